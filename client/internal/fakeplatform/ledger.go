package fakeplatform

import (
	"bytes"
	"sync"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// State is a transaction's state.
type State = outboxv1.Transaction_State

// The states.
const (
	Prepared  = outboxv1.Transaction_STATE_PREPARED
	Committed = outboxv1.Transaction_STATE_COMMITTED
	Aborted   = outboxv1.Transaction_STATE_ABORTED
)

// Transaction is a stored transaction.
type Transaction struct {
	ID       uuid.UUID
	State    State
	Database *outboxv1.DatabaseTransaction
	Events   []*outboxv1.Event
	digest   []byte
}

// ledger is the platform's memory. It outlives restarts of the server.
type ledger struct {
	mu    sync.Mutex
	byID  map[uuid.UUID]*Transaction
	order []*Transaction // as prepared
}

func (l *ledger) find(id []byte) *Transaction {
	u, _ := uuid.FromBytes(id)
	return l.byID[u]
}

// prepare stores events, or finds them stored.
func (l *ledger) prepare(id []byte, db *outboxv1.DatabaseTransaction, events []*outboxv1.Event, state State) error {
	digest, err := proto.MarshalOptions{Deterministic: true}.Marshal(&outboxv1.PublishRequest{Events: events})
	if err != nil {
		return internal(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if tx := l.find(id); tx != nil {
		switch {
		case !bytes.Equal(tx.digest, digest):
			return reused(id)
		case state == Committed && tx.State == Aborted:
			return decided(id, Aborted)
		case state == Committed:
			tx.State = Committed
		}
		return nil
	}
	u, _ := uuid.FromBytes(id)
	tx := &Transaction{ID: u, State: state, Database: db, Events: events, digest: digest}
	l.byID[u] = tx
	l.order = append(l.order, tx)
	return nil
}

func (l *ledger) decide(id []byte, state State) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	tx := l.find(id)
	switch {
	case tx == nil:
		return unknown(id)
	case tx.State == Prepared:
		tx.State = state
	case tx.State != state:
		return decided(id, tx.State)
	}
	return nil
}

// Transaction returns a copy of what is stored under an id; nil: nothing.
func (p *Platform) Transaction(id uuid.UUID) *Transaction {
	p.ledger.mu.Lock()
	defer p.ledger.mu.Unlock()
	tx := p.ledger.byID[id]
	if tx == nil {
		return nil
	}
	c := *tx
	return &c
}

// Transactions returns copies of everything stored, as prepared.
func (p *Platform) Transactions() []Transaction {
	p.ledger.mu.Lock()
	defer p.ledger.mu.Unlock()
	out := make([]Transaction, len(p.ledger.order))
	for i, tx := range p.ledger.order {
		out[i] = *tx
	}
	return out
}

// Published returns the payloads of an aggregate's committed events in the order in which they are published.
func (p *Platform) Published(aggregate string) []string {
	var out []string
	for _, tx := range p.Transactions() {
		for _, e := range tx.Events {
			if tx.State == Committed && e.GetAggregateId() == aggregate {
				out = append(out, string(e.GetPayload()))
			}
		}
	}
	return out
}

// Forget loses a transaction, as a store that lost its memory would.
func (p *Platform) Forget(id uuid.UUID) {
	p.ledger.mu.Lock()
	defer p.ledger.mu.Unlock()
	delete(p.ledger.byID, id)
}

// Decide gives a transaction a state, as the resolver or an operator would.
func (p *Platform) Decide(id uuid.UUID, s State) error { return p.ledger.decide(id[:], s) }

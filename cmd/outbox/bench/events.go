package bench

import (
	"context"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/outbox-platform/outbox/client"
)

// events is the workload without any business: callers only prepare and commit (outbox), or only insert the outbox row in
// a transaction of its own (naive). Each aggregate belongs to one caller, so that its order is defined.
type events struct {
	ledger   *ledger
	topic    string
	payload  int
	callers  int
	rollback float64
	last     []atomic.Uint64 // by aggregate
	client   *client.Client  // target outbox
	db       *pgxpool.Pool   // target naive
	onClose  func() error
}

// own is one caller's state.
type own struct {
	w         *events
	aggregate int
	count     int
	payload   []byte
}

func (w *events) caller(i int) caller {
	o := &own{w: w, aggregate: i, payload: make([]byte, w.payload)}
	if w.client != nil {
		return o.prepareAndCommit
	}
	return o.insert
}

func (w *events) bare(int) caller { return nil }

func (w *events) truth(context.Context) ([]uint64, error) {
	last := make([]uint64, len(w.last))
	for i := range last {
		last[i] = w.last[i].Load()
	}
	return last, nil
}

func (w *events) close() error { return w.onClose() }

// next chooses the aggregate of the next transaction and whether it will be rolled back, and fills in the payload.
func (o *own) next() (number, version uint64, rollback bool) {
	o.count++
	if o.aggregate += o.w.callers; o.aggregate >= len(o.w.last) {
		o.aggregate %= o.w.callers
	}
	number, version = o.w.ledger.open(), o.w.last[o.aggregate].Load()+1
	fillPayload(o.payload, number, uint32(o.aggregate), version) //nolint:gosec // few aggregates
	return number, version, isRollback(o.count, o.w.rollback)
}

// settle notes the transaction's fate.
func (o *own) settle(number, version uint64, rolledBack bool, at time.Time) {
	if rolledBack {
		o.w.ledger.aborted(number)
		return
	}
	o.w.last[o.aggregate].Store(version)
	o.w.ledger.committed(number, at)
}

func (o *own) prepareAndCommit(ctx context.Context) (time.Duration, error) {
	number, version, rollback := o.next()
	begin := time.Now()
	id := client.NewID()
	token, err := o.w.client.Prepare(ctx, id, client.DatabaseTransaction{XID: number + 1000, Mode: client.ModeClientOnly}, event(o.w.topic, o.aggregate, o.payload))
	if err != nil {
		return 0, fmt.Errorf("preparing: %w", err)
	}
	decided := time.Now()
	if rollback {
		o.settle(number, version, true, decided)
		err = o.w.client.Abort(ctx, id, token)
	} else {
		o.settle(number, version, false, decided)
		err = o.w.client.Commit(ctx, id, token)
	}
	if err != nil {
		return 0, fmt.Errorf("deciding: %w", err)
	}
	return time.Since(begin), nil
}

func (o *own) insert(ctx context.Context) (time.Duration, error) {
	number, version, rollback := o.next()
	args := naiveRow(o.w.topic, o.aggregate, o.payload)
	begin := time.Now()
	if !rollback {
		if _, err := o.w.db.Exec(ctx, naiveInsert, args...); err != nil {
			return 0, fmt.Errorf("inserting the outbox row: %w", err)
		}
		end := time.Now()
		o.settle(number, version, false, end)
		return end.Sub(begin), nil
	}
	tx, err := o.w.db.Begin(ctx)
	if err != nil {
		return 0, fmt.Errorf("beginning: %w", err)
	}
	defer tx.Rollback(ctx) //nolint:errcheck // after the explicit one a no-op
	if _, err := tx.Exec(ctx, naiveInsert, args...); err != nil {
		return 0, fmt.Errorf("inserting the outbox row: %w", err)
	}
	o.settle(number, version, true, time.Time{})
	if err := tx.Rollback(ctx); err != nil {
		return 0, fmt.Errorf("rolling back: %w", err)
	}
	return time.Since(begin), nil
}

const (
	aggregateType = "order"
	eventType     = "order.placed.v1"
)

// event is the one event of a transaction. Its payload is copied: the SDK may send it again while the caller goes on.
func event(topic string, aggregate int, payload []byte) client.Event {
	return client.Event{
		Topic: topic, AggregateType: aggregateType, AggregateID: strconv.Itoa(aggregate), Type: eventType,
		ContentType: "application/octet-stream", Payload: append([]byte(nil), payload...),
	}
}

func naiveRow(topic string, aggregate int, payload []byte) []any {
	return []any{uuid.Must(uuid.NewV7()), topic, aggregateType, strconv.Itoa(aggregate), eventType, payload}
}

// isRollback spreads the share of rolled back transactions evenly over a caller's transactions.
func isRollback(count int, share float64) bool {
	return int(float64(count)*share) != int(float64(count-1)*share)
}

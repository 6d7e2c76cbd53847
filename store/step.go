package store

import (
	"context"
	"time"
)

// Step is one fenced write of a shard's holder: its checkpoint together with every change of parked, dead_letter and
// operation rows that belongs to it, in one database transaction. It also renews the lease.
type Step struct {
	Shard      int16
	Epoch      int64
	Checkpoint Checkpoint
	Park       []Parked         // insert, or replace the row at the same position
	Decide     []ParkedDecision // set the state of all parked rows of these transactions
	Unpark     []EventPosition  // delete from parked
	Bury       []DeadLetter     // insert into dead_letter
	Exhume     []EventPosition  // delete from dead_letter
	Operations []OperationOutcome
}

// Parked is one event copied out of the log because it is undecided or blocked, so that nothing waits for it but its own
// aggregate.
type Parked struct {
	EventPosition
	Key       Key
	Aggregate Aggregate
	State     State  // of its transaction
	Body      []byte // EncodeEvent; nil when read without bodies
	Cause     Cause
	// Database: what the resolver needs; nil for published transactions.
	Database *DatabaseTransaction
	Since    time.Time // when it was parked (read only)
	// Head of a blocked aggregate only:
	Attempts int32
	Error    string
	NextTry  time.Time // zero: not before an operator says
}

// Cause says why an event is parked.
type Cause int16

// The causes, as stored.
const (
	CauseInDoubt  Cause = 1 // its own transaction is undecided
	CauseFollower Cause = 2 // waits behind an earlier event of its aggregate
	CauseRecord   Cause = 3 // Kafka refused it for good; policy block
	CauseTopic    Cause = 4 // its topic is unknown or not authorised
	CauseRedriven Cause = 5 // put back by an operator, waits for its turn
)

// ParkedDecision is a decision read from the log for a transaction with parked events.
type ParkedDecision struct {
	Key   Key
	State State
}

// DeadLetter is an event set aside after a permanent failure.
type DeadLetter struct {
	EventPosition
	Shard     int16
	Key       Key
	Aggregate Aggregate
	Body      []byte // EncodeEvent
	Error     string
	Attempts  int32
	// Queue: the aggregate is in park policy, later events follow it here until a redrive. False: set aside alone (skip).
	Queue bool
	Since time.Time // read only
}

// Steps writes the steps of several shards and renews their leases for ttl. Steps without row changes share one
// statement; a step with row changes is a transaction of its own. It returns the shards that are fenced: nothing of their
// steps was written. An error means that the outcome of steps not known to be written is unknown; repeating is safe.
func (s *Store) Steps(ctx context.Context, ttl time.Duration, steps []Step) (fenced []int16, err error) {
	return s.steps(ctx, ttl, steps)
}

// LoadParked returns all parked rows of a shard in position order, without bodies, for a takeover. States are re-read
// from tx.
func (s *Store) LoadParked(ctx context.Context, shard int16) ([]Parked, error) {
	return s.loadParked(ctx, shard)
}

// LoadParkedOf returns up to limit parked rows of one aggregate after a position, in order, with bodies.
func (s *Store) LoadParkedOf(ctx context.Context, shard int16, a Aggregate, after EventPosition, limit int) ([]Parked, error) {
	return s.loadParkedOf(ctx, shard, a, after, limit)
}

// LoadDeadQueues returns the aggregates of a shard that are in park policy: they have dead letters with Queue set.
func (s *Store) LoadDeadQueues(ctx context.Context, shard int16) ([]Aggregate, error) {
	return s.loadDeadQueues(ctx, shard)
}

// LoadDeadLettersOf returns up to limit dead letters of one aggregate after a position, in order, with bodies.
func (s *Store) LoadDeadLettersOf(ctx context.Context, shard int16, a Aggregate, after EventPosition, limit int) ([]DeadLetter, error) {
	return s.loadDeadLettersOf(ctx, shard, a, after, limit)
}

// States returns the states of the transactions that tx still knows.
func (s *Store) States(ctx context.Context, keys []Key) (map[Key]State, error) {
	return s.states(ctx, keys)
}

// Action is what an operator wants done with an aggregate.
type Action int16

// The actions, numbered as in outbox.v1.AggregateAction.
const (
	ActionRedrive Action = 1
	ActionSkip    Action = 2
	ActionDiscard Action = 3
)

// Operation is an operator's request that the holder of the aggregate's shard executes under its epoch.
type Operation struct {
	ID        int64
	Shard     int16
	Aggregate Aggregate
	Action    Action
	Done      bool
	Outcome   string // in words, once done
	Events    int64
}

// OperationOutcome marks an operation as done.
type OperationOutcome struct {
	ID      int64
	Outcome string
	Events  int64
}

// PendingOperations returns the operations of these shards that are not done, by id.
func (s *Store) PendingOperations(ctx context.Context, shards []int16) ([]Operation, error) {
	return s.pendingOperations(ctx, shards)
}

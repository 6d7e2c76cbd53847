package store

import (
	"context"
	"time"
)

// Place is where an event is, numbered as outbox.v1.EventStatus.Place.
type Place int32

// The places.
const (
	PlaceInDoubt    Place = 1
	PlaceQueued     Place = 2
	PlaceWaiting    Place = 3
	PlaceBlocked    Place = 4
	PlacePublished  Place = 5
	PlaceDeadLetter Place = 6
	PlaceDropped    Place = 7
)

// EventStatus says where an event is, and why it is not out.
type EventStatus struct {
	Event       Event
	Shard       int16
	Place       Place
	Explanation string
}

// Transaction is what the store knows about one transaction.
type Transaction struct {
	Key        Key
	State      State
	PreparedAt time.Time
	DecidedAt  time.Time // zero while PREPARED
	DecidedBy  string    // "client", "check-back", "direct", "operator"; "" while PREPARED
	Evidence   []byte    // JSON, or nil
	Database   *DatabaseTransaction
	Events     []EventStatus
}

// Transaction looks a transaction up, with its events and where each is now. ErrUnknown: not known, or past retention.
func (s *Store) Transaction(ctx context.Context, k Key) (*Transaction, error) {
	return s.transaction(ctx, k)
}

// RetentionHorizon is the time from which on transactions are certain to be known, by the database's clock.
func (s *Store) RetentionHorizon(ctx context.Context) (time.Time, error) {
	return s.retentionHorizon(ctx)
}

// ShardStatus is one shard's lease and progress.
type ShardStatus struct {
	Shard       int16
	Holder      string // "" when the lease has run out
	Epoch       int64
	LeaseUntil  time.Time
	Position    Position
	LagSegments int64
	OldestAge   time.Duration // age of the oldest segment after the checkpoint
	Parked      int64
}

// Shards returns all shards by number.
func (s *Store) Shards(ctx context.Context) ([]ShardStatus, error) { return s.shards(ctx) }

// BlockedAggregate is an aggregate whose head is parked for a cause other than waiting its turn.
type BlockedAggregate struct {
	Source    string
	Aggregate Aggregate
	Shard     int16
	Head      Parked // without body
	Topic     string
	Waiting   int64
}

// BlockedAggregates returns a page, longest blocked first. source "": of all. page "": the first page.
func (s *Store) BlockedAggregates(ctx context.Context, source, page string, limit int) (found []BlockedAggregate, next string, err error) {
	return s.blockedAggregates(ctx, source, page, limit)
}

// DeadLetters returns a page with bodies, oldest first. source "": of all. page "": the first page. A page that this
// function did not return is ErrInvalid.
func (s *Store) DeadLetters(ctx context.Context, source, page string, limit int) (found []DeadLetter, next string, err error) {
	return s.deadLetters(ctx, source, page, limit)
}

// RequestOperation records an operator's request for the holder and an audit row. ErrUnknown: the aggregate has nothing
// parked and no dead letters.
func (s *Store) RequestOperation(ctx context.Context, a Aggregate, action Action, actor, reason string) (*Operation, error) {
	return s.requestOperation(ctx, a, action, actor, reason)
}

// OperationByID returns an operation.
func (s *Store) OperationByID(ctx context.Context, id int64) (*Operation, error) {
	return s.operationByID(ctx, id)
}

// Violation is an invariant of the stored state that does not hold.
type Violation struct {
	Invariant string // short name
	Detail    string
}

// Verify checks every invariant of the stored state in one snapshot. It changes nothing.
func (s *Store) Verify(ctx context.Context) ([]Violation, error) { return s.verify(ctx) }

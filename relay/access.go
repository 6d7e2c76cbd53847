package relay

import (
	"context"
	"time"

	"github.com/outbox-platform/outbox/store"
)

// Store is what a relay asks of the store; each method is as the one of *store.Store.
type Store interface {
	ShardCount() int
	Heartbeat(ctx context.Context, instance string, ttl time.Duration) (int, error)
	AcquireShards(ctx context.Context, instance string, ttl time.Duration, limit int) ([]store.Lease, error)
	ReleaseShards(ctx context.Context, shards []int16, epochs []int64) error
	Steps(ctx context.Context, ttl time.Duration, steps []store.Step) (fenced []int16, err error)
	OpenReader(ctx context.Context) (Reader, error)
	States(ctx context.Context, keys []store.Key) (map[store.Key]store.State, error)
	LoadParked(ctx context.Context, shard int16) ([]store.Parked, error)
	LoadParkedOf(ctx context.Context, of []store.ParkedAfter, limit int) ([][]store.Parked, error)
	LoadDeadQueues(ctx context.Context, shard int16) ([]store.Aggregate, error)
	LoadDeadLettersOf(ctx context.Context, shard int16, a store.Aggregate, after store.EventPosition, limit int) ([]store.DeadLetter, error)
	PendingOperations(ctx context.Context, shards []int16) ([]store.Operation, error)
	Sources(ctx context.Context, after string, limit int) ([]store.Source, error)
	PutTopics(ctx context.Context, topics []store.Topic) error
}

// Reader is what a relay asks of a reader of the log; each method is as the one of *store.Reader.
type Reader interface {
	Read(ctx context.Context, cursors []store.Cursor, limit int) ([]store.Segment, error)
	ReadAt(ctx context.Context, shard int16, at []store.Position) ([]store.Segment, error)
	Horizon() store.Horizon
	Close(ctx context.Context) error
}

// postgres is a *store.Store as a Store.
type postgres struct{ *store.Store }

func (p postgres) OpenReader(ctx context.Context) (Reader, error) {
	r, err := p.Store.OpenReader(ctx)
	if err != nil {
		return nil, err // not a Reader that holds nil
	}
	return r, nil
}

// FromPostgres returns st as a Store.
func FromPostgres(st *store.Store) Store { return postgres{st} }

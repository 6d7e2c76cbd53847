package store

import (
	"context"
	"time"
)

// Source is a registered service that prepares transactions.
type Source struct {
	ID                int32
	Name              string
	Topics            []string // exact names, or a prefix and "*"
	RecordProfile     int16    // numbered as outbox.v1.RecordProfile, never 0
	FailurePolicy     int16    // numbered as outbox.v1.FailurePolicy, never 0
	CloudEventsSource string   // never empty
	Databases         []SourceDatabase
	Revision          int64
	CreatedAt         time.Time
	UpdatedAt         time.Time
}

// SourceDatabase is one database whose local transactions decide.
type SourceDatabase struct {
	Name   string `json:"name"`
	Mode   Mode   `json:"mode"`
	DSNRef string `json:"dsn_ref,omitempty"`
}

// Sources returns up to limit sources whose name is greater than after, by name. limit 0: all.
func (s *Store) Sources(ctx context.Context, after string, limit int) ([]Source, error) {
	return s.sources(ctx, after, limit)
}

// Source returns one source by name, or ErrUnknown.
func (s *Store) Source(ctx context.Context, name string) (*Source, error) { return s.source(ctx, name) }

// ApplySource creates or changes a source (ID is ignored; Revision 0 or the stored one, else ErrRevision) and writes an
// audit row. It returns it as it is now and as it was before (nil: it is new).
func (s *Store) ApplySource(ctx context.Context, src Source, actor, reason string) (now, before *Source, err error) {
	return s.applySource(ctx, src, actor, reason)
}

// DeleteSource takes a registration away and writes an audit row. ErrUnknown; ErrInUse while it has undecided
// transactions, parked events or dead letters. The id is never given out again.
func (s *Store) DeleteSource(ctx context.Context, name, actor, reason string) error {
	return s.deleteSource(ctx, name, actor, reason)
}

// Topic is what relays know about a Kafka topic.
type Topic struct {
	Name            string
	Partitions      int32
	MaxMessageBytes int32
}

// PutTopics replaces what is known about these topics.
func (s *Store) PutTopics(ctx context.Context, topics []Topic) error { return s.putTopics(ctx, topics) }

// Topics returns the catalogue.
func (s *Store) Topics(ctx context.Context) ([]Topic, error) { return s.topics(ctx) }

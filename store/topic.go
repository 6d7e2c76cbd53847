package store

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// Topic is what relays know about a Kafka topic.
type Topic struct {
	Name            string
	Partitions      int32
	MaxMessageBytes int32
}

// PutTopics replaces what is known about these topics. Of several with one name the last stays. Other topics are left
// alone. Relays of several instances may put the same topics at once.
func (s *Store) PutTopics(ctx context.Context, topics []Topic) error {
	if len(topics) == 0 {
		return nil
	}
	last := make(map[string]Topic, len(topics))
	for _, t := range topics {
		last[t.Name] = t
	}
	names := make([]string, 0, len(last))
	partitions, sizes := make([]int32, 0, len(last)), make([]int32, 0, len(last))
	for _, t := range last {
		names, partitions, sizes = append(names, t.Name), append(partitions, t.Partitions), append(sizes, t.MaxMessageBytes)
	}
	// In the order of names, so that two relays cannot lock each other out.
	_, err := s.pool.Exec(ctx, `
		INSERT INTO outbox.topic (name, partitions, max_message_bytes)
		SELECT u.name, u.partitions, u.bytes FROM unnest($1::text[], $2::int[], $3::int[]) u (name, partitions, bytes) ORDER BY u.name
		ON CONFLICT (name) DO UPDATE
		SET partitions = excluded.partitions, max_message_bytes = excluded.max_message_bytes, seen_at = now()`, names, partitions, sizes)
	return storeError("storing the topic catalogue", err)
}

// Topics returns the catalogue by name.
func (s *Store) Topics(ctx context.Context) ([]Topic, error) {
	rows, err := s.pool.Query(ctx, `SELECT name, partitions, max_message_bytes FROM outbox.topic ORDER BY name`)
	if err != nil {
		return nil, storeError("reading the topic catalogue", err)
	}
	topics, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Topic])
	return topics, storeError("reading the topic catalogue", err)
}

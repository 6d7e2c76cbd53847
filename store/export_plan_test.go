package store

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
)

// TheConn returns a connection of the pool, for stores opened with only one.
func (s *Store) TheConn(t *testing.T) *pgx.Conn {
	t.Helper()
	conn, err := s.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Release)
	return conn.Conn()
}

// PrepareWriterStatements prepares what a writer sends on a connection like a writer's.
func PrepareWriterStatements(ctx context.Context, s *Store) (*pgx.Conn, error) {
	conn, _, err := s.dial(ctx, pointLookups)
	if err != nil {
		return nil, err
	}
	for name, sql := range map[string]string{"append": appendSQL, "resolve": resolveSQL, "lookup": txLookupSQL} {
		if _, err := conn.Prepare(ctx, name, sql); err != nil {
			return nil, err
		}
	}
	return conn, nil
}

package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// pointLookups are settings for connections whose statements all find rows by index: without them a generic plan that
// was made while a table is empty is a sequential scan or a hash join for ever.
var pointLookups = map[string]string{
	"plan_cache_mode":  "force_generic_plan",
	"enable_hashjoin":  "off",
	"enable_mergejoin": "off",
	"enable_seqscan":   "off",
}

// dial opens a connection that belongs to a writer or a reader, and makes sure that the other end may still be used.
func (s *Store) dial(ctx context.Context, settings ...map[string]string) (*pgx.Conn, server, error) {
	cc, err := pgx.ParseConfig(s.cfg.DSN)
	if err != nil {
		return nil, server{}, fmt.Errorf("parsing the store's DSN: %w", err)
	}
	s.configure(cc)
	for _, m := range settings {
		for name, value := range m {
			cc.RuntimeParams[name] = value
		}
	}
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return nil, server{}, storeError("connecting to the store", err)
	}
	found, err := s.checkServer(ctx, conn)
	if err != nil {
		_ = conn.Close(ctx) // the first error is the one to tell
		return nil, server{}, err
	}
	return conn, found, nil
}

// checkServer refuses a server that has changed for the worse since Open. It may come back, hence ErrUnavailable.
func (s *Store) checkServer(ctx context.Context, conn *pgx.Conn) (server, error) {
	found, err := serverOf(ctx, conn)
	if err != nil {
		return server{}, err
	}
	if err := found.usable(s.cfg.Unsafe); err != nil {
		return server{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	shards, made, timeline, err := controlOf(ctx, conn)
	if err != nil {
		return server{}, err
	}
	if made != found.systemIdentifier || shards != s.shardCount {
		return server{}, fmt.Errorf("%w: another store answers at its address: made in cluster %d with %d shards, now in %d; this process knows %d shards",
			ErrUnavailable, made, shards, found.systemIdentifier, s.shardCount)
	}
	if timeline != found.timeline {
		if err := noteTimeline(ctx, conn, found.timeline); err != nil {
			return server{}, err
		}
	}
	return found, nil
}

// controlOf reads what was fixed when the schema was made, and on which timeline the store was last.
func controlOf(ctx context.Context, conn *pgx.Conn) (shards int, made uint64, timeline string, err error) {
	err = conn.QueryRow(ctx, `SELECT shards, system_identifier::text::xid8, timeline FROM outbox.control`).Scan(&shards, &made, &timeline)
	return shards, made, timeline, storeError("reading outbox.control", err)
}

// bound makes sure that a call ends even if the server stops answering without closing the connection: the server's own
// statement timeout does not help then.
func (s *Store) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, s.cfg.StatementTimeout+time.Second)
}

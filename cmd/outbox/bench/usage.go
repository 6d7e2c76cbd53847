package bench

import (
	"context"
	"fmt"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/embedded/postgres"
)

// measure reads CPU time and WAL position of everything that the stage started.
func (s *stage) measure(ctx context.Context) (u usage, err error) {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return u, fmt.Errorf("reading own CPU time: %w", err)
	}
	u.service = time.Duration(r.Utime.Nano() + r.Stime.Nano())
	if s.relay != nil {
		if u.platform, err = cpuTime(s.relay.cmd.Process.Pid); err != nil {
			return u, err
		}
	}
	if s.broker != nil {
		if u.kafka, err = cpuTime(s.broker.cmd.Process.Pid); err != nil {
			return u, err
		}
	}
	if s.apache != nil {
		if u.kafka, err = s.apache.CPUTime(); err != nil {
			return u, fmt.Errorf("reading Kafka's CPU time: %w", err)
		}
	}
	for server, into := range map[*postgres.Server]*time.Duration{s.source: &u.source, s.store: &u.store} {
		if server == nil {
			continue
		}
		if *into, err = server.CPUTime(); err != nil {
			return u, fmt.Errorf("reading PostgreSQL's CPU time: %w", err)
		}
		wal, err := walBytes(ctx, server.DSN("postgres"))
		if err != nil {
			return u, err
		}
		u.wal += wal
	}
	return u, nil
}

func walBytes(ctx context.Context, dsn string) (int64, error) {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return 0, fmt.Errorf("connecting to read the WAL position: %w", err)
	}
	defer conn.Close(ctx) //nolint:errcheck // only read
	var n int64
	if err := conn.QueryRow(ctx, `SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint`).Scan(&n); err != nil {
		return 0, fmt.Errorf("reading the WAL position: %w", err)
	}
	return n, nil
}

// perEvent turns the difference of two measurements into microseconds and WAL bytes per event. What ran elsewhere is nil.
func (s *stage) perEvent(before, after usage, events int64) (CPU, *float64) {
	if events == 0 {
		return CPU{}, nil
	}
	each := func(started bool, d time.Duration) *float64 {
		if !started {
			return nil
		}
		v := float64(d.Microseconds()) / float64(events)
		return &v
	}
	cpu := CPU{
		Service:        each(true, after.service-before.service),
		Platform:       each(s.relay != nil, after.platform-before.platform),
		Kafka:          each(s.broker != nil || s.apache != nil, after.kafka-before.kafka),
		Postgres:       each(s.source != nil || s.store != nil, after.source+after.store-before.source-before.store),
		SourcePostgres: each(s.source != nil, after.source-before.source),
	}
	if s.source == nil && s.store == nil {
		return cpu, nil
	}
	wal := float64(after.wal-before.wal) / float64(events)
	return cpu, &wal
}

package bench

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
)

// newWorkload prepares the source database or the client for one run.
func (c *Cmd) newWorkload(ctx context.Context, s *stage, topic string, n int, l *ledger) (workload, error) {
	var (
		cl      *client.Client
		onClose func() error
		err     error
	)
	if c.Target == targetOutbox {
		if cl, err = s.newClient(ctx, c.Transport, n); err != nil {
			return nil, err
		}
		onClose = cl.Close
	} else if onClose, err = s.startNaive(ctx); err != nil {
		return nil, err
	}
	if c.Workload == workloadEvents {
		return &events{
			ledger: l, topic: topic, payload: c.Payload, callers: n, rollback: c.Rollback,
			last: make([]atomic.Uint64, c.Aggregates), client: cl, db: s.sourcePool, onClose: onClose,
		}, nil
	}
	w := &orders{
		ledger: l, topic: topic, payload: c.Payload, aggregates: c.Aggregates, rollback: c.Rollback,
		client: cl, db: s.sourcePool, onClose: onClose,
	}
	err = w.createTables(ctx)
	if err == nil && cl != nil {
		err = pgxoutbox.Register(cl, "", s.sourcePool, pgxoutbox.Upkeep{})
	}
	if err != nil {
		return nil, errors.Join(err, onClose())
	}
	return w, nil
}

// newClient connects an SDK client to the platform.
func (s *stage) newClient(ctx context.Context, transport string, callers int) (*client.Client, error) {
	cfg := client.Config{Target: s.api, Source: sourceName, Plaintext: true, MaxInFlight: max(1024, 2*callers)}
	if transport == "unary" {
		cfg.Transport = client.TransportUnary
	}
	cl, err := client.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("making the client: %w", err)
	}
	if err := cl.Connect(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("connecting to the platform: %w", err), cl.Close())
	}
	return cl, nil
}

// startNaive makes an empty outbox table and starts its relay.
func (s *stage) startNaive(ctx context.Context) (stop func() error, err error) {
	if _, err := s.sourcePool.Exec(ctx, `DROP TABLE IF EXISTS naive_outbox`); err != nil {
		return nil, fmt.Errorf("creating the naive outbox: %w", err)
	}
	if _, err := s.sourcePool.Exec(ctx, naiveDDL); err != nil {
		return nil, fmt.Errorf("creating the naive outbox: %w", err)
	}
	s.sourcePool.Reset() // statements prepared for the table before
	if s.relay, err = startProcess("the naive relay", s.log, nil, "bench-naive-relay",
		"--dsn", s.sourcePool.Config().ConnString(), "--brokers", s.brokers); err != nil {
		return nil, err
	}
	relay := s.relay
	return func() error {
		s.relay = nil
		return relay.stop()
	}, nil
}

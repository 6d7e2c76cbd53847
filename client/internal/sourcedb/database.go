package sourcedb

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/client"
)

// withDefaults returns the configuration as it will be used, or what is wrong with it.
func withDefaults(u client.Upkeep) (client.Upkeep, error) {
	for name, d := range map[string]time.Duration{
		"MarkerRetention": u.MarkerRetention, "SpillRetention": u.SpillRetention, "DrainInterval": u.DrainInterval,
		"JanitorInterval": u.JanitorInterval,
	} {
		if d < 0 {
			return u, fmt.Errorf("outbox: %s is negative: %v", name, d)
		}
	}
	if u.Mode != 0 && u.Mode != client.ModeMarker && u.Mode != client.ModeXIDFenced {
		return u, fmt.Errorf("outbox: Mode is %d: a registered database has ModeMarker or ModeXIDFenced", u.Mode)
	}
	if u.MaxAcknowledged < 0 {
		return u, fmt.Errorf("outbox: MaxAcknowledged is negative: %d", u.MaxAcknowledged)
	}
	u.Mode = cmp.Or(u.Mode, client.ModeMarker)
	u.MarkerRetention = cmp.Or(u.MarkerRetention, time.Hour)
	u.SpillRetention = cmp.Or(u.SpillRetention, 7*24*time.Hour)
	u.DrainInterval = cmp.Or(u.DrainInterval, time.Second)
	u.JanitorInterval = cmp.Or(u.JanitorInterval, 10*time.Minute)
	u.MaxAcknowledged = cmp.Or(u.MaxAcknowledged, 1_000_000)
	return u, nil
}

// Database is a source database that is registered with a client.
type Database struct {
	c      *client.Client
	name   string
	pool   Pool
	upkeep client.Upkeep
	wake   chan struct{} // something was spilled

	identities identities

	mu    sync.Mutex
	acked []uuid.UUID // markers to delete, oldest first
}

var _ client.Database = (*Database)(nil)

// New returns a database that nobody looks after yet.
func New(c *client.Client, name string, pool Pool, u client.Upkeep) (*Database, error) {
	u, err := withDefaults(u)
	if err != nil {
		return nil, err
	}
	return &Database{c: c, name: cmp.Or(name, client.DefaultDatabase), pool: pool, upkeep: u, wake: make(chan struct{}, 1)}, nil
}

// Register registers a database with the client.
func Register(c *client.Client, name string, pool Pool, u client.Upkeep) (*Database, error) {
	d, err := New(c, name, pool, u)
	if err != nil {
		return nil, err
	}
	return d, c.RegisterDatabase(d.name, d)
}

// Check answers the platform's question.
func (d *Database) Check(ctx context.Context, transactions []client.CheckTransaction) []client.Verdict {
	return Verdicts(ctx, d.pool, transactions)
}

// Run drains, cleans and tidies until ctx ends.
func (d *Database) Run(ctx context.Context) error {
	if d.upkeep.Mode != client.ModeMarker {
		<-ctx.Done() // there is no table to look after
		return ctx.Err()
	}
	var wg sync.WaitGroup
	wg.Go(func() { d.drainLoop(ctx) })
	wg.Go(func() { d.every(ctx, d.upkeep.MarkerRetention/60+time.Second, "deleting markers", d.cleanAll) })
	wg.Go(func() { d.every(ctx, d.upkeep.JanitorInterval, "looking through old markers", d.tidyAll) })
	wg.Wait()
	return ctx.Err()
}

// every runs a step again and again, with jitter, the first time after a part of the interval.
func (d *Database) every(ctx context.Context, interval time.Duration, doing string, step func(context.Context) error) {
	t := time.NewTimer(rand.N(interval) + 1)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if err := step(ctx); err != nil && ctx.Err() == nil {
			d.c.Logger().Warn(doing, "database", d.name, "error", err)
		}
		t.Reset(interval*9/10 + rand.N(interval/5+1))
	}
}

// locked runs f in a transaction that holds one of our advisory locks. ran false: somebody else holds it. A lock of a
// transaction, not of a session, because poolers give sessions away.
func (d *Database) locked(ctx context.Context, lock int32, f func(ctx context.Context, q Queryer) error) (ran bool, err error) {
	tx, err := d.pool.Begin(ctx)
	if err != nil {
		return false, err
	}
	defer func() {
		if err != nil || !ran {
			Rollback(ctx, tx, nil)
		}
	}()
	const try = `SELECT pg_try_advisory_xact_lock($1, ('outbox_marker'::regclass::oid::bigint - 2147483648)::int)`
	if err := tx.QueryRow(ctx, try, lock).Scan(&ran); err != nil || !ran {
		return false, err
	}
	if err := f(ctx, tx); err != nil {
		return true, err
	}
	return true, tx.Commit(ctx)
}

// Advisory locks, in the class of the marker table's oid.
const (
	lockDrain   = int32(0x6f620001) // "ob", 1
	lockJanitor = int32(0x6f620002)
)

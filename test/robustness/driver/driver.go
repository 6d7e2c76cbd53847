package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	"github.com/outbox-platform/outbox/test/robustness/journal"
)

// patience bounds one transaction, thinking included.
const patience = 8 * time.Second

type driver struct {
	Config
	pool, upkeep *pgxpool.Pool
	sdk          *client.Client
	journal      *journal.Writer
	limiter      *rate.Limiter
	gate         gate
	open         sync.WaitGroup // transactions under way, late ends included
	profiles     []string       // as often as they weigh
}

func start(ctx context.Context, c Config) (*driver, error) {
	d := &driver{Config: c}
	weights := c.Profiles
	if weights == nil {
		weights = Mix
	}
	for _, p := range slices.Sorted(maps.Keys(weights)) {
		for range weights[p] {
			d.profiles = append(d.profiles, p)
		}
	}
	limit := rate.Inf
	if c.PerSecond > 0 {
		limit = rate.Limit(c.PerSecond)
	}
	d.limiter = rate.NewLimiter(limit, 1+int(c.PerSecond/20))
	var err error
	if d.journal, err = journal.Create(c.Journals, c.Process); err != nil {
		return nil, err
	}
	if d.pool, err = connections(ctx, c.DSN, int32(c.Workers)+2); err != nil { //nolint:gosec // few
		return nil, err
	}
	if d.upkeep, err = connections(ctx, c.DSN, 6); err != nil {
		return nil, err
	}
	if err := d.connect(); err != nil {
		return nil, err
	}
	d.gate.close()
	return d, nil
}

func connections(ctx context.Context, dsn string, most int32) (*pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, err
	}
	config.MaxConns = most
	config.ConnConfig.ConnectTimeout = 2 * time.Second
	return pgxpool.NewWithConfig(ctx, config)
}

// connect makes the SDK's client. Its servers are tried from a place of its own on.
func (d *driver) connect() error {
	servers := manual.NewBuilderWithScheme("servers")
	state := resolver.State{}
	for i := range d.Servers {
		a := resolver.Address{Addr: d.Servers[(i+int(d.Seed))%len(d.Servers)]} //nolint:gosec // any will do
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{a}})
		state.Addresses = append(state.Addresses, a)
	}
	servers.InitialState(state)
	var err error
	d.sdk, err = client.New(client.Config{
		Target: "servers:///outbox", Source: d.Source, Instance: d.Process, Plaintext: true,
		DialOptions: []grpc.DialOption{grpc.WithResolvers(servers)},
		Logger:      slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		OnAlarm: func(a client.Alarm) {
			id, _ := uuid.Parse(a.TransactionID)
			d.journal.Write(journal.Entry{Type: journal.Info, F: "alarm", Source: d.Source, Tx: id, State: string(a.Kind), Note: fmt.Sprint(a.Err)})
		},
	})
	if err != nil {
		return err
	}
	// Markers go soon after they are acknowledged, so that their clean-up is under test too.
	return pgxoutbox.Register(d.sdk, "", d.upkeep, pgxoutbox.Upkeep{MarkerRetention: time.Second, DrainInterval: 200 * time.Millisecond, JanitorInterval: 5 * time.Second})
}

func (d *driver) stop() {
	_ = d.sdk.Close() // always nil
	d.pool.Close()
	d.upkeep.Close()
	_ = d.journal.Close()
}

func (d *driver) run(ctx context.Context) error {
	if err := d.sdk.Connect(ctx); err != nil && ctx.Err() == nil {
		d.sdk.Logger().Warn("connecting; calls will", "error", err)
	}
	var all sync.WaitGroup
	all.Go(func() { d.obey(ctx) })
	for n := range d.Workers {
		w := &worker{driver: d, n: n + 1, random: rand.New(rand.NewPCG(d.Seed, uint64(n)))} //nolint:gosec // a workload
		all.Go(func() { w.run(ctx) })
	}
	all.Wait()
	d.open.Wait()
	return nil
}

// worker does one transaction after the other.
type worker struct {
	*driver
	n      int
	random *rand.Rand
	// own is an aggregate that only this worker writes to, without a lock: order is that of its session.
	own     string
	version int64
	begun   int
}

func (w *worker) run(ctx context.Context) {
	for w.limiter.Wait(ctx) == nil && w.gate.enter(ctx, &w.driver.open) {
		w.transact(w.profiles[w.random.IntN(len(w.profiles))])
		w.driver.open.Done()
	}
}

// transact does one transaction. What it has begun it finishes: no context of the process ends it, only time.
func (w *worker) transact(profile string) {
	w.begun++
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var err error
	switch profile {
	case Direct:
		w.publish(ctx)
	case Misused:
		err = w.misuse(ctx)
	case TwoPhase, Duplicate, Sync, Race:
		err = w.byHand(ctx, profile)
	default:
		err = w.bySDK(ctx, profile)
	}
	if err != nil {
		w.sdk.Logger().Debug("transaction", "profile", profile, "error", err)
	}
	if err != nil && !errors.Is(err, context.DeadlineExceeded) {
		// The database is away, or the platform refuses: no reason to spin.
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// note writes an entry about a transaction.
func (w *worker) note(t journal.Type, f, profile string, tx uuid.UUID, more ...func(*journal.Entry)) {
	e := journal.Entry{Worker: w.n, Type: t, F: f, Source: w.Source, Tx: tx, Profile: profile}
	for _, m := range more {
		m(&e)
	}
	w.journal.Write(e)
}

func because(err error) func(*journal.Entry) {
	return func(e *journal.Entry) {
		if err != nil {
			e.Note = err.Error()
		}
	}
}

// outcome is what a call's error says about its effect. Only what the platform says about the request itself is a refusal.
func outcome(err error) journal.Type {
	var e *client.Error
	switch {
	case err == nil:
		return journal.OK
	case errors.As(err, &e) && (e.Code == codes.AlreadyExists || e.Code == codes.FailedPrecondition || e.Code == codes.InvalidArgument):
		return journal.Fail
	default:
		return journal.Info
	}
}

// think holds the transaction open for a while: some milliseconds mostly, long sometimes.
func (w *worker) think(ctx context.Context, profile string) {
	d := time.Duration(float64(2*time.Millisecond) * lognormal(w.random, 1))
	if profile == Long {
		d = time.Second + time.Duration(w.random.Int64N(int64(5*time.Second)))
	}
	select {
	case <-time.After(min(d, 6*time.Second)):
	case <-ctx.Done():
	}
}

// begin opens a transaction, locks what the plan needs, and returns the events.
func (w *worker) begin(ctx context.Context, profile string) (pgx.Tx, []change, error) {
	tx, err := w.pool.Begin(ctx)
	if err != nil {
		return nil, nil, err
	}
	changes := w.plan(profile)
	for i := range changes {
		if err := w.lock(ctx, tx, &changes[i]); err != nil {
			rollBack(tx)
			return nil, nil, err
		}
	}
	return tx, changes, nil
}

// rollBack reports whether the transaction is rolled back for certain.
func rollBack(tx pgx.Tx) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	return tx.Rollback(ctx) == nil
}

func newRandom(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 1<<32)) } //nolint:gosec // a workload

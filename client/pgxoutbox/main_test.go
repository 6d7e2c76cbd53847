package pgxoutbox_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/rs/zerolog"

	toxiproxy "github.com/Shopify/toxiproxy/v2"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

// schema is a service's schema: its business table and the marker table.
const schema = `CREATE TABLE orders (id text PRIMARY KEY, state text NOT NULL, version int NOT NULL DEFAULT 0);` + "\n"

// world is a service with its database and a platform.
type world struct {
	t    *testing.T
	p    *fakeplatform.Platform
	c    *client.Client
	pool *pgxpool.Pool
	dsn  string

	mu     sync.Mutex
	alarms []client.Alarm
}

type options struct {
	cluster  *storetest.Cluster
	config   func(*client.Config)
	upkeep   pgxoutbox.Upkeep
	detached bool // the database is not registered
}

func newWorld(t *testing.T, o options) *world {
	t.Helper()
	w := &world{t: t, p: fakeplatform.Start(t)}
	var db *storetest.Database
	if o.cluster != nil {
		db = o.cluster.New(t, storetest.WithoutSchema())
	} else {
		db = storetest.New(t, storetest.WithoutSchema())
	}
	w.dsn = db.DSN
	w.pool = w.connect(w.dsn)
	w.exec(schema + client.MarkerDDL)
	w.c = w.client(o.config)
	if !o.detached {
		w.register(w.c, o.upkeep)
	}
	return w
}

func (w *world) connect(dsn string) *pgxpool.Pool {
	w.t.Helper()
	pool, err := pgxpool.New(w.t.Context(), dsn)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(pool.Close)
	return pool
}

// client makes another client, as another instance of the service would have.
func (w *world) client(change func(*client.Config)) *client.Client {
	w.t.Helper()
	cfg := client.Config{Target: w.p.Addr(), Source: "orders", Plaintext: true, OnAlarm: func(a client.Alarm) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.alarms = append(w.alarms, a)
	}}
	if change != nil {
		change(&cfg)
	}
	c, err := client.New(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c
}

func (w *world) register(c *client.Client, u pgxoutbox.Upkeep) {
	w.t.Helper()
	if err := pgxoutbox.Register(c, "", w.pool, u); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) alarmed(k client.AlarmKind) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, a := range w.alarms {
		if a.Kind == k {
			n++
		}
	}
	return n
}

func (w *world) exec(sql string, args ...any) {
	w.t.Helper()
	if _, err := w.pool.Exec(w.t.Context(), sql, args...); err != nil {
		w.t.Fatal(err)
	}
}

func value[T any](w *world, sql string, args ...any) T {
	w.t.Helper()
	var v T
	if err := w.pool.QueryRow(w.t.Context(), sql, args...).Scan(&v); err != nil {
		w.t.Fatal(err)
	}
	return v
}

// ordered inserts or updates an order in the transaction, which takes its row lock, and publishes an event about it.
func ordered(ctx context.Context, id, payload string) func(tx *pgxoutbox.Tx) error {
	return func(tx *pgxoutbox.Tx) error {
		if err := upsert(ctx, tx, id); err != nil {
			return err
		}
		return tx.Publish(event(id, payload))
	}
}

func upsert(ctx context.Context, tx pgx.Tx, id string) error {
	_, err := tx.Exec(ctx, `INSERT INTO orders (id, state) VALUES ($1, 'new') ON CONFLICT (id) DO UPDATE SET version = orders.version + 1`, id)
	return err
}

func event(id, payload string) client.Event {
	return client.Event{Topic: "orders", AggregateType: "order", AggregateID: id, Type: "order.changed.v1", Payload: []byte(payload)}
}

// place runs an ordinary InTx that must succeed.
func (w *world) place(id, payload string) {
	w.t.Helper()
	if err := pgxoutbox.InTx(w.t.Context(), w.pool, w.c, pgxoutbox.Options{}, ordered(w.t.Context(), id, payload)); err != nil {
		w.t.Fatal(err)
	}
}

// published waits until exactly these events of an aggregate are published, in this order.
func (w *world) published(id string, payloads ...string) {
	w.t.Helper()
	want := fmt.Sprint(payloads)
	w.p.Wait(w.t, "published "+want, func() bool { return fmt.Sprint(w.p.Published(id)) == want })
}

// verdict asks an instance of the service, over its session, about a transaction.
func (w *world) verdict(id uuid.UUID) (outcome, reason string) {
	w.t.Helper()
	a := w.p.Ask(w.t, "default", w.p.Transaction(id).Question())
	if len(a) != 1 {
		w.t.Fatalf("%d answers", len(a))
	}
	return strings.TrimPrefix(a[0].GetOutcome().String(), "OUTCOME_"), a[0].GetReason()
}

// proxy puts a proxy before the database.
func (w *world) proxy() (*pgxpool.Pool, *toxiproxy.Proxy) {
	w.t.Helper()
	cfg, err := pgxpool.ParseConfig(w.dsn)
	if err != nil {
		w.t.Fatal(err)
	}
	srv := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	p := toxiproxy.NewProxy(srv, "db", "127.0.0.1:0", fmt.Sprintf("%s:%d", cfg.ConnConfig.Host, cfg.ConnConfig.Port))
	if err := srv.Collection.Add(p, true); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(p.Stop)
	var port int
	if _, err := fmt.Sscanf(p.Listen[strings.LastIndex(p.Listen, ":")+1:], "%d", &port); err != nil {
		w.t.Fatal(err)
	}
	cfg.ConnConfig.Host, cfg.ConnConfig.Port = "127.0.0.1", uint16(port)
	pool, err := pgxpool.NewWithConfig(w.t.Context(), cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(pool.Close)
	return pool, p
}

func toxic(t *testing.T, p *toxiproxy.Proxy, json string) {
	t.Helper()
	if _, err := p.Toxics.AddToxicJson(strings.NewReader(json)); err != nil {
		t.Error(err)
	}
}

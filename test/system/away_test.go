package system_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/rs/zerolog"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/examples/orders"
)

// platformAway is how long the platform is away in TestPlatformAway; `go test ./test/system -run PlatformAway -platform-away 60s`.
var platformAway = flag.Duration("platform-away", 8*time.Second, "how long the platform is away")

const (
	// exampleRate is the load of the example, orders a second, by two instances together.
	exampleRate = 60
	// prepareDeadline is the SDK's default: what a transaction may wait for the platform.
	prepareDeadline = time.Second
	// noticing is how long the SDK may take to notice that a platform is away that says nothing: an unanswered Prepare, and an
	// attempt to connect.
	noticing = 5 * time.Second
	// ordersAtOnce bounds the orders of an instance that are under way. More than a few per customer only wait for each other's
	// row lock, and when the machine stalls for a moment, that queue and not the platform is what an order would wait for.
	ordersAtOnce = 16
	// slack is what this machine may add when it is busy.
	slack = 1500 * time.Millisecond
)

// TestPlatformAway takes the whole platform away under the load of the example: killed, or silent, or there but its answers are
// lost. No business transaction fails because of it, none waits longer than the deadline of Prepare, and once the SDK knows,
// none waits at all. When the platform is back all events arrive, in order per customer, across the outage, and none twice. A
// request that the platform refuses for good stops nobody.
func TestPlatformAway(t *testing.T) {
	for _, outage := range []struct {
		name   string
		strike func(a *away)
		known  bool // that the platform is away: then nobody waits

		resolved int // transactions that others than the client have to decide, at least
		waits    int // deadlines that may follow each other while an order waits for the row lock of its customer
	}{
		{"killed", (*away).killed, true, 0, 1},
		{"silent", (*away).silent, true, 0, 1},
		// The platform comes back every second, only to lose answers anew: what had spilled is drained by then, so the next order
		// of the same customer, which has waited for the one before, is prepared again, and waits again.
		{"answers lost", (*away).answersLost, false, 10, 3},
	} {
		t.Run(outage.name, func(t *testing.T) {
			a := newAway(t)
			finish := a.work()
			a.phase("before")
			pause(t, 5*time.Second)
			a.phase("away")
			misfit := a.outage(outage.strike)
			a.phase("back")
			pause(t, 5*time.Second)
			finish()
			a.judge(misfit, outage.resolved)
			a.latencies(outage.known, outage.waits)
			for _, process := range append(a.p.relays, a.p.servers...) {
				process.stop()
			}
			a.p.verify()
		})
	}
}

// away is the example and a platform that goes away.
type away struct {
	t     *testing.T
	p     *platform
	b     broker
	proxy *toxiproxy.Proxy
	pool  *pgxpool.Pool
	shops []*orders.Shop
	sdks  []*client.Client

	mu     sync.Mutex
	now    string // phase
	since  time.Time
	took   map[string][]time.Duration // by phase in which a transaction began
	placed map[uuid.UUID]orders.Order // committed
	failed []error

	refused atomic.Int64
}

func newAway(t *testing.T) *away {
	t.Helper()
	b := newFakeBroker(t)
	a := &away{
		t: t, b: b, p: deploy(t, deployment{servers: 1, relays: 1, broker: b, lease: leaseTTL}),
		took: map[string][]time.Duration{}, placed: map[uuid.UUID]orders.Order{},
	}
	if err := b.CreateTopic(t.Context(), orders.Topic, 3, nil); err != nil {
		t.Fatal(err)
	}
	dsn, err := startPostgres(t, "").CreateDatabase(t.Context(), "orders")
	if err != nil {
		t.Fatal(err)
	}
	// The platform may look into the database itself: it decides what was prepared and not answered long before that is drained.
	ref := filepath.Join(t.TempDir(), "dsn")
	if err := os.WriteFile(ref, []byte(dsn), 0o600); err != nil {
		t.Fatal(err)
	}
	registration := fmt.Sprintf("name: %s\ntopics: [%s]\nrecord_profile: cloudevents\nfailure_policy: block\ndatabases:\n  - {name: default, mode: marker, dsn_ref: \"file:%s\"}\n",
		orders.Source, orders.Topic, ref)
	if _, err := a.p.operate(registration, "source", "apply", "-"); err != nil {
		t.Fatal("register the example:", err)
	}
	a.proxy = proxyTo(t, a.p.servers[0].address)
	cfg, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	cfg.MaxConns = 100 // while Prepare waits for its deadline, every new order needs a connection
	if a.pool, err = pgxpool.NewWithConfig(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.pool.Close)
	if err := orders.Migrate(t.Context(), a.pool); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		a.instance()
	}
	return a
}

// instance starts an instance of the example.
func (a *away) instance() {
	a.t.Helper()
	sdk, err := client.New(client.Config{
		Target: a.proxy.Listen, Source: orders.Source, Plaintext: true,
		Logger: slog.New(slog.NewTextHandler(a.t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
		OnAlarm: func(alarm client.Alarm) {
			if alarm.Kind == client.AlarmRefused {
				a.refused.Add(1)
				return
			}
			a.t.Errorf("alarm %s: transaction %s: %v", alarm.Kind, alarm.TransactionID, alarm.Err)
		},
	})
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { _ = sdk.Close() }) // always nil
	shop, err := orders.New(a.pool, sdk)
	if err != nil {
		a.t.Fatal(err)
	}
	a.shops, a.sdks = append(a.shops, shop), append(a.sdks, sdk)
}

func proxyTo(t *testing.T, address string) *toxiproxy.Proxy {
	t.Helper()
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	proxy := toxiproxy.NewProxy(server, "platform", local(freePort(t)), address)
	if err := server.Collection.Add(proxy, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Stop)
	return proxy
}

// work lets all instances place orders, each in a goroutine of its own, and returns how to end that.
func (a *away) work() (finish func()) {
	ctx, cancel := context.WithCancel(a.t.Context())
	var all sync.WaitGroup
	for _, shop := range a.shops {
		all.Go(func() {
			tick := time.NewTicker(time.Second * time.Duration(len(a.shops)) / exampleRate)
			defer tick.Stop()
			places := make(chan struct{}, ordersAtOnce)
			for n := 0; ; n++ {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				select {
				case <-ctx.Done():
					return
				case places <- struct{}{}:
				}
				all.Go(func() {
					defer func() { <-places }()
					a.place(shop, n%10 == 0)
				})
			}
		})
	}
	return func() {
		cancel()
		all.Wait()
	}
}

// place places one order and notes how long it took and what became of it.
func (a *away) place(shop *orders.Shop, decline bool) {
	phase, began := a.present(), time.Now()
	order, err := shop.Place(context.WithoutCancel(a.t.Context()), orders.NewOrder(), decline)
	took := time.Since(began)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.took[phase] = append(a.took[phase], took)
	switch {
	case err == nil:
		a.placed[order.ID] = order
	case decline && errors.Is(err, orders.ErrDeclined):
	default:
		a.failed = append(a.failed, err)
	}
}

func (a *away) phase(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.now, a.since = name, time.Now()
}

// present is the phase that a transaction begins in. An outage has two: until the SDK has noticed it, and after.
func (a *away) present() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.now == "away" && time.Since(a.since) > noticing {
		return "away and known"
	}
	return a.now
}

// outage strikes and, in the middle of it, commits a transaction whose event the platform will refuse for good.
func (a *away) outage(strike func(*away)) (misfit uuid.UUID) {
	var both sync.WaitGroup
	both.Go(func() { strike(a) })
	pause(a.t, *platformAway/2)
	misfit = a.misfit()
	both.Wait()
	return misfit
}

// misfit commits a transaction with an event for a topic that the source may not use. While the platform is away nobody can
// tell.
func (a *away) misfit() uuid.UUID {
	id := client.NewID()
	deadline := time.Now().Add(startLimit)
	for {
		err := pgxoutbox.InTx(a.t.Context(), a.pool, a.sdks[0], pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
			if _, err := tx.Exec(a.t.Context(), "UPDATE customer SET spent = spent WHERE id = 'customer-1'"); err != nil {
				return err
			}
			return tx.Publish(client.Event{
				ID: id, Topic: "forbidden", AggregateType: "customer", AggregateID: "customer-1", Type: "order.misfit.v1", Payload: []byte("{}"),
			})
		})
		switch {
		case err == nil:
			return id
		case !client.IsDenied(err) || time.Now().After(deadline): // denied: the platform could be reached after all
			a.t.Errorf("a business transaction failed: %v", err)
			return id
		}
	}
}

// killed: every process of the platform, its PostgreSQL too, dies of SIGKILL.
func (a *away) killed() {
	a.p.servers[0].kill()
	a.p.relays[0].kill()
	a.p.store.Kill()
	pause(a.t, *platformAway)
	if err := a.p.store.Restart(a.t.Context()); err != nil {
		a.t.Error(err)
	}
	a.p.servers[0].start()
	a.p.relays[0].start()
}

// silent: connections stay, and nothing comes.
func (a *away) silent() {
	a.p.servers[0].signal(syscall.SIGSTOP)
	pause(a.t, *platformAway)
	a.p.servers[0].thaw()
}

// answersLost: what is sent arrives, the answers do not, again and again.
func (a *away) answersLost() {
	for end := time.Now().Add(*platformAway); time.Now().Before(end); {
		if _, err := a.proxy.Toxics.AddToxicJson(strings.NewReader(`{"name":"lost","type":"timeout","stream":"downstream","attributes":{"timeout":0}}`)); err != nil {
			a.t.Error(err)
			return
		}
		pause(a.t, prepareDeadline+200*time.Millisecond)
		a.proxy.Stop()
		if err := a.proxy.Toxics.RemoveToxic(a.t.Context(), "lost"); err != nil {
			a.t.Error(err)
		}
		if err := a.proxy.Start(); err != nil {
			a.t.Error(err)
			return
		}
		pause(a.t, time.Second)
	}
}

// judge compares what arrived with what was committed. least: how many transactions have to be resolved.
func (a *away) judge(misfit uuid.UUID, least int) {
	t := a.t
	t.Helper()
	if len(a.failed) != 0 {
		t.Errorf("%d business transactions failed: %v", len(a.failed), a.failed[0])
	}
	count := func(sql string) (n int) {
		t.Helper()
		if err := a.pool.QueryRow(t.Context(), sql).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	var spilled uint64
	for _, sdk := range a.sdks {
		spilled += sdk.Stats().Spilled
	}
	began := time.Now()
	eventually(t, settleLimit, "spilled requests to be published", func() (bool, string) {
		n := count("SELECT count(*) FROM outbox_marker WHERE spilled IS NOT NULL AND refused IS NULL")
		return n == 0, fmt.Sprintf("%d are left", n)
	})
	if n := count("SELECT count(*) FROM customer_order"); n != len(a.placed) {
		t.Errorf("%d orders in the database, %d were confirmed", n, len(a.placed))
	}
	if n := count("SELECT count(*) FROM outbox_marker WHERE spilled IS NOT NULL AND refused LIKE '%TOPIC_DENIED%'"); n != 1 || a.refused.Load() != 1 {
		t.Errorf("%d refused requests are kept, %d alarms", n, a.refused.Load())
	}
	missing := maps.Clone(a.placed)
	next := 0
	ctx, cancel := context.WithTimeout(t.Context(), settleLimit)
	defer cancel()
	_, err := kafka.ReadUntil(ctx, a.b.Bootstrap(), func(read []kafka.Record) bool {
		for ; next < len(read); next++ {
			delete(missing, a.read(read[next]).ID)
		}
		return len(missing) == 0
	}, orders.Topic)
	if err != nil && len(missing) > 0 {
		t.Errorf("%d of %d orders are missing: %v", len(missing), len(a.placed), err)
	}
	t.Logf("%d orders, %d spilled; all had arrived %s after the load ended", len(a.placed), spilled, time.Since(began).Round(10*time.Millisecond))
	records, err := kafka.ReadAll(t.Context(), a.b.Bootstrap(), orders.Topic)
	if err != nil {
		t.Fatal(err)
	}
	a.inOrder(records, misfit)
	// What was prepared, not answered in time, and spilled is there twice until it is drained.
	conn, err := pgx.Connect(t.Context(), a.p.dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	var resolved int
	if err := conn.QueryRow(t.Context(), "SELECT count(*) FROM outbox.resolution WHERE method <> 'client'").Scan(&resolved); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d transactions were decided by looking into the database or by asking", resolved)
	if resolved < least {
		t.Errorf("%d transactions were resolved, want at least %d: lost answers proved nothing", resolved, least)
	}
	if spilled < exampleRate {
		t.Errorf("only %d requests were spilled: the outage proved nothing", spilled)
	}
}

// inOrder: every order of a customer has the version after the one before, and no id is there twice.
func (a *away) inOrder(records []kafka.Record, misfit uuid.UUID) {
	a.t.Helper()
	slices.SortStableFunc(records, func(x, y kafka.Record) int { return int(x.Offset - y.Offset) })
	last, ids := map[string]int64{}, map[string]kafka.Record{}
	for _, r := range records {
		id, _ := r.Header("ce_id")
		order := a.read(r)
		if _, known := a.placed[order.ID]; !known || string(id) == misfit.String() {
			a.t.Errorf("a phantom: %+v", order)
		}
		if first, again := ids[string(id)]; again {
			a.t.Errorf("event %s is there twice: at %d of partition %d, and at %d of %d; version %d of %s", id, first.Offset, first.Partition, r.Offset, r.Partition, order.Version, order.Customer)
			continue
		}
		ids[string(id)] = r
		if order.Version != last[order.Customer]+1 {
			a.t.Errorf("%s: version %d follows %d", order.Customer, order.Version, last[order.Customer])
		}
		last[order.Customer] = order.Version
	}
}

func (a *away) read(r kafka.Record) (o orders.Order) {
	a.t.Helper()
	if err := json.Unmarshal(r.Value, &o); err != nil {
		a.t.Fatalf("a record that is no order: %q: %v", r.Value, err)
	}
	return o
}

// latencies checks that nobody waited longer than for the deadline of Prepare, and nobody at all once the outage was known.
func (a *away) latencies(known bool, waits int) {
	a.t.Helper()
	quantile := func(phase string, q float64) time.Duration {
		took := a.took[phase]
		if len(took) == 0 {
			a.t.Fatalf("nothing was measured %s", phase)
		}
		slices.Sort(took)
		return took[int(q*float64(len(took)-1))]
	}
	for _, phase := range []string{"before", "away", "away and known", "back"} {
		a.t.Logf("%-15s %5d transactions: p50 %s, p99 %s, longest %s", phase, len(a.took[phase]),
			quantile(phase, 0.5).Round(100*time.Microsecond), quantile(phase, 0.99).Round(100*time.Microsecond), quantile(phase, 1).Round(100*time.Microsecond))
		// Also those that waited for the row lock of one that waited: spilled requests make the next one spill without asking.
		if most := quantile(phase, 1); most > time.Duration(waits)*prepareDeadline+slack {
			a.t.Errorf("%s: a transaction took %s", phase, most)
		}
	}
	if before, later := quantile("before", 0.5), quantile("away and known", 0.5); known && later > before+50*time.Millisecond {
		a.t.Errorf("with the outage known, half of the transactions took longer than %s; before it was %s", later, before)
	}
	if most := quantile("away and known", 0.99); known && most > slack {
		a.t.Errorf("with the outage known, one of a hundred transactions took longer than %s", most)
	}
}

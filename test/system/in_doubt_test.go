package system_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/embedded/postgres"
)

// databaseAway is how long a database is away in TestInDoubtForAnHour; `go test ./test/system -run ForAnHour
// -timeout 2h -database-away 1h`. Retention and back-off are shortened so that a few seconds are many of each, as an hour is.
var databaseAway = flag.Duration("database-away", 20*time.Second, "how long a source's database is away")

// anHour are the settings: the ring of the log turns once in about ten seconds, transactions are forgotten after two, and who
// cannot be asked is asked again after two at the latest.
var anHour = []string{
	"OUTBOX_SERVER_GENERATION_BYTES=65536", "OUTBOX_SERVER_LOG_RETENTION=1s", "OUTBOX_SERVER_TX_RETENTION=2s", "OUTBOX_SERVER_MAINTENANCE_INTERVAL=200ms",
	"OUTBOX_RESOLVER_UNKNOWN_BACKOFF=2s",
}

const (
	goneSource = "gone"
	goneTopic  = "gone"
	goneCount  = 40 // in-doubt transactions, each of an aggregate of its own with an event waiting behind
)

// TestInDoubtForAnHour: the database of a source is away, with transactions in doubt. None of them is published or aborted; the
// other source flows as before; memory and store stay as they are; the log goes round, cursors move, old transactions are
// forgotten; and when the database is back, it all resolves by itself, in order.
func TestInDoubtForAnHour(t *testing.T) {
	b := newFakeBroker(t)
	p := deploy(t, deployment{servers: 1, relays: 1, broker: b, lease: steadyTTL, env: anHour})
	if err := b.CreateTopic(t.Context(), goneTopic, 3, nil); err != nil {
		t.Fatal(err)
	}
	s := openShop(t, p, b, underFaults.Aggregates)
	watch := watchLatency(t, b, "orders", "payments")
	finish := s.work(underFaults)
	pause(t, 2*time.Second) // everything is warm
	watch.phase("before")
	pause(t, 5*time.Second)

	g := leaveInDoubt(t, p)
	watch.phase("away")
	began, before := time.Now(), p.look(g)
	turns := p.waitAway(t)
	after := p.look(g)
	took := time.Since(began)
	watch.phase("back")
	g.stillInDoubt(p)
	t.Logf("away for %s: %d generations of the log opened, %d transactions known (%d batches were written), %d parked, asked %d times at most, server %d MiB (%+d), relay %d MiB (%+d)",
		took.Round(time.Second), turns, after.transactions, after.batches, after.parked, after.checks,
		after.serverMiB, after.serverMiB-before.serverMiB, after.relayMiB, after.relayMiB-before.relayMiB)
	switch {
	case turns < 8:
		t.Errorf("only %d generations were opened: the ring did not turn once", turns)
	case after.log != 0:
		t.Errorf("the log still holds %d segments with what is in doubt", after.log)
	case after.cursor <= g.newest:
		t.Errorf("a cursor is at xid %d, and what is in doubt at %d", after.cursor, g.newest)
	case after.parked != 2*goneCount:
		t.Errorf("%d events are parked, want the %d in doubt and those behind them", after.parked, goneCount)
	case after.transactions > 1000 || after.batches < 1000:
		t.Errorf("%d transactions are known, in %d batches: retention stands still", after.transactions, after.batches)
	case after.serverMiB > before.serverMiB+64 || after.relayMiB > before.relayMiB+64:
		t.Errorf("memory grew: server %d to %d MiB, relay %d to %d MiB", before.serverMiB, after.serverMiB, before.relayMiB, after.relayMiB)
	case after.checks > 15+int(took/time.Second):
		t.Errorf("asked %d times in %s: it does not back off", after.checks, took)
	}

	if err := g.database.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	returned := time.Now()
	eventually(t, startLimit, "what is in doubt to be resolved", func() (bool, string) {
		left := len(p.inDoubt())
		return left == 0, fmt.Sprintf("%d are left", left)
	})
	t.Logf("all resolved %s after the database was back", time.Since(returned).Round(10*time.Millisecond))
	g.published(b)

	tally := finish(true)
	if tally.Failed.Load() != 0 {
		t.Errorf("transactions of the other source failed: %q", tally.Errors())
	}
	if report := s.settle(nil); report.Broken() || len(report.Repeats) != 0 {
		t.Error("the other source's history is not what was promised")
	}
	watch.report()
	if was, is := watch.quantile("before", 0.99), watch.quantile("away", 0.99); is > 2*was+300*time.Millisecond {
		t.Errorf("the other source's p99 went from %s to %s", was, is)
	}
	for _, process := range append(p.relays, p.servers...) {
		process.stop()
	}
	p.verify()
}

// gone is a source whose database is away.
type gone struct {
	t        *testing.T
	database *postgres.Server
	newest   uint64 // xid of the store at which the last of it was written
}

// leaveInDoubt prepares transactions, commits every second one and rolls the others back, tells nobody, and takes the database
// away. Behind each waits an event that is committed.
func leaveInDoubt(t *testing.T, p *platform) *gone {
	t.Helper()
	g := &gone{t: t, database: startPostgres(t, "")}
	ctx := t.Context()
	dsn, err := g.database.CreateDatabase(ctx, "gone")
	if err != nil {
		t.Fatal(err)
	}
	ref := filepath.Join(t.TempDir(), "dsn") // written when the database is away: nobody may ask it before
	registration := fmt.Sprintf("name: %s\ntopics: [%s]\nrecord_profile: cloudevents\nfailure_policy: block\ndatabases:\n  - {name: default, mode: marker, dsn_ref: \"file:%s\"}\n", goneSource, goneTopic, ref)
	if _, err := p.operate(registration, "source", "apply", "-"); err != nil {
		t.Fatal(err)
	}
	sdk := p.client(t, goneSource)
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, client.MarkerDDL); err != nil {
		t.Fatal(err)
	}
	for i := range goneCount {
		tx, err := conn.Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		a, err := pgxoutbox.Mark(ctx, tx, sdk, pgxoutbox.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Prepare(ctx, goneEvent(i, "in doubt")); err != nil {
			t.Fatal(err)
		}
		if end := []func(context.Context) error{tx.Commit, tx.Rollback}[i%2]; end(ctx) != nil {
			t.Fatal("ending a transaction")
		}
	}
	g.database.Kill()
	if err := os.WriteFile(ref+".new", []byte(dsn), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(ref+".new", ref); err != nil {
		t.Fatal(err)
	}
	_ = sdk.Close() // always nil. The session's end makes the platform ask at once
	publisher := p.client(t, goneSource)
	for i := range goneCount {
		if err := publisher.Publish(ctx, client.NewID(), goneEvent(i, "behind")); err != nil {
			t.Fatal(err)
		}
	}
	g.newest = query[uint64](p, `SELECT max(log_xid)::text::bigint FROM outbox.tx JOIN outbox.source USING (source_id) WHERE name = 'gone'`)
	return g
}

func goneEvent(i int, payload string) client.Event {
	return client.Event{Topic: goneTopic, AggregateType: "order", AggregateID: strconv.Itoa(i), Type: "order.changed.v1", Payload: []byte(payload)}
}

// query asks the platform's store.
func query[T any](p *platform, sql string) (v T) {
	p.t.Helper()
	conn, err := pgx.Connect(p.t.Context(), p.dsn)
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(p.t.Context()))
	if err := conn.QueryRow(p.t.Context(), sql).Scan(&v); err != nil {
		p.t.Fatal(sql, err)
	}
	return v
}

// inDoubtTransaction is a line of `outbox transaction list --in-doubt -o json`.
type inDoubtTransaction struct {
	Source     string `json:"source"`
	LastAnswer string `json:"last_answer"`
	Checks     int    `json:"checks"`
}

func (p *platform) inDoubt() []inDoubtTransaction {
	p.t.Helper()
	return operateJSON[struct {
		Transactions []inDoubtTransaction `json:"transactions"`
	}](p, "transaction", "list", "--in-doubt").Transactions
}

// look is what the platform holds.
type look struct {
	transactions, batches, parked, log, checks int
	cursor                                     uint64
	serverMiB, relayMiB                        int
}

func (p *platform) look(g *gone) look {
	p.t.Helper()
	const ofGone = ` JOIN outbox.source USING (source_id) WHERE name = 'gone'`
	return look{
		transactions: query[int](p, `SELECT count(*) FROM outbox.tx`),
		batches:      query[int](p, `SELECT (max(log_xid)::text::bigint - `+strconv.FormatUint(g.newest, 10)+`)::int FROM outbox.tx`),
		parked:       query[int](p, `SELECT count(*) FROM outbox.parked`+ofGone),
		log:          query[int](p, `SELECT count(*) FROM outbox.log WHERE xid IN (SELECT log_xid FROM outbox.tx`+ofGone+` AND state = 0)`),
		checks:       query[int](p, `SELECT coalesce(max(checks), 0) FROM outbox.parked`+ofGone),
		cursor: query[uint64](p, `SELECT coalesce(min(s.xid), '0')::text::bigint FROM outbox.shard s
			WHERE EXISTS (SELECT FROM outbox.log l WHERE l.shard = s.shard AND l.xid > '`+strconv.FormatUint(g.newest, 10)+`')`), // an idle one has nowhere to go
		serverMiB: memoryMiB(p.t, p.servers[0]),
		relayMiB:  memoryMiB(p.t, p.relays[0]),
	}
}

// waitAway lets the database be away and counts the generations of the log that are opened meanwhile.
func (p *platform) waitAway(t *testing.T) (turns int) {
	t.Helper()
	last := query[int](p, `SELECT gen FROM outbox.control`)
	for end := time.Now().Add(*databaseAway); time.Now().Before(end) || turns < 8 && time.Now().Before(end.Add(startLimit)); {
		pause(t, 100*time.Millisecond)
		if now := query[int](p, `SELECT gen FROM outbox.control`); now != last {
			last = now
			turns++
		}
	}
	return turns
}

// memoryMiB is the memory that a process has in use.
func memoryMiB(t testing.TB, s *service) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.running.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, found := strings.CutPrefix(line, "VmRSS:"); found {
			kib, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return kib >> 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// stillInDoubt: nothing was decided, and nothing published, not even what waits behind.
func (g *gone) stillInDoubt(p *platform) {
	g.t.Helper()
	list := p.inDoubt()
	if len(list) != goneCount {
		g.t.Errorf("%d transactions are in doubt, want %d", len(list), goneCount)
	}
	for _, tx := range list {
		if tx.Source != goneSource || !strings.Contains(tx.LastAnswer, "nobody could be asked") {
			g.t.Errorf("%+v", tx)
		}
	}
	records, err := kafka.ReadAll(g.t.Context(), p.kafka(), goneTopic)
	if err != nil || len(records) != 0 {
		g.t.Errorf("%d records of a source in doubt, %v", len(records), err)
	}
}

// kafka is where the relays publish.
func (p *platform) kafka() string {
	for _, variable := range p.relays[0].env {
		if brokers, found := strings.CutPrefix(variable, "OUTBOX_KAFKA_BROKERS="); found {
			return brokers
		}
	}
	p.t.Fatal("the relay has no broker")
	return ""
}

// published: the committed ones, and behind each what waited; of the aborted ones only what waited.
func (g *gone) published(b broker) {
	g.t.Helper()
	got := map[string][]string{}
	const want = goneCount/2 + goneCount
	ctx, cancel := context.WithTimeout(g.t.Context(), settleLimit)
	defer cancel()
	records, err := kafka.ReadUntil(ctx, b.Bootstrap(), func(read []kafka.Record) bool { return len(read) >= want }, goneTopic)
	if err != nil {
		g.t.Errorf("%d of %d records: %v", len(records), want, err)
	}
	slices.SortStableFunc(records, func(x, y kafka.Record) int { return int(x.Offset - y.Offset) })
	for _, r := range records {
		got[string(r.Key)] = append(got[string(r.Key)], string(r.Value))
	}
	for i := range goneCount {
		want := []string{"in doubt", "behind"}[i%2:]
		if key := strconv.Itoa(i); !slices.Equal(got[key], want) {
			g.t.Errorf("aggregate %s: %q, want %q", key, got[key], want)
		}
	}
}

// latencyWatch measures how long events take from the service to a consumer.
type latencyWatch struct {
	t    *testing.T
	mu   sync.Mutex
	now  string
	took map[string][]time.Duration
}

// watchLatency consumes topics from now on, until the test ends.
func watchLatency(t *testing.T, b broker, topics ...string) *latencyWatch {
	t.Helper()
	w := &latencyWatch{t: t, took: map[string][]time.Duration{}}
	consumer, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(b.Bootstrap(), ",")...), kgo.ConsumeTopics(topics...),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtEnd()), kgo.FetchMaxWait(500*time.Millisecond), kgo.FetchMinBytes(1))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			fetched := consumer.PollFetches(ctx)
			now := time.Now()
			w.mu.Lock()
			fetched.EachRecord(func(r *kgo.Record) {
				if at, err := occurredAt(r); err == nil {
					w.took[w.now] = append(w.took[w.now], now.Sub(at))
				}
			})
			w.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		consumer.Close()
	})
	return w
}

// occurredAt is when the service made the event.
func occurredAt(r *kgo.Record) (time.Time, error) {
	for _, h := range r.Headers {
		if h.Key == "ce_time" {
			return time.Parse(time.RFC3339Nano, string(h.Value))
		}
	}
	return time.Time{}, fmt.Errorf("no ce_time")
}

func (w *latencyWatch) phase(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = name
}

func (w *latencyWatch) quantile(phase string, q float64) time.Duration {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	took := w.took[phase]
	if len(took) == 0 {
		w.t.Fatalf("nothing arrived %s", phase)
	}
	slices.Sort(took)
	return took[int(q*float64(len(took)-1))]
}

func (w *latencyWatch) report() {
	w.t.Helper()
	for _, phase := range []string{"before", "away", "back"} {
		w.t.Logf("%-7s e2e p50 %s, p90 %s, p99 %s of %d events of the other source", phase,
			w.quantile(phase, 0.5).Round(100*time.Microsecond), w.quantile(phase, 0.9).Round(100*time.Microsecond), w.quantile(phase, 0.99).Round(100*time.Microsecond), len(w.took[phase]))
	}
}

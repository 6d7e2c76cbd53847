package system_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/embedded/postgres"
	"github.com/outbox-platform/outbox/test/system/orders"
)

// Measured, on a quiet machine and without the race detector:
//
//	go build -o /tmp/outbox ./cmd/outbox
//	go test ./test/system -run ManyInDoubt -v -many-in-doubt 10000 -many-rounds 5 -program /tmp/outbox
var (
	manyInDoubt = flag.Int("many-in-doubt", 10000, "transactions that are in doubt")
	manyRounds  = flag.Int("many-rounds", 1, "how often a database goes away and comes back")
)

// manyLimit is how long they may take to be resolved, here: the goal of five seconds is for a quiet machine without the race
// detector.
const manyLimit = 60 * time.Second

// besideMany is the other source's load: enough to measure, and not so much that the machine is what is measured.
var besideMany = orders.Workload{Callers: 8, PerSecond: 100, Aggregates: 200, MaxPayload: 500, Seed: 11}

// TestManyInDoubt: the database of a source comes back, and ten thousand of its transactions are in doubt. They are resolved in
// seconds, and the other source hardly notices.
func TestManyInDoubt(t *testing.T) {
	b := newFakeBroker(t)
	p := deploy(t, deployment{servers: 1, relays: 1, broker: b, lease: steadyTTL})
	if err := b.CreateTopic(t.Context(), goneTopic, 3, nil); err != nil {
		t.Fatal(err)
	}
	s := openShop(t, p, b, besideMany.Aggregates)
	m := openMany(t, p)
	watch := watchLatency(t, b, "orders", "payments")
	finish := s.work(besideMany)
	pause(t, 2*time.Second) // everything is warm
	for round := range *manyRounds {
		m.leave()
		watch.phase("parked") // and not measured
		pause(t, time.Second)
		watch.phase("before")
		pause(t, 5*time.Second)
		if err := m.database.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		watch.phase("away") // they are being resolved
		returned := time.Now()
		m.awaitNothing(`SELECT EXISTS (SELECT FROM outbox.parked WHERE state = 0 AND check_at < 'infinity')`)
		took := time.Since(returned)
		m.awaitNothing(`SELECT EXISTS (SELECT FROM outbox.parked)`)
		all := time.Since(returned)
		watch.phase("back")
		m.decidedRight(round)
		m.publishedAll(b, round)
		t.Logf("round %d: %d transactions resolved in %s, the committed ones published in %s", round, *manyInDoubt, took.Round(10*time.Millisecond), all.Round(10*time.Millisecond))
		pause(t, time.Second)
	}
	tally := finish(true)
	if tally.Failed.Load() != 0 {
		t.Errorf("transactions of the other source failed: %q", tally.Errors())
	}
	if report := s.settle(nil); report.Broken() || len(report.Repeats) != 0 {
		t.Error("the other source's history is not what was promised")
	}
	watch.report()
	was, is := watch.quantile("before", 0.99), watch.quantile("away", 0.99)
	t.Logf("the other source's e2e p99 while they were resolved and published: %.2f of what it was before", float64(is)/float64(was))
	if is > 3*was+time.Second {
		t.Errorf("the other source's p99 went from %s to %s", was, is)
	}
	for _, process := range append(p.relays, p.servers...) {
		process.stop()
	}
	p.verify()
}

// many is a source with many transactions in doubt.
type many struct {
	t        *testing.T
	p        *platform
	database *postgres.Server
	dsn      string
}

func openMany(t *testing.T, p *platform) *many {
	t.Helper()
	m := &many{t: t, p: p, database: startPostgres(t, "")}
	var err error
	if m.dsn, err = m.database.CreateDatabase(t.Context(), "gone"); err != nil {
		t.Fatal(err)
	}
	ref := filepath.Join(t.TempDir(), "dsn")
	if err := os.WriteFile(ref, []byte(m.dsn), 0o600); err != nil {
		t.Fatal(err)
	}
	registration := fmt.Sprintf("name: %s\ntopics: [%s]\nrecord_profile: cloudevents\nfailure_policy: block\ndatabases:\n  - {name: default, mode: marker, dsn_ref: \"file:%s\"}\n", goneSource, goneTopic, ref)
	if _, err := p.operate(registration, "source", "apply", "-"); err != nil {
		t.Fatal(err)
	}
	conn := m.connect()
	defer conn.Close(context.WithoutCancel(t.Context()))
	if _, err := conn.Exec(t.Context(), client.MarkerDDL); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *many) connect() *pgx.Conn {
	m.t.Helper()
	conn, err := pgx.Connect(m.t.Context(), m.dsn)
	if err != nil {
		m.t.Fatal(err)
	}
	return conn
}

// leave prepares transactions, writes the markers of every second one, and takes the database away. It returns when all are
// parked.
func (m *many) leave() {
	m.t.Helper()
	ctx := m.t.Context()
	conn := m.connect()
	defer conn.Close(context.WithoutCancel(ctx))
	tx, err := conn.Begin(ctx)
	if err != nil {
		m.t.Fatal(err)
	}
	at := client.DatabaseTransaction{Mode: client.ModeMarker}
	err = tx.QueryRow(ctx, `SELECT pg_current_xact_id()::text::bigint, (SELECT system_identifier FROM pg_control_system()),
		('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint, (SELECT oid::bigint FROM pg_database WHERE datname = current_database()),
		'outbox_marker'::regclass::oid::bigint`).Scan(&at.XID, &at.SystemIdentifier, &at.Timeline, &at.DatabaseOID, &at.MarkerOID)
	if err != nil {
		m.t.Fatal(err)
	}
	sdk := m.p.client(m.t, goneSource)
	numbers := make(chan int)
	var markers [][]any
	var mu sync.Mutex
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			for i := range numbers {
				id := client.NewID()
				e := goneEvent(i, "x")
				e.AggregateID = id.String()
				if _, err := sdk.Prepare(ctx, id, at, e); err != nil {
					m.t.Error(err)
				}
				if i%2 == 0 {
					mu.Lock()
					markers = append(markers, []any{[16]byte(id)})
					mu.Unlock()
				}
			}
		})
	}
	for i := range *manyInDoubt {
		numbers <- i
	}
	close(numbers)
	all.Wait()
	if _, err := tx.CopyFrom(ctx, pgx.Identifier{"outbox_marker"}, []string{"id"}, pgx.CopyFromRows(markers)); err != nil {
		m.t.Fatal(err)
	}
	if err := tx.Commit(ctx); err != nil {
		m.t.Fatal(err)
	}
	m.database.Kill()
	_ = sdk.Close() // always nil
	eventually(m.t, startLimit, "all to be parked", func() (bool, string) {
		parked := query[int](m.p, `SELECT count(*) FROM outbox.parked JOIN outbox.source USING (source_id) WHERE name = 'gone' AND parked.state = 0`)
		inDoubt := query[int](m.p, `SELECT count(*) FROM outbox.tx JOIN outbox.source USING (source_id) WHERE name = 'gone' AND tx.state = 0`)
		// A few may have been asked about between COMMIT and the end of the database.
		return parked == inDoubt && parked >= *manyInDoubt*9/10, fmt.Sprintf("%d of %d are", parked, inDoubt)
	})
}

// awaitNothing waits until there is nothing of a kind any more. It looks seldom: looking must not be what is measured.
func (m *many) awaitNothing(sql string) {
	m.t.Helper()
	conn, err := pgx.Connect(m.t.Context(), m.p.dsn)
	if err != nil {
		m.t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(m.t.Context()))
	end := time.Now().Add(manyLimit)
	for left := true; left; {
		pause(m.t, 50*time.Millisecond)
		if err := conn.QueryRow(m.t.Context(), sql).Scan(&left); err != nil {
			m.t.Fatal(err)
		}
		if left && time.Now().After(end) {
			m.t.Fatalf("not resolved within %s", manyLimit)
		}
	}
}

// decidedRight: half of them committed.
func (m *many) decidedRight(round int) {
	m.t.Helper()
	for state, name := range map[int]string{1: "committed", 2: "aborted"} {
		n := query[int](m.p, fmt.Sprintf(`SELECT count(*) FROM outbox.tx JOIN outbox.source USING (source_id) JOIN outbox.resolution r USING (source_id, tx_id)
			WHERE name = 'gone' AND tx.state = %d AND r.state = %d AND r.method = 'direct'`, state, state))
		if want := (round + 1) * *manyInDoubt / 2; n != want {
			m.t.Errorf("%d are %s, want %d", n, name, want)
		}
	}
}

// publishedAll waits until all committed ones are published.
func (m *many) publishedAll(b broker, round int) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), settleLimit)
	defer cancel()
	want := (round + 1) * *manyInDoubt / 2
	records, err := kafka.ReadUntil(ctx, b.Bootstrap(), func(read []kafka.Record) bool { return len(read) >= want }, goneTopic)
	if err != nil || len(records) != want {
		m.t.Errorf("%d of %d are published, %v", len(records), want, err)
	}
}

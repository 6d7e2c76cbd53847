package storetest_test

import (
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

func TestDatabasesAreSeparate(t *testing.T) {
	t.Parallel()
	a, b := storetest.New(t), storetest.New(t, storetest.WithShards(3))
	if a.DSN == b.DSN {
		t.Fatal("two tests share a database")
	}
	if a.Store.ShardCount() != 16 || b.Store.ShardCount() != 3 {
		t.Fatalf("shards: %d and %d, want 16 and 3", a.Store.ShardCount(), b.Store.ShardCount())
	}
	if n := a.Exec(t, `UPDATE outbox.control SET gen = 5`); n != 1 {
		t.Fatalf("changed %d rows", n)
	}
	if gen := storetest.Query[int](t, b, `SELECT gen FROM outbox.control`); gen[0] != 0 {
		t.Fatal("a change in one database is seen in another")
	}
}

func TestUnqualifiedTablesFail(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	_, err := db.Connect(t).Exec(t.Context(), `SELECT FROM control`)
	if err == nil || !strings.Contains(err.Error(), "does not exist") {
		t.Fatalf("got %v, want an error", err)
	}
}

func TestWithoutSchema(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithoutSchema())
	if db.Store != nil {
		t.Fatal("a store without a schema")
	}
	if found := storetest.Query[bool](t, db, `SELECT to_regnamespace('outbox') IS NOT NULL`); found[0] {
		t.Fatal("the schema is there")
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	want := os.Getenv(storetest.VersionEnv)
	if want == "" {
		want = "18"
	}
	if got := storetest.New(t).Cluster.Server().Version(); !strings.HasPrefix(got, want+".") {
		t.Fatalf("PostgreSQL %s, want %s", got, want)
	}
}

func TestKillAndRestart(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t, storetest.WithSettings(map[string]string{"work_mem": "5MB"}))
	db := cluster.New(t, storetest.WithConfig(func(c *store.Config) { c.MaxConns = 2 }))
	if mem := storetest.Query[string](t, db, `SHOW work_mem`); mem[0] != "5MB" {
		t.Fatalf("work_mem is %s", mem[0])
	}
	db.Exec(t, `INSERT INTO outbox.topic (name, partitions, max_message_bytes) VALUES ('kept', 1, 1)`)
	cluster.Kill()
	if err := db.Store.Ping(t.Context()); err == nil {
		t.Fatal("a killed server answers")
	}
	cluster.Restart(t)
	if kept := storetest.Query[string](t, db, `SELECT name FROM outbox.topic`); len(kept) != 1 || kept[0] != "kept" {
		t.Fatalf("after the crash: %v", kept)
	}
	storetest.Eventually(t, 10*time.Second, func() bool { return db.Store.Ping(t.Context()) == nil })
}

func TestEventually(t *testing.T) {
	t.Parallel()
	var calls atomic.Int32
	storetest.Eventually(t, 10*time.Second, func() bool { return calls.Add(1) == 3 })
	if calls.Load() != 3 {
		t.Fatalf("%d calls", calls.Load())
	}
	stuck := &recorder{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		storetest.Eventually(stuck, 5*time.Millisecond, func() bool { return false })
	}()
	<-done
	if !stuck.failed {
		t.Fatal("a condition that never holds does not fail the test")
	}
}

// recorder is a testing.TB whose Fatalf only takes note.
type recorder struct {
	testing.TB
	failed bool
}

func (r *recorder) Helper() {}

func (r *recorder) Fatalf(string, ...any) {
	r.failed = true
	runtime.Goexit()
}

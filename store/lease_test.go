package store_test

import (
	"slices"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestHeartbeatCountsLiveInstances(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	for i, instance := range []string{"a", "b", "a"} {
		n, err := db.Store.Heartbeat(t.Context(), instance, time.Minute)
		if want := min(i+1, 2); err != nil || n != want {
			t.Fatalf("heartbeat %d: %d live, %v; want %d", i, n, err, want)
		}
	}
	db.Exec(t, `UPDATE outbox.relay SET live_until = now() - interval '1 ms' WHERE instance = 'b'`)
	if n, err := db.Store.Heartbeat(t.Context(), "a", time.Minute); err != nil || n != 1 {
		t.Fatalf("%d live, %v; want 1", n, err)
	}
}

// acquire takes shards and fails the test if it gets another number of them.
func acquire(t *testing.T, st *store.Store, instance string, ttl time.Duration, limit, want int) []store.Lease {
	t.Helper()
	leases, err := st.AcquireShards(t.Context(), instance, ttl, limit)
	if err != nil || len(leases) != want {
		t.Fatalf("%s acquired %d shards, %v; want %d", instance, len(leases), err, want)
	}
	return leases
}

func TestShardsAreLeasedOnce(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(4))
	a := acquire(t, db.Store, "a", time.Minute, 3, 3)
	b := acquire(t, db.Store, "b", time.Minute, 64, 1)
	acquire(t, db.Store, "c", time.Minute, 64, 0)
	for _, l := range append(a, b...) {
		if l.Epoch != 1 || l.Position.Compare(store.Position{Seq: -1}) != 0 || len(l.Pend) != 0 || len(l.Offsets) != 0 {
			t.Errorf("a new shard begins with %+v", l)
		}
	}
	// A release with an old epoch does nothing; with the right one it frees at once.
	if err := db.Store.ReleaseShards(t.Context(), []int16{b[0].Shard}, []int64{0}); err != nil {
		t.Fatal(err)
	}
	acquire(t, db.Store, "c", time.Minute, 64, 0)
	if err := db.Store.ReleaseShards(t.Context(), []int16{b[0].Shard}, []int64{1}); err != nil {
		t.Fatal(err)
	}
	c := acquire(t, db.Store, "c", time.Minute, 64, 1)
	if c[0].Shard != b[0].Shard || c[0].Epoch != 2 {
		t.Errorf("c got %+v", c[0])
	}
}

func TestLeaseEndsByTheDatabasesClock(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	a := acquire(t, db.Store, "a", 20*time.Millisecond, 1, 1)
	storetest.Eventually(t, 10*time.Second, func() bool {
		b, err := db.Store.AcquireShards(t.Context(), "b", time.Minute, 1)
		if err != nil {
			t.Fatal(err)
		}
		return len(b) == 1 && b[0].Epoch == 2
	})
	fenced, err := db.Store.Steps(t.Context(), time.Minute, []store.Step{{Shard: a[0].Shard, Epoch: a[0].Epoch}})
	if err != nil || !slices.Equal(fenced, []int16{0}) {
		t.Errorf("the old holder's step: fenced %v, %v", fenced, err)
	}
}

// TestClockOfTheStoreIsPutBack: what was given out by the clock before would last until the clock gets there again.
func TestClockOfTheStoreIsPutBack(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(2))
	for _, instance := range []string{"a", "gone"} {
		if _, err := db.Store.Heartbeat(t.Context(), instance, 5*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	acquire(t, db.Store, "gone", 5*time.Second, 1, 1)
	db.Exec(t, `UPDATE outbox.shard SET lease_until = lease_until + interval '10 min' WHERE holder <> ''`)
	db.Exec(t, `UPDATE outbox.relay SET live_until = live_until + interval '10 min' WHERE instance = 'gone'`)
	if n, err := db.Store.Heartbeat(t.Context(), "a", 5*time.Second); err != nil || n != 1 {
		t.Errorf("%d relays are counted, %v; want the one that is there", n, err)
	}
	acquire(t, db.Store, "a", store.MaxLeaseTTL, 2, 2)
	// Another relay whose leases are shorter leaves these alone.
	acquire(t, db.Store, "b", 3*time.Second, 2, 0)
}

func TestAcquireSkipsAShardWhoseStepIsUnderWay(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(2))
	conn := db.Connect(t)
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(t.Context()) //nolint:errcheck // the test ends
	if _, err := tx.Exec(t.Context(), `SELECT 1 FROM outbox.shard WHERE shard = 0 FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	if got := acquire(t, db.Store, "a", time.Minute, 2, 1); got[0].Shard != 1 {
		t.Errorf("acquired %+v", got[0])
	}
}

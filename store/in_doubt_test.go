package store_test

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// HurryInDoubt claims, page by page, what waits for its time, of one source database and nothing else, each transaction once.
func TestHurryInDoubt(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(2))
	mine, other := db.Source(t, "mine"), db.Source(t, "other")
	leases := acquire(t, db.Store, "relay", time.Minute, 2, 2)
	slices.SortFunc(leases, func(a, b store.Lease) int { return int(a.Shard - b.Shard) })
	keys := make([]store.Key, 5)
	for i := range keys {
		keys[i] = storetest.Key(mine.ID)
	}
	slices.SortFunc(keys, func(a, b store.Key) int { return bytes.Compare(a.Transaction[:], b.Transaction[:]) })
	foreign, elsewhere := storetest.Key(other.ID), storetest.Key(mine.ID)
	park := func(shard int, at store.EventPosition, k store.Key) store.Parked {
		p := parkedEvent(at, k, k.Transaction.String(), store.CauseInDoubt)
		p.Aggregate.Source = k.Source
		return p
	}
	rows := [2][]store.Parked{}
	for i, k := range keys {
		rows[0] = append(rows[0], park(0, at(10, 0, int32(i)), k))
	}
	rows[0] = append(rows[0], park(0, at(11, 0, 0), foreign), park(0, at(11, 0, 1), elsewhere))
	moved := *rows[0][6].Database
	moved.Database = "elsewhere"
	rows[0][6].Database = &moved
	rows[1] = append(rows[1], park(1, at(10, 1, 0), keys[2])) // one of them is in two shards
	for i, l := range leases {
		step(t, db.Store, store.Step{Shard: l.Shard, Epoch: l.Epoch, Checkpoint: store.Checkpoint{Position: store.Position{XID: 20}}, Park: rows[i]})
	}
	hurry := func(after store.TransactionID, limit int) ([]store.Key, store.TransactionID) {
		t.Helper()
		found, last, err := db.Store.HurryInDoubt(t.Context(), mine.ID, rows[0][0].Database.Database, after, limit, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		var got []store.Key
		for _, p := range found {
			if p.Checks != 0 || p.Database == nil || p.Database.XID != rows[0][0].Database.XID || p.State != store.Prepared {
				t.Errorf("hurried %+v", p)
			}
			got = append(got, p.Key)
		}
		slices.SortFunc(got, func(a, b store.Key) int { return bytes.Compare(a.Transaction[:], b.Transaction[:]) })
		return got, last
	}
	claim := func() []store.Parked {
		t.Helper()
		found, err := db.Store.ClaimInDoubt(t.Context(), 100, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	from := store.TransactionID{}
	if got, _ := hurry(from, 100); len(got) != 0 {
		t.Errorf("hurried %v, which are due", got)
	}
	if found := claim(); len(found) != 7 {
		t.Fatalf("claimed %d, want 7", len(found))
	}
	if err := db.Store.RecordAnswer(t.Context(), slices.Concat(keys, []store.Key{foreign, elsewhere}), "nobody", time.Hour); err != nil {
		t.Fatal(err)
	}
	if got, last := hurry(from, 2); !slices.Equal(got, keys[:2]) || last != keys[1].Transaction {
		t.Errorf("the first page: %v, then from %s", got, last)
	}
	if got, last := hurry(keys[1].Transaction, 2); !slices.Equal(got, keys[2:4]) || last != keys[3].Transaction {
		t.Errorf("the second page: %v, then from %s", got, last)
	}
	// Another server that begins later takes what is left.
	if got, last := hurry(from, 2); !slices.Equal(got, keys[4:]) || last != keys[4].Transaction {
		t.Errorf("the rest: %v, then from %s", got, last)
	}
	if got, last := hurry(from, 2); len(got) != 0 || last != from {
		t.Errorf("hurried twice: %v, then from %s", got, last)
	}
	if found := claim(); len(found) != 0 {
		t.Errorf("claimed %+v, which are being asked about", found)
	}
	// Asked about in vain, they wait anew, and can be hurried anew.
	if err := db.Store.RecordAnswer(t.Context(), keys, "nobody", -time.Second); err != nil {
		t.Fatal(err)
	}
	found := claim()
	if len(found) != 5 || found[0].Checks != 1 {
		t.Fatalf("claimed %+v", found)
	}
	if err := db.Store.RecordAnswer(t.Context(), keys, "nobody", time.Hour); err != nil {
		t.Fatal(err)
	}
	// What is decided, and not read by its shard's holder yet, leaves nothing to ask.
	db.Exec(t, `INSERT INTO outbox.tx (source_id, tx_id, state, shards, digest, log_xid) VALUES ($1, $2, 2, 1, 0, '10')`, mine.ID, [16]byte(keys[0].Transaction))
	if got, _ := hurry(from, 100); !slices.Equal(got, keys[1:]) {
		t.Errorf("hurried %v", got)
	}
	st := db.Open(t)
	st.Close()
	if _, last, err := st.HurryInDoubt(t.Context(), 1, "x", keys[0].Transaction, 1, time.Second); err == nil || last != keys[0].Transaction {
		t.Errorf("a closed store: from %s, %v", last, err)
	}
}

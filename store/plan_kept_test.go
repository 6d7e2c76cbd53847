package store_test

import (
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// manyParked is how many events are parked when plans that were made without them are used.
const manyParked = 20000

// planUser does something with n of the parked events again and again.
type planUser struct {
	t     *testing.T
	st    *store.Store
	epoch int64
	keys  []store.Key
	empty bool // there are none yet
}

func (u *planUser) found(n int, found []store.Parked, err error) {
	u.t.Helper()
	if err != nil || len(found) != n && !u.empty {
		u.t.Fatalf("found %d, %v; want %d", len(found), err, n)
	}
}

func (u *planUser) claim(n int) {
	u.t.Helper()
	found, err := u.st.ClaimInDoubt(u.t.Context(), n, time.Minute)
	u.found(n, found, err)
}

func (u *planUser) hurry(n int) {
	u.t.Helper()
	found, _, err := u.st.HurryInDoubt(u.t.Context(), 1, "db", store.TransactionID{}, n, time.Minute)
	u.found(n, found, err)
}

func (u *planUser) answer(n int) {
	u.t.Helper()
	if err := u.st.RecordAnswer(u.t.Context(), u.keys[:n], "nobody", time.Minute); err != nil {
		u.t.Fatal(err)
	}
}

func (u *planUser) unpark(n int) {
	u.t.Helper()
	s := store.Step{Epoch: u.epoch, Checkpoint: store.Checkpoint{Position: store.Position{XID: 10}}}
	for i := range n {
		s.Unpark = append(s.Unpark, at(10, int32(i), 0)) //nolint:gosec // few
	}
	step(u.t, u.st, s)
}

func (u *planUser) decide(n int) {
	u.t.Helper()
	s := store.Step{Epoch: u.epoch, Checkpoint: store.Checkpoint{Position: store.Position{XID: 10}}}
	for _, k := range u.keys[:n] {
		s.Decide = append(s.Decide, store.ParkedDecision{Key: k, State: store.Committed})
	}
	step(u.t, u.st, s)
}

// Of an empty table any index is as good as another, and so is reading all of it. PostgreSQL keeps the plans of statements that
// are sent often: when there are many rows a moment later, none of them may be read in vain.
func TestPlansOfATableThatWasEmpty(t *testing.T) {
	t.Parallel()
	for name, use := range map[string]func(*planUser, int){
		"claim": (*planUser).claim, "hurry": (*planUser).hurry, "answer": (*planUser).answer, "unpark": (*planUser).unpark, "decide": (*planUser).decide,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := storetest.New(t, storetest.WithShards(1))
			db.Exec(t, `ALTER TABLE outbox.parked SET (autovacuum_enabled = false)`)   // it may end what is kept
			st, err := store.Open(t.Context(), store.Config{DSN: db.DSN, MaxConns: 1}) // one session: it keeps the plans
			if err != nil {
				t.Fatal(err)
			}
			defer st.Close()
			u := &planUser{t: t, st: st, epoch: acquire(t, st, "a", time.Minute, 1, 1)[0].Epoch, empty: true}
			const n = 50
			for range n {
				u.keys = append(u.keys, storetest.Key(1))
			}
			for range 10 {
				use(u, n)
			}
			db.Exec(t, `
				INSERT INTO outbox.parked (xid, agg, seq, record, shard, cause, state, source_id, tx_id, aggregate_type, aggregate_id, topic, body, database, mode, check_at, checks)
				SELECT '10', hashint8extended(i, 0), i, 0, 0, 1, 0, 1, gen_random_uuid(), 'order', i::text, 'orders', '\x01', 'db', 1,
					now() + CASE WHEN $2 THEN interval '1 h' ELSE interval '-1 h' END, 1
				FROM generate_series(0, $1::int - 1) i`, manyParked, name == "hurry")
			u.keys, u.empty = nil, false
			for _, id := range storetest.Query[[16]byte](t, db, `SELECT tx_id FROM outbox.parked ORDER BY seq LIMIT $1`, n) {
				u.keys = append(u.keys, store.Key{Source: 1, Transaction: id})
			}
			rows := func(of string, want int) {
				t.Helper()
				storetest.Eventually(t, time.Minute, func() bool {
					return storetest.Query[int](t, db, `SELECT `+of+` FROM pg_stat_user_tables WHERE relname = 'parked'`)[0] == want
				})
			}
			rows("n_tup_ins", manyParked)
			reads := func() (tuples, blocks int) {
				return storetest.Query[int](t, db, `SELECT sum(idx_tup_read)::int + (SELECT seq_tup_read::int FROM pg_stat_user_tables WHERE relname = 'parked')
						FROM pg_stat_user_indexes WHERE relname = 'parked'`)[0],
					storetest.Query[int](t, db, `SELECT sum(idx_blks_hit + idx_blks_read)::int FROM pg_statio_user_indexes WHERE relname = 'parked'`)[0]
			}
			tuples, blocks := reads()
			use(u, n)
			st.Close() // a session that ends tells of what it has read
			rows("n_tup_upd + n_tup_del", n)
			tuplesAfter, blocksAfter := reads()
			if tuplesAfter-tuples > 10*n || blocksAfter-blocks > 40*n {
				t.Errorf("for %d rows of %d, %d rows or index entries and %d index pages were read", n, manyParked, tuplesAfter-tuples, blocksAfter-blocks)
			}
		})
	}
}

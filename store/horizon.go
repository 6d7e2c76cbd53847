package store

import (
	"context"
	"encoding/binary"
	"time"

	"github.com/jackc/pgx/v5"
)

// Horizon tells how far reading is behind writing because of transactions that own an xid, anywhere in the cluster.
type Horizon struct {
	XID       uint64        // everything below it is final
	Next      uint64        // nothing had begun from it on
	Held      time.Duration // how long the horizon has not moved although later xids exist; 0: it moves
	RoleAware bool          // foreign transactions were stepped over in the last read
}

// Horizon returns what the last Read saw.
func (r *Reader) Horizon() Horizon {
	h := &r.horizon
	held := time.Duration(0)
	if h.snapshot.xmin < h.snapshot.xmax {
		held = h.seen.Sub(h.plain.since)
	}
	return Horizon{XID: h.bound(), Next: h.snapshot.xmax, Held: held, RoleAware: h.bound() > h.snapshot.xmin}
}

// horizon watches the snapshots of a reader and knows which of the transactions in progress are foreign: they own an xid
// but never write the log, so that nothing can appear below theirs.
type horizon struct {
	snapshot snapshot
	seen     time.Time // when it was taken
	plain    hold      // of the snapshot's xmin, foreign ones included
	stepped  hold      // of the bound, foreign ones left out
	foreign  map[uint64]bool
	searched time.Time // when foreign ones were last looked for
}

// snapshot is a pg_snapshot: ids below xmin have ended, those at or above xmax had not begun, and of the rest exactly
// those in progress are listed, in ascending order.
type snapshot struct {
	xmin, xmax uint64
	inProgress []uint64
}

// hold is how long a value has not moved.
type hold struct {
	value uint64
	since time.Time
}

func (h *hold) observe(now time.Time, value uint64, mayHold bool) {
	if value != h.value || !mayHold {
		h.value, h.since = value, now
	}
}

// holdPatience is how long the horizon may rest before somebody is suspected of holding it, and the least time between
// two searches. Batches of our own writers take about that long.
const holdPatience = 5 * time.Millisecond

// observe takes in the snapshot of a read.
func (h *horizon) observe(now time.Time, binarySnapshot []byte) {
	h.snapshot.decode(binarySnapshot)
	h.seen = now
	for x := range h.foreign {
		if !h.snapshot.has(x) {
			delete(h.foreign, x) // it has ended
		}
	}
	h.plain.observe(now, h.snapshot.xmin, h.snapshot.xmin < h.snapshot.xmax)
	h.stepped.observe(now, h.bound(), h.bound() < h.snapshot.xmax)
}

// bound is below which everything is final: no transaction that may write the log is in progress there.
func (h *horizon) bound() uint64 {
	for _, x := range h.snapshot.inProgress {
		if !h.foreign[x] {
			return max(x, h.snapshot.xmin)
		}
	}
	return h.snapshot.xmax
}

// suspicious reports whether it is time to look for foreign transactions: the bound did not move between reads although
// later ids exist.
func (h *horizon) suspicious(now time.Time) bool {
	return h.bound() < h.snapshot.xmax && h.seen.Sub(h.stepped.since) >= holdPatience && now.Sub(h.searched) >= holdPatience
}

func (h *horizon) forget() { *h = horizon{} }

// foreignArray is the parameter of the read statement.
func (h *horizon) foreignArray(a *array) []byte {
	a.reset(oidXID8)
	for x := range h.foreign {
		a.int8(x)
	}
	return a.value()
}

func (s *snapshot) has(x uint64) bool {
	for _, y := range s.inProgress {
		if x == y {
			return true
		}
	}
	return false
}

// decode reads the binary form of pg_snapshot: count, xmin, xmax, ids.
func (s *snapshot) decode(b []byte) {
	*s = snapshot{inProgress: s.inProgress[:0]}
	if len(b) < 20 {
		return
	}
	n := int(binary.BigEndian.Uint32(b))
	s.xmin, s.xmax = binary.BigEndian.Uint64(b[4:]), binary.BigEndian.Uint64(b[12:])
	for at := 20; n > 0 && at+8 <= len(b); n, at = n-1, at+8 {
		s.inProgress = append(s.inProgress, binary.BigEndian.Uint64(b[at:]))
	}
}

// findForeign looks for transactions in progress that do not write the log.
//
// A backend that writes the log holds a lock on it before it gets its xid and until it ends: the append statement is a
// transaction of its own, and locks its tables before it runs. So the snapshot comes first, the locks second, the
// backends third, each in a statement of its own that sees newer state. An xid that was in progress at first and whose
// backend is still there at last was in progress all the time between; without a lock then, it is not a writer's. What
// is not seen among the backends (prepared transactions, backends hidden from this role) stays in the way.
func (r *Reader) findForeign(ctx context.Context) error {
	h := &r.horizon
	h.searched = time.Now()
	var b pgx.Batch
	var (
		inProgress []uint64
		writers    = map[int32]bool{}
		foreign    = map[uint64]bool{}
	)
	b.Queue(`SELECT x FROM pg_snapshot_xip(pg_current_snapshot()) x`).Query(func(rows pgx.Rows) (err error) {
		inProgress, err = pgx.CollectRows(rows, pgx.RowTo[uint64])
		return err
	})
	b.Queue(lockersSQL).Query(func(rows pgx.Rows) error {
		var pid int32
		_, err := pgx.ForEachRow(rows, []any{&pid}, func() error { writers[pid] = true; return nil })
		return err
	})
	b.Queue(ownersSQL).Query(func(rows pgx.Rows) error {
		var pid int32
		var short uint32
		_, err := pgx.ForEachRow(rows, []any{&pid, &short}, func() error {
			for _, x := range inProgress {
				// backend_xid lacks the epoch. All ids in progress lie within 2³¹ of each other.
				if uint32(x) == short && !writers[pid] { //nolint:gosec // the lower half is meant
					foreign[x] = true
				}
			}
			return nil
		})
		return err
	})
	if err := r.conn.SendBatch(ctx, &b).Close(); err != nil {
		return err
	}
	h.foreign = foreign
	return nil
}

// lockersSQL names the backends that hold or await a lock on the log; ownersSQL those that own an xid.
const (
	lockersSQL = `SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'relation' AND relation = 'outbox.log'::regclass
		AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND pid IS NOT NULL`
	ownersSQL = `SELECT pid, backend_xid FROM pg_stat_activity WHERE backend_xid IS NOT NULL`
)

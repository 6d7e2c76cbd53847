package store

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

// checkpoint is a shard's row, with pend decoded.
type checkpoint struct {
	shard int16
	Position
	oldest   uint64
	pend     []PendEntry
	pendErr  error // pend does not decode; only Verify goes on then
	offsets  []byte
	holder   string // "" when the lease has run out
	epoch    int64
	leaseEnd time.Time
	live     bool // the lease runs
}

// pending returns the entry at a position, or nil.
func (c *checkpoint) pending(p EventPosition) *PendEntry {
	i, found := slices.BinarySearchFunc(c.pend, p, func(e PendEntry, p EventPosition) int { return e.EventPosition.Compare(p) })
	if !found {
		return nil
	}
	return &c.pend[i]
}

// needed is the smallest xid from which on the shard's log may still be read, as the checkpoint tells: that of oldest
// while something is pending, else that of the position, whose own segments are done up to seq.
const neededFromLog = `(l.xid > s.xid OR l.xid = s.xid AND l.seq > s.seq OR l.xid >= s.oldest AND (s.pend <> '' OR s.oldest < s.xid))`

// readCheckpointsOfAll returns the checkpoints of all shards by number.
func readCheckpointsOfAll(ctx context.Context, q querier) ([]checkpoint, error) {
	const doing = "reading the checkpoints"
	rows, err := q.Query(ctx, `
		SELECT shard, xid, seq, oldest, pend, offsets, holder, epoch, coalesce(nullif(lease_until, '-infinity'), 'epoch'), lease_until > now()
		FROM outbox.shard ORDER BY shard`)
	if err != nil {
		return nil, storeError(doing, err)
	}
	found, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (c checkpoint, err error) {
		var pend []byte
		err = row.Scan(&c.shard, &c.XID, &c.Seq, &c.oldest, &pend, &c.offsets, &c.holder, &c.epoch, &c.leaseEnd, &c.live)
		c.pend, c.pendErr = DecodePend(pend)
		if !c.live {
			c.holder = ""
		}
		return c, err
	})
	return found, storeError(doing, err)
}

// readCheckpoints is readCheckpointsOfAll, but a pend that does not decode is an error.
func readCheckpoints(ctx context.Context, q querier) ([]checkpoint, error) {
	found, err := readCheckpointsOfAll(ctx, q)
	if err != nil {
		return nil, err
	}
	for _, c := range found {
		if c.pendErr != nil {
			return nil, fmt.Errorf("checkpoint of shard %d: %w", c.shard, c.pendErr)
		}
	}
	return found, nil
}

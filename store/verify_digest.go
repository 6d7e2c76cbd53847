package store

import (
	"context"
	"math/bits"

	"github.com/cespare/xxhash/v2"
)

// batchDigests computes the digests of the transactions of one batch whose first shard is the one that is walked over.
type batchDigests struct {
	xid    uint64
	order  []Key
	byKey  map[Key]*transactionDigest
	shards ShardSet // others that the transactions are in
	buffer []byte
}

type transactionDigest struct {
	xxhash.Digest
	row transactionRow
}

func (b *batchDigests) add(shard int16, r *Record, t transactionRow) {
	d := b.byKey[r.Key]
	if d == nil {
		if int16(bits.TrailingZeros64(uint64(t.shards))) != shard { //nolint:gosec // at most 64
			return
		}
		d = &transactionDigest{row: t}
		d.Reset()
		if b.byKey == nil {
			b.byKey = map[Key]*transactionDigest{}
		}
		b.byKey[r.Key] = d
		b.order = append(b.order, r.Key)
		b.shards |= t.shards &^ (1 << uint(shard))
	}
	b.buffer = appendEvent(b.buffer[:0], &r.Event)
	_, _ = d.Write(b.buffer)
}

// finishBatch compares the digests, after it has read what else the batch wrote.
func (w *logWalk) finishBatch(ctx context.Context) error {
	b := &w.batch
	if b.shards != 0 {
		segments, err := w.segmentsOf(ctx, b.xid, b.shards)
		if err != nil {
			return err
		}
		for i := range segments {
			// What does not decode is reported by the walk over its shard.
			_ = segments[i].Records(func(r *Record) bool {
				if b.byKey[r.Key] != nil && !r.IsDecision {
					b.add(segments[i].Shard, r, transactionRow{})
				}
				return true
			})
		}
	}
	for _, key := range b.order {
		d := b.byKey[key]
		if sum := d.Sum64(); sum != d.row.digest {
			w.violated(InvariantDigest, "source %d transaction %s: the events in batch %d have digest %x, tx says %x", key.Source, key.Transaction, b.xid, sum, d.row.digest)
		}
	}
	*b = batchDigests{buffer: b.buffer}
	return nil
}

package store

import "github.com/cespare/xxhash/v2"

// ShardSet is a set of shards, one bit each: at most 64 shards. It is the token that Prepare hands out.
type ShardSet uint64

// Add returns the set with shard in it.
func (s ShardSet) Add(shard int16) ShardSet { return s | 1<<uint(shard) }

// Has reports whether shard is in the set.
func (s ShardSet) Has(shard int16) bool { return s&(1<<uint(shard)) != 0 }

// ShardOf returns the shard of an aggregate. It must never change: it decides where stored events are found. The
// aggregate's hash is stable over processes and versions (xxhash64 of source, NUL, type, NUL, id).
func ShardOf(a Aggregate, shards int) int16 {
	return int16(a.Hash() % uint64(shards)) //nolint:gosec // shards ≤ 64
}

// Hash is the aggregate's stable 64-bit hash.
func (a Aggregate) Hash() uint64 {
	var d xxhash.Digest
	d.Reset()
	var b [5]byte
	b[0], b[1], b[2], b[3] = byte(a.Source), byte(a.Source>>8), byte(a.Source>>16), byte(a.Source>>24) //nolint:gosec // bytes of an int
	_, _ = d.Write(b[:])
	_, _ = d.WriteString(a.Type)
	_, _ = d.Write([]byte{0})
	_, _ = d.WriteString(a.ID)
	return d.Sum64()
}

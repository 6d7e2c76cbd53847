package server

import (
	"encoding/binary"

	"github.com/cespare/xxhash/v2"

	"github.com/outbox-platform/outbox/store"
)

// A token is the set of shards that hold a transaction's events, 8 bytes, and 4 bytes that tie it to its transaction.
// The check guards against mixed-up tokens, not against malice: a source can only harm its own transactions with one.
const tokenBytes = 12

// appendToken appends the token of a transaction.
func appendToken(b []byte, set store.ShardSet, k store.Key) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(set))
	return binary.BigEndian.AppendUint32(b, tokenCheck(set, k))
}

// readToken returns the set of shards in a token, or 0 when it is not a token of this transaction: the writer then looks
// the set up. Refusing it would delay a decision for nothing.
func readToken(token []byte, k store.Key, shards int) store.ShardSet {
	if len(token) != tokenBytes {
		return 0
	}
	set := store.ShardSet(binary.BigEndian.Uint64(token))
	if shards < 64 && set>>uint(shards) != 0 || binary.BigEndian.Uint32(token[8:]) != tokenCheck(set, k) {
		return 0
	}
	return set
}

func tokenCheck(set store.ShardSet, k store.Key) uint32 {
	var b [28]byte
	binary.BigEndian.PutUint64(b[:], uint64(set))
	binary.BigEndian.PutUint32(b[8:], uint32(k.Source)) //nolint:gosec // the bytes of an int32
	copy(b[12:], k.Transaction[:])
	return uint32(xxhash.Sum64(b[:]) >> 32) //nolint:gosec // half of a hash
}

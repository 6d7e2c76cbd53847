package relay

import (
	"encoding/binary"
	"math/rand/v2"
)

// Partition returns the partition of a topic with n > 0 partitions that a key belongs to: what Java's default partitioner
// and librdkafka's murmur2_random say, so that producers of all languages agree. An empty key is hashed like any other; a
// nil key has no place of its own and gets a random partition.
func Partition(key []byte, n int32) int32 {
	if key == nil {
		return rand.Int32N(n)
	}
	// The sign bit is cut off, as Java's Utils.toPositive does; taking the absolute value would differ for half the keys.
	return int32(murmur2(key)&0x7fffffff) % n
}

// murmur2 is the 32-bit MurmurHash2 with the seed of Java's org.apache.kafka.common.utils.Utils.murmur2.
func murmur2(key []byte) uint32 {
	const (
		seed = 0x9747b28c
		m    = 0x5bd1e995
		r    = 24
	)
	h := uint32(seed) ^ uint32(len(key))
	for len(key) >= 4 {
		k := binary.LittleEndian.Uint32(key) * m
		k ^= k >> r
		h = h*m ^ k*m
		key = key[4:]
	}
	switch len(key) {
	case 3:
		h ^= uint32(key[2]) << 16
		fallthrough
	case 2:
		h ^= uint32(key[1]) << 8
		fallthrough
	case 1:
		h = (h ^ uint32(key[0])) * m
	}
	h = (h ^ h>>13) * m
	return h ^ h>>15
}

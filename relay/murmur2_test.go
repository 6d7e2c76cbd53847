package relay

import "testing"

func TestMurmur2KnownVectors(t *testing.T) {
	tests := []struct {
		key  string
		want uint32
	}{
		// Java: clients/src/test/java/org/apache/kafka/common/utils/UtilsTest.java, testMurmur2.
		{"21", signed(-973932308)},
		{"foobar", signed(-790332482)},
		{"a-little-bit-long-string", signed(-985981536)},
		{"a-little-bit-longer-string", signed(-1486304829)},
		{"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", signed(-58897971)},
		{"abc", 479470107},
		// librdkafka: src/rdmurmur2.c, unittest_murmur2, made by the Java client.
		{"kafka", 0xd067cf64},
		{"giberish123456789", 0x8f552b0c},
		{"1234", 0x9fc97b14},
		{"234", 0xe7c009ca},
		{"34", 0x873930da},
		{"4", 0x5a4b5ca1},
		{"PreAmbleWillBeRemoved,ThePrePartThatIs", 0x78424f1c},
		{"reAmbleWillBeRemoved,ThePrePartThatIs", 0x4a62b377},
		{"eAmbleWillBeRemoved,ThePrePartThatIs", 0xe0e4e09e},
		{"AmbleWillBeRemoved,ThePrePartThatIs", 0x62b8b43f},
		{"", 0x106e08d9},
	}
	for _, tt := range tests {
		if got := murmur2([]byte(tt.key)); got != tt.want {
			t.Errorf("murmur2(%q) = %#x, want %#x", tt.key, got, tt.want)
		}
	}
}

func signed(v int32) uint32 { return uint32(v) }

func TestPartition(t *testing.T) {
	// "foobar" hashes to a negative number in Java: toPositive(-790332482) = 1357151166.
	if got := Partition([]byte("foobar"), 1000); got != 166 {
		t.Errorf("foobar of 1000: %d, want 166", got)
	}
	for range 10 {
		if got := Partition([]byte{}, 7); got != int32(0x106e08d9%7) {
			t.Errorf("an empty key must be hashed, got partition %d", got)
		}
	}
	seen := map[int32]bool{}
	for range 1000 {
		p := Partition(nil, 4)
		if p < 0 || p > 3 {
			t.Fatalf("nil key of 4 partitions: %d", p)
		}
		seen[p] = true
	}
	if len(seen) != 4 {
		t.Errorf("a nil key must be spread over all partitions, got %v", seen)
	}
}

package store

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// PendEntry is an event at or before a checkpoint's position that is neither done nor parked: the holder has it in memory
// only, and a new holder reads it from the log again. It carries the state of its transaction, because the tx row of a
// decided transaction may be gone before Kafka comes back.
type PendEntry struct {
	EventPosition
	Key   Key
	State State
}

// TopicOffset is the next offset that Kafka will give out in a partition, as far as a shard's acknowledged records tell:
// where a new holder starts to look for records that were in flight.
type TopicOffset struct {
	Topic     string
	Partition int32
	Offset    int64
}

// The first byte of an encoded list. An empty list is encoded as no bytes at all: the column's default.
const (
	pendFormat    = 1
	offsetsFormat = 1
)

// Bits of an entry's flag byte. The two lowest are the state.
const (
	pendStateMask = 3
	pendSameKey   = 4 // the key is the one of the entry before: not repeated
)

// EncodePend encodes entries for Checkpoint.Pend. They need not be sorted; of several at one position the first stays.
// The argument is not changed.
//
// Format: version, count, then per entry in position order: flags, uvarint difference of the xid, seq (the difference
// within one xid, else itself), record (the difference within one segment, else itself), and unless it is the key of the
// entry before: uvarint source and the 16 bytes of the transaction id.
func EncodePend(entries []PendEntry) []byte {
	if len(entries) == 0 {
		return nil
	}
	byPosition := func(a, b PendEntry) int { return a.EventPosition.Compare(b.EventPosition) }
	sorted := slices.Clone(entries)
	slices.SortStableFunc(sorted, byPosition)
	sorted = slices.CompactFunc(sorted, func(a, b PendEntry) bool { return byPosition(a, b) == 0 })

	b := make([]byte, 0, 8+len(sorted)*24)
	b = append(b, pendFormat)
	b = binary.AppendUvarint(b, uint64(len(sorted)))
	var last PendEntry
	for i, e := range sorted {
		flags := byte(e.State) & pendStateMask
		sameKey := i > 0 && e.Key == last.Key
		if sameKey {
			flags |= pendSameKey
		}
		b = append(b, flags)
		b = binary.AppendUvarint(b, e.XID-last.XID)
		seq, record := e.Seq, e.Record
		if i > 0 && e.XID == last.XID {
			if seq == last.Seq {
				record -= last.Record
			}
			seq -= last.Seq
		}
		b = binary.AppendUvarint(b, uint64(uint32(seq)))    //nolint:gosec // sorted: never negative
		b = binary.AppendUvarint(b, uint64(uint32(record))) //nolint:gosec // sorted: never negative
		if !sameKey {
			b = binary.AppendUvarint(b, uint64(uint32(e.Key.Source))) //nolint:gosec // ids are positive
			b = append(b, e.Key.Transaction[:]...)
		}
		last = e
	}
	return b
}

// DecodePend decodes what EncodePend wrote: entries in position order, one per position. Anything else is ErrInvalid.
func DecodePend(b []byte) ([]PendEntry, error) {
	if len(b) == 0 {
		return nil, nil
	}
	d := listDecoder{rest: b, what: "pend"}
	count := d.header(pendFormat, 4) // an entry is at least flags and three numbers
	entries := make([]PendEntry, 0, count)
	var last PendEntry
	for i := range count {
		flags := d.byte()
		e := PendEntry{State: State(flags & pendStateMask), Key: last.Key}
		delta := d.uvarint()
		e.XID = last.XID + delta
		e.Seq, e.Record = d.int32(), d.int32()
		if i > 0 && delta == 0 {
			if e.Seq == 0 {
				d.check(e.Record > 0, "not in order")
				e.Record += last.Record
			}
			e.Seq += last.Seq
		}
		if flags&pendSameKey == 0 {
			e.Key.Source = d.int32()
			copy(e.Key.Transaction[:], d.bytes(16))
		} else {
			d.check(i > 0, "the first entry has no key")
		}
		d.check(e.XID >= last.XID && e.Seq >= 0 && e.Record >= 0, "a number overflows")
		d.check(flags <= pendSameKey|pendStateMask && e.State <= Aborted, "unknown flags")
		if d.err != nil {
			return nil, d.err
		}
		entries = append(entries, e)
		last = e
	}
	return entries, d.end()
}

// EncodeOffsets encodes offsets for Checkpoint.Offsets. They need not be sorted; of several of one partition the first
// stays. The argument is not changed.
//
// Format: version, count, then per partition in order of topic and number: length of the topic plus one and the topic, or
// 0 for the topic of the entry before; uvarint partition; uvarint offset.
func EncodeOffsets(offsets []TopicOffset) []byte {
	if len(offsets) == 0 {
		return nil
	}
	sorted := slices.Clone(offsets)
	slices.SortStableFunc(sorted, compareTopicOffsets)
	sorted = slices.CompactFunc(sorted, func(a, b TopicOffset) bool { return compareTopicOffsets(a, b) == 0 })

	b := make([]byte, 0, 8+len(sorted)*16)
	b = append(b, offsetsFormat)
	b = binary.AppendUvarint(b, uint64(len(sorted)))
	for i, o := range sorted {
		if i > 0 && o.Topic == sorted[i-1].Topic {
			b = append(b, 0)
		} else {
			b = binary.AppendUvarint(b, uint64(len(o.Topic))+1)
			b = append(b, o.Topic...)
		}
		b = binary.AppendUvarint(b, uint64(uint32(o.Partition))) //nolint:gosec // partitions are not negative
		b = binary.AppendUvarint(b, uint64(o.Offset))            //nolint:gosec // offsets are not negative
	}
	return b
}

// DecodeOffsets decodes what EncodeOffsets wrote, in order of topic and partition. Anything else is ErrInvalid.
func DecodeOffsets(b []byte) ([]TopicOffset, error) {
	if len(b) == 0 {
		return nil, nil
	}
	d := listDecoder{rest: b, what: "offsets"}
	count := d.header(offsetsFormat, 3)
	offsets := make([]TopicOffset, 0, count)
	var last TopicOffset
	for i := range count {
		o := TopicOffset{Topic: last.Topic}
		if n := d.uvarint(); n > 0 {
			o.Topic = string(d.bytes(n - 1))
		} else {
			d.check(i > 0, "the first entry has no topic")
		}
		o.Partition = d.int32()
		offset := d.uvarint()
		o.Offset = int64(offset) //nolint:gosec // checked below
		d.check(o.Offset >= 0, "a number overflows")
		d.check(i == 0 || compareTopicOffsets(last, o) < 0, "not in order")
		if d.err != nil {
			return nil, d.err
		}
		offsets = append(offsets, o)
		last = o
	}
	return offsets, d.end()
}

func compareTopicOffsets(a, b TopicOffset) int {
	if c := strings.Compare(a.Topic, b.Topic); c != 0 {
		return c
	}
	return int(a.Partition) - int(b.Partition)
}

// listDecoder reads one of the lists above. The first error stays; after it everything reads as zero.
type listDecoder struct {
	rest []byte
	what string
	err  error
}

func (d *listDecoder) check(ok bool, problem string) {
	if !ok && d.err == nil {
		d.err = fmt.Errorf("decode %s: %s: %w", d.what, problem, ErrInvalid)
		d.rest = nil
	}
}

// header reads version and count. No list is believed to be longer than its bytes allow, so that a damaged count cannot
// allocate much.
func (d *listDecoder) header(version byte, atLeast int) int {
	d.check(d.byte() == version, "unknown version")
	n := d.uvarint()
	d.check(n > 0 && n <= uint64(len(d.rest)/atLeast), "impossible count")
	if d.err != nil {
		return 0
	}
	return int(n) //nolint:gosec // bounded by the length
}

func (d *listDecoder) byte() byte {
	if b := d.bytes(1); len(b) == 1 {
		return b[0]
	}
	return 0
}

func (d *listDecoder) bytes(n uint64) []byte {
	if n > uint64(len(d.rest)) {
		d.check(false, "cut short")
		return nil
	}
	b := d.rest[:n]
	d.rest = d.rest[n:]
	return b
}

func (d *listDecoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.rest)
	if n <= 0 {
		d.check(false, "bad number")
		return 0
	}
	d.rest = d.rest[n:]
	return v
}

func (d *listDecoder) int32() int32 {
	v := d.uvarint()
	d.check(v <= 1<<31-1, "a number overflows")
	if d.err != nil {
		return 0
	}
	return int32(v) //nolint:gosec // checked
}

func (d *listDecoder) end() error {
	d.check(len(d.rest) == 0, "bytes left over")
	return d.err
}

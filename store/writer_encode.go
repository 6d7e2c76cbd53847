package store

import (
	"math/bits"
	"sync"
	"time"

	"github.com/cespare/xxhash/v2"
)

// encoding is what a writer keeps with a request. It is filled in by the goroutine that submits, so that the cost of
// encoding is not paid by the one goroutine that everybody waits for.
type encoding struct {
	as       Kind // what it is written as: a Publish that finds its prepared twin becomes a Commit
	lost     bool // while its batch is split
	tries    uint8
	ordinal  int32 // in the batch, from 1; prepares and decisions are counted apart
	shards   ShardSet
	digest   uint64
	deadline time.Time // for attempts while the store is away
	queued   time.Time
	payload  *payload // only for kinds that store events
	size     int64
	next     *Request // the next request of the same key, held until this one is answered
	last     *Request // of the chain; only in its first
}

// payload is the encoded content of a Prepare or Publish, without ordinals: these are known when a batch is built.
type payload struct {
	b      []byte
	head   int // b[:head] is the head
	events []eventRef
}

type eventRef struct {
	shard      int16
	start, end int
}

// payloads are used again; big ones are left to the garbage collector, or a burst of them would be kept for ever.
var payloads = sync.Pool{New: func() any { return new(payload) }}

const keptPayload = 64 << 10

// perRequest is what a request costs beside its bytes.
const perRequest = 512

func (e *encoding) encode(r *Request, shards int, maxWait time.Duration, now time.Time) {
	*e = encoding{as: r.Kind, queued: now, deadline: now.Add(maxWait), size: perRequest}
	if !r.Kind.stores() {
		e.shards = r.Shards
		if e.shards>>uint(shards-1)>>1 != 0 { //nolint:gosec // 1 ≤ shards ≤ 64
			e.shards = 0 // not a token of this store: look it up
		}
		return
	}
	p := payloads.Get().(*payload) //nolint:forcetypeassert,errcheck // nothing else is put there
	p.b = appendHead(p.b[:0], r.Key, now.UnixNano(), r.Database)
	p.head = len(p.b)
	p.events = p.events[:0]
	for i := range r.Events {
		ev := &r.Events[i]
		shard := ShardOf(Aggregate{Source: r.Key.Source, Type: ev.AggregateType, ID: ev.AggregateID}, shards)
		start := len(p.b)
		p.b = appendEvent(p.b, ev)
		p.events = append(p.events, eventRef{shard: shard, start: start, end: len(p.b)})
		e.shards = e.shards.Add(shard)
	}
	e.payload = p
	e.digest = p.digest(e.shards)
	e.size += int64(len(p.b))
}

// digest is a hash of the events only: a Publish has the digest of the Prepare with the same events, and a Prepare that is
// sent again has the same although it is prepared at another time. Events are taken shard by shard, because that is the
// order that the log keeps: Verify computes it again from there.
func (p *payload) digest(shards ShardSet) uint64 {
	if shards&(shards-1) == 0 {
		return xxhash.Sum64(p.b[p.head:])
	}
	var d xxhash.Digest
	d.Reset()
	for ; shards != 0; shards &= shards - 1 {
		shard := int16(bits.TrailingZeros64(uint64(shards))) //nolint:gosec // less than 64
		for _, ref := range p.events {
			if ref.shard == shard {
				_, _ = d.Write(p.b[ref.start:ref.end])
			}
		}
	}
	return d.Sum64()
}

// release gives the payload back.
func (e *encoding) release() {
	if e.payload != nil && cap(e.payload.b) <= keptPayload {
		payloads.Put(e.payload)
	}
	e.payload = nil
}

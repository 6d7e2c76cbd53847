package relay

import (
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
)

// benchLog is a log in memory: transactions of one event of 1 KiB each, their commits some segments later.
func benchLog(transactions, aggregates int) []store.Segment {
	var segments []store.Segment
	body := []byte{1}
	cut := func() {
		segments = append(segments, store.Segment{Position: store.Position{XID: uint64(len(segments) + 1)}, Body: body})
		body = []byte{1}
	}
	payload := make([]byte, 1024)
	commit := func(n int) {
		k := store.Key{Source: 1}
		binary.BigEndian.PutUint64(k.Transaction[:], uint64(n))
		body = append(body, 3, 0, 17, 1)
		body = append(body, k.Transaction[:]...)
	}
	const behind = 32
	for n := range transactions + behind {
		if n < transactions {
			r := store.Record{Key: store.Key{Source: 1}, PreparedAt: 1, Database: &store.DatabaseTransaction{XID: 1, Mode: 1, Database: "default"},
				Event: store.Event{Topic: "orders", AggregateType: "order", AggregateID: fmt.Sprint("order-", n%aggregates),
					Type: "order.changed", ContentType: "application/json", Payload: payload}}
			binary.BigEndian.PutUint64(r.Key.Transaction[:], uint64(n))
			binary.BigEndian.PutUint64(r.Event.ID[:], uint64(n))
			body = append(body, store.EncodeEvent(nil, &r)[1:]...)
		}
		if n >= behind {
			commit(n - behind)
		}
		if len(body) > 7000 {
			cut()
		}
	}
	cut()
	return segments
}

// BenchmarkCore measures what the relay itself costs per event: decoding, ordering, making the record, taking the report and
// writing checkpoints, with a sink that acknowledges at once.
func BenchmarkCore(b *testing.B) {
	log := benchLog(50_000, 1000)
	b.ReportAllocs()
	b.ResetTimer()
	done := 0
	for done < b.N {
		l := modelLimits()
		l.memoryBytes, l.maxUnacked, l.maxPend, l.stepRows = 64<<20, 10_000, 1000, 1000
		c := newCore(l)
		c.sources[1] = &store.Source{ID: 1, Name: "shop", RecordProfile: 1, CloudEventsSource: "/shop"}
		now := time.Unix(1, 0)
		s := c.acquire(0, 1, store.Checkpoint{Position: store.Position{Seq: -1}})
		s.trustUntil = now.Add(time.Hour)
		if err := c.restore(s, &inheritance{}, now); err != nil {
			b.Fatal(err)
		}
		c.start(s, nil, now)
		for i := range log {
			if err := c.feed(s, log[i].Position, len(log[i].Body), log[i].Records, now); err != nil {
				b.Fatal(err)
			}
			for e := c.next(now); e != nil; e = c.next(now) {
				e.delivery = Delivery{Record: BuildRecord(c.sources[1], s.number, s.epoch, &e.rec), Opaque: e}
				c.report(e, 0, int64(done), nil, now)
				done++
			}
			if i%100 == 0 && s.stepDue() {
				c.step(s, now)
				c.stepped(s)
			}
		}
	}
}

package relay

import (
	"errors"
	"time"

	"github.com/outbox-platform/outbox/internal/fault"
)

const (
	// deliverAtOnce bounds the deliveries between two looks at reports.
	deliverAtOnce = 2048
	// fullPause is how long to wait when the sink has no room and no report makes some.
	fullPause = 5 * time.Millisecond
	// rebuildPause is how long to wait when the producer is being rebuilt.
	rebuildPause = 50 * time.Millisecond
)

// deliver hands events to the sink as long as it takes them. The lease is checked before each.
func (r *Relay) deliver(now time.Time) {
	r.more = false
	if now.Before(r.deliverAt) || r.reports == nil {
		return
	}
	c := r.core
	for range deliverAtOnce {
		now = r.now()
		e := c.next(now)
		if e == nil {
			return
		}
		s := e.shard
		e.delivery = Delivery{
			Record: BuildRecord(c.sources[e.rec.Key.Source], s.number, s.epoch, &e.rec), Shard: s.number, Epoch: s.epoch, Opaque: e,
		}
		fault.Point("relay.before-deliver")
		if fault.Mutant("M3") { // handed over is published
			d := &Delivery{Record: e.delivery.Record}
			if r.sink.Deliver(d) == nil {
				r.takeReport(e, 0, 0, nil, now)
				continue
			}
		}
		err := r.sink.Deliver(&e.delivery)
		if err == nil {
			continue
		}
		if errors.Is(err, ErrSinkFull) {
			c.refused(e)
			r.deliverAt = now.Add(fullPause)
			return
		}
		if r.takeReport(e, 0, 0, err, now) >= ClassCluster {
			r.deliverAt = now.Add(rebuildPause)
			return
		}
	}
	r.more = true
}

// takeReports takes a report and those that are there already, but not so many that nothing else is done.
func (r *Relay) takeReports(d *Delivery) {
	now := r.now()
	r.deliverAt = time.Time{}
	for n := 1; ; n++ {
		if d == nil { // the sink was closed while we run: nothing will be reported any more
			r.sinkClosed()
			return
		}
		if e, ours := d.Opaque.(*event); ours || !fault.Mutant("M3") {
			r.takeReport(e, d.Partition, d.Offset, d.Err, now)
		}
		if n == deliverAtOnce {
			return
		}
		select {
		case d = <-r.reports:
		default:
			return
		}
	}
}

// sinkClosed stops waiting for reports.
func (r *Relay) sinkClosed() {
	r.reports = nil
	r.log.Error("the sink was closed before the relay ended: nothing more is delivered")
}

// takeReport takes what became of one event, and returns the class of the failure, 0 for none.
func (r *Relay) takeReport(e *event, partition int32, offset int64, err error, now time.Time) Class {
	if err == nil {
		fault.Point("relay.after-ack")
		r.metrics.acknowledged(e, now)
		r.core.report(e, partition, offset, nil, now)
		return 0
	}
	failure := asSinkError(err)
	r.logFailure(e, failure, now)
	s := e.shard
	r.core.report(e, partition, offset, failure, now)
	if failure.Class == ClassFatal {
		r.cutOff(s, now)
	}
	return failure.Class
}

// logFailure logs a failed delivery: each refused record, and of the others one in a while.
func (r *Relay) logFailure(e *event, failure *SinkError, now time.Time) {
	if failure.Class == ClassPurged || e.shard.phase == phaseGone {
		return
	}
	if failure.Class != ClassRecord {
		if now.Sub(r.failureLogged) < time.Second {
			return
		}
		r.failureLogged = now
	}
	r.log.Warn("delivery failed", "class", failure.Class.String(), "code", failure.Code, "detail", failure.Detail,
		"topic", e.rec.Event.Topic, "shard", e.shard.number, "epoch", e.shard.epoch, "source", e.rec.Key.Source,
		"transaction_id", e.rec.Key.Transaction.String(), "aggregate_type", e.rec.Event.AggregateType,
		"aggregate_id", e.rec.Event.AggregateID, "attempt", e.attempts+1)
}

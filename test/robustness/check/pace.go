package check

import (
	"cmp"
	"math"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/test/robustness/driver"
)

// Limits that nobody's machine is too slow for. What is judged by them was held up by no fault and by no earlier event.
const (
	// healing is how long after its end a fault still explains that something is slow: a lease must run out, connections are
	// tried again, a backlog goes out.
	healing = 20 * time.Second
	// tornLimit bounds how long a part of a transaction may be visible without the rest.
	tornLimit = 30 * time.Second
	// prepareLimit and publishLimit bound medians.
	prepareLimit = 3 * time.Second
	publishLimit = 30 * time.Second
	// behind is the median from COMMIT to Kafka above which a run is one long backlog: shards are then at different places of
	// it, and a transaction across them is torn for as long as they are apart.
	behind = 5 * time.Second
	// enough is how many samples make a median.
	enough = 100
	// waiting is how long an aggregate's next event may be due before the aggregate is said to wait.
	waiting = time.Second
)

// Spread is a distribution, in seconds.
type Spread struct {
	N   int     `json:"n"`
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

// SpreadOf is the distribution of times in seconds, by the nearest rank.
func SpreadOf(times []float64) Spread {
	if len(times) == 0 {
		return Spread{}
	}
	times = slices.Sorted(slices.Values(times))
	at := func(part float64) float64 { return times[int(math.Ceil(part*float64(len(times))))-1] }
	return Spread{N: len(times), P50: at(.5), P99: at(.99), Max: at(1)}
}

// seconds, to the tenth of a millisecond.
func seconds(ns int64) float64 { return math.Round(float64(ns)/1e5) / 1e4 }

// Pace is how fast the run was as the services and a consumer saw it.
type Pace struct {
	// Torn is the time from a transaction's first visible event to its last, of those with several; Unexplained what is left of
	// it for any one event when the time is taken off in which a fault or an earlier event of its aggregate held it up.
	Torn        Spread `json:"torn"`
	Unexplained Spread `json:"torn_unexplained"`
	// Prepare is from the call to its answer, Publish from the local COMMIT of a transaction that the platform is told of at
	// once to each event being visible, FoundOut the same of one that it is not told of. Calm is without a fault.
	Prepare      Spread `json:"prepare"`
	PrepareCalm  Spread `json:"prepare_calm"`
	Publish      Spread `json:"publish"`
	PublishCalm  Spread `json:"publish_calm"`
	FoundOut     Spread `json:"found_out"`
	FoundOutCalm Spread `json:"found_out_calm"`
	// Recovery is, for each strike of a fault, how many seconds after its end the last aggregate went on whose next event had
	// become due meanwhile and waited for more than a second; 0: none had to. Other faults at that time hold it up too.
	Recovery map[string][]float64 `json:"recovery"`
	// Unseen counts committed events on Kafka that the consumer which watched did not get to.
	Unseen int `json:"unseen"`
}

// told are the profiles in which the platform is told of the COMMIT at once.
var told = map[string]bool{driver.Plain: true, driver.Savepoint: true, driver.Duplicate: true, driver.Sync: true}

// due says of a committed event what had to happen before it could be published.
type due struct {
	*known
	seen int64
	// before is when the event before it in its aggregate was seen, decided when the last transaction before it that did not
	// commit was decided; 0: there is none. math.MaxInt64: nobody knows.
	before, decided int64
}

// pace judges how long things took: I3 during the run, I15.
func (c *checker) pace() {
	if len(c.Seen) == 0 {
		return
	}
	c.summary.Pace = &Pace{Recovery: map[string][]float64{}}
	faults := strikes(c.Entries)
	all := c.dues()
	c.latencies(all, merged(faults, int64(healing)))
	c.torn(all, merged(slices.DeleteFunc(slices.Clone(faults), func(w window) bool { return !c.Disturbing[w.fault] }), int64(healing)))
	c.recoveries(all, faults)
}

// dues are all committed events that were seen, an aggregate's in the order of its versions. What did not commit comes before
// the events whose versions it had.
func (c *checker) dues() []due {
	aggregates := map[string][]*known{}
	for _, t := range c.order {
		for _, k := range t.events {
			aggregates[k.Aggregate] = append(aggregates[k.Aggregate], k)
		}
	}
	all := make([]due, 0, len(c.Seen))
	for _, events := range aggregates {
		slices.SortFunc(events, func(a, b *known) int {
			return cmp.Or(cmp.Compare(a.Version, b.Version), boolCompare(a.tx.committed, b.tx.committed))
		})
		var before, decided int64
		for _, k := range events {
			if !k.tx.committed {
				decided = max(decided, c.decidedAt(k.tx))
				continue
			}
			seen, there := c.Seen[k.ID]
			switch {
			case there:
				all = append(all, due{k, seen, before, decided})
			case k.records > 0:
				c.summary.Pace.Unseen++
				fallthrough
			default:
				seen = math.MaxInt64
			}
			before = max(before, seen)
		}
	}
	return all
}

func boolCompare(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// decidedAt is when the platform decided a transaction; 0: it never held it. A time before the transaction was taken from a
// clock that had jumped.
func (c *checker) decidedAt(t *tx) int64 {
	at, decided := c.Decided[t.id]
	switch {
	case c.States[t.id] == none:
		return 0
	case !decided || at < t.from:
		return math.MaxInt64
	}
	return at
}

// latencies: I15.
func (c *checker) latencies(all []due, faults windows) {
	var prepare, prepareCalm, publish, publishCalm, found, foundCalm []float64
	measure := func(every, calm *[]float64, from, to int64) {
		to = max(to, from)
		*every = append(*every, seconds(to-from))
		if faults.outside(from, to+1) == to+1-from {
			*calm = append(*calm, seconds(to-from))
		}
	}
	for _, t := range c.order {
		if t.prepared > 0 {
			measure(&prepare, &prepareCalm, t.from, t.prepared)
		}
	}
	for _, d := range all {
		switch {
		case d.tx.local == 0:
		case told[d.tx.profile]:
			measure(&publish, &publishCalm, d.tx.local, d.seen)
		case d.tx.profile == driver.Forget:
			measure(&found, &foundCalm, d.tx.local, d.seen)
		}
	}
	p := c.summary.Pace
	p.Prepare, p.PrepareCalm = SpreadOf(prepare), SpreadOf(prepareCalm)
	p.Publish, p.PublishCalm = SpreadOf(publish), SpreadOf(publishCalm)
	p.FoundOut, p.FoundOutCalm = SpreadOf(found), SpreadOf(foundCalm)
	if c.Saturated {
		return
	}
	for _, x := range []struct {
		what  string
		of    Spread
		limit time.Duration
	}{{"Prepare was answered", p.PrepareCalm, prepareLimit}, {"a committed event was visible", p.PublishCalm, publishLimit}} {
		if x.of.N >= enough && x.of.P50 > x.limit.Seconds() {
			c.violate("I15", "", uuid.Nil, "without a fault %s after %.1f s in the median of %d, which may be %s", x.what, x.of.P50, x.of.N, x.limit)
		}
	}
}

// torn: I3 during the run. A part of a transaction being visible says that the platform knows its decision, so that only the
// way to Kafka, what is before it in its aggregate, and an operator's help may hold the rest up.
func (c *checker) torn(all []due, faults windows) {
	for _, d := range all {
		t := d.tx
		if t.first == 0 || d.seen < t.first {
			t.first = d.seen
		}
		t.last = max(t.last, d.seen)
	}
	for _, d := range all {
		since := max(d.tx.first, d.before, d.decided)
		if len(d.tx.events) < 2 || c.Blocked[d.Aggregate] || since >= d.seen {
			continue
		}
		if held := faults.outside(since, d.seen); held > d.tx.held {
			d.tx.held, d.tx.late = held, d.known
		}
	}
	p := c.summary.Pace
	judged := !c.Saturated && p.Publish.P50 <= behind.Seconds()
	var torn, unexplained []float64
	for _, t := range c.order {
		if len(t.events) < 2 || t.first == 0 {
			continue
		}
		torn, unexplained = append(torn, seconds(t.last-t.first)), append(unexplained, seconds(t.held))
		if judged && t.held > int64(tornLimit) {
			c.violate("I3", t.late.Aggregate, t.id, "transaction %s (%s) was visible in parts for %.1f s, and for %.1f s of it nothing held up event %s",
				t.id, t.profile, seconds(t.last-t.first), seconds(t.held), t.late.ID)
		}
	}
	p.Torn, p.Unexplained = SpreadOf(torn), SpreadOf(unexplained)
}

// recoveries looks at every event that waited for long, and became due during a fault or just before.
func (c *checker) recoveries(all []due, faults []window) {
	faults = slices.DeleteFunc(slices.Clone(faults), func(w window) bool { return !w.hit }) // in the order of their ends
	took := make([]int64, len(faults))
	for _, d := range all {
		from := max(d.tx.local, d.before)
		if d.tx.local == 0 || d.before == math.MaxInt64 || d.seen-from <= int64(waiting) {
			continue
		}
		i, _ := slices.BinarySearchFunc(faults, from, func(w window, at int64) int { return cmp.Compare(w.to, at) })
		for ; i < len(faults) && faults[i].to < d.seen; i++ {
			if faults[i].from-int64(waiting) <= from {
				took[i] = max(took[i], d.seen-faults[i].to)
			}
		}
	}
	for i, w := range faults {
		c.summary.Pace.Recovery[w.fault] = append(c.summary.Pace.Recovery[w.fault], seconds(took[i]))
	}
}

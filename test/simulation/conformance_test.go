package simulation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// subject is a store that a script of operations is run against: the one in memory, or the real one.
type subject interface {
	relay.Store
	ClaimInDoubt(ctx context.Context, limit int, lease time.Duration) ([]store.Parked, error)
	RecordAnswer(ctx context.Context, keys []store.Key, answer string, next time.Duration) error
	RequestOperation(ctx context.Context, a store.Aggregate, action store.Action, actor, reason string) (*store.Operation, error)

	// writer is that of a server.
	writer(server int) *store.SteppedWriter
	// run begins what stores a batch of a server, settle waits until all that was begun has ended or waits for somebody, and
	// busy tells which.
	run(server int, put func())
	settle()
	busy(server int) bool
	// hold keeps batches of a server from committing once they are stored; cut breaks the connection of one that waits.
	hold(server int, held bool)
	cut(server int)
	// read reads the log. wanted is what the other store returned: a real one may take a while to show it all.
	read(cursors []store.Cursor, limit int, wanted func([]store.Segment) bool) ([]store.Segment, error)
	readAt(shard int16, at []store.Position) ([]store.Segment, error)
	// disconnect breaks the connection of the reader.
	disconnect()
	// pass lets time pass, upkeep makes a pass of maintenance.
	pass(d time.Duration)
	upkeep(full bool, logRetention, retention, resolutionRetention time.Duration) string
	// dump is all that is stored.
	dump() *dump
}

// dump is the content of a store.
type dump struct {
	tx         []dumpedTx
	log        []segment
	parked     []dumpedParked
	dead       []store.DeadLetter
	operations []store.Operation // that are not done
	shards     []dumpedShard
	open       int   // the number of the open generation in the ring
	used       []int // those that are not empty
}

type dumpedTx struct {
	store.Row
	logXID   uint64
	decided  bool
	resolved string // by what and whom, if not by the client
}

type dumpedParked struct {
	store.Parked
	shard int16
	asked bool // it is to be asked about
}

type dumpedShard struct {
	store.Checkpoint
	epoch  int64
	holder string
	leased bool
}

// place is a position in a store's log, with the number of the batch in the place of its xid: those differ.
type place struct {
	batch       int // 0: before the first
	seq, record int32
}

// side is a subject with what a script knows of it.
type side struct {
	subject
	batches map[uint64]int
	xids    []uint64 // by batch; the first is 0
	now     *dump
	records map[int16]map[place]store.Record
	order   map[int16][]place // of records, by shard
	ends    map[int16][]place // of segments
}

func newSide(s subject) *side {
	return &side{subject: s, batches: map[uint64]int{0: 0}, xids: []uint64{0}}
}

// look takes a dump, and gives numbers to the batches that are new in it.
func (s *side) look() {
	s.now = s.dump()
	var fresh []uint64
	for i := range s.now.log {
		if x := s.now.log[i].XID; s.batches[x] == 0 && !slices.Contains(fresh, x) {
			fresh = append(fresh, x)
		}
	}
	for i := range s.now.tx {
		if x := s.now.tx[i].logXID; s.batches[x] == 0 && !slices.Contains(fresh, x) {
			fresh = append(fresh, x)
		}
	}
	slices.Sort(fresh)
	for _, x := range fresh {
		s.batches[x] = len(s.xids)
		s.xids = append(s.xids, x)
	}
	s.records, s.order, s.ends = map[int16]map[place]store.Record{}, map[int16][]place{}, map[int16][]place{}
	for i := range s.now.log {
		g := &s.now.log[i]
		if s.records[g.Shard] == nil {
			s.records[g.Shard] = map[place]store.Record{}
		}
		_ = g.Records(func(r *store.Record) bool {
			at := s.place(store.EventPosition{Position: g.Position, Record: r.Number})
			s.records[g.Shard][at] = *r
			if !r.IsDecision {
				s.order[g.Shard] = append(s.order[g.Shard], at)
			}
			return true
		})
		s.ends[g.Shard] = append(s.ends[g.Shard], s.place(store.EventPosition{Position: g.Position}))
	}
}

func (s *side) place(p store.EventPosition) place {
	n, known := s.batches[p.XID]
	if !known {
		n = -1
	}
	return place{n, p.Seq, p.Record}
}

func (s *side) at(p place) store.EventPosition {
	return store.EventPosition{Position: store.Position{XID: s.xids[p.batch], Seq: p.seq}, Record: p.record}
}

// text is what of a dump must be the same.
func (s *side) text() []string {
	d := s.now
	var out []string
	line := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	order := slices.Clone(s.xids)
	slices.Sort(order)
	batches := make([]int, len(order))
	for i, x := range order {
		batches[i] = s.batches[x]
	}
	line("batches in the order of their xids: %v", batches)
	for i := range d.tx {
		t := &d.tx[i]
		line("tx %s: %s, shards %b, digest %x, batch %d, decided %v, resolved %q", keyText(t.Key), t.State, t.Shards, t.Digest, s.batches[t.logXID], t.decided, t.resolved)
	}
	for i := range d.log {
		line("log, generation %d: %s", d.log[i].generation, s.segmentText(&d.log[i].Segment))
	}
	for i := range d.parked {
		line("parked in shard %d: %s, asked %v", d.parked[i].shard, s.parkedText(&d.parked[i].Parked), d.parked[i].asked)
	}
	for i := range d.dead {
		line("dead letter %s", s.deadText(&d.dead[i]))
	}
	for i := range d.operations {
		line("operation %s", operationText(&d.operations[i]))
	}
	for i := range d.shards {
		line("shard %d: epoch %d of %q, leased %v, %s", i, d.shards[i].epoch, d.shards[i].holder, d.shards[i].leased, s.checkpointText(&d.shards[i].Checkpoint))
	}
	line("generation %d is open, %v are used", d.open, d.used)
	return out
}

func keyText(k store.Key) string {
	return fmt.Sprintf("%d:%d", k.Source, int(k.Transaction[14])<<8|int(k.Transaction[15]))
}

func aggregateText(a store.Aggregate) string { return fmt.Sprintf("%d/%s/%s", a.Source, a.Type, a.ID) }

func (s *side) segmentText(g *store.Segment) string {
	text := fmt.Sprintf("shard %d at %v, stale %v:", g.Shard, s.place(store.EventPosition{Position: g.Position}), g.Stale)
	err := g.Records(func(r *store.Record) bool {
		text += " [" + recordText(r) + "]"
		return true
	})
	if err != nil {
		text += err.Error()
	}
	return text
}

func recordText(r *store.Record) string {
	if r.IsDecision {
		return fmt.Sprintf("%d: %s is %s", r.Number, keyText(r.Key), r.State)
	}
	e := &r.Event
	return fmt.Sprintf("%d: %s %s event %d to %s of %s/%s, %d bytes %.12q, database %v", r.Number, keyText(r.Key), r.State, e.ID[0], e.Topic,
		e.AggregateType, e.AggregateID, len(e.Payload), e.Payload, databaseText(r.Database))
}

func databaseText(d *store.DatabaseTransaction) string {
	if d == nil {
		return "none"
	}
	return fmt.Sprintf("%+v", *d)
}

func bodyText(body []byte) string {
	if body == nil {
		return "none"
	}
	r, err := store.DecodeEvent(body)
	if err != nil {
		return err.Error()
	}
	return recordText(r)
}

func (s *side) parkedText(p *store.Parked) string {
	next := "never"
	if !p.NextTry.IsZero() {
		next = p.NextTry.UTC().Format(time.TimeOnly)
	}
	return fmt.Sprintf("%v %s of %s, %s, cause %d, attempts %d, error %q, next try %s, checks %d, answer %q, database %s, body [%s]", s.place(p.EventPosition),
		keyText(p.Key), aggregateText(p.Aggregate), p.State, p.Cause, p.Attempts, p.Error, next, p.Checks, p.LastAnswer, databaseText(p.Database), bodyText(p.Body))
}

func (s *side) deadText(d *store.DeadLetter) string {
	return fmt.Sprintf("%v in shard %d, %s of %s, attempts %d, error %q, queue %v, body [%s]", s.place(d.EventPosition), d.Shard, keyText(d.Key),
		aggregateText(d.Aggregate), d.Attempts, d.Error, d.Queue, bodyText(d.Body))
}

func operationText(o *store.Operation) string {
	return fmt.Sprintf("%d in shard %d: %s %s, done %v, outcome %q of %d", o.ID, o.Shard, o.Action, aggregateText(o.Aggregate), o.Done, o.Outcome, o.Events)
}

func (s *side) checkpointText(c *store.Checkpoint) string {
	pend, err := store.DecodePend(c.Pend)
	if err != nil {
		return err.Error()
	}
	text := fmt.Sprintf("checkpoint %v, oldest %d, offsets %x, pending", s.place(store.EventPosition{Position: c.Position}), s.batches[c.Oldest], c.Offsets)
	for _, e := range pend {
		text += fmt.Sprintf(" %v %s %s", s.place(e.EventPosition), keyText(e.Key), e.State)
	}
	return text
}

// answer says what an error means to a caller.
func answer(err error) string {
	var decided *store.DecidedError
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &decided):
		return decided.Error()
	case strings.Contains(err.Error(), "backwards"):
		return "backwards"
	}
	for _, class := range []error{
		store.ErrUnknown, store.ErrReused, store.ErrBacklogFull, store.ErrUnavailable, store.ErrContention, store.ErrInvalid, store.ErrStoreChanged,
	} {
		if errors.Is(err, class) {
			return class.Error()
		}
	}
	return "unexpected: " + err.Error()
}

// sorted is a list in an order that is not promised.
func sorted[T any](all []T, text func(*T) string) string {
	texts := make([]string, len(all))
	for i := range all {
		texts[i] = text(&all[i])
	}
	sort.Strings(texts)
	return strings.Join(texts, "\n")
}

// listed is a list in an order that is.
func listed[T any](all []T, text func(*T) string) string {
	texts := make([]string, len(all))
	for i := range all {
		texts[i] = text(&all[i])
	}
	return strings.Join(texts, "\n")
}

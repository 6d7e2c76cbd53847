package simulation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"time"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// Store is the store in memory: what the statements of package store do, one transaction at a time, with the moments in
// between where PostgreSQL has them. It is not safe for concurrent use.
type Store struct {
	now func() time.Time
	// call makes an access: it may let others go first, fail, or do it and fail all the same. nil: it is made.
	call func(do func() error) error
	// decided is told of each decision. nil: nobody is.
	decided func(k store.Key, before, after store.State)
	// acquired is told of each lease, note of what else may explain something. nil: nobody is.
	acquired func(shard int16, epoch int64)
	note     func(format string, args ...any)
	// stepped is told of each step before it is written. nil: nobody is.
	stepped func(st *store.Step)
	// order is that in which whoever acquires shards finds them. nil: by number.
	order func() []int16

	shards      []shardRow
	tx          map[store.Key]*txRow
	commits     int // transactions committed so far: the snapshots of statements
	log         [][]segment
	generation  int // the open one
	opened      time.Time
	pages       map[int]bool // of generations: something was written, committed or not
	closed      map[int]time.Time
	nextXID     uint64
	inProgress  []*appending
	parked      [][]parkedRow
	dead        [][]store.DeadLetter
	operations  []store.Operation
	relays      map[string]time.Time
	sources     []store.Source
	resolutions map[store.Key]*store.Resolution

	unflushed []unflushed
	server    int // another number: another server or timeline
	crashes   int
	biggest   int64  // of the reads: what one brought, in bytes of memory
	broken    string // a rule that this store does not keep, to show that the simulator sees it
}

var _ relay.Store = (*Store)(nil)

type shardRow struct {
	store.Checkpoint
	epoch      int64
	holder     string
	leaseUntil time.Time
}

type txRow struct {
	store.Row
	logXID     uint64
	stored     int // in which commit
	decidedAt  time.Time
	resolvedAt time.Time // zero: by the client
}

type segment struct {
	store.Segment
	generation int
}

type parkedRow struct {
	store.Parked
	checkAt time.Time // zero: not to be asked about
}

// unflushed is a step that a crash takes back.
type unflushed struct {
	at   time.Time
	undo func()
}

// flushWithin is how long a step may stay unflushed: PostgreSQL's WAL writer flushes after three times 200 ms at the latest.
const flushWithin = 600 * time.Millisecond

// NewStore returns an empty store.
func NewStore(shards int, now func() time.Time) *Store {
	s := &Store{
		now: now, tx: map[store.Key]*txRow{}, opened: now(), pages: map[int]bool{}, closed: map[int]time.Time{}, nextXID: 10, relays: map[string]time.Time{},
		resolutions: map[store.Key]*store.Resolution{},
		shards:      make([]shardRow, shards), log: make([][]segment, shards), parked: make([][]parkedRow, shards), dead: make([][]store.DeadLetter, shards),
	}
	for i := range s.shards {
		s.shards[i].Position.Seq = -1
	}
	return s
}

// access makes a call.
func (s *Store) access(do func() error) error {
	if s.call == nil {
		return do()
	}
	return s.call(do)
}

// ShardCount is the number of shards.
func (s *Store) ShardCount() int { return len(s.shards) }

// Heartbeat counts the relays.
func (s *Store) Heartbeat(_ context.Context, instance string, ttl time.Duration) (n int, err error) {
	err = s.access(func() error {
		s.flush()
		s.relays[instance] = s.now().Add(ttl)
		n = 1
		for other, until := range s.relays {
			if other != instance && until.After(s.now()) {
				n++
			}
		}
		return nil
	})
	return n, err
}

// AcquireShards takes shards whose lease has run out.
func (s *Store) AcquireShards(_ context.Context, instance string, ttl time.Duration, limit int) (leases []store.Lease, err error) {
	err = s.access(func() error {
		s.flush()
		leases = nil
		for _, i := range s.searched() {
			sh := &s.shards[i]
			if len(leases) == limit {
				break
			}
			if !sh.leaseUntil.Before(s.now()) {
				continue
			}
			sh.epoch++
			sh.holder, sh.leaseUntil = instance, s.now().Add(ttl)
			if s.acquired != nil {
				s.acquired(i, sh.epoch)
			}
			leases = append(leases, store.Lease{Shard: i, Epoch: sh.epoch, Checkpoint: sh.Checkpoint})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return leases, nil
}

// searched returns the shards in the order in which one looks for free ones.
func (s *Store) searched() []int16 {
	if s.order != nil {
		return s.order()
	}
	all := make([]int16, len(s.shards))
	for i := range all {
		all[i] = int16(i) //nolint:gosec // few
	}
	return all
}

// ReleaseShards ends leases.
func (s *Store) ReleaseShards(_ context.Context, shards []int16, epochs []int64) error {
	return s.access(func() error {
		s.flush()
		for i, n := range shards {
			if sh := &s.shards[n]; sh.epoch == epochs[i] {
				sh.holder, sh.leaseUntil = "", time.Time{}
			}
		}
		return nil
	})
}

var errBackwards = errors.New("the checkpoint would move backwards")

// Steps writes steps in one transaction. What changes rows is flushed.
func (s *Store) Steps(_ context.Context, ttl time.Duration, steps []store.Step) (fenced []int16, err error) {
	err = s.access(func() error {
		fenced = nil
		flush := false
		for i := range steps {
			st := &steps[i]
			flush = flush || st.Flush || changesRows(st)
			if sh := &s.shards[st.Shard]; s.holds(sh, st) && st.Checkpoint.Position.Compare(sh.Position) < 0 {
				return errBackwards
			}
		}
		for i := range steps {
			if !s.step(ttl, &steps[i]) {
				fenced = append(fenced, steps[i].Shard)
			}
		}
		if flush && s.broken != "flush" {
			s.flush()
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return fenced, nil
}

func changesRows(st *store.Step) bool {
	return len(st.Park)+len(st.Decide)+len(st.Unpark)+len(st.Bury)+len(st.Exhume)+len(st.Operations) > 0
}

func (s *Store) holds(sh *shardRow, st *store.Step) bool {
	return s.broken == "fence" || sh.epoch == st.Epoch && sh.holder != ""
}

// step writes one step, unless it is fenced.
func (s *Store) step(ttl time.Duration, st *store.Step) (written bool) {
	sh := &s.shards[st.Shard]
	if !s.holds(sh, st) {
		return false
	}
	s.remember(st.Shard)
	s.tellStep(st)
	if s.stepped != nil {
		s.stepped(st)
	}
	sh.Checkpoint = st.Checkpoint
	sh.Pend, sh.Offsets = slices.Clone(sh.Pend), slices.Clone(sh.Offsets)
	sh.leaseUntil = s.now().Add(ttl)
	for i := range st.Park {
		s.park(st.Shard, &st.Park[i])
	}
	for _, d := range st.Decide {
		for i := range s.parked[st.Shard] {
			if p := &s.parked[st.Shard][i]; p.Key == d.Key {
				p.State, p.checkAt = d.State, time.Time{}
			}
		}
	}
	s.parked[st.Shard] = without(s.parked[st.Shard], st.Unpark, func(p *parkedRow) store.EventPosition { return p.EventPosition })
	s.dead[st.Shard] = without(s.dead[st.Shard], st.Exhume, func(d *store.DeadLetter) store.EventPosition { return d.EventPosition })
	for _, d := range st.Bury {
		d.Body = slices.Clone(d.Body)
		at, found := find(s.dead[st.Shard], d.EventPosition, func(d *store.DeadLetter) store.EventPosition { return d.EventPosition })
		if found {
			s.dead[st.Shard][at] = d
		} else {
			s.dead[st.Shard] = slices.Insert(s.dead[st.Shard], at, d)
		}
	}
	for _, o := range st.Operations {
		for i := range s.operations {
			if p := &s.operations[i]; p.ID == o.ID && p.Shard == st.Shard && !p.Done {
				p.Done, p.Outcome, p.Events = true, o.Outcome, o.Events
			}
		}
	}
	return true
}

// tellStep tells what a step changes.
func (s *Store) tellStep(st *store.Step) {
	if s.note == nil {
		return
	}
	text := ""
	for _, p := range st.Park {
		text += fmt.Sprintf(" park %v (%s, %s, cause %d)", p.EventPosition, p.Aggregate.ID, p.State, p.Cause)
	}
	for _, p := range st.Unpark {
		text += fmt.Sprintf(" unpark %v", p)
	}
	for _, d := range st.Bury {
		text += fmt.Sprintf(" bury %v (%s)", d.EventPosition, d.Aggregate.ID)
	}
	for _, p := range st.Exhume {
		text += fmt.Sprintf(" exhume %v", p)
	}
	for _, d := range st.Decide {
		text += fmt.Sprintf(" decide %x %s", d.Key.Transaction[:2], d.State)
	}
	for _, o := range st.Operations {
		text += fmt.Sprintf(" operation %d: %s", o.ID, o.Outcome)
	}
	pend, _ := store.DecodePend(st.Checkpoint.Pend)
	s.note("store: step of shard %d epoch %d at %v, %d pending:%s", st.Shard, st.Epoch, st.Checkpoint.Position, len(pend), text)
}

// park inserts a row, or replaces what the holder keeps in it.
func (s *Store) park(shard int16, p *store.Parked) {
	rows := s.parked[shard]
	at, found := find(rows, p.EventPosition, func(p *parkedRow) store.EventPosition { return p.EventPosition })
	if !found {
		rows = slices.Insert(rows, at, parkedRow{Parked: *p})
		s.parked[shard] = rows
		rows[at].Since = s.now()
	}
	r := &rows[at]
	r.Body = slices.Clone(p.Body)
	r.Cause, r.State, r.Attempts, r.Error, r.NextTry = p.Cause, p.State, p.Attempts, p.Error, p.NextTry
	switch {
	case p.State != store.Prepared:
		r.checkAt = time.Time{}
	case r.checkAt.IsZero():
		r.checkAt = s.now()
	}
}

func find[T any](rows []T, at store.EventPosition, pos func(*T) store.EventPosition) (int, bool) {
	i := sort.Search(len(rows), func(i int) bool { return pos(&rows[i]).Compare(at) >= 0 })
	return i, i < len(rows) && pos(&rows[i]) == at
}

func without[T any](rows []T, gone []store.EventPosition, pos func(*T) store.EventPosition) []T {
	for _, at := range gone {
		if i, found := find(rows, at, pos); found {
			rows = slices.Delete(rows, i, i+1)
		}
	}
	return rows
}

// States returns what tx knows.
func (s *Store) States(_ context.Context, keys []store.Key) (states map[store.Key]store.State, err error) {
	err = s.access(func() error {
		states = map[store.Key]store.State{}
		for _, k := range keys {
			if row := s.tx[k]; row != nil {
				states[k] = row.State
			}
		}
		return nil
	})
	return states, err
}

// read returns a parked row as the store's readers see it: with the state that tx knows, if its own is not final.
func (s *Store) read(p *parkedRow, body bool) store.Parked {
	out := p.Parked
	if out.State == store.Prepared {
		if row := s.tx[p.Key]; row != nil {
			out.State = row.State
		}
	}
	if !body {
		out.Body = nil
	}
	return out
}

// LoadParked returns the rows of a shard.
func (s *Store) LoadParked(_ context.Context, shard int16) (found []store.Parked, err error) {
	err = s.access(func() error {
		found = nil
		for i := range s.parked[shard] {
			found = append(found, s.read(&s.parked[shard][i], false))
		}
		return nil
	})
	return found, err
}

// LoadParkedOf returns rows of aggregates.
func (s *Store) LoadParkedOf(_ context.Context, of []store.ParkedAfter, limit int) (found [][]store.Parked, err error) {
	err = s.access(func() error {
		found = make([][]store.Parked, len(of))
		for n, a := range of {
			for i := range s.parked[a.Shard] {
				if p := &s.parked[a.Shard][i]; p.Aggregate == a.Aggregate && p.EventPosition.Compare(a.After) > 0 && len(found[n]) < limit {
					found[n] = append(found[n], s.read(p, true))
				}
			}
		}
		return nil
	})
	return found, err
}

// LoadDeadQueues returns the aggregates in park policy.
func (s *Store) LoadDeadQueues(_ context.Context, shard int16) (found []store.Aggregate, err error) {
	err = s.access(func() error {
		found = nil
		for _, d := range s.dead[shard] {
			if d.Queue && !slices.Contains(found, d.Aggregate) {
				found = append(found, d.Aggregate)
			}
		}
		return nil
	})
	return found, err
}

// LoadDeadLettersOf returns dead letters of one aggregate.
func (s *Store) LoadDeadLettersOf(_ context.Context, shard int16, a store.Aggregate, after store.EventPosition, limit int) (found []store.DeadLetter, err error) {
	err = s.access(func() error {
		found = nil
		for _, d := range s.dead[shard] {
			if d.Aggregate == a && d.EventPosition.Compare(after) > 0 && len(found) < limit {
				found = append(found, d)
			}
		}
		return nil
	})
	return found, err
}

// PendingOperations returns the requests that are not done.
func (s *Store) PendingOperations(_ context.Context, shards []int16) (found []store.Operation, err error) {
	err = s.access(func() error {
		found = nil
		for _, o := range s.operations {
			if !o.Done && slices.Contains(shards, o.Shard) {
				found = append(found, o)
			}
		}
		return nil
	})
	return found, err
}

// RequestOperation records an operator's request, if the aggregate has rows that it could concern.
func (s *Store) RequestOperation(_ context.Context, a store.Aggregate, action store.Action, _, _ string) (*store.Operation, error) {
	shard := store.ShardOf(a, len(s.shards))
	if !s.hasRows(a) {
		return nil, store.ErrUnknown
	}
	s.flush()
	o := store.Operation{ID: int64(len(s.operations) + 1), Shard: shard, Aggregate: a, Action: action}
	s.operations = append(s.operations, o)
	return &o, nil
}

// hasRows reports whether an aggregate has parked rows or dead letters.
func (s *Store) hasRows(a store.Aggregate) bool {
	shard := store.ShardOf(a, len(s.shards))
	return slices.ContainsFunc(s.parked[shard], func(p parkedRow) bool { return p.Aggregate == a }) ||
		slices.ContainsFunc(s.dead[shard], func(d store.DeadLetter) bool { return d.Aggregate == a })
}

// Sources returns all sources.
func (s *Store) Sources(context.Context, string, int) (all []store.Source, err error) {
	err = s.access(func() error {
		all = slices.Clone(s.sources)
		return nil
	})
	return all, err
}

// PutTopics is of no interest here.
func (s *Store) PutTopics(context.Context, []store.Topic) error { return nil }

// ClaimInDoubt claims transactions that are due to be asked about.
func (s *Store) ClaimInDoubt(_ context.Context, limit int, lease time.Duration) (claimed []store.Parked, err error) {
	err = s.access(func() error {
		s.flush()
		claimed = nil
		due := s.due()
		for _, p := range due[:min(limit, len(due))] {
			p.checkAt = s.now().Add(lease)
			p.Checks++
			if found := s.read(p, false); found.State == store.Prepared {
				claimed = append(claimed, found)
			}
		}
		return nil
	})
	return claimed, err
}

// due returns the rows that stand for transactions to be asked about, longest due first.
func (s *Store) due() (due []*parkedRow) {
	seen := map[store.Key]bool{}
	for shard := range s.parked {
		for i := range s.parked[shard] {
			p := &s.parked[shard][i]
			if p.State != store.Prepared || seen[p.Key] {
				continue
			}
			seen[p.Key] = true // only the first row of a transaction is ever due
			if !p.checkAt.IsZero() && !p.checkAt.After(s.now()) {
				due = append(due, p)
			}
		}
	}
	sort.SliceStable(due, func(i, j int) bool { return due[i].checkAt.Before(due[j].checkAt) })
	return due
}

// RecordAnswer puts off what is still undecided.
func (s *Store) RecordAnswer(_ context.Context, keys []store.Key, answer string, next time.Duration) error {
	return s.access(func() error {
		s.flush()
		for shard := range s.parked {
			for i := range s.parked[shard] {
				if p := &s.parked[shard][i]; p.State == store.Prepared && slices.Contains(keys, p.Key) {
					p.LastAnswer, p.checkAt = answer, s.now().Add(next)
				}
			}
		}
		return nil
	})
}

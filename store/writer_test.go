package store_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// runWriter runs a writer until the test ends.
func runWriter(t testing.TB, st *store.Store, cfg store.WriterConfig) *store.Writer {
	t.Helper()
	w := store.NewWriter(st, cfg)
	stopAtEnd(t, w)
	return w
}

// stopAtEnd runs w and stops it with the test.
func stopAtEnd(t testing.TB, w *store.Writer) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error("the writer ended with", err)
		}
	})
}

func prepare(k store.Key, events ...store.Event) *store.Request {
	return &store.Request{Kind: store.KindPrepare, Key: k, Events: events, Database: storetest.DatabaseTransaction(7)}
}

func publish(k store.Key, events ...store.Event) *store.Request {
	return &store.Request{Kind: store.KindPublish, Key: k, Events: events}
}

func commit(k store.Key, shards store.ShardSet) *store.Request {
	return &store.Request{Kind: store.KindCommit, Key: k, Shards: shards}
}

func abort(k store.Key, shards store.ShardSet) *store.Request {
	return &store.Request{Kind: store.KindAbort, Key: k, Shards: shards}
}

func order(id string) store.Event {
	return storetest.Event("orders", "order", id, `{"order":"`+id+`"}`)
}

// do submits and fails the test unless the answer is as wanted: nil, an error for errors.Is, or a *DecidedError.
func do(t testing.TB, w *store.Writer, r *store.Request, want error) store.Answer {
	t.Helper()
	a, err := w.Do(t.Context(), r)
	checkAnswer(t, r, err, want)
	return a
}

func checkAnswer(t testing.TB, r *store.Request, err, want error) {
	t.Helper()
	var decided, wanted *store.DecidedError
	switch {
	case errors.As(want, &wanted):
		if !errors.As(err, &decided) || decided.State != wanted.State {
			t.Fatalf("kind %d of %s: %v, want %v", r.Kind, r.Key.Transaction, err, want)
		}
	case !errors.Is(err, want):
		t.Fatalf("kind %d of %s: %v, want %v", r.Kind, r.Key.Transaction, err, want)
	}
}

// pending collects answers of requests that are submitted without waiting.
type pending struct {
	all     sync.WaitGroup
	mu      sync.Mutex
	answers map[*store.Request]store.Answer
	order   []*store.Request
}

func (p *pending) submit(t testing.TB, w *store.Writer, requests ...*store.Request) {
	t.Helper()
	for _, r := range requests {
		p.all.Add(1)
		r.Done = func(r *store.Request, a store.Answer) {
			p.mu.Lock()
			if p.answers == nil {
				p.answers = map[*store.Request]store.Answer{}
			}
			p.answers[r] = a
			p.order = append(p.order, r)
			p.mu.Unlock()
			p.all.Done()
		}
		if err := w.Submit(r); err != nil {
			t.Fatal("submit:", err)
		}
	}
}

func (p *pending) wait() map[*store.Request]store.Answer {
	p.all.Wait()
	return p.answers
}

// logged is what the log says about a transaction, stale records left out.
type logged struct {
	events    []store.Event
	published bool
	decisions []store.State // one per shard that has events
	shards    store.ShardSet
}

// readLog reads all of the log as a relay does.
func readLog(t testing.TB, st *store.Store) map[store.Key]*logged {
	t.Helper()
	r, err := st.OpenReader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close(t.Context()) //nolint:errcheck // nothing depends on it
	found := map[store.Key]*logged{}
	segments := readAll(t, r, st)
	for i := range segments {
		s := &segments[i]
		if err := s.Records(func(rec *store.Record) bool {
			l := found[rec.Key]
			if l == nil {
				l = &logged{}
				found[rec.Key] = l
			}
			l.shards = l.shards.Add(s.Shard)
			if rec.IsDecision {
				l.decisions = append(l.decisions, rec.State)
			} else {
				l.events = append(l.events, rec.Event)
				l.published = rec.State == store.Committed
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
	}
	return found
}

func cursorsAtStart(st *store.Store) []store.Cursor {
	cursors := make([]store.Cursor, st.ShardCount())
	for i := range cursors {
		cursors[i] = store.Cursor{Shard: int16(i), Position: store.Position{Seq: -1}}
	}
	return cursors
}

// checkLogged fails unless the log holds exactly these events of k, in order per shard, decided as said.
func checkLogged(t testing.TB, log map[store.Key]*logged, k store.Key, events int, decision store.State) {
	t.Helper()
	l := log[k]
	if l == nil {
		t.Fatalf("nothing of %s in the log", k.Transaction)
	}
	if len(l.events) != events {
		t.Fatalf("%s has %d valid events in the log, want %d", k.Transaction, len(l.events), events)
	}
	if decision == store.Prepared {
		if len(l.decisions) != 0 {
			t.Fatalf("%s has decisions %v in the log, want none", k.Transaction, l.decisions)
		}
		return
	}
	for _, d := range l.decisions {
		if d != decision {
			t.Fatalf("%s has decisions %v in the log, want %s", k.Transaction, l.decisions, decision)
		}
	}
	shards := 0
	for s := range int16(64) {
		if l.shards.Has(s) {
			shards++
		}
	}
	if l.published && len(l.decisions) == 0 {
		return // it was published: there was nothing to decide
	}
	if len(l.decisions) != shards {
		t.Fatalf("%s has %d decisions in the log for %d shards", k.Transaction, len(l.decisions), shards)
	}
}

func TestDecisions(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	w := runWriter(t, db.Store, store.WriterConfig{})
	var (
		committed = &store.DecidedError{State: store.Committed}
		aborted   = &store.DecidedError{State: store.Aborted}
		one       = []store.Event{order("1"), order("2"), order("1")}
		other     = []store.Event{order("1")}
	)
	type call struct {
		kind   store.Kind
		events []store.Event
		token  bool // pass the token of the first Prepare
		want   error
	}
	const (
		P = store.KindPrepare
		U = store.KindPublish
		C = store.KindCommit
		A = store.KindAbort
	)
	for name, calls := range map[string][]call{
		"prepare, commit with token, commit again":     {{P, one, false, nil}, {C, nil, true, nil}, {C, nil, true, nil}, {C, nil, false, nil}},
		"commit without token":                         {{P, one, false, nil}, {C, nil, false, nil}},
		"abort without token, again with":              {{P, one, false, nil}, {A, nil, false, nil}, {A, nil, true, nil}},
		"commit after abort":                           {{P, one, false, nil}, {A, nil, true, nil}, {C, nil, true, aborted}, {C, nil, false, aborted}},
		"abort after commit":                           {{P, one, false, nil}, {C, nil, true, nil}, {A, nil, true, committed}, {A, nil, false, committed}},
		"prepare twice":                                {{P, one, false, nil}, {P, one, false, nil}, {C, nil, true, nil}},
		"prepare after commit":                         {{P, one, false, nil}, {C, nil, true, nil}, {P, one, false, nil}},
		"prepare with other content":                   {{P, one, false, nil}, {P, other, false, store.ErrReused}, {C, nil, true, nil}},
		"publish":                                      {{U, one, false, nil}, {U, one, false, nil}, {U, other, false, store.ErrReused}, {C, nil, false, nil}, {A, nil, false, committed}},
		"publish of a prepared twin":                   {{P, one, false, nil}, {U, one, false, nil}, {U, one, false, nil}, {A, nil, true, committed}},
		"publish of an aborted twin":                   {{P, one, false, nil}, {A, nil, true, nil}, {U, one, false, aborted}},
		"publish of a prepared one with other content": {{P, one, false, nil}, {U, other, false, store.ErrReused}, {A, nil, true, nil}},
		"prepare of a published twin":                  {{U, one, false, nil}, {P, one, false, nil}, {P, other, false, store.ErrReused}},
		"unknown":                                      {{C, nil, false, store.ErrUnknown}, {A, nil, false, store.ErrUnknown}, {P, one, false, nil}, {C, nil, true, nil}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := storetest.Key(1)
			var token store.ShardSet
			state := store.Prepared
			for i, c := range calls {
				r := &store.Request{Kind: c.kind, Key: k, Events: c.events}
				if c.kind == P {
					r.Database = storetest.DatabaseTransaction(9)
				}
				if c.token {
					r.Shards = token
				}
				a := do(t, w, r, c.want)
				if c.want != nil {
					continue
				}
				if c.kind == P || c.kind == U {
					if token != 0 && a.Shards != token || a.Shards == 0 {
						t.Fatalf("call %d: token %x after %x", i, a.Shards, token)
					}
					token = a.Shards
				}
				switch c.kind {
				case U, C:
					state = store.Committed
				case A:
					state = store.Aborted
				}
			}
			states, err := db.Store.States(t.Context(), []store.Key{k})
			if err != nil || states[k] != state {
				t.Errorf("state %v, %v; want %s", states, err, state)
			}
			checkLogged(t, readLog(t, db.Store), k, len(one), state)
		})
	}
}

// A token that is not the stored shard set is corrected, never believed: not a wrong one, and not one with shards that do
// not exist.
func TestCommitWithAWrongToken(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(8))
	w := runWriter(t, db.Store, store.WriterConfig{})
	for _, wrong := range []store.ShardSet{1 << 63, 1 << 8, 1<<8 - 1, 1, 2} {
		k := storetest.Key(1)
		a := do(t, w, prepare(k, order("1"), order("2")), nil)
		if wrong == a.Shards {
			wrong = a.Shards ^ 4
		}
		do(t, w, commit(k, wrong), nil)
		log := readLog(t, db.Store)
		checkLogged(t, log, k, 2, store.Committed)
		if log[k].shards != a.Shards {
			t.Errorf("decided in shards %b, events in %b", log[k].shards, a.Shards)
		}
	}
	// Beside one that wins, so that the batch is logged.
	k, other := storetest.Key(1), storetest.Key(1)
	a := do(t, w, prepare(other, order("1")), nil)
	do(t, w, prepare(k, order("1")), nil)
	full := store.NewWriter(db.Store, store.WriterConfig{})
	var p pending
	p.submit(t, full, commit(k, 1<<8|1<<63), commit(other, a.Shards))
	stopAtEnd(t, full)
	for r, a := range p.wait() {
		checkAnswer(t, r, a.Err, nil)
	}
	if n := storetest.Query[int](t, db, `SELECT count(*)::int FROM outbox.log WHERE shard >= 8`); n[0] != 0 {
		t.Errorf("%d segments in shards that do not exist", n[0])
	}
}

// Regression (a) of store.md §6.2: a batch made only of duplicates stores nothing.
func TestABatchOfDuplicatesIsNotLogged(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	w := runWriter(t, db.Store, store.WriterConfig{})
	k := storetest.Key(1)
	r := prepare(k, order("1"))
	do(t, w, r, nil)
	before := storetest.Query[int](t, db, `SELECT count(*)::int FROM outbox.log`)[0]
	do(t, w, r, nil)
	if after := storetest.Query[int](t, db, `SELECT count(*)::int FROM outbox.log`)[0]; after != before {
		t.Errorf("%d segments after the duplicate, %d before", after, before)
	}
	checkLogged(t, readLog(t, db.Store), k, 1, store.Prepared)
}

// Regression (b) of store.md §6.2, by the statement alone, because the writer never puts two requests of one transaction
// into a batch: a duplicate Prepare beside its own Commit is stale although the Commit wins.
func TestADuplicateBesideItsOwnCommitIsStale(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	w := runWriter(t, db.Store, store.WriterConfig{})
	k, fresh := storetest.Key(1), storetest.Key(1)
	a := do(t, w, prepare(k, order("1")), nil)
	var np, nc int64
	var stale []int32
	err := db.Connect(t).QueryRow(t.Context(), store.AppendSQL,
		[]int32{1, 1}, [][16]byte{k.Transaction, fresh.Transaction}, []int16{0, 0}, []int64{int64(a.Shards), 1}, []int64{5, 6}, // prepares
		[]int32{1, 1}, [][16]byte{k.Transaction, storetest.Key(1).Transaction}, []int16{1, 2}, []int64{int64(a.Shards), 1}, // decisions
		[]int16{0}, []int32{0}, [][]byte{{1}}).Scan(&np, &nc, &stale)
	if err != nil || np != 1 || nc != 1 || !slices.Equal(stale, []int32{1, -2}) {
		t.Errorf("prepared %d, decided %d, stale %v, %v; want 1, 1, [1 -2]", np, nc, stale, err)
	}
}

// Requests of one transaction keep their order although none is awaited, and a Commit without token takes it from the
// Prepare before it.
func TestPipelinedRequestsOfATransactionKeepTheirOrder(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	w := store.NewWriter(db.Store, store.WriterConfig{})
	var p pending
	var requests []*store.Request
	var keys []store.Key
	for i := range 100 {
		k := storetest.Key(1)
		keys = append(keys, k)
		e := order(fmt.Sprint(i))
		requests = append(requests, prepare(k, e), commit(k, 0), commit(k, 0), prepare(k, e), abort(k, 0))
	}
	p.submit(t, w, requests...)
	if n := w.Held(); n != 400 {
		t.Errorf("%d requests are held, want 400", n)
	}
	stopAtEnd(t, w)
	answers := p.wait()
	for i, r := range requests {
		want := error(nil)
		if i%5 == 4 {
			want = &store.DecidedError{State: store.Committed}
		}
		checkAnswer(t, r, answers[r].Err, want)
	}
	log := readLog(t, db.Store)
	for _, k := range keys {
		checkLogged(t, log, k, 1, store.Committed)
	}
}

// Events of one aggregate appear in the log in the order in which their Prepares were answered.
func TestLogOrderIsPrepareOrder(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	writers := []*store.Writer{runWriter(t, db.Store, store.WriterConfig{}), runWriter(t, db.Open(t), store.WriterConfig{})}
	const aggregates, each = 16, 25
	var all sync.WaitGroup
	for a := range aggregates {
		all.Go(func() {
			for i := range each {
				k := storetest.Key(1)
				e := order(fmt.Sprint(a))
				e.OccurredAt = int64(i + 1)
				// Prepares go through both servers; decisions too, and not the same one.
				x, err := writers[(a+i)%2].Do(t.Context(), prepare(k, e))
				if err == nil {
					_, err = writers[(a+i+1)%2].Do(t.Context(), commit(k, x.Shards))
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	last := map[string]int64{}
	r, err := db.Store.OpenReader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close(t.Context()) //nolint:errcheck // nothing depends on it
	prepared := map[store.Key]bool{}
	for _, s := range readAll(t, r, db.Store) {
		if err := s.Records(func(rec *store.Record) bool {
			if rec.IsDecision {
				if !prepared[rec.Key] {
					t.Errorf("the decision of %s comes before its events", rec.Key.Transaction)
				}
				return true
			}
			prepared[rec.Key] = true
			e := rec.Event
			if e.OccurredAt != last[e.AggregateID]+1 {
				t.Errorf("aggregate %s: event %d after %d", e.AggregateID, e.OccurredAt, last[e.AggregateID])
			}
			last[e.AggregateID] = e.OccurredAt
			return true
		}); err != nil {
			t.Fatal(err)
		}
	}
	if len(prepared) != aggregates*each {
		t.Errorf("%d transactions in the log, want %d", len(prepared), aggregates*each)
	}
}

// readAll reads everything that was committed when it began, in order.
func readAll(t testing.TB, r *store.Reader, st *store.Store) (found []store.Segment) {
	t.Helper()
	var until uint64
	if err := r.Conn().QueryRow(t.Context(), `SELECT pg_snapshot_xmax(pg_current_snapshot())`).Scan(&until); err != nil {
		t.Fatal(err)
	}
	cursors := cursorsAtStart(st)
	for {
		segments, err := r.Read(t.Context(), cursors, 3)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range segments {
			if s.Compare(cursors[s.Shard].Position) <= 0 {
				t.Fatalf("segment %s of shard %d after %s", s.Position, s.Shard, cursors[s.Shard].Position)
			}
			cursors[s.Shard].Position = s.Position
		}
		found = append(found, segments...)
		if len(segments) == 0 && r.Horizon().XID >= until {
			return found
		}
	}
}

// Two servers get the same requests at the same time: one valid copy, one answer.
func TestTwoWritersRaceDuplicates(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	writers := []*store.Writer{runWriter(t, db.Store, store.WriterConfig{}), runWriter(t, db.Open(t), store.WriterConfig{})}
	const n = 300
	keys := make([]store.Key, n)
	outcomes := make([][2]error, n)
	var p [2]pending
	var requests [2][]*store.Request
	for i := range n {
		keys[i] = storetest.Key(1)
		events := []store.Event{order(fmt.Sprint(i % 7)), order("x")}
		for side := range 2 {
			requests[side] = append(requests[side], prepare(keys[i], events...))
		}
	}
	slices.Reverse(requests[1]) // crosswise, so that unsorted keys would deadlock
	var both sync.WaitGroup
	for side := range 2 {
		both.Go(func() {
			p[side].submit(t, writers[side], requests[side]...)
			p[side].wait()
			var q pending
			var decisions []*store.Request
			for i, k := range keys {
				r := commit(k, 0)
				if (i+side)%2 == 0 {
					r = abort(k, 0)
				}
				decisions = append(decisions, r)
			}
			q.submit(t, writers[side], decisions...)
			q.wait()
			for i, r := range decisions {
				outcomes[i][side] = q.answers[r].Err
			}
		})
	}
	both.Wait()
	for side := range 2 {
		for r, a := range p[side].answers {
			checkAnswer(t, r, a.Err, nil)
		}
	}
	log := readLog(t, db.Store)
	states, err := db.Store.States(t.Context(), keys)
	if err != nil {
		t.Fatal(err)
	}
	for i, k := range keys {
		if (outcomes[i][0] == nil) == (outcomes[i][1] == nil) {
			t.Fatalf("of two contrary decisions of %d: %v, %v", i, outcomes[i][0], outcomes[i][1])
		}
		checkLogged(t, log, k, 2, states[k])
	}
}

func TestResolutionIsStoredIfItWins(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	w := runWriter(t, db.Store, store.WriterConfig{})
	evidence := func(method string) *store.Resolution {
		return &store.Resolution{Method: method, Evidence: []byte(`{"timeline":"00000001"}`), Actor: "server-1"}
	}
	won, lost, bare := storetest.Key(1), storetest.Key(1), storetest.Key(1)
	var token store.ShardSet
	for _, k := range []store.Key{won, lost, bare} {
		token = do(t, w, prepare(k, order("1")), nil).Shards
	}
	do(t, w, commit(lost, 0), nil)
	r := abort(won, 0)
	r.Resolution = evidence("direct")
	do(t, w, r, nil)
	r = abort(lost, token)
	r.Resolution = evidence("direct")
	do(t, w, r, &store.DecidedError{State: store.Committed})
	r = commit(bare, 0)
	r.Resolution = &store.Resolution{Method: "operator", Actor: "me"}
	do(t, w, r, nil)
	got := storetest.Query[string](t, db, `SELECT method || state || evidence::text || actor FROM outbox.resolution ORDER BY method`)
	if !slices.Equal(got, []string{`direct2{"timeline": "00000001"}server-1`, `operator1{}me`}) {
		t.Errorf("resolutions %q", got)
	}
}

// One request that PostgreSQL refuses fails alone.
func TestPoisonRequestFailsAlone(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	setup := runWriter(t, db.Open(t), store.WriterConfig{})
	poisoned := []int{0, 17, 63}
	var requests []*store.Request
	for i := range 64 {
		k := storetest.Key(1)
		a := do(t, setup, prepare(k, order(fmt.Sprint(i))), nil)
		r := abort(k, a.Shards)
		r.Resolution = &store.Resolution{Method: "direct", Evidence: []byte(`{}`)}
		requests = append(requests, r)
	}
	requests[0].Resolution.Evidence = []byte(`{`)         // 22P02
	requests[17].Resolution.Evidence = []byte(`"\u0000"`) // 22P05
	requests[63].Resolution.Method = "a guess"            // 23514
	var batches atomic.Int64
	w := store.NewWriter(db.Store, store.WriterConfig{OnBatch: func(int, time.Duration, time.Duration) { batches.Add(1) }})
	var p pending
	p.submit(t, w, requests...) // before Run: one batch
	stopAtEnd(t, w)
	answers := p.wait()
	log := readLog(t, db.Store)
	for i, r := range requests {
		if slices.Contains(poisoned, i) {
			checkAnswer(t, r, answers[r].Err, store.ErrInvalid)
			checkLogged(t, log, r.Key, 1, store.Prepared)
			continue
		}
		checkAnswer(t, r, answers[r].Err, nil)
		checkLogged(t, log, r.Key, 1, store.Aborted)
	}
	if n := batches.Load(); n > 30 {
		t.Errorf("%d statements succeeded: not halved", n)
	}
}

func TestSubmitRefusesAtOnce(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	w := store.NewWriter(db.Store, store.WriterConfig{MaxQueued: 3})
	var p pending
	p.submit(t, w, prepare(storetest.Key(1), order("1")), prepare(storetest.Key(1), order("1")), prepare(storetest.Key(1), order("1")))
	if err := w.Submit(prepare(storetest.Key(1), order("1"))); !errors.Is(err, store.ErrBacklogFull) {
		t.Errorf("fourth of three: %v", err)
	}
	if _, err := w.Do(t.Context(), prepare(storetest.Key(1), order("1"))); !errors.Is(err, store.ErrBacklogFull) {
		t.Errorf("do: %v", err)
	}
	big := order("1")
	big.Payload = make([]byte, 4000)
	small := store.NewWriter(db.Store, store.WriterConfig{MaxQueuedBytes: 4096})
	var q pending
	q.submit(t, small, prepare(storetest.Key(1), order("1")))
	if err := small.Submit(prepare(storetest.Key(1), big)); !errors.Is(err, store.ErrBacklogFull) {
		t.Errorf("too many bytes: %v", err)
	}
	if err := small.Submit(prepare(storetest.Key(1))); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("no events: %v", err)
	}
	stopAtEnd(t, w)
	stopAtEnd(t, small)
	p.wait()
	q.wait()
	// Alone, a request may be larger than the bound, or it could never be sent.
	storetest.Eventually(t, 10*time.Second, func() bool {
		_, err := small.Do(t.Context(), prepare(storetest.Key(1), big))
		return err == nil
	})
}

func TestDoEndsWithItsContext(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	w := store.NewWriter(db.Store, store.WriterConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	k := storetest.Key(1)
	if _, err := w.Do(ctx, prepare(k, order("1"))); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	stopAtEnd(t, w)
	// It still took effect, as the contract says.
	do(t, w, commit(k, 0), nil)
}

// A writer that is stopped answers what it accepted, and then refuses.
func TestRunDrains(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	w := store.NewWriter(db.Store, store.WriterConfig{MaxBatch: 8})
	ctx, cancel := context.WithCancel(t.Context())
	var p pending
	var requests []*store.Request
	for i := range 200 {
		k := storetest.Key(1)
		e := order(fmt.Sprint(i))
		requests = append(requests, prepare(k, e), prepare(k, e), commit(k, 0), abort(storetest.Key(1), 0))
	}
	p.submit(t, w, requests...)
	cancel()
	if err := w.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if len(p.answers) != len(requests) {
		t.Fatalf("%d of %d answered when Run returned", len(p.answers), len(requests))
	}
	for i, r := range requests {
		want := error(nil)
		if i%4 == 3 {
			want = store.ErrUnknown
		}
		checkAnswer(t, r, p.answers[r].Err, want)
	}
	if err := w.Submit(prepare(storetest.Key(1), order("1"))); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("after the end: %v", err)
	}
}

func TestOnDecidedNamesTheShardsOfWinners(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	var decided atomic.Uint64
	w := runWriter(t, db.Store, store.WriterConfig{OnDecided: func(s store.ShardSet) { decided.Or(uint64(s)) }})
	r := prepare(storetest.Key(1), order("1"), order("2"), order("3"))
	a := do(t, w, r, nil)
	if got := decided.Swap(0); got != 0 {
		t.Errorf("told %b of a prepare: there is nothing to deliver", got)
	}
	do(t, w, &store.Request{Kind: store.KindCommit, Key: r.Key, Shards: a.Shards}, nil)
	if got := store.ShardSet(decided.Swap(0)); got != a.Shards {
		t.Errorf("told %b, want %b", got, a.Shards)
	}
	do(t, w, &store.Request{Kind: store.KindCommit, Key: r.Key, Shards: a.Shards}, nil)
	if got := decided.Load(); got != 0 {
		t.Errorf("told %b of a duplicate", got)
	}
}

// Large events get a segment each, and many small ones are cut into segments that fit a page.
func TestSegmentsAreCut(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	w := runWriter(t, db.Store, store.WriterConfig{})
	var events []store.Event
	for i := range 500 {
		e := order(fmt.Sprint(i))
		if i%100 == 50 {
			e.Payload = make([]byte, 300_000)
		}
		events = append(events, e)
	}
	k := storetest.Key(1)
	do(t, w, publish(k, events...), nil)
	got := readLog(t, db.Store)[k]
	if len(got.events) != len(events) {
		t.Fatalf("%d events, want %d", len(got.events), len(events))
	}
	for i := range events {
		if got.events[i].ID != events[i].ID || len(got.events[i].Payload) != len(events[i].Payload) {
			t.Fatalf("event %d is another one", i)
		}
	}
	sizes := storetest.Query[int](t, db, `SELECT octet_length(body) FROM outbox.log ORDER BY seq`)
	large := 0
	for _, n := range sizes {
		if n > 8000 {
			large++
		}
	}
	if large != 5 || len(sizes) > 40 {
		t.Errorf("sizes %v", sizes)
	}
}

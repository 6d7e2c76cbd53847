package store_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// model is what the writer promises about one transaction, in a dozen lines.
type model struct {
	exists  bool
	content int
	state   store.State
}

// apply returns the promised answer and changes the state.
func (m *model) apply(kind store.Kind, content int) error {
	switch kind {
	case store.KindPrepare, store.KindPublish:
		switch {
		case !m.exists:
			*m = model{exists: true, content: content}
		case m.content != content:
			return store.ErrReused
		}
		if kind == store.KindPrepare {
			return nil
		}
		return m.decide(store.Committed)
	case store.KindCommit:
		return m.decide(store.Committed)
	default:
		return m.decide(store.Aborted)
	}
}

func (m *model) decide(s store.State) error {
	switch {
	case !m.exists:
		return store.ErrUnknown
	case m.state == store.Prepared:
		m.state = s
	case m.state != s:
		return &store.DecidedError{State: m.state}
	}
	return nil
}

// The writer answers as the model does, whatever is asked of a few transactions in whatever order, through two servers,
// one request at a time per transaction and all transactions at once; and the log says the same afterwards.
func TestWriterAgainstModel(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(3))
	writers := []*store.Writer{
		runWriter(t, db.Store, store.WriterConfig{SecondWriterAt: 2, MaxBatch: 5}),
		runWriter(t, db.Open(t), store.WriterConfig{SecondWriterAt: 3, MaxBatch: 7}),
	}
	// Two contents, of several events on several aggregates.
	contents := [2][]store.Event{{order("1"), order("2"), order("1"), order("3")}, {order("1")}}
	type call struct {
		kind    store.Kind
		content int
		token   store.ShardSet
		writer  int
		kept    bool // of a Publish
	}
	var mu sync.Mutex
	all := map[store.Key]model{}
	rapid.Check(t, func(t *rapid.T) {
		scripts := make([][]call, rapid.IntRange(1, 8).Draw(t, "transactions"))
		for i := range scripts {
			for range rapid.IntRange(1, 6).Draw(t, "calls") {
				scripts[i] = append(scripts[i], call{
					kind:    store.Kind(rapid.SampledFrom([]int{0, 0, 1, 2, 2, 3}).Draw(t, "kind")),
					content: rapid.SampledFrom([]int{0, 0, 0, 1}).Draw(t, "content"),
					token:   store.ShardSet(rapid.SampledFrom([]int{0, 1, 3, 7, 64}).Draw(t, "token")),
					writer:  rapid.IntRange(0, 1).Draw(t, "writer"),
					kept:    rapid.Bool().Draw(t, "kept"),
				})
			}
		}
		failures := make(chan string, len(scripts))
		var callers sync.WaitGroup
		for _, script := range scripts {
			callers.Go(func() {
				k := storetest.Key(1)
				var m model
				for n, c := range script {
					r := &store.Request{Kind: c.kind, Key: k, Shards: c.token}
					switch c.kind {
					case store.KindPrepare:
						r.Database, r.Events = storetest.DatabaseTransaction(3), contents[c.content]
					case store.KindPublish:
						r.Events = contents[c.content]
						if c.kept {
							r.Resolution = store.KeptByCaller("model")
						}
					}
					_, err := writers[c.writer].Do(t.Context(), r)
					if want := m.apply(c.kind, c.content); !sameAnswer(err, want) {
						failures <- fmt.Sprintf("call %d of %+v: %v, want %v", n, script, err, want)
						return
					}
				}
				mu.Lock()
				all[k] = m
				mu.Unlock()
			})
		}
		callers.Wait()
		select {
		case f := <-failures:
			t.Fatal(f)
		default:
		}
	})
	log := readLog(t, db.Store)
	for k, m := range all {
		if !m.exists {
			if log[k] != nil {
				t.Fatalf("%s is in the log and was never stored", k.Transaction)
			}
			continue
		}
		checkLogged(t, log, k, len(contents[m.content]), m.state)
	}
	// Whichever request decided has left its note, and no other one.
	for _, wrong := range storetest.Query[string](t, db, `
		SELECT format('%s: resolved as %s, it is %s', r.tx_id, r.state, t.state)
		FROM outbox.resolution r LEFT JOIN outbox.tx t USING (source_id, tx_id) WHERE t.state IS DISTINCT FROM r.state`) {
		t.Error(wrong)
	}
	t.Logf("%d transactions", len(all))
}

func sameAnswer(got, want error) bool {
	var g, w *store.DecidedError
	if errors.As(want, &w) {
		return errors.As(got, &g) && g.State == w.State
	}
	return errors.Is(got, want)
}

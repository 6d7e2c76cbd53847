package resolver

import (
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// The client's own word, two resolvers' verdicts, an operator's check and an operator's decision meet at one transaction:
// there is exactly one terminal state, one evidence row unless the client decided, and the same answer to everyone after.
func TestDecisionsMeet(t *testing.T) {
	w := newWorld(t)
	s := w.direct("orders", w.sourceDatabase())
	first, _ := w.resolver(nobody{})
	second, _ := w.resolver(instance{source: s})
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // a test
	for round := range 40 {
		a := s.begin().prepare()
		truth := store.KindAbort
		if random.IntN(2) == 0 {
			a.commit()
			truth = store.KindCommit
		} else {
			a.exec("ROLLBACK")
		}
		operators := []store.Kind{store.KindCommit, store.KindAbort}[random.IntN(2)]
		parties := []func(){
			func() { _, _ = w.writer.Do(t.Context(), &store.Request{Kind: truth, Key: a.key}) },
			func() { first.SessionBroke("orders", "pod", []store.Parked{a.parked()}) },
			func() { second.SessionBroke("orders", "pod", []store.Parked{a.parked()}) },
			func() { _, _ = first.Check(t.Context(), a.parked()) },
			func() {
				_, _ = w.writer.Do(t.Context(), &store.Request{Kind: operators, Key: a.key, Resolution: &store.Resolution{
					Method: methodOperator, Evidence: []byte(`{}`), Actor: "ops",
				}})
			},
		}
		random.Shuffle(len(parties), func(i, j int) { parties[i], parties[j] = parties[j], parties[i] })
		var meeting sync.WaitGroup
		for _, p := range parties[:1+random.IntN(len(parties))] {
			meeting.Go(p)
		}
		meeting.Wait()
		// Whoever took part, the resolvers end it if nobody else did.
		first.SessionBroke("orders", "pod", []store.Parked{a.parked()})
		storetest.Eventually(t, soon, func() bool { return a.state().State != store.Prepared && first.queued()+second.queued() == 0 })
		tx := a.state()
		rows := storetest.Query[string](t, w.db, `SELECT method || ':' || state FROM outbox.resolution WHERE source_id = $1 AND tx_id = $2`, a.key.Source, [16]byte(a.key.Transaction))
		switch {
		case tx.DecidedBy == "client" && len(rows) != 0, tx.DecidedBy != "client" && len(rows) != 1:
			t.Fatalf("round %d: decided by %s, evidence %v", round, tx.DecidedBy, rows)
		case len(rows) == 1 && rows[0] != tx.DecidedBy+":"+map[store.State]string{store.Committed: "1", store.Aborted: "2"}[tx.State]:
			t.Fatalf("round %d: %s by %s, evidence %v", round, tx.State, tx.DecidedBy, rows)
		case tx.DecidedBy != methodOperator && (tx.State == store.Committed) != (truth == store.KindCommit):
			t.Fatalf("round %d: %s by %s, but the database says otherwise", round, tx.State, tx.DecidedBy)
		}
		for _, kind := range []store.Kind{store.KindCommit, store.KindAbort} {
			_, err := w.writer.Do(t.Context(), &store.Request{Kind: kind, Key: a.key})
			var other *store.DecidedError
			if fits := (kind == store.KindCommit) == (tx.State == store.Committed); fits != (err == nil) || !fits && !errors.As(err, &other) {
				t.Fatalf("round %d: it is %s, and kind %d is answered with %v", round, tx.State, kind, err)
			}
		}
	}
	if bad, err := w.db.Store.Verify(t.Context()); err != nil || len(bad) != 0 {
		t.Errorf("verify: %v, %v", bad, err)
	}
}

package simulation

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// TestStoreConformsAfterCrashes kills PostgreSQL in the middle of steps. What it has then must be what the store of the
// simulator may have after a crash: of the steps since the last flush the last ones are missing, or none. The last time the
// server comes back on another timeline.
func TestStoreConformsAfterCrashes(t *testing.T) {
	t.Parallel()
	const shards = 2
	cluster := storetest.NewCluster(t, storetest.WithSettings(map[string]string{"autovacuum": "off"}))
	db := cluster.New(t, storetest.WithShards(shards))
	source := db.Source(t, "shop").ID
	real := newOnPostgres(t, db, 1, 4)
	now := time.Now()
	memory := newInMemory(shards, 1, 4, now, nil)
	both := []*side{newSide(memory), newSide(real)}
	ctx := t.Context()
	for _, s := range both {
		leases, err := s.AcquireShards(ctx, "relay", time.Hour, shards)
		if err != nil || len(leases) != shards {
			t.Fatal(leases, err)
		}
	}
	chance := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // not a secret
	for round := range 3 {
		for _, s := range both {
			publishOne(t, s, source, round)
			s.look()
		}
		for i := range int32(12) {
			shard, kind := int16(chance.IntN(shards)), chance.IntN(8)
			for _, s := range both {
				end := s.ends[shard][len(s.ends[shard])-1]
				st := store.Step{Shard: shard, Epoch: 1, Flush: kind == 0}
				st.Checkpoint.Position = s.at(end).Position
				st.Checkpoint.Position.Seq += 1 + i
				st.Checkpoint.Oldest = st.Checkpoint.Position.XID
				if kind == 1 {
					at := s.order[shard][len(s.order[shard])-1]
					r := s.records[shard][at]
					st.Park = []store.Parked{{
						EventPosition: s.at(at), Key: r.Key, Aggregate: aggregateOf(&r), State: r.State, Cause: store.CauseTopic, Attempts: i, Body: store.EncodeEvent(nil, &r),
					}}
				}
				if fenced, err := s.Steps(ctx, time.Hour, []store.Step{st}); err != nil || len(fenced) != 0 {
					t.Fatal(fenced, err)
				}
			}
		}
		failOver := round == 2
		cluster.Kill()
		if failOver {
			if err := os.WriteFile(filepath.Join(cluster.Server().DataDir(), "standby.signal"), nil, 0o644); err != nil { //nolint:gosec // the server's account reads it
				t.Fatal(err)
			}
		}
		cluster.Restart(t)
		if failOver {
			cluster.Promote(t)
			memory.server++
		}
		real.connectAgain()
		lost := 0
		for ; ; lost++ {
			for _, s := range both {
				s.look()
			}
			if slices.Equal(both[0].text(), both[1].text()) {
				break
			}
			n := len(memory.unflushed)
			if n == 0 {
				t.Fatalf("round %d: after a crash PostgreSQL has\n%s\nwhich the store of the simulator cannot have; before all that it may lose it has\n%s",
					round, strings.Join(both[1].text(), "\n"), strings.Join(both[0].text(), "\n"))
			}
			memory.unflushed[n-1].undo()
			memory.unflushed = memory.unflushed[:n-1]
		}
		memory.crash(0)
		t.Logf("round %d: %d steps were lost", round, lost)
		want := []string{store.ErrUnavailable.Error(), "ok"}
		if failOver {
			want = []string{store.ErrUnavailable.Error(), store.ErrStoreChanged.Error(), "ok"}
		}
		for _, s := range both {
			var got []string
			for len(got) == 0 || got[len(got)-1] != "ok" && len(got) < 5 {
				found, err := s.read([]store.Cursor{{}, {Shard: 1}}, 100, func(found []store.Segment) bool { return len(found) == len(s.now.log) })
				got = append(got, answer(err))
				if err == nil && len(found) != len(s.now.log) {
					t.Errorf("%T: round %d: %d segments are read of %d", s.subject, round, len(found), len(s.now.log))
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%T: round %d: reading says %q, expected %q", s.subject, round, got, want)
			}
		}
	}
}

// publishOne publishes something in all shards.
func publishOne(t *testing.T, s *side, source int32, round int) {
	t.Helper()
	k := store.Key{Source: source}
	k.Transaction[15] = byte(1 + round) //nolint:gosec // few
	r := &store.Request{Kind: store.KindPublish, Key: k}
	for i := range 8 {
		r.Events = append(r.Events, store.Event{Topic: "t", AggregateType: "order", AggregateID: fmt.Sprint("id-", i)})
	}
	out := "no answer"
	r.Done = func(_ *store.Request, a store.Answer) { out = answer(a.Err) }
	if err := s.writer(0).Submit(r); err != nil {
		t.Fatal(err)
	}
	for put, _ := s.writer(0).Batch(); put != nil; put, _ = s.writer(0).Batch() {
		s.run(0, put)
	}
	if out != "ok" {
		t.Fatalf("%T: publishing: %s", s.subject, out)
	}
}

// connectAgain connects after a crash, as a process would that starts then. The reader stays.
func (p *onPostgres) connectAgain() {
	p.tb.Helper()
	p.hands = p.db.Connect(p.tb)
	p.use(p.open("relay"))
}

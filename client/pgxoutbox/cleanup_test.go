package pgxoutbox_test

import (
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
)

func (w *world) markers() int { return value[int](w, "SELECT count(*) FROM outbox_marker") }

// TestMarkersAreDeleted: after the acknowledgement and the retention, and not before either.
func TestMarkersAreDeleted(t *testing.T) {
	w := newWorld(t, options{upkeep: pgxoutbox.Upkeep{MarkerRetention: 300 * time.Millisecond, JanitorInterval: time.Hour}})
	w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		txs := w.p.Transactions()
		switch {
		case call.Name != "commit":
		case call.ID == txs[0].ID:
			return fakeplatform.Fault{Silent: true}
		case call.ID == txs[1].ID:
			return fakeplatform.Fault{Err: fakeplatform.Error(codes.FailedPrecondition, "TRANSACTION_ALREADY_DECIDED", 0, nil)}
		}
		return fakeplatform.Fault{}
	})
	start := time.Now()
	for i := range 4 {
		w.place("1", fmt.Sprint(i))
	}
	w.p.Wait(t, "two of four markers to go", func() bool { return w.c.Stats().MarkersDeleted == 2 && w.alarmed(client.AlarmContradiction) == 1 })
	if d := time.Since(start); d < 300*time.Millisecond {
		t.Errorf("they went after %v", d)
	}
	for i, tx := range w.p.Transactions() {
		if there := value[bool](w, "SELECT EXISTS (SELECT FROM outbox_marker WHERE id = $1)", tx.ID); there != (i < 2) {
			t.Errorf("marker %d is there: %v; only those of acknowledged Commits may go", i, there)
		}
	}
}

// oldMarker writes a marker that is three hours old.
func (w *world) oldMarker() uuid.UUID {
	w.t.Helper()
	id := client.NewID()
	var ms [8]byte
	binary.BigEndian.PutUint64(ms[:], uint64(time.Now().Add(-3*time.Hour).UnixMilli())<<16)
	copy(id[:6], ms[:6])
	w.exec("INSERT INTO outbox_marker (id, created_at) VALUES ($1, now() - interval '3 hours')", id)
	return id
}

// TestJanitor: old markers go when the platform knows the decision, or has forgotten it in due time. A committed transaction
// that the platform lost, or holds for aborted, keeps its marker, and a person is told.
func TestJanitor(t *testing.T) {
	w := newWorld(t, options{upkeep: pgxoutbox.Upkeep{JanitorInterval: 50 * time.Millisecond}})
	ctx := t.Context()
	w.p.SetHorizon(time.Now().Add(-4 * time.Hour)) // the platform would still know everything that is three hours old
	w.place("1", "young")
	stored := func(s fakeplatform.State) uuid.UUID {
		id := w.oldMarker()
		if _, err := w.c.Prepare(ctx, id, client.DatabaseTransaction{}, event("2", "x")); err != nil {
			t.Fatal(err)
		}
		if s != fakeplatform.Prepared {
			if err := w.p.Decide(id, s); err != nil {
				t.Fatal(err)
			}
		}
		return id
	}
	committed, aborted, undecided := stored(fakeplatform.Committed), stored(fakeplatform.Aborted), stored(fakeplatform.Prepared)
	forgotten := w.oldMarker()
	spilled := w.oldMarker()
	w.exec("UPDATE outbox_marker SET spilled = '\\xff', refused = 'kept' WHERE id = $1", spilled)
	w.p.Wait(t, "the janitor to ask", func() bool { return w.alarmed(client.AlarmLost) > 0 })
	there := func(id uuid.UUID) bool {
		return value[bool](w, "SELECT EXISTS (SELECT FROM outbox_marker WHERE id = $1)", id)
	}
	w.p.Wait(t, "decided ones to go", func() bool { return !there(committed) && !there(undecided) })
	if !there(forgotten) {
		t.Error("a transaction that the platform lost has no marker any more")
	}
	w.p.SetHorizon(time.Now().Add(-2 * time.Hour)) // the platform knows everything younger, so it forgot this one in due time
	w.p.Wait(t, "forgotten ones to go", func() bool { return !there(forgotten) })
	w.p.Wait(t, "the alarm", func() bool { return w.alarmed(client.AlarmContradiction) > 0 })
	if !there(aborted) || !there(spilled) || w.markers() != 3 {
		t.Errorf("%d markers are left", w.markers())
	}
	if s := w.p.Transaction(undecided).State; s != fakeplatform.Committed {
		t.Errorf("the undecided one is %v: its marker is proof", s)
	}
}

func TestUpkeepIsChecked(t *testing.T) {
	w := newWorld(t, options{detached: true})
	for _, u := range []pgxoutbox.Upkeep{
		{MarkerRetention: -1}, {SpillRetention: -1}, {DrainInterval: -1}, {JanitorInterval: -1}, {MaxAcknowledged: -1},
	} {
		if err := pgxoutbox.Register(w.c, "", w.pool, u); err == nil {
			t.Errorf("%+v", u)
		}
	}
}

// TestJanitorGoesOn: more old markers than one batch holds.
func TestJanitorGoesOn(t *testing.T) {
	w := newWorld(t, options{upkeep: pgxoutbox.Upkeep{JanitorInterval: 50 * time.Millisecond}})
	w.p.SetHorizon(time.Now().Add(-2 * time.Hour))
	w.exec(`INSERT INTO outbox_marker (id, created_at)
		SELECT (lpad(to_hex((extract(epoch FROM now() - interval '3 hours') * 1000)::bigint), 12, '0') || '7' || substr(md5(n::text), 1, 3) ||
		        '8' || substr(md5(n::text), 4, 15))::uuid, now() - interval '3 hours' FROM generate_series(1, 1100) n`)
	w.p.Wait(t, "all to go", func() bool { return w.markers() == 0 })
	if n := w.c.Stats().MarkersDeleted; n != 1100 {
		t.Errorf("%d deleted", n)
	}
}

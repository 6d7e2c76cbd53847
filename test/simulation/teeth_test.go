//go:build mutant

package simulation

import (
	"strings"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/internal/fault"
)

// TestTeeth breaks one rule after the other and sees that the simulator notices: a check that never fails proves nothing.
// go test -tags mutant ./test/simulation -run TestTeeth -v prints the table of README.md.
func TestTeeth(t *testing.T) {
	const most = 20_000
	for _, c := range []struct {
		mutant string // of the product
		broken string // of the store
		what   string
		by     string // what notices, or several
	}{
		{"M1", "", "pg_xact_status decides", "decision lost"},
		{"M2", "", "a transaction that runs for long is aborted", "decision"},
		{"M3", "", "what is handed over is published", "lost order gate"},
		{"M5", "", "what Kafka refuses is passed over", "order lost retention"},
		{"M6", "", "whose Commit comes first is published first", "order"},
		{"S1", "", "no gate: several records of an aggregate under way", "gate"},
		{"S2", "", "a checkpoint passes what is not acknowledged", "lost order stuck retention"},
		{"S3", "", "an undecided head with a follower is dropped", "lost order"},
		{"S4", "", "everything is published twice", "duplicate"},
		{"S5", "", "what was purged counts as published", "lost order dropped"},
		{"S6", "", "the log that pend needs may be truncated", "retention stuck"},
		{"S7", "", "a holder trusts its lease for ever", "fencing"},
		{"", "fence", "steps are written without looking at the epoch", "fencing lost stuck order"},
		{"", "flush", "rows are not flushed", "lost stuck order"},
		{"", "horizon", "the log is read above the horizon", "lost stuck order decision"},
		{"", "retention", "the log is truncated whoever needs it", "retention"},
	} {
		fault.Choose(c.mutant)
		started := time.Now()
		caught, seed := "", uint64(0)
		for seed < most && caught == "" {
			seed++
			caught = teethRun(seed, c.broken)
		}
		fault.Choose("")
		by, _, _ := strings.Cut(caught, ":")
		t.Logf("| %s%s | %s | %s | %d | %.1f s |", c.mutant, c.broken, c.what, by, seed, time.Since(started).Seconds())
		if caught == "" {
			t.Errorf("%s%s (%s): not noticed in %d schedules", c.mutant, c.broken, c.what, most)
		} else if !strings.Contains(c.by, by) {
			t.Errorf("%s%s (%s): noticed as %q, expected one of %s", c.mutant, c.broken, c.what, caught, c.by)
		}
	}
}

// teethRun runs one schedule. A mutant may also run into a contradiction of its own state: that is noticed too.
func teethRun(seed uint64, broken string) (failure string) {
	w := newWorld(newSeeded(seed))
	w.store.broken = broken
	defer func() {
		if r := recover(); r != nil {
			failure = "gate: the relay's state contradicts itself"
		}
	}()
	defer w.close()
	w.run(300)
	return w.failure
}

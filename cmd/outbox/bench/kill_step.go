package bench

import (
	"slices"
	"time"

	"github.com/outbox-platform/outbox/client"
)

// killStep is a place in the protocol at which a service dies.
type killStep string

const (
	killBeforePrepare killStep = "before-prepare" // the marker is written, nothing was sent
	killPrepareSent   killStep = "prepare-sent"   // Prepare is on the wire, not answered
	killPrepared      killStep = "prepared"       // Prepare was answered, COMMIT is not sent
	killCommitCut     killStep = "commit-cut"     // COMMIT reaches the database, its answer never comes
	killCommitted     killStep = "committed"      // COMMIT was answered, Commit is not sent
	killCommitSent    killStep = "commit-sent"    // Commit is on the wire, not answered
)

// killSteps are all steps in the order of the protocol.
var killSteps = []killStep{killBeforePrepare, killPrepareSent, killPrepared, killCommitCut, killCommitted, killCommitSent}

// killResolver is how the platform finds out: the same names as in the evidence of a decision.
type killResolver string

const (
	killCheckBack killResolver = "check-back" // another instance of the source is asked; there is no DSN
	killDirect    killResolver = "direct"     // the platform reads the database; no other instance lives
)

var killResolvers = []killResolver{killCheckBack, killDirect}

// source is the name under which the victims of a resolver are registered.
func (r killResolver) source() string { return sourceName + "-" + string(r) }

// seen is what the platform says about a transaction in the end.
type seen int

const (
	seenUnknown   seen = iota // never heard of it
	seenUndecided             // still in doubt when the patience was over
	seenCommitted
	seenAborted
)

func seenOf(s client.State) seen {
	switch s {
	case client.StateCommitted:
		return seenCommitted
	case client.StateAborted:
		return seenAborted
	}
	return seenUndecided
}

// mayBeUnknown tells whether a death at this step may leave nothing in the platform.
func (s killStep) mayBeUnknown() bool { return s == killBeforePrepare || s == killPrepareSent }

// decider tells whether a decision by this method can come about in the set-up of the bench. Anything else is a fault of the
// bench: the wrong resolver would be measured.
func (s killStep) decider(r killResolver, by string) bool {
	return by == string(r) || by == "client" && s == killCommitSent
}

// death is one victim's transaction.
type death struct {
	number    uint64 // of the order, unique in the run
	id        [16]byte
	died      time.Time
	seen      seen
	by        string // who decided
	nanos     int64  // from death to decision, if decided
	committed bool   // the truth: the order is in the source database
	arrived   int    // records in Kafka
}

// wrong tells what contradicts the truth; "" when nothing does.
func (d *death) wrong(step killStep) string {
	switch {
	case step == killBeforePrepare && d.seen != seenUnknown:
		return "known to the platform although it was never prepared"
	case d.seen == seenUnknown && !step.mayBeUnknown():
		return "prepared, and unknown to the platform"
	case d.seen == seenUnknown && d.committed:
		return "committed, and unknown to the platform"
	case d.seen == seenCommitted && !d.committed:
		return "decided COMMITTED, and the database has no such order"
	case d.seen == seenAborted && d.committed:
		return "decided ABORTED, and the database has the order"
	case d.arrived > 0 && !d.committed:
		return "its event arrived, and the database has no such order"
	case d.arrived == 0 && d.seen == seenCommitted:
		return "decided COMMITTED, and its event did not arrive"
	}
	return ""
}

// killResultOf sums up the deaths at one step.
func killResultOf(step killStep, r killResolver, deaths []death) KillResult {
	res := KillResult{Step: string(step), Resolver: string(r), N: len(deaths)}
	var nanos []int64
	for i := range deaths {
		d := &deaths[i]
		if d.wrong(step) != "" {
			res.Wrong++
		}
		switch d.seen {
		case seenUnknown:
			res.NotStored++
		case seenUndecided:
			res.Undecided++
		case seenCommitted, seenAborted:
			nanos = append(nanos, d.nanos)
			if d.by == "client" {
				res.ByClient++
			}
		}
	}
	if len(nanos) > 0 {
		p50, p99, most := quantile(nanos, 0.50), quantile(nanos, 0.99), float64(slices.Max(nanos))/1e6
		res.P50, res.P99, res.Max = &p50, &p99, &most
	}
	return res
}

package resolver

import (
	"context"

	"github.com/outbox-platform/outbox/store"
)

// forgotten is why a missing marker may prove nothing.
const forgotten = "the store failed over since it was prepared: a Commit may be lost whose marker is deleted by now"

// remember takes back what a missing marker does not prove. A marker is deleted some time after its Commit was acknowledged. A
// store that failed over may have lost that Commit; then "ended, not marked" would drop the events of a committed transaction.
func (r *Resolver) remember(ctx context.Context, parked []store.Parked, answers []answer) []answer {
	byMarker := make(map[store.Key]bool, len(parked))
	for i := range parked {
		byMarker[parked[i].Key] = parked[i].Database.Mode != store.ModeXIDFenced
	}
	var denied []store.Key
	for _, a := range answers {
		if a.outcome == aborted && byMarker[a.key] {
			denied = append(denied, a.key)
		}
	}
	if len(denied) == 0 {
		return answers
	}
	memories, err := r.store.Memories(ctx, denied, r.cfg.MarkerRetention/2) // half is margin for clocks, and between marker and Prepare
	for i := range answers {
		a := &answers[i]
		switch {
		case a.outcome != aborted || !byMarker[a.key]:
		case err != nil:
			a.outcome, a.reason = unknown, "asking the store: "+err.Error()
		case memories[a.key] == store.Decided:
			a.over = true
		case memories[a.key] == store.Forgetful:
			a.outcome, a.reason = unknown, forgotten
		}
	}
	return answers
}

package relay

import "github.com/outbox-platform/outbox/store"

// overtake is the mutant M6: an event that is committed passes those that are not decided yet.
func (a *aggregate) overtake(e *event) {
	first := a.back.first
	if e.row != hot || a.front.n > 0 || a.unloaded > 0 || first == e || first.row != hot || first.state != store.Prepared {
		return
	}
	for p := first; p != nil; p = p.next {
		if p.next != e {
			continue
		}
		p.next = e.next
		if a.back.last == e {
			a.back.last = p
		}
		e.next, a.back.first = first, e
		return
	}
}

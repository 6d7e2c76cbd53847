package client

import "sync/atomic"

// counters of a client.
type counters struct {
	calls, messages, resent, retries          atomic.Uint64
	sessions, connectFailures, drains         atomic.Uint64
	acknowledged, droppedCommits              atomic.Uint64
	checked, alarms                           atomic.Uint64
	spilled, drained, refused, markersDeleted atomic.Uint64
}

// Stats are a client's counters since it was made, for the metrics of the service.
type Stats struct {
	// Calls were sent, repetitions included, in Messages messages.
	Calls, Messages uint64
	// Resent calls went out again because a session ended before it answered them.
	Resent uint64
	// Retries are repetitions after a failure.
	Retries uint64
	// Sessions were opened; ConnectFailures attempts failed; Drains were asked for by the platform.
	Sessions, ConnectFailures, Drains uint64
	// Acknowledged are Commits and Aborts in the background that the platform confirmed; DroppedCommits were not sent because
	// too many were pending.
	Acknowledged, DroppedCommits uint64
	// PendingCommits are Commits and Aborts that are not acknowledged now.
	PendingCommits int
	// Checked are check-back answers given.
	Checked uint64
	// Alarms were raised.
	Alarms uint64
	// Spilled requests were stored in the source's database; Drained ones were published from there; Refused ones were refused
	// for good by the platform.
	Spilled, Drained, Refused uint64
	// MarkersDeleted are marker rows removed.
	MarkersDeleted uint64
}

// Stats returns the counters.
func (c *Client) Stats() Stats {
	s := &c.stats
	c.decisions.mu.Lock()
	pending := c.decisions.pending
	c.decisions.mu.Unlock()
	return Stats{
		Calls: s.calls.Load(), Messages: s.messages.Load(), Resent: s.resent.Load(), Retries: s.retries.Load(),
		Sessions: s.sessions.Load(), ConnectFailures: s.connectFailures.Load(), Drains: s.drains.Load(),
		Acknowledged: s.acknowledged.Load(), DroppedCommits: s.droppedCommits.Load(), PendingCommits: pending,
		Checked: s.checked.Load(), Alarms: s.alarms.Load(),
		Spilled: s.spilled.Load(), Drained: s.drained.Load(), Refused: s.refused.Load(), MarkersDeleted: s.markersDeleted.Load(),
	}
}

// UpkeepCounts is what a registered database reports about its own work, for Stats.
type UpkeepCounts struct{ Spilled, Drained, Refused, MarkersDeleted uint64 }

// Count adds to the counters. Implementations of [Database] call it.
func (c *Client) Count(u UpkeepCounts) {
	c.stats.spilled.Add(u.Spilled)
	c.stats.drained.Add(u.Drained)
	c.stats.refused.Add(u.Refused)
	c.stats.markersDeleted.Add(u.MarkersDeleted)
}

// InFlight returns the number of calls that wait for an answer now.
func (c *Client) InFlight() int { return len(c.inFlight) }

package system_test

import "strings"

// blockedAggregate is a line of `outbox aggregate blocked -o json`.
type blockedAggregate struct {
	AggregateID string `json:"aggregate_id"`
	Source      string `json:"source"`
	Cause       string `json:"cause"`
	Explanation string `json:"explanation"`
	Waiting     int64  `json:"waiting,string"`
	Attempts    int    `json:"attempts"`
	Topic       string `json:"topic"`
}

// blocked lists the aggregates that cannot go on.
func (p *platform) blocked() []blockedAggregate {
	p.t.Helper()
	return operateJSON[struct {
		Aggregates []blockedAggregate `json:"aggregates"`
	}](p, "aggregate", "blocked").Aggregates
}

// deadLetter is a line of `outbox deadletter list -o json`.
type deadLetter struct {
	EventID     string `json:"event_id"`
	Source      string `json:"source"`
	AggregateID string `json:"aggregate_id"`
	Error       string `json:"error"`
	Attempts    int    `json:"attempts"`
}

// deadLetters lists what was set aside.
func (p *platform) deadLetters() []deadLetter {
	p.t.Helper()
	return operateJSON[struct {
		DeadLetters []deadLetter `json:"dead_letters"`
	}](p, "deadletter", "list").DeadLetters
}

// operateAggregate redrives, skips or discards, and waits until the holder has done it.
func (p *platform) operateAggregate(action, source, aggregate string) {
	p.t.Helper()
	out, err := p.operate("", "deadletter", action, source, "order", aggregate, "--reason", "test")
	if err != nil || !strings.Contains(out, "done") {
		p.t.Fatalf("deadletter %s: %v: %s", action, err, out)
	}
}

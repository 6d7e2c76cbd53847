package client

import (
	"errors"
	"testing"
)

// A client is closed while a decision waits for its next attempt: the attempt sends nothing, whichever way it goes, and whoever
// waits is told.
func TestADecisionWhoseClientIsClosed(t *testing.T) {
	for name, send := range map[string]func(*decision){"session": (*decision).send, "unary": (*decision).sendUnary} {
		t.Run(name, func(t *testing.T) {
			c, err := New(Config{Target: "127.0.0.1:1", Source: "orders", Plaintext: true})
			if err != nil {
				t.Fatal(err)
			}
			var told []error
			id := NewID()
			d := &decision{c: c, kind: kindCommit, id: id, body: c.encodeDecision(kindCommit, id, nil), done: func(err error) { told = append(told, err) }}
			c.decisions.pending = 1
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			send(d)
			if len(told) != 1 || !errors.Is(told[0], errClosed) || c.decisions.pending != 0 {
				t.Errorf("told %v, %d pending", told, c.decisions.pending)
			}
		})
	}
}

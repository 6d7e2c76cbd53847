package simulation

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"
)

// drawn is a chance whose answers rapid draws, so that it can take them back one by one.
type drawn struct{ t *rapid.T }

var upTo [512]*rapid.Generator[int]

func init() {
	for limit := 1; limit < len(upTo); limit++ {
		upTo[limit] = rapid.IntRange(0, limit-1)
	}
}

func (d drawn) n(limit int) int {
	if limit < len(upTo) {
		return upTo[limit].Draw(d.t, "")
	}
	return rapid.IntRange(0, limit-1).Draw(d.t, "")
}

// shrinkable is a schedule that rapid draws.
func shrinkable(t *rapid.T) {
	w := newWorld(drawn{t})
	defer w.close()
	var story []string
	w.trace = func(format string, args ...any) { story = append(story, fmt.Sprintf(format, args...)) }
	w.store.note = w.note
	w.run(rapid.IntRange(1, 150).Draw(t, "events"))
	if w.failure != "" {
		for _, line := range story {
			t.Log(line)
		}
		t.Fatal(w.failure)
	}
}

// TestShrinks runs schedules that rapid draws. What fails it makes as short as it can, and tells the story of that.
func TestShrinks(t *testing.T) { rapid.Check(t, shrinkable) }

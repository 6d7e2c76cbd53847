package check_test

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/outbox-platform/outbox/test/robustness/check"
	"github.com/outbox-platform/outbox/test/robustness/driver"
	"github.com/outbox-platform/outbox/test/robustness/journal"
	"github.com/outbox-platform/outbox/test/system/history"
)

// world is a run in which everything is well, for a test to break one thing in.
type world struct {
	*check.Run
	now     int64
	offsets map[string]int64
	txs     []uuid.UUID
	prepare []int // indexes of the entries that prepare them
}

const partitions = 4

func (w *world) note(t journal.Type, f, profile string, tx uuid.UUID, events ...journal.Event) *journal.Entry {
	w.now += 10
	w.Entries = append(w.Entries, journal.Entry{At: w.now, Process: "p", Worker: 1, Type: t, F: f, Source: "shop", Tx: tx, Profile: profile, Events: events})
	return &w.Entries[len(w.Entries)-1]
}

func event(aggregate string, version int64) journal.Event {
	digest := sha256.Sum256(fmt.Append(nil, version))
	return journal.Event{
		ID: uuid.New(), Topic: "things", Aggregate: "thing/" + aggregate, Version: version, Locked: true, Key: []byte(aggregate), Digest: digest[:],
		Headers: []journal.Header{{Name: "note", Value: []byte("x")}},
	}
}

// publish puts an event on Kafka.
func (w *world) publish(e journal.Event, epoch int64) {
	partition := placed(e.Key, partitions)
	at := fmt.Sprintf("%s/%d", e.Topic, partition)
	r := history.Record{
		ID: e.ID, Topic: e.Topic, Partition: partition, Offset: w.offsets[at], Key: e.Key, Shard: 1, Epoch: epoch,
		Headers: []history.Header{{Name: "note", Value: "x"}, {Name: "ce_id", Value: e.ID.String()}},
	}
	copy(r.Payload[:], e.Digest)
	w.offsets[at]++
	if _, again := w.Seen[e.ID]; !again {
		w.Seen[e.ID] = w.now
	}
	w.Records = append(w.Records, r)
}

func placed(key []byte, count int) int32 {
	return int32(kgo.StickyKeyPartitioner(nil).ForTopic("things").Partition(&kgo.Record{Key: key}, count))
}

// transaction is one that goes well.
func (w *world) transaction(profile string, events ...journal.Event) uuid.UUID {
	id := uuid.New()
	w.txs = append(w.txs, id)
	w.prepare = append(w.prepare, len(w.Entries))
	w.note(journal.Invoke, journal.Prepare, profile, id, events...)
	w.note(journal.OK, journal.Prepare, profile, id)
	w.note(journal.Invoke, journal.Local, profile, id)
	w.note(journal.OK, journal.Local, profile, id)
	w.note(journal.Invoke, journal.Commit, profile, id)
	w.note(journal.OK, journal.Commit, profile, id)
	w.note(journal.Invoke, journal.Get, profile, id)
	w.note(journal.OK, journal.Get, profile, id).State = string(check.Committed)
	w.Truth[id], w.States[id], w.Markers[id] = true, check.Committed, true
	for _, e := range events {
		w.publish(e, 1)
	}
	return id
}

// well is a good run: three transactions on two aggregates, one that was rolled back, and one that was found out.
func well() *world {
	w := &world{offsets: map[string]int64{}, Run: &check.Run{
		Truth: map[uuid.UUID]bool{}, Markers: map[uuid.UUID]bool{}, States: map[uuid.UUID]check.State{}, Resolutions: map[uuid.UUID]check.Resolution{},
		Seen: map[uuid.UUID]int64{}, Decided: map[uuid.UUID]int64{}, Blocked: map[string]bool{}, Disturbing: map[string]bool{"kill-relay": true, "kill-driver": false},
		Partitions: map[string][]int{"things": {partitions}}, Window: 1, Settled: check.Settled{Limit: time.Minute},
	}}
	w.transaction(driver.Sync, event("a", 1), event("a", 2))
	w.transaction(driver.Sync, event("a", 3), event("b", 1))
	w.transaction(driver.Sync, event("b", 2))
	undone := uuid.New()
	w.note(journal.Invoke, journal.Prepare, driver.Undo, undone, event("c", 1))
	w.note(journal.OK, journal.Prepare, driver.Undo, undone)
	w.States[undone] = check.Aborted
	w.txs = append(w.txs, undone)
	found := w.transaction(driver.Forget, event("b", 3))
	w.Resolutions[found] = check.Resolution{State: check.Committed, Method: "direct"}
	w.Decided[undone] = w.now
	w.Counters = check.Counters{
		Published: 6, Takeovers: 1,
		Relays: map[string]float64{
			"outbox_published_total": 6, "outbox_dropped_total": 1, "outbox_takeovers_total": 1, "outbox_duplicates_suppressed_total": 0, "outbox_corrupt_total": 0,
			`outbox_blocked_aggregates{cause="in_doubt"}`: 0, `outbox_shard_backlog_events{shard="1"}`: 0, `outbox_kafka_errors_total{class="record"}`: 0,
		},
		Servers: map[string]float64{
			"outbox_prepares_total": 5, `outbox_decisions_total{method="client",state="committed"}`: 3, `outbox_decisions_total{method="client",state="aborted"}`: 1,
			`outbox_decisions_total{method="publish",state="committed"}`: 0, `outbox_resolved_transactions_total{method="direct",state="committed"}`: 1,
		},
	}
	return w
}

func (w *world) event(tx, n int) journal.Event { return w.Entries[w.prepare[tx]].Events[n] }

// swap exchanges two records' places.
func (w *world) swap(i, j int) {
	a, b := &w.Records[i], &w.Records[j]
	a.Offset, b.Offset = b.Offset, a.Offset
}

// TestEachInvariant breaks one thing at a time: the checker must name the invariant, and nothing in a run that is well.
func TestEachInvariant(t *testing.T) {
	for _, test := range []struct {
		name, want string
		harm       func(*world)
	}{
		{"all is well", "", func(*world) {}},
		{"an event of a transaction that was rolled back is on Kafka", "I1", func(w *world) {
			for _, e := range w.Entries {
				if e.Profile == driver.Undo && len(e.Events) > 0 {
					w.publish(e.Events[0], 1)
				}
			}
		}},
		{"a committed event is not on Kafka", "I2", func(w *world) { w.Records = w.Records[:len(w.Records)-1] }},
		{"half a transaction is on Kafka", "I3", func(w *world) { w.Records = slices.Delete(w.Records, 1, 2) }},
		{"two events of an aggregate are swapped", "I4", func(w *world) { w.swap(0, 1) }},
		{"a gap that is filled later", "I4", func(w *world) { w.swap(1, 2) }},
		{"another partition", "I5", func(w *world) { w.Records[0].Partition = (w.Records[0].Partition + 1) % partitions }},
		{"a repeat without a reason", "I6", func(w *world) { w.publish(w.event(0, 0), 1) }},
		{"more repeats than can be explained", "I6", func(w *world) {
			w.Disturbances = 1
			w.publish(w.event(0, 0), 1)
			w.publish(w.event(0, 0), 1)
		}},
		{"a repeat that is explained", "", func(w *world) {
			w.Disturbances = 1
			w.publish(w.event(0, 0), 1)
		}},
		{"a holder goes on after it was replaced", "I7", func(w *world) {
			w.Disturbances = 9
			w.publish(w.event(0, 0), 2)
			w.publish(w.event(0, 0), 1)
			w.publish(w.event(0, 1), 1)
		}},
		{"another payload", "I8", func(w *world) { w.Records[0].Payload[0]++ }},
		{"another key", "I8", func(w *world) { w.Records[0].Headers[0].Value = "y" }},
		{"an event that nobody prepared", "I8", func(w *world) { w.publish(event("x", 1), 1) }},
		{"the same again is refused", "I9", func(w *world) { w.note(journal.Fail, journal.Again, driver.Duplicate, w.txs[0]) }},
		{"other content is accepted", "I9", func(w *world) { w.note(journal.OK, journal.Other, driver.Duplicate, w.txs[0]) }},
		{"ABORTED and then COMMITTED", "I10", func(w *world) {
			for i := range w.Entries {
				if e := &w.Entries[i]; e.Tx == w.txs[0] && e.F == journal.Local && e.Type == journal.Invoke {
					e.F = journal.Get
					w.Entries[i+1].F, w.Entries[i+1].State = journal.Get, string(check.Aborted)
				}
			}
		}},
		{"a committed transaction is held for aborted", "I11", func(w *world) { w.States[w.txs[0]] = check.Aborted }},
		{"a resolver is wrong", "I11", func(w *world) { w.Resolutions[w.txs[0]] = check.Resolution{State: check.Aborted} }},
		{"the SDK raises an alarm", "I11", func(w *world) { w.note(journal.Info, "alarm", "", w.txs[0]) }},
		{"a transaction stays undecided", "I12", func(w *world) { w.States[w.txs[3]] = check.Prepared }},
		{"something stays blocked", "I12", func(w *world) { w.Settled.Blocked = 1 }},
		{"the store has forgotten a transaction", "I13", func(w *world) { delete(w.States, w.txs[0]) }},
		{"outbox verify finds something", "I13", func(w *world) { w.Stored = []string{"something"} }},
		{"the counters are wrong", "I14", func(w *world) { w.Counters.Relays["outbox_published_total"] = 5 }},
		{"misuse is not refused", "M", func(w *world) { w.note(journal.Fail, journal.Misuse, driver.Misused, uuid.Nil) }},
		{"a process panics", "C", func(w *world) { w.Crashes = []string{"panic"} }},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := well()
			test.harm(w)
			violations, summary, err := check.Check(w.Run)
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, v := range violations {
				names = append(names, v.Invariant)
				if check.Invariants[v.Invariant] == "" || len(v.What) == 0 {
					t.Errorf("violation without words: %+v", v)
				}
			}
			if test.want == "" && len(names) > 0 || test.want != "" && !slices.Contains(names, test.want) {
				t.Errorf("want %q, found %s: %+v", test.want, strings.Join(names, " "), violations)
			}
			if summary.Transactions != 5 && summary.Transactions != 6 {
				t.Errorf("%d transactions", summary.Transactions)
			}
		})
	}
}

// TestGrowingTopic: no order is promised across a change of the partition count, and everything else is.
func TestGrowingTopic(t *testing.T) {
	w := well()
	w.Partitions["things"] = []int{partitions, partitions + 1}
	if violations, _, err := check.Check(w.Run); err != nil || len(violations) > 0 {
		t.Errorf("%v %+v", err, violations)
	}
	// A later holder repeats an event where the new count puts it, behind a younger one. It was first where it was, in whatever
	// order both are read.
	w.Disturbances = 1
	young := w.event(3, 0)
	at := slices.IndexFunc(w.Records, func(r history.Record) bool { return r.ID == young.ID })
	repeat := w.Records[slices.IndexFunc(w.Records, func(r history.Record) bool { return r.ID == w.event(2, 0).ID })]
	elsewhere := placed(young.Key, partitions+1)
	if elsewhere == repeat.Partition {
		t.Fatal("the key stays where it is: the test needs another one")
	}
	w.Records[at].Partition, w.Records[at].Offset = elsewhere, 0
	repeat.Partition, repeat.Offset, repeat.Epoch = elsewhere, 1, 2
	w.Records = slices.Insert(w.Records, 0, repeat)
	if violations, summary, err := check.Check(w.Run); err != nil || len(violations) > 0 || summary.Repeats != 1 {
		t.Errorf("a repeat on the other side of the change: %v %+v %+v", err, violations, summary)
	}
	w.swap(1, 2)
	violations, _, err := check.Check(w.Run)
	if err != nil || len(violations) == 0 || violations[0].Invariant != "I4" {
		t.Errorf("a swap on one partition: %v %+v", err, violations)
	}
}

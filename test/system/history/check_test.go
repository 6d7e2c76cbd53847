package history_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kgo"
	"pgregory.net/rapid"

	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/test/system/history"
)

var partitions = map[string]int{"orders": 6, "payments": 3}

// run is a faultless history: aggregates with events that alternate between two topics, published in order.
func run(aggregates, versions int) (committed []history.Event, records []history.Record) {
	next := map[string]int64{}
	clock := time.Unix(1_000_000, 0)
	for v := range versions {
		for a := range aggregates {
			aggregate := fmt.Sprintf("order/%d", a)
			topic := "orders"
			if (a+v)%3 == 0 {
				topic = "payments"
			}
			key := []byte(aggregate)
			id := uuid.NewSHA1(uuid.NameSpaceOID, fmt.Appendf(nil, "%d/%d", a, v))
			headers := []history.Header{{Name: "mine", Value: fmt.Sprint(v)}}
			payload := history.DigestOf(fmt.Append(nil, a, v))
			committed = append(committed, history.Event{
				ID: id, Aggregate: aggregate, Version: int64(v + 1), Topic: topic, Key: key, Payload: payload, Headers: headers,
			})
			partition := int32(kgo.StickyKeyPartitioner(nil).ForTopic(topic).Partition(&kgo.Record{Key: key}, partitions[topic]))
			place := fmt.Sprint(topic, partition)
			clock = clock.Add(time.Millisecond)
			records = append(records, history.Record{
				ID: id, Topic: topic, Partition: partition, Offset: next[place], Key: key, Payload: payload,
				Headers: append(slices.Clone(headers), history.Header{Name: "ce_id", Value: id.String()}),
				Shard:   a % 4, Epoch: 7, AppendedAt: clock,
			})
			next[place]++
		}
	}
	return committed, records
}

func check(t interface{ Fatal(...any) }, committed []history.Event, records []history.Record) *history.Report {
	report, err := history.Check(committed, records, partitions)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func TestFaultlessHistoryIsClean(t *testing.T) {
	committed, records := run(20, 10)
	slices.Reverse(records) // the order of reading across partitions is free
	report := check(t, committed, records)
	if report.Broken() || len(report.Repeats) != 0 || report.Late.Count != 0 || report.Committed != 200 || report.Records != 200 {
		t.Error(report)
	}
}

// TestCheckerHasTeeth breaks a faultless history in one way at a time.
func TestCheckerHasTeeth(t *testing.T) {
	// streamOf lists the indexes of an aggregate's records on its first topic.
	streamOf := func(records []history.Record, committed []history.Event) []int {
		var found []int
		for i := range records {
			if committed[i].Aggregate == "order/1" && records[i].Topic == "orders" {
				found = append(found, i)
			}
		}
		return found
	}
	// again appends a copy of a record to the end of its partition.
	again := func(records []history.Record, i int) ([]history.Record, *history.Record) {
		r := records[i]
		for _, other := range records {
			if other.Topic == r.Topic && other.Partition == r.Partition {
				r.Offset = max(r.Offset, other.Offset+1)
			}
		}
		records = append(records, r)
		return records, &records[len(records)-1]
	}
	repeats := func(which func(history.Repeat) bool) func(*history.Report) history.Findings {
		return func(report *history.Report) (found history.Findings) {
			for _, r := range report.Repeats {
				if which(r) {
					found.Count++
				}
			}
			return found
		}
	}
	for _, c := range []struct {
		name  string
		spoil func(committed []history.Event, records []history.Record) ([]history.Event, []history.Record)
		count func(*history.Report) history.Findings
		want  int
		sound bool // breaks no promise
	}{
		{name: "lost", want: 1,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				s := streamOf(r, e)
				return e, slices.Delete(r, s[len(s)-1], s[len(s)-1]+1) // the last one: no gap shows it
			},
			count: func(r *history.Report) history.Findings { return r.Lost }},
		{name: "skipped in the middle", want: 1,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				return e, slices.Delete(r, streamOf(r, e)[1], streamOf(r, e)[1]+1)
			},
			count: func(r *history.Report) history.Findings { return r.Reordered }},
		{name: "phantom of a rolled back transaction", want: 1,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				r, phantom := again(r, 0)
				phantom.ID = uuid.New()
				return e, r
			},
			count: func(r *history.Report) history.Findings { return r.Phantom }},
		{name: "record without id", want: 1,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				r, phantom := again(r, 0)
				phantom.ID = uuid.Nil
				return e, r
			},
			count: func(r *history.Report) history.Findings { return r.Phantom }},
		{name: "event on a foreign topic", want: 1,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				r, phantom := again(r, streamOf(r, e)[0])
				phantom.Topic, phantom.Partition, phantom.Offset = "payments", 0, 10_000
				return e, r
			},
			count: func(r *history.Report) history.Findings { return r.Phantom }},
		{name: "two neighbours swapped", want: 2,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				s := streamOf(r, e)
				r[s[2]].Offset, r[s[3]].Offset = r[s[3]].Offset, r[s[2]].Offset
				return e, r
			},
			count: func(r *history.Report) history.Findings { return r.Reordered }},
		{name: "first event comes last", want: 2,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				r, last := again(r, streamOf(r, e)[0])
				moved := *last
				r = r[:len(r)-1]
				r[streamOf(r, e)[0]].Offset = moved.Offset
				return e, r
			},
			count: func(r *history.Report) history.Findings { return r.Reordered }},
		{name: "order across topics", want: 1,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				for i := range r { // order/0 has its first event on payments, its second on orders
					if e[i].Aggregate == "order/0" && e[i].Version == 2 {
						r[i].AppendedAt = r[i].AppendedAt.Add(-time.Minute)
					}
				}
				return e, r
			},
			count: func(r *history.Report) history.Findings { return r.Reordered }},
		{name: "payload altered", want: 1,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				r[5].Payload[0]++
				return e, r
			},
			count: func(r *history.Report) history.Findings { return r.Altered }},
		{name: "absent key made empty", want: 1,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				e[5].Key, r[5].Key = []byte{}, nil
				return e, r
			},
			count: func(r *history.Report) history.Findings { return r.Altered }},
		{name: "prepared header missing", want: 1,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				r[5].Headers = r[5].Headers[1:]
				return e, r
			},
			count: func(r *history.Report) history.Findings { return r.Altered }},
		{name: "wrong partition", want: 1,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				last := len(r) - 1
				r[last].Partition = (r[last].Partition + 1) % int32(partitions[r[last].Topic])
				r[last].Offset = 10_000
				return e, r
			},
			count: func(r *history.Report) history.Findings { return r.Misplaced }},
		{name: "repeat by the same holder", want: 1, sound: true,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				r, _ = again(r, 3)
				return e, r
			},
			count: repeats(func(r history.Repeat) bool { return r.Epoch == r.FirstEpoch })},
		{name: "repeat by the next holder", want: 1, sound: true,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				r, repeat := again(r, 3)
				repeat.Epoch++
				return e, r
			},
			count: repeats(func(r history.Repeat) bool { return r.Epoch == r.FirstEpoch+1 })},
		{name: "repeat with other headers", want: 1,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				r, repeat := again(r, 3)
				repeat.Epoch++
				repeat.Headers = append(slices.Clone(repeat.Headers), history.Header{Name: "more"})
				return e, r
			},
			count: func(r *history.Report) history.Findings { return r.Altered }},
		{name: "repeat by a holder that had lost its shard", want: 1, sound: true,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				r, repeat := again(r, 3)
				repeat.Epoch--
				return e, r
			},
			count: func(r *history.Report) history.Findings { return r.Late }},
		{name: "more than one repeat of an aggregate by such a holder", want: 1,
			spoil: func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
				for _, i := range streamOf(r, e)[:2] {
					var repeat *history.Record
					r, repeat = again(r, i)
					repeat.Epoch--
				}
				return e, r
			},
			count: func(r *history.Report) history.Findings { return r.Zombie }},
	} {
		t.Run(c.name, func(t *testing.T) {
			committed, records := run(20, 10)
			committed, records = c.spoil(committed, records)
			report := check(t, committed, records)
			if got := c.count(report); got.Count != c.want || report.Broken() == c.sound {
				t.Errorf("found %d, want %d, broken %v: %s", got.Count, c.want, report.Broken(), report)
			}
		})
	}
}

func TestHistoryThatContradictsItselfIsAnError(t *testing.T) {
	for name, spoil := range map[string]func(committed []history.Event, records []history.Record) ([]history.Event, []history.Record){
		"committed twice": func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
			return append(e, e[0]), r
		},
		"follows version": func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
			return slices.Delete(e, 25, 26), r
		},
		"read twice": func(e []history.Event, r []history.Record) ([]history.Event, []history.Record) {
			return e, append(r, r[0])
		},
	} {
		committed, records := spoil(run(20, 10))
		if _, err := history.Check(committed, records, partitions); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAnyRepeatedSuffixIsNoReordering: a new holder repeats from some earlier event on, in order. Whatever it repeats, a
// consumer that de-duplicates sees the right order, and so does the checker.
func TestAnyRepeatedSuffixIsNoReordering(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		committed, records := run(3, 8)
		var out []history.Record
		next := map[string]int64{}
		write := func(r history.Record, epoch int64) {
			place := fmt.Sprint(r.Topic, r.Partition)
			r.Offset, r.Epoch, r.AppendedAt = next[place], epoch, time.Time{}
			next[place]++
			out = append(out, r)
		}
		done, epoch := 0, int64(1)
		for done < len(records) {
			until := rapid.IntRange(done, len(records)).Draw(t, "until")
			from := rapid.IntRange(0, done).Draw(t, "from")
			for _, r := range records[from:until] {
				write(r, epoch)
			}
			done = max(done, until)
			epoch++
		}
		report := check(t, committed, out)
		if report.Broken() || report.Late.Count != 0 || len(report.Repeats) != len(out)-len(records) {
			t.Fatal(report)
		}
	})
}

// TestAnySwapIsFound moves one record of a partition to a later place, past another one of its aggregate.
func TestAnySwapIsFound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		committed, records := run(2, 12)
		var stream []int
		for i, r := range records {
			if committed[i].Aggregate == "order/1" && r.Topic == "orders" {
				stream = append(stream, i)
			}
		}
		a := rapid.IntRange(0, len(stream)-2).Draw(t, "a")
		b := rapid.IntRange(a+1, len(stream)-1).Draw(t, "b")
		i, j := stream[a], stream[b]
		records[i].Offset, records[j].Offset = records[j].Offset, records[i].Offset
		if report := check(t, committed, records); report.Reordered.Count == 0 {
			t.Fatal(report)
		}
	})
}

func TestFromKafkaReadsIDAndEpoch(t *testing.T) {
	id := uuid.New()
	appended := time.Unix(5, 0)
	records, err := history.FromKafka([]kafka.Record{{
		Topic: "orders", Partition: 2, Offset: 9, Key: []byte("k"), Value: []byte("v"), Timestamp: appended,
		Headers: []kafka.Header{{Key: "mine", Value: []byte("x")}, {Key: "ce_id", Value: []byte(id.String())}, {Key: "outbox-epoch", Value: []byte("3:41")}},
	}}, true)
	if err != nil {
		t.Fatal(err)
	}
	r := records[0]
	if r.ID != id || r.Shard != 3 || r.Epoch != 41 || len(r.Headers) != 2 || r.Payload != history.DigestOf([]byte("v")) || !r.AppendedAt.Equal(appended) {
		t.Errorf("%+v", r)
	}
	for _, bad := range []kafka.Header{{Key: "ce_id", Value: []byte("x")}, {Key: "outbox-epoch", Value: []byte("x")}} {
		if _, err := history.FromKafka([]kafka.Record{{Headers: []kafka.Header{bad}}}, false); err == nil {
			t.Errorf("%s %q is accepted", bad.Key, bad.Value)
		}
	}
}

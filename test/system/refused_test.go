package system_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/embedded/kafka"
)

const (
	// smallTopic takes no record of more than smallLimit bytes by the time the relays run.
	smallTopic = "small"
	smallLimit = 20_000
)

// TestRefusedRecord puts a record that its topic refuses into the middle of an aggregate, under each policy, on both kinds of
// broker, without and with transactions. What the policy says happens to that aggregate; the others never notice.
func TestRefusedRecord(t *testing.T) {
	type mode struct {
		broker string
		env    []string
	}
	for name, m := range map[string]mode{
		"kfake": {broker: "kfake"}, "apache": {broker: "apache"},
		"kfake, transactional":  {"kfake", []string{"OUTBOX_KAFKA_TRANSACTIONAL=true"}},
		"apache, transactional": {"apache", []string{"OUTBOX_KAFKA_TRANSACTIONAL=true"}},
	} {
		t.Run(name, func(t *testing.T) {
			b := brokers[m.broker](t)
			p := deploy(t, deployment{servers: 1, relays: 1, broker: b, lease: steadyTTL, env: m.env})
			if err := b.CreateTopic(t.Context(), smallTopic, 3, nil); err != nil {
				t.Fatal(err)
			}
			refused := map[string]*refusal{}
			for _, policy := range []string{"block", "park", "skip"} {
				refused[policy] = &refusal{t: t, p: p, b: b, source: "shop-" + policy}
				p.register("shop-"+policy, policy)
			}
			// The server refuses what it knows to be too large. So the limit falls after the events were accepted.
			p.relays[0].stop()
			for _, r := range refused {
				r.events = p.publishSeries(t, r.source)
			}
			setTopicLimit(t, b, smallLimit)
			p.relays[0].start()

			// Before somebody lifts the limit for his own, all must have been refused.
			refused["block"].blocked()
			refused["park"].parked()
			refused["skip"].skipped()
			refused["block"].goesOn()
			refused["park"].comesBack()
			refused["skip"].isDiscarded()
			p.relays[0].stop()
			p.servers[0].stop()
			p.verify()
		})
	}
}

// The series: events 0 to 4 of one aggregate, of which the third is too large, then one of another aggregate.
const (
	troubled = "troubled"
	healthy  = "healthy"
	tooLarge = 2
)

func (p *platform) publishSeries(t *testing.T, source string) []client.Event {
	t.Helper()
	sdk := p.client(t, source)
	var events []client.Event
	for i := range 6 {
		e := client.Event{
			ID: client.NewID(), Topic: smallTopic, AggregateType: "order", AggregateID: troubled, Type: "order.changed.v1",
			Payload: fmt.Append(nil, i), OccurredAt: time.Now(),
		}
		if i == tooLarge {
			e.Payload = make([]byte, 3*smallLimit)
			_, _ = rand.Read(e.Payload) // not compressible, or it would fit; never fails
		}
		if i == 5 {
			e.AggregateID = healthy
		}
		if err := sdk.Publish(t.Context(), client.NewID(), e); err != nil {
			t.Fatal(err)
		}
		events = append(events, e)
	}
	return events
}

// publishOne adds a later event of the troubled aggregate.
func (r *refusal) publishOne() {
	r.t.Helper()
	e := client.Event{
		ID: client.NewID(), Topic: smallTopic, AggregateType: "order", AggregateID: troubled, Type: "order.changed.v1",
		Payload: []byte("later"), OccurredAt: time.Now(),
	}
	if err := r.p.client(r.t, r.source).Publish(r.t.Context(), client.NewID(), e); err != nil {
		r.t.Fatal(err)
	}
	r.events = append(r.events, e)
}

// refusal checks one policy on its source.
type refusal struct {
	t      *testing.T
	p      *platform
	b      broker
	source string
	events []client.Event
}

// block: the aggregate waits at the refused event until somebody does something …
func (r *refusal) blocked() {
	r.t.Helper()
	r.arrives(0, 1, 5)
	var blocked blockedAggregate
	eventually(r.t, startLimit, "the blocked aggregate to be listed with all that wait", func() (bool, string) {
		for _, blocked = range r.p.blocked() {
			if blocked.Source == r.source && blocked.AggregateID == troubled {
				return blocked.Waiting >= 2, fmt.Sprintf("%+v", blocked)
			}
		}
		return false, "not listed"
	})
	if blocked.Cause != "record" || blocked.Attempts != 1 || blocked.Topic != smallTopic || !strings.Contains(strings.ToLower(blocked.Explanation), "large") {
		r.t.Errorf("blocked: %+v", blocked)
	}
}

// … and then goes on in order.
func (r *refusal) goesOn() {
	r.t.Helper()
	r.publishOne()
	r.p.operateAggregate("redrive", r.source, troubled) // too early: refused again, and nothing overtakes it
	r.arrives(0, 1, 5)
	r.withoutLimit(func() { r.p.operateAggregate("redrive", r.source, troubled); r.arrives(0, 1, 5, 2, 3, 4, 6) })
	r.noLetters()
}

// park: the refused event and all later ones of the aggregate become dead letters …
func (r *refusal) parked() {
	r.t.Helper()
	r.arrives(0, 1, 5)
	r.letters(2, 3, 4)
}

// … that a redrive brings back in order, ahead of newer ones.
func (r *refusal) comesBack() {
	r.t.Helper()
	r.publishOne()
	r.letters(2, 3, 4, 6)
	r.arrives(0, 1, 5)
	r.withoutLimit(func() { r.p.operateAggregate("redrive", r.source, troubled); r.arrives(0, 1, 5, 2, 3, 4, 6) })
	r.publishOne() // out of trouble: it goes the ordinary way
	r.arrives(0, 1, 5, 2, 3, 4, 6, 7)
	r.noLetters()
}

// skip: only the refused event is set aside …
func (r *refusal) skipped() {
	r.t.Helper()
	r.arrives(0, 1, 5, 3, 4)
	r.letters(2)
}

// … and that one can be discarded.
func (r *refusal) isDiscarded() {
	r.t.Helper()
	r.publishOne()
	r.arrives(0, 1, 5, 3, 4, 6)
	r.p.operateAggregate("discard", r.source, troubled)
	r.noLetters()
	r.arrives(0, 1, 5, 3, 4, 6)
}

// withoutLimit does something while the topic takes everything.
func (r *refusal) withoutLimit(do func()) {
	r.t.Helper()
	setTopicLimit(r.t, r.b, 1_000_000)
	do()
	setTopicLimit(r.t, r.b, smallLimit)
}

// arrives waits until exactly the named events of this source are on the topic, those of one aggregate in the named order.
func (r *refusal) arrives(want ...int) {
	r.t.Helper()
	eventually(r.t, startLimit, fmt.Sprintf("events %v of %s", want, r.source), func() (bool, string) {
		got := r.read()
		return len(got) >= len(want), fmt.Sprint(got)
	})
	got := r.read()
	inOrder := func(numbers []int, aggregate string) []int {
		return slices.DeleteFunc(slices.Clone(numbers), func(i int) bool { return r.events[i].AggregateID != aggregate })
	}
	for _, aggregate := range []string{troubled, healthy} {
		if !slices.Equal(inOrder(got, aggregate), inOrder(want, aggregate)) {
			r.t.Fatalf("aggregate %s of %s: events %v arrived, want %v", aggregate, r.source, got, want)
		}
	}
}

// read returns the numbers of this source's events as they are on the topic.
func (r *refusal) read() []int {
	r.t.Helper()
	records, err := kafka.ReadCommitted(r.t.Context(), r.b.Bootstrap(), smallTopic)
	if err != nil {
		r.t.Fatal(err)
	}
	var numbers []int
	for _, record := range records {
		header, _ := record.Header("ce_id")
		id, err := uuid.ParseBytes(header)
		if err != nil {
			r.t.Fatalf("ce_id %q: %v", header, err)
		}
		if n := slices.IndexFunc(r.events, func(e client.Event) bool { return e.ID == id }); n >= 0 {
			numbers = append(numbers, n)
		}
	}
	return numbers
}

// letters waits until exactly the named events of this source are dead letters.
func (r *refusal) letters(want ...int) {
	r.t.Helper()
	eventually(r.t, startLimit, fmt.Sprintf("dead letters %v of %s", want, r.source), func() (bool, string) {
		var got []int
		for _, letter := range r.p.deadLetters() {
			if letter.Source == r.source {
				got = append(got, slices.IndexFunc(r.events, func(e client.Event) bool { return e.ID.String() == letter.EventID }))
			}
		}
		slices.Sort(got)
		return slices.Equal(got, want), fmt.Sprint(got)
	})
}

func (r *refusal) noLetters() {
	r.t.Helper()
	r.letters()
}

// client returns an SDK client of a source, of the first server.
func (p *platform) client(t testing.TB, source string) *client.Client {
	t.Helper()
	sdk, err := client.New(client.Config{Target: p.servers[0].address, Source: source, Plaintext: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sdk.Close() }) // always nil
	return sdk
}

// setTopicLimit changes how large a record of the small topic may be.
func setTopicLimit(t testing.TB, b broker, bytes int) {
	t.Helper()
	admin, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(b.Bootstrap(), ",")...))
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	config := kmsg.NewIncrementalAlterConfigsRequestResourceConfig()
	config.Name, config.Op, config.Value = "max.message.bytes", kmsg.IncrementalAlterConfigOpSet, kmsg.StringPtr(fmt.Sprint(bytes))
	resource := kmsg.NewIncrementalAlterConfigsRequestResource()
	resource.ResourceType, resource.ResourceName = kmsg.ConfigResourceTypeTopic, smallTopic
	resource.Configs = append(resource.Configs, config)
	request := kmsg.NewPtrIncrementalAlterConfigsRequest()
	request.Resources = append(request.Resources, resource)
	response, err := request.RequestWith(ctx, admin)
	if err != nil {
		t.Fatal(err)
	}
	for _, answer := range response.Resources {
		if err := kerr.ErrorForCode(answer.ErrorCode); err != nil {
			t.Fatalf("limit of topic %s: %v", smallTopic, err)
		}
	}
}

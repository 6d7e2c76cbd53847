package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/embedded/postgres"
)

// runningPlatform is a server, and a relay once startRelay was called, in this process.
type runningPlatform struct {
	t       *testing.T
	dsn     string
	address string // of the API
	http    string
}

func startPlatform(t *testing.T) *runningPlatform {
	t.Helper()
	pg, err := postgres.Start(t.Context(), postgres.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pg.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	dsn, err := pg.CreateDatabase(t.Context(), "outbox")
	if err != nil {
		t.Fatal(err)
	}
	if r := outbox(t, "", "server", "--store-dsn", dsn); r.code != exitFailure || !strings.Contains(r.err, "outbox migrate up") {
		t.Fatalf("a server on an empty database does not name the command to run: %+v", r)
	}
	if r := outbox(t, "", "migrate", "up", "--store-dsn", dsn, "--shards", "4"); r.code != exitOK || !strings.Contains(r.out, "applied 00001_init.sql") {
		t.Fatalf("migrate up: %+v", r)
	}
	if r := outbox(t, "", "migrate", "up", "--store-dsn", dsn); r.code != exitOK || strings.Contains(r.out, "applied") {
		t.Fatalf("migrate up again: %+v", r)
	}
	p := &runningPlatform{t: t, dsn: dsn}
	var settings serverSettings
	if err := applyDefaults(&settings); err != nil {
		t.Fatal(err)
	}
	settings.Server.GRPCListen, settings.Server.HTTPListen = "127.0.0.1:0", "127.0.0.1:0"
	made := p.run(func(made *platform) error { return made.addServer(settings) })
	p.address, p.http = made.server.GRPCAddr(), made.server.HTTPAddr()
	return p
}

// run makes a platform, lets add say what it consists of, and runs it until the test ends.
func (p *runningPlatform) run(add func(*platform) error) *platform {
	p.t.Helper()
	var settings storeSettings
	if err := applyDefaults(&settings); err != nil {
		p.t.Fatal(err)
	}
	settings.DSN = secret(p.dsn)
	made, err := newPlatform(p.t.Context(), settings, slog.New(slog.DiscardHandler))
	if err != nil {
		p.t.Fatal(err)
	}
	if err := add(made); err != nil {
		made.close()
		p.t.Fatal(err)
	}
	running := runInBackground(p.t.Context(), made)
	p.t.Cleanup(func() {
		if err := running.stop(); err != nil {
			p.t.Error(err)
		}
		made.close()
	})
	return made
}

func (p *runningPlatform) startRelay(brokers string) *platform {
	p.t.Helper()
	var settings struct {
		Kafka kafkaSettings `embed:"" prefix:"kafka-"`
		relaySettings
	}
	if err := applyDefaults(&settings); err != nil {
		p.t.Fatal(err)
	}
	settings.Kafka.Brokers = []string{brokers}
	return p.run(func(made *platform) error {
		return errors.Join(made.addRelay(p.t.Context(), settings.Kafka, settings.relaySettings), made.addAdminPort(p.t.Context(), "127.0.0.1:0"))
	})
}

// outbox runs a command against the platform.
func (p *runningPlatform) outbox(in string, args ...string) result {
	p.t.Helper()
	return outbox(p.t, in, append(args, "--address", p.address)...)
}

// eventually runs a command until its output is as wanted.
func (p *runningPlatform) eventually(wanted func(out string) bool, args ...string) string {
	p.t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var r result
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); <-tick.C {
		if r = p.outbox("", args...); r.code == exitOK && wanted(r.out) {
			return r.out
		}
	}
	p.t.Fatalf("%v: still %+v", args, r)
	return ""
}

var (
	times = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,9}Z`)
	ids   = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)
	gaps  = regexp.MustCompile(` {2,}`)
)

// normal replaces what differs from run to run.
func normal(s string) string {
	s = times.ReplaceAllString(s, "TIME")
	s = ids.ReplaceAllString(s, "UUID")
	return gaps.ReplaceAllString(s, "  ")
}

func TestSources(t *testing.T) {
	p := startPlatform(t)
	file := filepath.Join(t.TempDir(), "sources.yaml")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(twoSources, "revision: 3\n", "")), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	do := func(in string, args ...string) {
		t.Helper()
		r := p.outbox(in, args...)
		log.WriteString("$ outbox " + strings.ReplaceAll(strings.Join(args, " "), file, "sources.yaml") + "\n" + r.out)
		if r.err != "" {
			log.WriteString(r.err)
		}
		log.WriteString("=> " + string(rune('0'+r.code)) + "\n\n")
	}
	do("", "source", "apply", file, "--dry-run")
	do("", "source", "list")
	do("", "source", "apply", file, "--reason", "test")
	do("", "source", "apply", file)
	do("", "source", "list")
	do("", "source", "get", "orders")
	do("", "source", "get", "orders", "-o", "json")
	do("name: orders\ntopics: [orders]\nfailure_policy: skip\n", "source", "apply", "-")
	do("name: orders\nrevision: 1\n", "source", "apply", "-")
	do("name: Orders\n---\nname: other\n", "source", "apply", "-")
	do("", "source", "get", "other")
	do("", "source", "delete", "payments", "--reason", "test")
	do("", "source", "delete", "payments", "--reason", "test")
	do("", "source", "list", "-o", "json")
	golden(t, "sources.txt", normal(log.String()))
}

// TestTroubleshooting follows events that do not get out, as an operator would.
func TestTroubleshooting(t *testing.T) {
	p := startPlatform(t)
	for _, policy := range []string{"block", "park"} {
		source := "name: " + policy + "\ntopics: [small, missing]\nfailure_policy: " + policy + "\n"
		if r := p.outbox(source, "source", "apply", "-"); r.code != exitOK {
			t.Fatalf("%+v", r)
		}
	}
	// Published before any relay has told the servers how large a record of the topic may be.
	blocked := p.publish("block", client.Event{Topic: "small", AggregateID: "1", Payload: incompressible(20_000)})
	p.publish("block", client.Event{Topic: "small", AggregateID: "1"})
	p.publish("park", client.Event{Topic: "small", AggregateID: "2", Payload: incompressible(20_000)})
	p.publish("park", client.Event{Topic: "small", AggregateID: "2"})
	waiting := p.publish("park", client.Event{Topic: "missing", AggregateID: "3"})
	inDoubt := p.prepare("block", client.Event{Topic: "small", AggregateID: "4"})

	broker, err := kafka.StartFake(kafka.FakeConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(broker.Close)
	if err := broker.CreateTopic("small", 1, map[string]string{"max.message.bytes": "2000"}); err != nil {
		t.Fatal(err)
	}
	p.startRelay(broker.Bootstrap())

	out := p.eventually(func(out string) bool { return strings.Count(out, "\n") == 4 }, "aggregate", "blocked")
	for _, want := range []string{"block  order  1  record", "park  order  3  topic", "block  order  4  in-doubt"} {
		if !strings.Contains(normal(out), want) {
			t.Errorf("aggregate blocked: no %q in\n%s", want, out)
		}
	}
	out = p.eventually(func(out string) bool { return strings.Count(out, "\n") == 3 }, "deadletter", "list", "--source", "park")
	if strings.Count(normal(out), "park  order  2") != 2 {
		t.Errorf("deadletter list:\n%s", out)
	}
	for _, c := range []struct{ source, id, want string }{
		{"block", blocked, "blocked"}, {"park", waiting, "blocked"}, {"block", inDoubt, "in-doubt"},
	} {
		r := p.outbox("", "transaction", "get", c.source, c.id)
		if r.code != exitOK || !strings.Contains(r.out, c.want) {
			t.Errorf("transaction get of %s: no %q in %+v", c.source, c.want, r)
		}
	}

	// The operator acts, and the holder of the shard does it.
	done := func(args ...string) {
		t.Helper()
		r := p.outbox("", append(args, "--reason", "test", "-o", "json")...)
		var answer struct{ Done bool }
		if err := json.Unmarshal([]byte(r.out), &answer); r.code != exitOK || err != nil || !answer.Done {
			t.Errorf("%v: %+v", args, r)
		}
	}
	done("deadletter", "skip", "block", "order", "1")
	p.eventually(func(out string) bool { return strings.Contains(normal(out), "block  order  1") }, "deadletter", "list")
	done("deadletter", "discard", "block", "order", "1")
	done("deadletter", "discard", "park", "order", "2")
	p.eventually(func(out string) bool { return strings.Count(out, "\n") == 1 }, "deadletter", "list")
	if err := broker.CreateTopic("missing", 1, nil); err != nil {
		t.Fatal(err)
	}
	p.eventually(func(out string) bool { return strings.Contains(out, "published") }, "transaction", "get", "park", waiting)
	p.eventually(func(out string) bool { return strings.Count(out, "\n") == 2 }, "aggregate", "blocked") // the one in doubt
	if r := outbox(t, "", "verify", "--store-dsn", p.dsn, "-o", "json"); r.code != exitOK {
		t.Errorf("verify: %+v", r)
	}
}

func (p *runningPlatform) client(source string) *client.Client {
	p.t.Helper()
	c, err := client.New(client.Config{Target: p.address, Source: source, Plaintext: true})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			p.t.Error(err)
		}
	})
	return c
}

func orderPlaced(e client.Event) client.Event {
	e.AggregateType, e.Type = "order", "order.placed.v1"
	return e
}

func (p *runningPlatform) publish(source string, e client.Event) string {
	p.t.Helper()
	id := client.NewID()
	if err := p.client(source).Publish(p.t.Context(), id, orderPlaced(e)); err != nil {
		p.t.Fatal(err)
	}
	return id.String()
}

func (p *runningPlatform) prepare(source string, e client.Event) string {
	p.t.Helper()
	id := client.NewID()
	if _, err := p.client(source).Prepare(p.t.Context(), id, client.DatabaseTransaction{Mode: client.ModeClientOnly}, orderPlaced(e)); err != nil {
		p.t.Fatal(err)
	}
	return id.String()
}

// incompressible returns bytes that no codec makes smaller.
func incompressible(n int) []byte {
	var b []byte
	for len(b) < n {
		id := uuid.New()
		b = append(b, id[:]...)
	}
	return b[:n]
}

func TestProbesAndMetrics(t *testing.T) {
	p := startPlatform(t)
	broker, err := kafka.StartFake(kafka.FakeConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(broker.Close)
	relay := p.startRelay(broker.Bootstrap())
	for path, want := range map[string]string{
		"http://" + p.http + "/metrics":                                      "outbox_prepares_total",
		"http://" + relay.admin.listener.Addr().String() + "/metrics":        "outbox_published_total",
		"http://" + relay.admin.listener.Addr().String() + "/healthz":        `"ok"`,
		"http://" + relay.admin.listener.Addr().String() + "/readyz":         `"ok"`,
		"http://" + relay.admin.listener.Addr().String() + "/debug/nonsense": "404",
	} {
		var body string
		tick := time.NewTicker(50 * time.Millisecond)
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); <-tick.C {
			if body = fetch(t, path); strings.Contains(body, want) {
				break
			}
		}
		tick.Stop()
		if !strings.Contains(body, want) {
			t.Errorf("%s: no %q in %q", path, want, body)
		}
	}
	broker.Close()
	// What the relay is asked for cannot be had now, and it says which part is missing.
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	ready := ""
	for deadline := time.Now().Add(40 * time.Second); time.Now().Before(deadline) && !strings.Contains(ready, "Kafka"); <-tick.C {
		ready = fetch(t, "http://"+relay.admin.listener.Addr().String()+"/readyz")
	}
	if !strings.Contains(ready, "Kafka cluster") {
		t.Errorf("readyz without a broker: %q", ready)
	}
}

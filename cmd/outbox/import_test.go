package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/twmb/franz-go/pkg/kgo"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"

	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/store/storetest"
)

const eventOutboxDDL = `
CREATE TABLE event_outbox (
  id uuid PRIMARY KEY, aggregate_id varchar(255) NOT NULL, aggregate_type varchar(100) NOT NULL, event_type varchar(255) NOT NULL,
  event_data json NOT NULL, event_key varchar(255), topic varchar(255) NOT NULL, created_at timestamptz NOT NULL DEFAULT now(),
  published_at timestamptz, retry_count int NOT NULL DEFAULT 0, last_error text)`

// oldService is the database of a service that has an outbox table of its own.
type oldService struct {
	t    *testing.T
	dsn  string
	conn *pgx.Conn
	rows int
}

func newOldService(t *testing.T, p *runningPlatform, ddl string) *oldService {
	t.Helper()
	admin, err := pgx.Connect(t.Context(), p.dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(t.Context()) //nolint:errcheck // the test goes on with another
	name := "files_" + strings.ReplaceAll(uuid.NewString(), "-", "")
	if _, err := admin.Exec(t.Context(), "CREATE DATABASE "+name); err != nil {
		t.Fatal(err)
	}
	s := &oldService{t: t, dsn: strings.Replace(p.dsn, "/outbox", "/"+name, 1)}
	if s.conn, err = pgx.Connect(t.Context(), s.dsn); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.conn.Close(context.WithoutCancel(t.Context())) })
	s.exec(ddl)
	return s
}

func (s *oldService) exec(sql string, args ...any) {
	s.t.Helper()
	if _, err := s.conn.Exec(s.t.Context(), sql, args...); err != nil {
		s.t.Fatalf("%s: %v", sql, err)
	}
}

func (s *oldService) count(where string) (n int) {
	s.t.Helper()
	if err := s.conn.QueryRow(s.t.Context(), "SELECT count(*) FROM event_outbox WHERE "+where).Scan(&n); err != nil {
		s.t.Fatal(err)
	}
	return n
}

// envelope stores a row as the library does and returns its id and the id of its event.
func (s *oldService) envelope(aggregate, topic string, change func(map[string]any)) (row, event string) {
	s.t.Helper()
	s.rows++
	row, event = uuid.NewString(), uuid.NewString()
	data := map[string]any{
		"event_id": event, "event_type": "huleedu.file.batch.file.added.v1", "event_timestamp": "2025-07-29T10:11:12.131415Z",
		"source_service": "file_service", "schema_version": 1, "correlation_id": uuid.NewString(), "data": map[string]any{"n": s.rows, "name": "åäö"}, "topic": topic,
	}
	if change != nil {
		change(data)
	}
	text, err := json.Marshal(data)
	if err != nil {
		s.t.Fatal(err)
	}
	s.row(row, aggregate, topic, string(text))
	return row, event
}

func (s *oldService) row(id, aggregate, topic, data string) {
	s.t.Helper()
	s.exec(`INSERT INTO event_outbox (id, aggregate_id, aggregate_type, event_type, event_data, event_key, topic, created_at)
		VALUES ($1, $2, 'batch', 'huleedu.file.batch.file.added.v1', $3, $2, $4, timestamptz '2025-07-29 10:00:00Z' + make_interval(secs => $5))`,
		id, aggregate, data, topic, s.rows)
}

func fakeKafka(t *testing.T, topics map[string]int) *kafka.Fake {
	t.Helper()
	broker, err := kafka.StartFake(kafka.FakeConfig{Topics: topics})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(broker.Close)
	return broker
}

// consume returns n records of a topic.
func consume(t *testing.T, bootstrap, topic string, n int) []*kgo.Record {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	consumer, err := kgo.NewClient(kgo.SeedBrokers(bootstrap), kgo.DisableClientMetrics(), kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		t.Fatal(err)
	}
	defer consumer.Close()
	var all []*kgo.Record
	for len(all) < n {
		fetched := consumer.PollFetches(ctx)
		if err := fetched.Err(); err != nil {
			t.Fatalf("%d of %d records of %s: %v", len(all), n, topic, err)
		}
		all = append(all, fetched.Records()...)
	}
	return all
}

func headersOf(r *kgo.Record) map[string]string {
	all := map[string]string{}
	for _, h := range r.Headers {
		all[h.Key] = string(h.Value)
	}
	return all
}

func (p *runningPlatform) register(source string) {
	p.t.Helper()
	if r := p.outbox(source, "source", "apply", "-"); r.code != exitOK {
		p.t.Fatalf("%+v", r)
	}
}

func (p *runningPlatform) imports(s *oldService, wantCode int, args ...string) importReport {
	p.t.Helper()
	r := p.outbox("", append([]string{"import", "files", "--dsn", s.dsn, "-o", "json"}, args...)...)
	var report importReport
	if err := json.Unmarshal([]byte(r.out), &report); err != nil || r.code != wantCode {
		p.t.Fatalf("exit %d, want %d; %v: %+v", r.code, wantCode, err, r)
	}
	return report
}

func TestImport(t *testing.T) {
	p := startPlatform(t)
	p.register("name: files\ntopics: [file.added, small]\nrecord_profile: huleedu\n")
	broker := fakeKafka(t, map[string]int{"file.added": 3})
	p.startRelay(broker.Bootstrap())
	s := newOldService(t, p, eventOutboxDDL)

	long := strings.Repeat("å", 255) // 255 characters, 510 bytes
	aggregates := []string{"b-1", "b-2", "elev@example.org", long}
	order := map[string][]string{}
	for i := range 40 {
		a := aggregates[i%len(aggregates)]
		_, event := s.envelope(a, "file.added", nil)
		order[a] = append(order[a], event)
	}
	_, withHeaders := s.envelope("b-3", "file.added", func(data map[string]any) {
		data["headers"] = map[string]any{"trace_id": "mine", "x": "y"}
	})
	poison := map[string]string{}
	bad := func(why, topic, data string) {
		id := uuid.NewString()
		s.rows++
		s.row(id, "b-1", topic, data)
		poison[id] = why
	}
	bad("not a JSON object", "file.added", "[1]")
	bad("not the name of a topic", "file added!", `{"event_id": "x"}`)
	bad("no topic", "", `{"event_id": "x"}`)
	bad("allowed are 983040", "file.added", `{"event_id": "x", "data": "`+strings.Repeat("a", 1_500_000)+`"}`)
	row, _ := s.envelope("b-1", "file.added", nil)
	s.exec(`UPDATE event_outbox SET retry_count = 5, last_error = 'Kafka said no' WHERE id = $1`, row)
	poison[row] = "gave it up after 5 attempts: Kafka said no"
	huge := uuid.NewString()
	s.row(huge, "b-9", "file.added", `{"event_id": "x", "data": "`+strings.Repeat("a", 5_000_000)+`"}`)
	row, _ = s.envelope("b-1", "file.added", nil)
	s.exec(`UPDATE event_outbox SET published_at = now() WHERE id = $1`, row)

	dry := p.imports(s, exitViolation, "--dry-run")
	if dry.Published != 41 || len(dry.DeadLetters) != len(poison)+1 || s.count("published_at IS NULL") != int(dry.Rows) {
		t.Errorf("dry run: %+v", dry)
	}
	report := p.imports(s, exitViolation, "--batch", "7")
	if report.Rows != dry.Rows || report.Published != 41 || report.Topics["file.added"] != 41 || len(report.DeadLetters) != len(poison) || len(report.Left) != 1 || len(report.Changed) != 0 {
		t.Errorf("%+v", report)
	}
	for _, d := range report.DeadLetters {
		if !strings.Contains(d.Reason, poison[d.Row]) || poison[d.Row] == "" {
			t.Errorf("row %s: %q, want %q", d.Row, d.Reason, poison[d.Row])
		}
	}
	if report.Left[0].Row != huge || s.count("published_at IS NULL AND last_error LIKE 'outbox import: left: %'") != 1 || s.count("published_at IS NULL") != 1 {
		t.Errorf("left: %+v", report.Left)
	}
	out := p.outbox("", "deadletter", "list", "--source", "files").out
	if strings.Count(out, "\n") != len(poison)+1 || !strings.Contains(out, "Kafka said no") {
		t.Errorf("deadletter list:\n%s", out)
	}

	got := map[string][]string{}
	for _, record := range consume(t, broker.Bootstrap(), "file.added", 41) {
		headers := headersOf(record)
		got[string(record.Key)] = append(got[string(record.Key)], headers["event_id"])
		var body map[string]any
		if err := json.Unmarshal(record.Value, &body); err != nil || body["event_id"] != headers["event_id"] || body["topic"] != nil || body["headers"] != nil {
			t.Errorf("value %s, %v", record.Value, err)
		}
		if !strings.Contains(string(record.Value), `, "event_id": "`) || strings.Contains(string(record.Value), "å") {
			t.Errorf("not as Python writes it: %s", record.Value)
		}
		for name, want := range map[string]string{
			"trace_id": fmt.Sprint(body["correlation_id"]), "schema_version": "1", "occurred_at": "2025-07-29T10:11:12.131415Z",
			"content_type": "application/json", "source_service": "file_service", "event_type": "huleedu.file.batch.file.added.v1",
		} {
			if headers["event_id"] == withHeaders && name == "trace_id" {
				want = "mine"
			}
			if headers[name] != want {
				t.Errorf("header %s is %q, want %q", name, headers[name], want)
			}
		}
	}
	for aggregate, want := range order {
		if !slices.Equal(got[aggregate], want) {
			t.Errorf("%s: %v, want %v", aggregate, got[aggregate], want)
		}
	}

	// The large row is tried again, the rest is done.
	if again := p.imports(s, exitViolation); again.Rows != 1 || len(again.Left) != 1 {
		t.Errorf("again: %+v", again)
	}
	s.exec(`DELETE FROM event_outbox WHERE id = $1`, huge)
	if again := p.imports(s, exitOK); again.Rows != 0 {
		t.Errorf("nothing left: %+v", again)
	}
	// A redrive publishes what was given up, with everything in its place.
	if r := p.outbox("", "deadletter", "redrive", "files", "batch", "b-1", "--reason", "test"); r.code != exitOK {
		t.Errorf("%+v", r)
	}
	// All dead letters of the aggregate come back, in order: first the one that is no object, which is published as it is.
	values := consume(t, broker.Bootstrap(), "file.added", 42)
	if !slices.ContainsFunc(values, func(r *kgo.Record) bool { return string(r.Value) == "[1]" }) {
		t.Error("the redriven one is not there")
	}
	if r := outbox(t, "", "verify", "--store-dsn", p.dsn); r.code != exitOK {
		t.Errorf("verify: %+v", r)
	}
}

// TestImportIsResumed: an import that ends anywhere goes on where it was, and nothing is published twice.
func TestImportIsResumed(t *testing.T) {
	p := startPlatform(t)
	p.register("name: files\ntopics: [other]\nrecord_profile: huleedu\n")
	broker := fakeKafka(t, map[string]int{"file.added": 1, "late": 1})
	p.startRelay(broker.Bootstrap())
	s := newOldService(t, p, eventOutboxDDL)
	for i := range 30 {
		s.envelope(fmt.Sprint(i%3), "file.added", nil)
	}
	// A topic that the source may not use is a mistake in its registration, not poison.
	r := p.outbox("", "import", "files", "--dsn", s.dsn, "--dry-run")
	if r.code != exitRefused || !strings.Contains(r.err, "file.added (30 rows)") {
		t.Errorf("dry run: %+v", r)
	}
	if report := p.imports(s, exitRefused, "--batch", "10"); len(report.DeadLetters) != 0 || s.count("published_at IS NULL") != 20 {
		t.Errorf("topic denied: %+v", report)
	}
	p.register("name: files\ntopics: [file.added]\nrecord_profile: huleedu\n")
	// The database fails after the second page was published and before that is recorded.
	s.exec(`CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''disk full''; END'`)
	s.exec(`CREATE TRIGGER fail BEFORE UPDATE ON event_outbox FOR EACH ROW WHEN (NEW.last_error LIKE 'outbox import: published%' AND OLD.created_at > '2025-07-29 10:00:15Z') EXECUTE FUNCTION fail()`)
	if report := p.imports(s, exitFailure, "--batch", "10"); s.count("last_error LIKE 'outbox import: taken over%'") != 10 {
		t.Errorf("%+v", report)
	}
	s.exec(`DROP TRIGGER fail ON event_outbox`)
	// Nobody runs it again before the platform has forgotten what is an hour old.
	p.anHourLater()
	if report := p.imports(s, exitOK); report.Rows != 20 || report.Published != 20 {
		t.Errorf("%+v", report)
	}
	// One more, so that a duplicate would be seen before it.
	s.envelope("0", "file.added", func(data map[string]any) { data["data"] = "last" })
	p.imports(s, exitOK)
	records := consume(t, broker.Bootstrap(), "file.added", 31)
	seen := map[string]bool{}
	for _, record := range records {
		id := headersOf(record)["event_id"]
		if seen[id] {
			t.Errorf("event %s twice", id)
		}
		seen[id] = true
	}
	if len(records) != 31 || !strings.Contains(string(records[30].Value), `"last"`) {
		t.Errorf("%d records, the last %s", len(records), records[len(records)-1].Value)
	}
	// A row that was changed after it was imported is not published a second time.
	s.exec(`UPDATE event_outbox SET published_at = NULL, last_error = NULL, event_data = '{"event_id": "changed"}' WHERE created_at = '2025-07-29 10:00:01Z'`)
	if report := p.imports(s, exitViolation); len(report.Left) != 1 || !strings.Contains(report.Left[0].Reason, "changed since") {
		t.Errorf("%+v", report)
	}
}

// anHourLater waits until everything is published, makes it an hour older, and waits until the running server has forgotten what it
// does not keep for longer.
func (p *runningPlatform) anHourLater() {
	p.t.Helper()
	conn, err := pgx.Connect(p.t.Context(), p.dsn)
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(p.t.Context())) //nolint:errcheck // the test goes on without it
	count := func(sql string) (n int) {
		p.t.Helper()
		if err := conn.QueryRow(p.t.Context(), sql).Scan(&n); err != nil {
			p.t.Fatal(err)
		}
		return n
	}
	storetest.Eventually(p.t, time.Minute, func() bool {
		return count(`SELECT count(*) FROM outbox.tx t JOIN outbox.shard s ON (t.shards >> s.shard) & 1 = 1 WHERE t.log_xid > s.xid OR s.oldest < s.xid OR s.pend <> ''`) == 0
	})
	for _, sql := range []string{
		`UPDATE outbox.control SET tx_known_since = now() - '2 h'::interval`,
		`UPDATE outbox.resolution SET resolved_at = resolved_at - '1 h'::interval`,
		`UPDATE outbox.tx SET prepared_at = prepared_at - '1 h'::interval, decided_at = decided_at - '1 h'::interval`,
		// One that nobody keeps, by which to see that it is done.
		`INSERT INTO outbox.tx (source_id, tx_id, state, shards, digest, log_xid, prepared_at, decided_at)
		 SELECT source_id, '00000000-0000-7000-8000-000000000000', 1, 1, 0, '0', now() - '1 h'::interval, now() - '1 h'::interval FROM outbox.source LIMIT 1`,
	} {
		if _, err := conn.Exec(p.t.Context(), sql); err != nil {
			p.t.Fatal(err)
		}
	}
	storetest.Eventually(p.t, time.Minute, func() bool {
		return count(`SELECT count(*) FROM outbox.tx WHERE tx_id = '00000000-0000-7000-8000-000000000000'`) == 0
	})
}

// TestImportNoticesARunningRelay: rows that somebody else marks while they are taken over are told.
func TestImportNoticesARunningRelay(t *testing.T) {
	p := startPlatform(t)
	p.register("name: files\ntopics: [file.added]\n")
	s := newOldService(t, p, eventOutboxDDL)
	row, _ := s.envelope("a", "file.added", nil)
	s.envelope("b", "file.added", nil)
	// What a relay does that had read the row just before.
	s.exec(`CREATE FUNCTION relay() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN UPDATE event_outbox SET published_at = clock_timestamp() WHERE id = NEW.id; RETURN NULL; END'`)
	s.exec(`CREATE TRIGGER relay AFTER UPDATE ON event_outbox FOR EACH ROW WHEN (pg_trigger_depth() = 0 AND NEW.aggregate_id = 'a' AND OLD.published_at IS NULL) EXECUTE FUNCTION relay()`)
	report := p.imports(s, exitViolation)
	if !slices.Equal(report.Changed, []string{row}) || report.Published != 2 {
		t.Errorf("%+v", report)
	}
	if r := p.outbox("", "import", "files", "--dsn", s.dsn); r.code != exitOK || !strings.Contains(r.out, "0 rows") {
		t.Errorf("%+v", r)
	}
}

func TestImportOfAnotherTable(t *testing.T) {
	p := startPlatform(t)
	p.register("name: files\ntopics: [orders]\nrecord_profile: debezium\n")
	broker := fakeKafka(t, map[string]int{"orders": 1})
	p.startRelay(broker.Bootstrap())
	s := newOldService(t, p, `
		CREATE SCHEMA shop;
		CREATE TABLE shop."Out" ("ID" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY, aggregate_id int, aggregate_type text, kind text, body bytea, dest text,
		  inserted timestamp NOT NULL DEFAULT now(), sent timestamp, note text)`)
	s.exec(`INSERT INTO shop."Out" (aggregate_id, aggregate_type, kind, body, dest) SELECT g, 'order', 'placed', '\x00ff', 'orders' FROM generate_series(1, 3) g`)
	s.exec(`INSERT INTO shop."Out" (aggregate_id, aggregate_type, kind, body, dest) VALUES (4, NULL, 'placed', NULL, 'orders')`)
	mapping := "id=ID;event-type=kind;payload=body;created-at=inserted;published-at=sent;last-error=note;topic=dest"
	report := p.imports(s, exitViolation, "--table", `shop."Out"`, "--format", "plain", "--column", mapping)
	if report.Published != 3 || len(report.DeadLetters) != 1 || report.DeadLetters[0].Reason != "the payload is NULL" || report.Table != "shop.Out" {
		t.Fatalf("%+v", report)
	}
	keys := map[string]bool{}
	for _, record := range consume(t, broker.Bootstrap(), "orders", 3) {
		keys[string(record.Key)] = true
		if string(record.Value) != "\x00\xff" || headersOf(record)["eventType"] != "placed" {
			t.Errorf("%+v", record)
		}
	}
	if len(keys) != 3 {
		t.Errorf("keys %v", keys)
	}
}

func TestImportRefuses(t *testing.T) {
	p := startPlatform(t)
	p.register("name: files\ntopics: [file.added]\n")
	s := newOldService(t, p, eventOutboxDDL)
	s.exec(`CREATE TABLE bare (id int)`)
	s.exec(`SELECT pg_advisory_lock(hashtextextended('outbox import public.event_outbox', 0))`)
	for name, c := range map[string]struct {
		args []string
		code int
		says string
	}{
		"no DSN":            {[]string{"import", "files"}, exitUsage, "OUTBOX_IMPORT_DSN"},
		"bad DSN":           {[]string{"import", "files", "--dsn", "postgres://%%"}, exitUsage, "not a PostgreSQL connection string"},
		"bad number":        {[]string{"import", "files", "--dsn", s.dsn, "--batch", "0"}, exitUsage, "positive"},
		"no database":       {[]string{"import", "files", "--dsn", "postgres://127.0.0.1:1/x"}, exitUnavailable, "connecting to the service's database"},
		"no table":          {[]string{"import", "files", "--dsn", s.dsn, "--table", "outbox"}, exitNotFound, "no table outbox"},
		"no columns":        {[]string{"import", "files", "--dsn", s.dsn, "--table", "bare"}, exitUsage, "aggregate_type (--column aggregate-type=NAME)"},
		"no such role":      {[]string{"import", "files", "--dsn", s.dsn, "--column", "colour=red"}, exitUsage, "no such role"},
		"unknown source":    {[]string{"import", "nobody", "--dsn", s.dsn}, exitRefused, "SOURCE_DENIED"},
		"another is there":  {[]string{"import", "files", "--dsn", s.dsn}, exitRefused, "another import"},
		"no platform there": {[]string{"import", "files", "--dsn", s.dsn, "--address", "127.0.0.1:1", "--timeout", "200ms"}, exitUnavailable, "did not answer"},
	} {
		t.Run(name, func(t *testing.T) {
			args := c.args
			if !slices.Contains(args, "--address") {
				args = append(args, "--address", p.address)
			}
			if r := outbox(t, "", args...); r.code != c.code || !strings.Contains(r.err, c.says) {
				t.Errorf("%+v", r)
			}
		})
	}
}

// importVector is a row and the record it makes; the Python drop-in must make the same of the same call.
type importVector struct {
	Name          string            `json:"name"`
	RowID         string            `json:"row_id"`
	AggregateType string            `json:"aggregate_type"`
	AggregateID   string            `json:"aggregate_id"`
	EventType     string            `json:"event_type"`
	Topic         string            `json:"topic"`
	EventKey      *string           `json:"event_key"`
	EventData     json.RawMessage   `json:"event_data"`
	Value         string            `json:"value"`
	Headers       map[string]string `json:"headers"`
	EventID       string            `json:"event_id"`
	PlatformType  string            `json:"platform_aggregate_type"`
	PlatformID    string            `json:"platform_aggregate_id"`
}

func TestImportVectors(t *testing.T) {
	text, err := os.ReadFile("testdata/huleedu_vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []importVector
	if err := json.Unmarshal(text, &vectors); err != nil || len(vectors) < 5 {
		t.Fatalf("%d vectors, %v", len(vectors), err)
	}
	c := rowConverter{source: "files", table: "public.event_outbox", huleedu: true}
	for _, v := range vectors {
		t.Run(v.Name, func(t *testing.T) {
			got := c.convert(&importRow{
				id: v.RowID, aggregateType: v.AggregateType, aggregateID: v.AggregateID, eventType: v.EventType, topic: v.Topic, key: v.EventKey,
				payload: v.EventData, payloadBytes: int64(len(v.EventData)),
			})
			e := got.event
			headers := map[string]string{}
			for _, h := range e.GetHeaders() {
				headers[h.GetName()] = string(h.GetValue())
			}
			if got.poison != "" || string(e.GetPayload()) != v.Value || idText(e.GetEventId()) != v.EventID ||
				e.GetAggregateType() != v.PlatformType || e.GetAggregateId() != v.PlatformID {
				t.Errorf("poison %q, value %s, id %s, aggregate %s %s", got.poison, e.GetPayload(), idText(e.GetEventId()), e.GetAggregateType(), e.GetAggregateId())
			}
			if have, want := fmt.Sprint(headers), fmt.Sprint(v.Headers); have != want {
				t.Errorf("headers %s, want %s", have, want)
			}
		})
	}
}

func TestPlatformName(t *testing.T) {
	for name, want := range map[string]string{
		"": "-", "a": "a", strings.Repeat("a", 255): strings.Repeat("a", 255), strings.Repeat("å", 128): strings.Repeat("å", 95) + "#",
	} {
		got := platformName(name)
		if !strings.HasPrefix(got, want) || len(got) > 255 || len(name) <= 255 && got != want {
			t.Errorf("%q becomes %q", name, got)
		}
	}
	if a, b := platformName(strings.Repeat("å", 200)), platformName(strings.Repeat("å", 201)); a == b {
		t.Error("two names become one")
	}
}

func FuzzPythonJSON(f *testing.F) {
	f.Add([]byte(`{"a" : [1, 2.50, 1e5, -0], "b\"\\": "å\u00e5\ud83d😀", "c": {}, "d": null}`))
	f.Add([]byte(`{"":"","x":[[],{}],"\u0000":true}`))
	f.Fuzz(func(t *testing.T, src []byte) {
		if !json.Valid(src) {
			return
		}
		out := appendPythonJSON(nil, src)
		var a, b any
		if json.Unmarshal(src, &a) != nil {
			return
		}
		if err := json.Unmarshal(out, &b); err != nil || fmt.Sprint(a) != fmt.Sprint(b) {
			t.Fatalf("%s became %s: %v", src, out, err)
		}
		for _, c := range out {
			if c >= 0x80 {
				t.Fatalf("not ASCII: %s", out)
			}
		}
		members, err := objectMembers(src)
		if _, isObject := a.(map[string]any); isObject != (err == nil) {
			t.Fatalf("object %v: %v", isObject, err)
		}
		for _, m := range members {
			if !json.Valid(m.raw) || !json.Valid(m.value) {
				t.Fatalf("member %q: %s of %s", m.raw, m.value, src)
			}
		}
	})
}

func TestEventSizeCountsWhatTheServerCounts(t *testing.T) {
	e := &outboxv1.Event{Topic: "t", AggregateType: "ab", AggregateId: "abc", EventType: "abcd", ContentType: "abcde", Key: []byte("abcdef"), Payload: []byte("abcdefg"),
		Headers: []*outboxv1.Header{{Name: "n", Value: []byte("vv")}}}
	if n := eventSize(e); n != 1+2+3+4+5+6+7+3 {
		t.Error(n)
	}
}

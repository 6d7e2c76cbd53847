package main

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

const twoSources = `
name: orders
topics: [orders, "orders.*"]
record_profile: huleedu
failure_policy: park
cloudevents_source: /shop
databases:
  - {name: main, mode: xid-fenced, dsn_ref: "env:ORDERS_DSN"}
---
name: payments
topics: []
revision: 3
`

func TestSourceFile(t *testing.T) {
	got, err := readSources(strings.NewReader(twoSources))
	if err != nil {
		t.Fatal(err)
	}
	want := []*outboxv1.Source{
		{
			Name: "orders", Topics: []string{"orders", "orders.*"}, RecordProfile: outboxv1.RecordProfile_RECORD_PROFILE_HULEEDU,
			FailurePolicy: outboxv1.FailurePolicy_FAILURE_POLICY_PARK, CloudeventsSource: "/shop",
			Databases: []*outboxv1.SourceDatabase{{Name: "main", Mode: outboxv1.DatabaseMode_DATABASE_MODE_XID_FENCED, DsnRef: "env:ORDERS_DSN"}},
		},
		{Name: "payments", Revision: 3},
	}
	if len(got) != len(want) {
		t.Fatalf("%d sources", len(got))
	}
	for i := range want {
		if !proto.Equal(got[i], want[i]) {
			t.Errorf("source %d is %v, want %v", i, got[i], want[i])
		}
	}
	text, err := sourceYAML(want[0])
	if err != nil {
		t.Fatal(err)
	}
	again, err := readSources(strings.NewReader(text))
	if err != nil || !proto.Equal(again[0], want[0]) {
		t.Errorf("written and read again: %v, %v\n%s", again, err, text)
	}
}

func TestSourceFileIsStrict(t *testing.T) {
	for text, says := range map[string]string{
		"":                                     "no source",
		"topics: [x]":                          "name is missing",
		"name: a\ntopic: [x]":                  "field topic not found",
		"name: a\nname: b":                     "already defined",
		"name: a\nrecord_profile: avro":        `record_profile "avro" is none of cloudevents, debezium, huleedu, plain`,
		"name: a\nfailure_policy: retry":       "none of block, park, skip",
		"name: a\nrecord_profile: unspecified": "none of",
		"name: a\ndatabases: [{name: x, mode: magic}]": `database "x": mode "magic" is none of marker, xid-fenced, client-only`,
	} {
		if _, err := readSources(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, want %q", text, err, says)
		}
	}
}

func TestDiff(t *testing.T) {
	for _, c := range []struct{ before, now, want string }{
		{"", "a\n", "+ a\n"},
		{"a\n", "", "- a\n"},
		{"a\nb\nc\n", "a\nx\nc\n", "  a\n- b\n+ x\n  c\n"},
		{"a\nb\n", "a\nb\n", "  a\n  b\n"},
		{"a\nb\nc\n", "b\nc\nd\n", "- a\n  b\n  c\n+ d\n"},
	} {
		if got := diff(c.before, c.now); got != c.want {
			t.Errorf("diff(%q, %q) = %q, want %q", c.before, c.now, got, c.want)
		}
	}
}

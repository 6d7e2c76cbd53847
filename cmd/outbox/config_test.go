package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func configFileOf(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "outbox.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// settingsOf runs `outbox config` and returns value and origin of each setting.
func settingsOf(t *testing.T, args ...string) map[string]struct {
	Value any
	From  string
} {
	t.Helper()
	r := outbox(t, "", append([]string{"config", "-o", "json"}, args...)...)
	if r.code != exitOK {
		t.Fatalf("exit %d: %s", r.code, r.err)
	}
	var found map[string]struct {
		Value any
		From  string
	}
	if err := json.Unmarshal([]byte(r.out), &found); err != nil {
		t.Fatal(err)
	}
	return found
}

func TestConfigPrecedence(t *testing.T) {
	file := configFileOf(t, `
store: {dsn: from-file, max-conns: 3, statement-timeout: 7s}
kafka:
  brokers: [a:1, b:2]
  properties: {ssl.cipher.suites: x}
log: {level: warn}
address: example:1
`)
	t.Setenv("OUTBOX_STORE_MAX_CONNS", "4")
	t.Setenv("OUTBOX_STORE_STATEMENT_TIMEOUT", "8s")
	got := settingsOf(t, "-c", file, "--store-statement-timeout", "9s")
	for key, want := range map[string][2]string{
		"store.statement-timeout": {"9s", "flag"},
		"store.max-conns":         {"4", "OUTBOX_STORE_MAX_CONNS"},
		"store.dsn":               {"********", file},
		"log.level":               {"WARN", file},
		"address":                 {"example:1", file},
		"store.unsafe":            {"false", "default"},
		"kafka.compression":       {"lz4", "default"},
	} {
		if value := mustJSON(t, got[key].Value); strings.Trim(value, `"`) != want[0] || got[key].From != want[1] {
			t.Errorf("%s is %s from %q, want %v", key, value, got[key].From, want)
		}
	}
	if value := mustJSON(t, got["kafka.brokers"].Value); value != `["a:1","b:2"]` {
		t.Errorf("kafka.brokers is %s", value)
	}
	if value := mustJSON(t, got["kafka.properties"].Value); value != `{"ssl.cipher.suites":"********"}` {
		t.Errorf("kafka.properties is %s", value)
	}
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestConfigFileIsStrict(t *testing.T) {
	for name, c := range map[string]struct{ text, says string }{
		"unknown section":     {"sever: {grpc-listen: x}", "unknown: sever.grpc-listen"},
		"unknown key":         {"store: {dns: x}", "unknown: store.dns"},
		"all of them":         {"a: 1\nb: {c: 2}", "unknown: a, b.c"},
		"section is a scalar": {"store: x", "unknown: store"},
		"not a setting":       {"reason: x", "unknown: reason"},
		"twice":               {"log: {level: info}\nlog: {level: warn}", "already defined"},
		"not YAML":            {"store: [", "yaml"},
		"a list":              {"- a", "cannot unmarshal"},
		"bad duration":        {"store: {statement-timeout: 30}", "statement-timeout"},
		"bad number":          {"store: {max-conns: many}", "max-conns"},
		"bad choice":          {"log: {format: xml}", "must be one of"},
	} {
		t.Run(name, func(t *testing.T) {
			r := outbox(t, "", "config", "-c", configFileOf(t, c.text))
			if r.code != exitUsage || !strings.Contains(r.err, c.says) {
				t.Errorf("exit %d, stderr %q; want %q", r.code, r.err, c.says)
			}
		})
	}
	if r := outbox(t, "", "config", "-c", configFileOf(t, "")); r.code != exitOK {
		t.Errorf("an empty file: exit %d: %s", r.code, r.err)
	}
}

// What config prints is a configuration file.
func TestConfigPrintsAFile(t *testing.T) {
	first := outbox(t, "", "config", "--kafka-brokers", "a:1,b:2", "--server-max-events", "7", "--relay-http-listen", "127.0.0.1:99")
	if first.code != exitOK {
		t.Fatalf("exit %d: %s", first.code, first.err)
	}
	golden(t, "config-kafka.txt", outbox(t, "", "config", "--only", "kafka", "--kafka-brokers", "a:1,b:2").out)
	got := settingsOf(t, "-c", configFileOf(t, first.out))
	for key, want := range map[string]string{"kafka.brokers": `["a:1","b:2"]`, "server.max-events": "7", "relay.http-listen": `"127.0.0.1:99"`} {
		if value := mustJSON(t, got[key].Value); value != want {
			t.Errorf("%s is %s, want %s", key, value, want)
		}
	}
}

func TestSecretsFromFiles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "dsn")
	if err := os.WriteFile(file, []byte("postgres://u:p@h/d\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	dsn, err := storeSettings{DSNFile: file}.dsn()
	if err != nil || dsn != "postgres://u:p@h/d" {
		t.Errorf("%q, %v", dsn, err)
	}
	t.Setenv("OUTBOX_STORE_DSN_FILE", "") // as if it were not there
	t.Setenv("OUTBOX_STORE_DSN", "postgres://u:hidden@h/d")
	if r := outbox(t, "", "config", "--only", "store"); r.code != exitOK || !strings.Contains(r.out, `dsn-file: ""`) {
		t.Errorf("an empty variable: %+v", r)
	}
	for _, args := range [][]string{{"config"}, {"config", "-o", "json"}, {"config", "--kafka-sasl-password", "hidden", "--token", "hidden"}} {
		if r := outbox(t, "", args...); strings.Contains(r.out+r.err, "hidden") {
			t.Errorf("%v shows a secret:\n%s", args, r.out)
		}
	}
}

func TestSettingsAreChecked(t *testing.T) {
	for name, c := range map[string]struct {
		check func() error
		says  string
	}{
		"conns": {func() error {
			_, err := (storeSettings{DSN: "x", MaxConns: 0, StatementTimeout: 1e9}).config("")
			return err
		}, "store-max-conns must be positive: 0"},
		"timeout": {func() error { _, err := (storeSettings{DSN: "x", MaxConns: 1}).config(""); return err }, "at least 1s: 0s"},
		"writer":  {func() error { _, err := (writerSettings{}).config(); return err }, "writer-max-wait must be positive: 0"},
		"batch": {func() error {
			_, err := (writerSettings{MaxQueued: 1, MaxQueuedBytes: 1, MaxBatch: 2, MaxBatchBytes: 1, SecondWriterAt: 1, MaxWait: 1}).config()
			return err
		}, "2 > 1"},
		"batch bytes": {func() error {
			_, err := (writerSettings{MaxQueued: 1, MaxQueuedBytes: 1, MaxBatch: 1, MaxBatchBytes: 2, SecondWriterAt: 1, MaxWait: 1}).config()
			return err
		}, "writer-max-batch-bytes must not be above writer-max-queued-bytes: 2 > 1"},
		"no brokers": {func() error { _, err := (kafkaSettings{}).config(nil, nil); return err }, "--kafka-brokers"},
		"promise": {func() error {
			_, err := kafkaSettings{Brokers: []string{"a:1"}, Properties: map[string]secret{"acks": "1"}, MaxMessageBytes: 1 << 20}.config(nil, nil)
			return err
		}, `property "acks" may not be set`},
		"lease": {func() error { _, err := (relayFlags{}).config(); return err }, "relay-lease-ttl must be positive: 0"},
		"half a pair": {func() error {
			_, err := (kafkaSettings{Brokers: []string{"a:1"}, Cert: "x"}).config(nil, nil)
			return err
		}, "go together"},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.check()
			if err == nil || !strings.Contains(err.Error(), c.says) || exitCode(err) != exitUsage {
				t.Errorf("%v (exit %d), want %q", err, exitCode(err), c.says)
			}
		})
	}
}

// config says what a process would refuse, after it printed everything.
func TestConfigChecks(t *testing.T) {
	r := outbox(t, "", "config", "--server-max-events", "0", "--writer-max-batch", "0", "--relay-poll-max", "0s", "--kafka-brokers", "a b")
	if r.code != exitUsage || !strings.Contains(r.out, "max-events: 0 # flag") {
		t.Errorf("%+v", r)
	}
	for _, want := range []string{"max-events must be positive: 0", "writer-max-batch must be positive: 0", "relay-poll-max must be positive: 0", `"a b"`} {
		if !strings.Contains(r.err, want) {
			t.Errorf("no %q in %q", want, r.err)
		}
	}
}

func TestDurationText(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 30 * time.Second: "30s", 30 * time.Minute: "30m", 90 * time.Minute: "1h30m", 168 * time.Hour: "168h",
		time.Hour + time.Second: "1h0m1s", 20 * time.Millisecond: "20ms", 10 * time.Minute: "10m", 20 * time.Hour: "20h",
	} {
		if got := durationText(d); got != want {
			t.Errorf("%v is %q, want %q", d, got, want)
		}
	}
}

func TestServerRefusesToStart(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		says string
	}{
		"no store":          {[]string{"server"}, "OUTBOX_STORE_DSN_FILE"},
		"relay, no store":   {[]string{"relay"}, "OUTBOX_STORE_DSN_FILE"},
		"no DSN":            {[]string{"server", "--store-dsn", "postgres://x@127.0.0.1:port/x"}, "parsing the store's DSN"},
		"nobody but us":     {[]string{"config", "--server-grpc-listen", "0.0.0.0:7070"}, "allow-anonymous"},
		"receive too small": {[]string{"config", "--server-max-receive-bytes", "5"}, "max-receive-bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			if r := outbox(t, "", c.args...); r.code == exitOK || !strings.Contains(r.err, c.says) {
				t.Errorf("exit %d, stderr %q; want %q", r.code, r.err, c.says)
			}
		})
	}
}

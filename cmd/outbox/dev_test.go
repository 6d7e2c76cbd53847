package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/embedded/postgres"
	"github.com/outbox-platform/outbox/examples/orders"
)

const (
	// devLimit bounds a first start: PostgreSQL may have to be fetched.
	devLimit = 3 * time.Minute
	endLimit = time.Minute
)

var devArgs = []string{
	"dev", "--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--kafka-port", "0", "--rate", "50", "--rollback", "0.2",
}

// fieldOf returns what follows a label in the lines that dev prints first.
func fieldOf(p *program, label string) string {
	return strings.Fields(strings.TrimPrefix(p.await(devLimit, label), label))[0]
}

var counts = regexp.MustCompile(`so far: (\d+) committed, (\d+) rolled back; (\d+) arrived, (\d+) on their way`)

func lastCounts(t *testing.T, output string) (committed, rolledBack, arrived, onTheirWay int) {
	t.Helper()
	all := counts.FindAllStringSubmatch(output, -1)
	if len(all) == 0 {
		t.Fatal("no summary was printed")
	}
	var n [4]int
	for i, digits := range all[len(all)-1][1:] {
		n[i], _ = strconv.Atoi(digits)
	}
	return n[0], n[1], n[2], n[3]
}

func TestDev(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	args := append(devArgs, "--dir", dir)
	p := start(t, nil, args...)
	p.await(devLimit, "ready")
	p.await(endLimit, "committed    order")
	p.await(endLimit, "arrived      order")
	p.await(endLimit, "rolled back  order")

	// A second one on the same data is refused.
	if code := start(t, nil, args...).wait(endLimit); code != exitUsage {
		t.Errorf("a second dev in the same folder: exit %d", code)
	}

	// A foreign client reads the records.
	records, err := kafka.ReadUntil(t.Context(), fieldOf(p, "Kafka"), kafka.AtLeast(20), orders.Topic)
	if err != nil {
		t.Fatal(err)
	}
	for _, record := range records {
		if id, _ := record.Header("ce_id"); len(id) != 36 || !strings.HasPrefix(string(record.Key), "customer-") {
			t.Fatalf("key %q, headers %v", record.Key, record.Headers)
		}
	}

	// Operators' commands work against it.
	api := fieldOf(p, "API")
	if r := outbox(t, "", "source", "get", orders.Source, "--address", api); r.code != exitOK || !strings.Contains(r.out, "topics: [orders]") && !strings.Contains(r.out, "- orders") {
		t.Errorf("source get: %+v", r)
	}
	if r := outbox(t, "", "shard", "list", "--address", api); r.code != exitOK || strings.Count(r.out, "\n") != 17 {
		t.Errorf("shard list: %+v", r)
	}
	metricsAreDocumented(t, regexp.MustCompile(`http://[^ ]+`).FindString(p.await(endLimit, "(JSON")))

	// Ctrl-C is clean, and everything that was committed has arrived.
	if code := p.end(syscall.SIGINT, endLimit); code != exitOK {
		t.Fatalf("exit %d after SIGINT", code)
	}
	committed, rolledBack, arrived, onTheirWay := lastCounts(t, p.output())
	if committed == 0 || rolledBack == 0 || arrived != committed || onTheirWay != 0 {
		t.Errorf("%d committed, %d rolled back, %d arrived, %d on their way", committed, rolledBack, arrived, onTheirWay)
	}
	for _, bad := range []string{"REPEATED", "OUT OF ORDER", "failed", "outbox: "} {
		if strings.Contains(p.output(), bad) {
			t.Errorf("it printed %q", bad)
		}
	}

	// The second start finds its data: what is on Kafka stays, and the store is sound.
	again := start(t, nil, append(args, "--stop-after", "10")...)
	again.await(devLimit, "ready")
	store := fieldOf(again, "store")
	if r := outbox(t, "", "verify", "--store-dsn", store); r.code != exitOK || !strings.Contains(r.out, "no violation") {
		t.Errorf("verify: %+v", r)
	}
	if r := outbox(t, "", "migrate", "status", "--store-dsn", store); r.code != exitOK || strings.Contains(r.out, "pending") {
		t.Errorf("migrate status: %+v", r)
	}
	if code := again.wait(endLimit); code != exitOK {
		t.Fatalf("exit %d of the second start", code)
	}
	_, _, arrived, _ = lastCounts(t, again.output())
	if arrived < 10 || strings.Contains(again.output(), "REPEATED") || strings.Contains(again.output(), "OUT OF ORDER") {
		t.Errorf("second start: %d arrived", arrived)
	}
}

// Root's PostgreSQL runs as somebody else; an ordinary user's runs as that user. TestDev is whoever runs the tests; this is
// the other one where that is possible.
func TestDevAsOrdinaryUser(t *testing.T) {
	if os.Getuid() != 0 {
		return // TestDev was that already
	}
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(nobody.Uid)
	gid, _ := strconv.Atoi(nobody.Gid)
	home, err := os.MkdirTemp("/var/tmp", "outbox-dev-") //nolint:usetesting // others must be able to enter it
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(home) }()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(home, "outbox")
	binary, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, binary, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{os.Chmod(home, 0o755), os.Chown(home, uid, gid)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	// Root's programs, which everybody can run: unpacking others would take a minute under the race detector.
	server, err := postgres.Start(t.Context(), postgres.Config{})
	if err != nil {
		t.Fatal(err)
	}
	postgresProgram, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", server.PID()))
	if err := errors.Join(err, server.Stop(t.Context())); err != nil {
		t.Fatal(err)
	}
	p := start(t, func(cmd *exec.Cmd) {
		cmd.Path = program
		cmd.Dir = home
		cmd.Env = append(cmd.Env, "HOME="+home, "XDG_CACHE_HOME="+filepath.Join(home, "cache"), "TMPDIR="+home,
			postgres.BinEnv+"="+filepath.Dir(postgresProgram))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}, append(devArgs, "--stop-after", "5")...)
	if code := p.wait(devLimit); code != exitOK {
		t.Fatalf("exit %d as %s", code, nobody.Username)
	}
}

// metricsAreDocumented checks that a running platform has every metric that docs/metrics.md names; go test -update writes
// it. Some metrics exist only after the first shard was leased, or the producer's first figures came: they are waited for.
func metricsAreDocumented(t *testing.T, base string) {
	t.Helper()
	const file = "../../docs/metrics.md"
	have, err := os.ReadFile(file)
	if err != nil && !*update {
		t.Fatal(err)
	}
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	var page, missing string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); <-tick.C {
		page = metricsPage(t, base)
		if missing = missingMetrics(string(have), page); missing == "" && !*update {
			if extra := missingMetrics(page, string(have)); extra != "" {
				t.Logf("not in %s yet (go test -update writes it):%s", file, extra)
			}
			return
		}
		if *update && strings.Contains(page, "outbox_kafka_broker_up") && strings.Contains(page, "outbox_shard_epoch") {
			break
		}
	}
	if *update {
		if err := os.WriteFile(file, []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("%s names metrics that are not there (go test -update writes it):%s", file, missing)
}

// missingMetrics lists the metrics that one page names and another does not.
func missingMetrics(page, other string) string {
	var missing strings.Builder
	for _, match := range regexp.MustCompile("(?m)^\\| (`outbox_[a-z_]+`)").FindAllStringSubmatch(page, -1) {
		if !strings.Contains(other, match[1]) {
			missing.WriteString(" " + match[1])
		}
	}
	return missing.String()
}

func metricsPage(t *testing.T, base string) string {
	t.Helper()
	body := fetch(t, base+"/metrics")
	kinds := map[string]string{}
	for _, match := range regexp.MustCompile(`(?m)^# TYPE (\S+) (\S+)$`).FindAllStringSubmatch(body, -1) {
		kinds[match[1]] = match[2]
	}
	var b strings.Builder
	b.WriteString(`# Metrics

All metrics of ours, as a server with a relay in one process shows them at ` + "`/metrics`" + `; servers and relays alone show their own part.
Beside them there are Go's, the process's and gRPC's (` + "`grpc_server_…`" + `). What to alarm on is in [operations](operations.md#alarms).

This page is written by a test (` + "`go test ./cmd/outbox -update`" + `).

| metric | kind | |
|---|---|---|
`)
	for _, match := range regexp.MustCompile(`(?m)^# HELP (outbox_\S+) (.*)$`).FindAllStringSubmatch(body, -1) {
		b.WriteString("| `" + match[1] + "` | " + kinds[match[1]] + " | " + strings.ReplaceAll(match[2], "|", "\\|") + " |\n")
	}
	return b.String()
}

// fetch returns what an HTTP port answers.
func fetch(t *testing.T, url string) string {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer http.DefaultClient.CloseIdleConnections()
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return err.Error()
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		return err.Error()
	}
	return string(body)
}

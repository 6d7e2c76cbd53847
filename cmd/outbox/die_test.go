package main

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/examples/orders"
)

var lastWords = regexp.MustCompile(`dying at (\S+): order (\S+) of \S+, transaction (\S+)`)

// TestDieAt kills the example at each step, as the README tells readers to, and compares what the platform finds out with
// the database's truth.
func TestDieAt(t *testing.T) {
	service := filepath.Join(t.TempDir(), "orders")
	if out, err := exec.Command("go", "build", "-o", service, "../../examples/orders/service").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	dev := start(t, nil, append(devArgs, "--dir", filepath.Join(t.TempDir(), "data"), "--rate", "2")...)
	dev.await(devLimit, "ready; ")
	api, dsn := fieldOf(dev, "API"), fieldOf(dev, "demo source")
	database, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer database.Close(t.Context())

	happens := map[string]bool{orders.DieCommitted: true, orders.DieCommitTold: true}
	for _, step := range orders.DieSteps {
		t.Run(step, func(t *testing.T) {
			victim := exec.Command(service, "-dsn", dsn, "-server", api, "-die-at", step)
			out, err := victim.CombinedOutput()
			words := lastWords.FindStringSubmatch(string(out))
			status, ok := victim.ProcessState.Sys().(syscall.WaitStatus)
			if err == nil || !ok || status.Signal() != syscall.SIGKILL || words == nil || words[1] != step {
				t.Fatalf("it did not die as it should: %v: %s", err, out)
			}
			state := decision(t, api, words[3])
			var truth bool
			if err := database.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM customer_order WHERE id = $1)`, words[2]).Scan(&truth); err != nil {
				t.Fatal(err)
			}
			if (state == "STATE_COMMITTED") != truth {
				t.Errorf("the platform says %q, the database %t", state, truth)
			}
			if step != orders.DieCommitSent && truth != happens[step] { // that one may go either way
				t.Errorf("died at %s, and the order is there: %t", step, truth)
			}
			if truth {
				dev.await(endLimit, "arrived      order "+words[2][24:])
			}
		})
	}
	if code := dev.end(syscall.SIGINT, endLimit); code != exitOK {
		t.Errorf("exit %d after SIGINT", code)
	}
	if strings.Contains(dev.output(), "OUT OF ORDER") || strings.Contains(dev.output(), "REPEATED") {
		t.Error("records came out of order, or twice")
	}

	if out, err := exec.Command(service, "-dsn", dsn, "-die-at", "once").CombinedOutput(); err == nil || !strings.Contains(string(out), orders.DieCommitted) {
		t.Errorf("a step that is not there: %v: %s", err, out)
	}
}

// decision waits until a transaction is decided, and returns its state; "" when the platform has never heard of it.
func decision(t *testing.T, api, id string) string {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(endLimit); time.Now().Before(deadline); <-tick.C {
		r := outbox(t, "", "transaction", "get", orders.Source, id, "--address", api, "-o", "json")
		if r.code == exitNotFound {
			return ""
		}
		var answer struct {
			State string `json:"state"`
		}
		if r.code != exitOK || json.Unmarshal([]byte(r.out), &answer) != nil {
			t.Fatalf("transaction get: %+v", r)
		}
		if answer.State != "STATE_PREPARED" {
			return answer.State
		}
	}
	t.Fatalf("transaction %s is undecided", id)
	return ""
}

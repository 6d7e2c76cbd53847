package main

import (
	"bytes"
	"encoding/json"
	"io"
	"testing"

	"github.com/outbox-platform/outbox/cmd/outbox/bench"
)

// TestBenchKillsServices runs the workload kill with everything real but the broker: services die at every step, and the
// platform finds out what they did, in both ways.
func TestBenchKillsServices(t *testing.T) {
	t.Setenv(mainEnv, "1") // for the processes that the bench starts
	var out, progress bytes.Buffer
	if code := run(t.Context(), []string{"bench", "--workload", "kill", "--runs", "2", "-o", "json"}, bytes.NewReader(nil), &out, &progress); code != exitOK {
		t.Fatalf("exit code %d\n%s%s", code, out.String(), progress.String())
	}
	met := map[string]bool{}
	for lines := json.NewDecoder(&out); ; {
		var r bench.KillResult
		if err := lines.Decode(&r); err == io.EOF { //nolint:errorlint // the decoder's own
			break
		} else if err != nil {
			t.Fatal(err)
		}
		met[r.Step+" "+r.Resolver] = true
		if r.N != 2 || r.Wrong != 0 || r.Undecided != 0 {
			t.Errorf("%+v", r)
		}
		switch {
		case r.Step == "before-prepare":
			if r.NotStored != 2 || r.P99 != nil {
				t.Errorf("nothing was prepared: %+v", r)
			}
		case r.NotStored < 2 && r.P99 == nil, r.Step != "prepare-sent" && r.NotStored > 0, r.Step != "commit-sent" && r.ByClient > 0:
			t.Errorf("%+v", r)
		}
	}
	if len(met) != 12 {
		t.Errorf("met %v", met)
	}
}

func TestBenchKillRefusesWhatDoesNotApply(t *testing.T) {
	for _, args := range [][]string{{"--runs", "0"}, {"--target", "naive"}, {"--server", "elsewhere:7000"}, {"--transport", "unary"}} {
		if r := outbox(t, "", append([]string{"bench", "--workload", "kill"}, args...)...); r.code != exitUsage {
			t.Errorf("%v: exit code %d: %s", args, r.code, r.err)
		}
	}
}

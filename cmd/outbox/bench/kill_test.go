package bench

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/client"
)

func TestWhatIsWrong(t *testing.T) {
	for name, tc := range map[string]struct {
		step  killStep
		death death
		wrong bool
	}{
		"never prepared":                  {killBeforePrepare, death{}, false},
		"never prepared but known":        {killBeforePrepare, death{seen: seenAborted}, true},
		"never prepared but in doubt":     {killBeforePrepare, death{seen: seenUndecided}, true},
		"never prepared but arrived":      {killBeforePrepare, death{arrived: 1}, true},
		"lost on the wire":                {killPrepareSent, death{}, false},
		"lost on the wire but committed":  {killPrepareSent, death{committed: true}, true},
		"arrived and aborted":             {killPrepareSent, death{seen: seenAborted}, false},
		"prepared but unknown":            {killPrepared, death{}, true},
		"prepared and aborted":            {killPrepared, death{seen: seenAborted}, false},
		"phantom":                         {killPrepared, death{seen: seenCommitted, arrived: 1}, true},
		"phantom event":                   {killPrepared, death{seen: seenAborted, arrived: 1}, true},
		"cut and committed":               {killCommitCut, death{seen: seenCommitted, committed: true, arrived: 1}, false},
		"cut and aborted, truly":          {killCommitCut, death{seen: seenAborted}, false},
		"cut and aborted, falsely":        {killCommitCut, death{seen: seenAborted, committed: true}, true},
		"committed":                       {killCommitted, death{seen: seenCommitted, committed: true, arrived: 1}, false},
		"committed, twice in Kafka":       {killCommitted, death{seen: seenCommitted, committed: true, arrived: 2}, false},
		"committed but nothing arrived":   {killCommitted, death{seen: seenCommitted, committed: true}, true},
		"committed and still in doubt":    {killCommitted, death{seen: seenUndecided, committed: true}, false},
		"committed, unknown":              {killCommitSent, death{committed: true, arrived: 1}, true},
		"committed, decided by the other": {killCommitSent, death{seen: seenCommitted, committed: true, arrived: 1, by: "client"}, false},
	} {
		if why := tc.death.wrong(tc.step); (why != "") != tc.wrong {
			t.Errorf("%s: %q", name, why)
		}
	}
}

func TestOnlyTheResolverOfTheRunDecides(t *testing.T) {
	for _, step := range killSteps {
		for _, r := range killResolvers {
			if !step.decider(r, string(r)) || step.decider(r, "operator") || step.decider(r, "client") != (step == killCommitSent) {
				t.Errorf("step %s, resolver %s", step, r)
			}
		}
		if step.decider(killDirect, string(killCheckBack)) || step.decider(killCheckBack, string(killDirect)) {
			t.Errorf("step %s takes the other resolver's decisions", step)
		}
	}
}

func TestStatesAreSeen(t *testing.T) {
	for state, want := range map[client.State]seen{
		client.StateCommitted: seenCommitted, client.StateAborted: seenAborted, client.StatePrepared: seenUndecided, 99: seenUndecided,
	} {
		if got := seenOf(state); got != want {
			t.Errorf("%s: %d", state, got)
		}
	}
}

func TestKillResult(t *testing.T) {
	res := killResultOf(killPrepareSent, killDirect, []death{
		{seen: seenAborted, by: "direct", nanos: 3e6},
		{seen: seenAborted, by: "direct", nanos: 9e6},
		{seen: seenAborted, by: "direct", nanos: 1e6},
		{}, {seen: seenUndecided}, {seen: seenAborted, by: "direct", nanos: 2e6, arrived: 1},
	})
	var out bytes.Buffer
	p := killPrinter{w: &out, json: true}
	nothing := killResultOf(killBeforePrepare, killCheckBack, make([]death, 2))
	for _, r := range []KillResult{res, nothing} {
		if err := p.print(r); err != nil {
			t.Fatal(err)
		}
	}
	const want = `{"step":"prepare-sent","resolver":"direct","n":6,"wrong":1,"undecided":1,"not_stored":1,"by_client":0,"p50_ms":3,"p99_ms":9,"max_ms":9}
{"step":"before-prepare","resolver":"check-back","n":2,"wrong":0,"undecided":0,"not_stored":2,"by_client":0,"p50_ms":null,"p99_ms":null,"max_ms":null}
`
	if out.String() != want {
		t.Errorf("%s", out.String())
	}
	out.Reset()
	p.json = false
	if err := p.print(nothing); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, "p99 ms") || !strings.Contains(s, "–") || strings.Count(s, "\n") != 2 {
		t.Errorf("%s", s)
	}
}

func TestKillIsValidated(t *testing.T) {
	good := func() *Cmd {
		return &Cmd{
			Workload: workloadKill, Target: targetOutbox, Transport: "session", Concurrency: []int{1}, Duration: time.Second,
			Payload: 1024, Aggregates: 1, Runs: 1, Broker: brokerAuto,
		}
	}
	if err := good().Validate(); err != nil {
		t.Fatal(err)
	}
	for flag, spoil := range map[string]func(*Cmd){
		"--runs":         func(c *Cmd) { c.Runs = 0 },
		"--target":       func(c *Cmd) { c.Target = targetNaive },
		"--server":       func(c *Cmd) { c.Server = "elsewhere:7000" },
		"--hold-xid":     func(c *Cmd) { c.HoldXID = true },
		"--history":      func(c *Cmd) { c.History = 1 },
		"--transactions": func(c *Cmd) { c.Transactions = 1 },
		"--transport":    func(c *Cmd) { c.Transport = "unary" },
	} {
		c := good()
		spoil(c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), flag) {
			t.Errorf("%s: %v", flag, err)
		}
		if c.Workload = workloadOrders; flag != "--transport" && flag != "--target" && c.Validate() != nil {
			t.Errorf("%s is checked for other workloads", flag)
		}
	}
}

// sink is a connection that takes everything.
type sink struct{ net.Conn }

func (sink) Write(b []byte) (int, error) { return len(b), nil }

func TestWireTellsWhenItIsSent(t *testing.T) {
	for name, writes := range map[string][]string{
		"one write":     {"before", "xxneedlexx"},
		"two writes":    {"before", "xxnee", "dlexx"},
		"byte by byte":  {"n", "e", "e", "d", "l", "e"},
		"after a start": {"need", "needle"},
	} {
		w, times := &wire{}, 0
		c := &watchedConn{Conn: sink{}, wire: w}
		_, _ = c.Write([]byte("needle")) // before anybody waits
		w.await([]byte("needle"), func() { times++ })
		for i, b := range writes {
			if n, err := c.Write([]byte(b)); n != len(b) || err != nil {
				t.Fatal(n, err)
			}
			if want := i == len(writes)-1; (times == 1) != want {
				t.Errorf("%s: after write %d: %d", name, i, times)
			}
		}
		_, _ = c.Write([]byte("needle"))
		if times != 1 {
			t.Errorf("%s: told %d times", name, times)
		}
	}
}

func message(kind, text string) []byte {
	n := len(text) + 4
	return append(append([]byte(kind), byte(n>>24), byte(n>>16), byte(n>>8), byte(n)), text...)
}

func TestForwardFindsCommit(t *testing.T) {
	parts := [][]byte{
		message("", "\x00\x03\x00\x00user\x00commit\x00\x00"), message("p", "commit\x00"), message("Q", "begin\x00"),
		message("P", "\x00commit\x00"), message("Q", "select 'commit'\x00"), message("Q", "COMMIT;\x00"), message("X", ""),
	}
	var server bytes.Buffer
	var before, after int
	err := forward(&server, bytes.NewReader(slices.Concat(parts...)), func() { before = server.Len() }, func() { after = server.Len() })
	if err != io.EOF { //nolint:errorlint // the reader's own
		t.Error(err)
	}
	if !bytes.Equal(server.Bytes(), slices.Concat(parts...)) {
		t.Errorf("%q", server.Bytes())
	}
	start := len(slices.Concat(parts[:5]...))
	if before != start || after != start+len(parts[5]) {
		t.Errorf("COMMIT lies at %d…%d, found at %d…%d", start, start+len(parts[5]), before, after)
	}
	if err := forward(io.Discard, strings.NewReader("\x7f\xff\xff\xffxx"), nil, nil); err == nil || err == io.EOF { //nolint:errorlint // see above
		t.Errorf("nonsense: %v", err)
	}
}

func TestResultsAreValidJSONForEveryStep(t *testing.T) {
	for _, step := range killSteps {
		var out bytes.Buffer
		if err := (&killPrinter{w: &out, json: true}).print(killResultOf(step, killDirect, []death{{seen: seenAborted, nanos: 5}})); err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := json.Unmarshal(out.Bytes(), &m); err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{"step", "resolver", "n", "wrong", "undecided", "p50_ms", "p99_ms"} {
			if _, ok := m[key]; !ok {
				t.Errorf("%s: no %s", step, key)
			}
		}
	}
}

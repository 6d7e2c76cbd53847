package main

import (
	"bytes"
	"context"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
	"go.uber.org/goleak"
)

var update = flag.Bool("update", false, "write the golden files")

func TestMain(m *testing.M) {
	if os.Getenv(mainEnv) != "" {
		main()
		return
	}
	flag.Parse()
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "OUTBOX_") && name != "OUTBOX_POSTGRES_BIN" {
			_ = os.Unsetenv(name) // settings of the machine must not reach the tests
		}
	}
	goleak.VerifyTestMain(m)
}

// result is what a command did.
type result struct {
	code     int
	out, err string
}

// outbox runs a command in process.
func outbox(t *testing.T, in string, args ...string) result {
	t.Helper()
	var out, errOut bytes.Buffer
	code := run(t.Context(), args, strings.NewReader(in), &out, &errOut)
	return result{code, out.String(), errOut.String()}
}

// golden compares text with testdata/name; go test -update writes it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v (go test -update writes it)", err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it):\n%s", name, diff(string(want), got))
	}
}

// commands are all commands that do something, with their arguments.
func commands(t *testing.T) []*kong.Node {
	t.Helper()
	parser, err := newParser(&cli{}, streams{}, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	return parser.Model.Leaves(true)
}

func TestEveryCommandHelps(t *testing.T) {
	for _, command := range commands(t) {
		path := strings.TrimPrefix(command.FullPath(), "outbox ")
		t.Run(path, func(t *testing.T) {
			r := outbox(t, "", append(strings.Fields(path), "--help")...)
			if r.code != exitOK || r.err != "" {
				t.Fatalf("exit %d, stderr %q", r.code, r.err)
			}
			if !strings.Contains(r.out, "Usage: outbox "+path) {
				t.Errorf("no usage in %q", r.out)
			}
			for _, flag := range command.Flags {
				if flag.Help == "" && !flag.Hidden {
					t.Errorf("--%s has no help", flag.Name)
				}
			}
			for _, argument := range command.Positional {
				if argument.Help == "" {
					t.Errorf("argument %s has no help", argument.Name)
				}
			}
		})
	}
}

func TestHelp(t *testing.T) {
	r := outbox(t, "", "--help")
	if r.code != exitOK {
		t.Fatalf("exit %d: %s", r.code, r.err)
	}
	golden(t, "help.txt", r.out)
	golden(t, "help-source-apply.txt", outbox(t, "", "source", "apply", "--help").out)
	golden(t, "help-doctor.txt", outbox(t, "", "doctor", "--help").out)
}

func TestWrongUsage(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		says string
	}{
		"no command":        {nil, "expected one of"},
		"unknown command":   {[]string{"serve"}, "unexpected argument serve"},
		"unknown flag":      {[]string{"shard", "list", "--addr", "x"}, "See 'outbox shard list --help'"},
		"missing argument":  {[]string{"source", "get"}, "<name>"},
		"missing reason":    {[]string{"source", "delete", "orders"}, "--reason"},
		"bad output":        {[]string{"shard", "list", "-o", "xml"}, "must be one of"},
		"no store":          {[]string{"verify"}, "OUTBOX_STORE_DSN_FILE"},
		"two ways to a DSN": {[]string{"verify", "--store-dsn", "x", "--store-dsn-file", "y"}, "keep one"},
		"no DSN file":       {[]string{"verify", "--store-dsn-file", "/does/not/exist"}, "no such file"},
		"not a UUID":        {[]string{"transaction", "get", "orders", "4711"}, "not a UUID"},
		"shards":            {[]string{"migrate", "up", "--shards", "65", "--store-dsn", "x"}, "between 1 and 64: 65"},
		"down without yes":  {[]string{"migrate", "down", "--store-dsn", "x"}, "--yes"},
		"no such section":   {[]string{"config", "--only", "kaffka"}, `no section "kaffka"`},
		"no such file":      {[]string{"config", "-c", "/does/not/exist.yaml"}, "configuration file"},
		"half a TLS pair":   {[]string{"shard", "list", "--tls-cert", "x"}, "go together"},
		"bad address":       {[]string{"shard", "list", "--address", "\x00"}, "address"},
	} {
		t.Run(name, func(t *testing.T) {
			r := outbox(t, "", c.args...)
			if r.code != exitUsage || !strings.Contains(r.err, c.says) {
				t.Errorf("exit %d, stderr %q; want %d and %q", r.code, r.err, exitUsage, c.says)
			}
			if r.out != "" {
				t.Errorf("stdout %q", r.out)
			}
		})
	}
}

func TestUnreachableServerSaysWhatToDo(t *testing.T) {
	r := outbox(t, "", "shard", "list", "--address", "127.0.0.1:1", "--timeout", "2s")
	if r.code != exitUnavailable || !strings.Contains(r.err, "OUTBOX_ADDRESS") {
		t.Errorf("exit %d, stderr %q", r.code, r.err)
	}
}

func TestVersion(t *testing.T) {
	if r := outbox(t, "", "version"); r.code != exitOK || !strings.HasPrefix(r.out, "outbox development (go") {
		t.Errorf("%+v", r)
	}
	if r := outbox(t, "", "version", "-o", "json"); r.code != exitOK || !strings.Contains(r.out, `"schema": 3`) {
		t.Errorf("%+v", r)
	}
}

func TestMarkerDDL(t *testing.T) {
	for _, format := range []string{"plain", "goose", "alembic", "django"} {
		r := outbox(t, "", "marker-ddl", "--format", format)
		if r.code != exitOK {
			t.Fatalf("exit %d: %s", r.code, r.err)
		}
		golden(t, "marker-ddl-"+format+".txt", r.out)
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if r := outbox(t, "", "completion", shell); r.code != exitOK || !strings.Contains(r.out, "outbox __complete") {
			t.Errorf("%s: %+v", shell, r)
		}
	}
	for words, want := range map[string]string{
		"so":                       "source",
		"source ":                  "apply delete failover get list",
		"source l":                 "list",
		"source apply --dr":        "--dry-run",
		"source list --output ":    "json text",
		"source list -o j":         "json",
		"source list --address ":   "",
		"marker-ddl --format ":     "alembic django goose plain",
		"completion ":              "bash fish zsh",
		"do":                       "doctor",
		"doctor --res":             "--resolver-role",
		"doctor -o ":               "json text",
		"deadletter redrive --rea": "--reason",
		"__":                       "",
	} {
		r := outbox(t, "", append([]string{"__complete", "--"}, strings.Split(words, " ")...)...)
		if got := strings.Join(strings.Fields(r.out), " "); got != want || r.code != exitOK {
			t.Errorf("%q: %q, want %q (%s)", words, got, want, r.err)
		}
	}
}

func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, errOut bytes.Buffer
	code := run(ctx, []string{"shard", "list", "--address", "127.0.0.1:1"}, strings.NewReader(""), &out, &errOut)
	if code == exitOK || errOut.Len() == 0 {
		t.Errorf("exit %d, stderr %q", code, errOut.String())
	}
}

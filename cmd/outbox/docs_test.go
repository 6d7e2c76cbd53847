package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
)

// TestSettingsAreDocumented keeps docs/settings.md as the settings are; go test -update writes it.
func TestSettingsAreDocumented(t *testing.T) {
	parser, err := newParser(&cli{}, streams{}, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	var command *kong.Node
	for _, child := range parser.Model.Children {
		if child.Name == "config" {
			command = child
		}
	}
	var b strings.Builder
	b.WriteString(`# Settings

The key ` + "`relay.lease-ttl`" + ` of the configuration file is the flag ` + "`--relay-lease-ttl`" + ` and the environment variable
` + "`OUTBOX_RELAY_LEASE_TTL`" + `, and so on for all. Flags go before variables, variables before the file. Durations are written as
"30s", sizes in bytes. ` + "`outbox config`" + ` prints what is in force and where it comes from. One file may serve all processes.

This page is written by a test (` + "`go test ./cmd/outbox -update`" + `).
`)
	for _, section := range []struct{ key, title string }{
		{"store", "store: all processes"}, {"log", "log: all processes"}, {"server", "server"}, {"writer", "writer: servers"}, {"resolver", "resolver: servers"},
		{"kafka", "kafka: relays"}, {"relay", "relay"}, {"api", "The commands that operators use"},
	} {
		fmt.Fprintf(&b, "\n## %s\n\n| key | default | |\n|---|---|---|\n", section.title)
		rows := 0
		for _, flag := range command.Flags {
			if !isSetting(flag) || flag.Group.Key != section.key {
				continue
			}
			rows++
			value := "–"
			if flag.HasDefault {
				value = "`" + flag.Default + "`"
			} else if flag.IsBool() {
				value = "`false`"
			}
			fmt.Fprintf(&b, "| `%s` | %s | %s |\n", settingKey(flag), value, flag.Help)
		}
		if rows == 0 {
			t.Errorf("section %s has no settings", section.key)
		}
	}
	const file = "../../docs/settings.md"
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != b.String() {
		t.Errorf("%s differs (go test -update writes it):\n%s", file, diff(string(have), b.String()))
	}
}

// TestDocumentedMetricsExist: operations.md must not alarm on a metric that is not there (docs/metrics.md is what is).
func TestDocumentedMetricsExist(t *testing.T) {
	known, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	operations, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	used := regexp.MustCompile(`outbox_[a-z_]+_(?:total|seconds|up|full|epoch|aggregates|topics|bytes)\b`).FindAllString(string(operations), -1)
	if len(used) < 10 {
		t.Fatalf("only %v found in operations.md", used)
	}
	for _, name := range used {
		if !strings.Contains(string(known), "`"+name+"`") {
			t.Errorf("operations.md names %s, which no process exports", name)
		}
	}
}

// TestDocumentedCommandsExist: each `outbox …` command in the documentation parses as far as its command goes.
func TestDocumentedCommandsExist(t *testing.T) {
	known := map[string]bool{}
	for _, command := range commands(t) {
		words := strings.Fields(strings.TrimPrefix(command.FullPath(), "outbox "))
		for i := range words {
			known[strings.Join(words[:i+1], " ")] = true
		}
	}
	for _, file := range []string{"../../README.md", "../../docs/operations.md", "../../docs/migrating-from-a-library.md", "../../docs/in-doubt.md", "../../docs/guarantees.md", "../../deploy/README.md"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile("(?m)(?:^|`|\\||bin/)outbox ([a-z][a-z-]*)(?: ([a-z]+))?").FindAllStringSubmatch(string(text), -1)
		if len(found) == 0 {
			t.Errorf("no command found in %s", file)
		}
		for _, match := range found {
			if !known[match[1]] || match[2] != "" && !known[match[1]+" "+match[2]] && !leaf(t, match[1]) {
				t.Errorf("%s names `outbox %s %s`, which does not exist", file, match[1], match[2])
			}
		}
	}
}

// leaf reports whether a command has no commands below it: what follows it are arguments.
func leaf(t *testing.T, name string) bool {
	for _, command := range commands(t) {
		if command.FullPath() == "outbox "+name {
			return true
		}
	}
	return false
}

// TestReasonsAreDocumented: docs/in-doubt.md explains every reason for which an answer is not conclusive, in the code's words.
func TestReasonsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/in-doubt.md")
	if err != nil {
		t.Fatal(err)
	}
	reason := regexp.MustCompile(`(?:nknown, |nProgress, |borted, |clientOnly = |answer: |reason: |Sprintf\(\s*|return )"((?:another|the |only |asking |pg_|row |its |it |nobody )[^"%]*)`)
	found := map[string]bool{}
	for _, file := range []string{
		"../../server/resolver/verdict.go", "../../server/resolver/lane.go", "../../client/internal/sourcedb/verdict.go",
	} {
		code, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range reason.FindAllStringSubmatch(string(code), -1) {
			found[strings.TrimSpace(match[1])] = true
		}
	}
	if len(found) < 14 {
		t.Errorf("only %d reasons found in the code: %v", len(found), found)
	}
	for why := range found {
		// What follows a colon or a number is different each time.
		if words, _, _ := strings.Cut(why, ":"); !strings.Contains(string(text), words) {
			t.Errorf("docs/in-doubt.md does not explain %q", why)
		}
	}
}

package main

import (
	"fmt"
	"os"
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
		{"store", "store: all processes"}, {"log", "log: all processes"}, {"server", "server"}, {"writer", "writer: servers"},
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

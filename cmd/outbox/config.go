package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/alecthomas/kong"
	"go.yaml.in/yaml/v3"
)

// configCmd knows the settings of every process, so that one file can serve all of them.
type configCmd struct {
	outputSettings
	Only  string        `placeholder:"SECTION" help:"Only this section, for example relay."`
	API   apiSettings   `embed:"" group:"api"`
	Log   logSettings   `embed:"" prefix:"log-" group:"log"`
	Store storeSettings `embed:"" prefix:"store-" group:"store"`
	Kafka kafkaSettings `embed:"" prefix:"kafka-" group:"kafka"`
	serverSettings
	relaySettings
}

// Help implements kong.HelpProvider.
func (*configCmd) Help() string {
	return `Prints every setting as a configuration file, with where its value comes from and secrets masked. What it prints is a
file that --config takes, but for the secrets. What a process would refuse to start with is reported, with exit code 2. The setting relay.lease-ttl of the file is the flag --relay-lease-ttl and the
environment variable OUTBOX_RELAY_LEASE_TTL. Each secret can be given by a file: store.dsn-file, OUTBOX_STORE_DSN_FILE.

Examples:
  outbox config -c /etc/outbox.yaml
  outbox config --only relay`
}

// setting is one setting with its value.
type setting struct {
	key    string // section.name, or the name alone
	value  any
	origin string
}

// Run prints the settings.
func (c *configCmd) Run(s streams, k *kong.Context, root *cli) error {
	var settings []setting
	for _, flag := range k.Selected().Flags {
		if !isSetting(flag) {
			continue
		}
		settings = append(settings, setting{settingKey(flag), printable(flag.Target), c.origin(flag, k, root)})
	}
	slices.SortStableFunc(settings, func(a, b setting) int {
		sectionA, _, nestedA := strings.Cut(a.key, ".")
		sectionB, _, nestedB := strings.Cut(b.key, ".")
		switch {
		case nestedA != nestedB:
			if nestedB {
				return -1
			}
			return 1
		case !nestedA:
			return 0
		}
		return strings.Compare(sectionA, sectionB)
	})
	if c.Only != "" {
		settings = slices.DeleteFunc(settings, func(v setting) bool { return !strings.HasPrefix(v.key+".", c.Only+".") })
		if len(settings) == 0 {
			return usagef("there is no section %q", c.Only)
		}
	}
	if err := c.print(s.out, settings); err != nil {
		return err
	}
	return c.check()
}

func (c *configCmd) print(w io.Writer, settings []setting) error {
	if c.json() {
		out := map[string]any{}
		for _, v := range settings {
			out[v.key] = map[string]any{"value": v.value, "from": v.origin}
		}
		return writeJSON(w, out)
	}
	section := ""
	for _, v := range settings {
		name, indent := v.key, ""
		if in, rest, nested := strings.Cut(v.key, "."); nested {
			name, indent = rest, "  "
			if in != section {
				fmt.Fprintf(w, "%s:\n", in)
				section = in
			}
		}
		text, err := yaml.Marshal(v.value)
		if err != nil {
			return fmt.Errorf("printing %s: %w", v.key, err)
		}
		value := strings.TrimSpace(string(text))
		if strings.Contains(value, "\n") {
			value = flow(v.value)
		}
		fmt.Fprintf(w, "%s%s: %s # %s\n", indent, name, value, v.origin)
	}
	return nil
}

// origin says where a setting's value comes from, in the order in which they win.
func (*configCmd) origin(flag *kong.Flag, k *kong.Context, root *cli) string {
	for _, path := range k.Path {
		if path.Flag == flag && !path.Resolved {
			return "flag"
		}
	}
	for _, env := range flag.Envs {
		if _, ok := os.LookupEnv(env); ok {
			return env
		}
	}
	for _, path := range k.Path {
		if path.Flag == flag {
			return string(root.Config)
		}
	}
	return "default"
}

// settingKey is a setting's name in the configuration file.
func settingKey(flag *kong.Flag) string {
	if rest, ok := strings.CutPrefix(flag.Name, flag.Group.Key+"-"); ok {
		return flag.Group.Key + "." + rest
	}
	return flag.Name
}

// printable converts a value to what a configuration file holds.
func printable(v reflect.Value) any {
	switch value := v.Interface().(type) {
	case time.Duration:
		return durationText(value)
	case fmt.Stringer:
		return value.String()
	case map[string]secret:
		out := map[string]string{}
		for name, s := range value {
			out[name] = s.String()
		}
		return out
	default:
		return value
	}
}

// durationText is a duration as people write it: 30m, not 30m0s.
func durationText(d time.Duration) string {
	text := d.String()
	if rest, ok := strings.CutSuffix(text, "m0s"); ok {
		text = rest + "m"
	}
	if rest, ok := strings.CutSuffix(text, "h0m"); ok {
		text = rest + "h"
	}
	return text
}

// check reports what a process would refuse to start with. What is not given at all (a store, brokers) is not wrong here: the
// file may be for another process.
func (c *configCmd) check() error {
	_, writer := c.Writer.config()
	_, relay := c.Relay.config()
	errs := []error{writer, relay}
	if err := c.Server.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("server: %w", err))
	}
	if err := c.Resolver.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("resolver: %w", err))
	}
	if c.Store.DSN != "" || c.Store.DSNFile != "" {
		_, err := c.Store.config("")
		errs = append(errs, err)
	}
	if len(c.Kafka.Brokers) > 0 {
		_, err := c.Kafka.config(nil, nil)
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return codedError{exitUsage, err}
	}
	return nil
}

// flow writes a list or map on one line.
func flow(v any) string {
	var node yaml.Node
	if err := node.Encode(v); err != nil {
		return fmt.Sprint(v)
	}
	node.Style = yaml.FlowStyle
	b, err := yaml.Marshal(&node)
	if err != nil {
		return fmt.Sprint(v)
	}
	return strings.TrimSpace(string(b))
}

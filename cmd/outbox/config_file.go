package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
	"go.yaml.in/yaml/v3"
)

// configPath names the configuration file.
type configPath string

// BeforeResolve reads the configuration file, wherever its name came from, before the other settings get their values.
func (c *cli) BeforeResolve(k *kong.Kong, ctx *kong.Context) error {
	var path configPath
	for _, flag := range k.Model.Flags {
		if flag.Name == "config" {
			path, _ = ctx.FlagValue(flag).(configPath)
		}
	}
	if path == "" {
		return nil
	}
	f, err := os.Open(string(path))
	if err != nil {
		return fmt.Errorf("configuration file: %w", err)
	}
	defer f.Close()
	file, err := readConfigFile(f, settingNames(k.Model.Node))
	if err != nil {
		return fmt.Errorf("configuration file %s: %w", path, err)
	}
	ctx.AddResolver(file)
	return nil
}

// configFile resolves settings from a configuration file.
type configFile struct{ values map[string]any }

// readConfigFile reads a file whose keys must all be known settings. A nested key is the setting of that name with "-"
// between its parts.
func readConfigFile(r io.Reader, known map[string]bool) (*configFile, error) {
	var root map[string]any
	if err := yaml.NewDecoder(r).Decode(&root); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	file := &configFile{values: map[string]any{}}
	var unknown []string
	file.flatten("", "", root, known, &unknown)
	if len(unknown) > 0 {
		slices.Sort(unknown)
		return nil, fmt.Errorf("unknown: %s ('outbox config' prints all keys)", strings.Join(unknown, ", "))
	}
	return file, nil
}

func (f *configFile) flatten(key, name string, value any, known map[string]bool, unknown *[]string) {
	if section, ok := value.(map[string]any); ok && !known[name] {
		for k, v := range section {
			below := strings.TrimPrefix(name+"-"+k, "-")
			f.flatten(strings.TrimPrefix(key+"."+k, "."), below, v, known, unknown)
		}
		return
	}
	if !known[name] {
		*unknown = append(*unknown, key)
		return
	}
	if value != nil {
		f.values[name] = value
	}
}

// Validate implements kong.Resolver; the keys were checked when the file was read.
func (f *configFile) Validate(*kong.Application) error { return nil }

// Resolve implements kong.Resolver. An environment variable goes before the file.
func (f *configFile) Resolve(_ *kong.Context, _ *kong.Path, flag *kong.Flag) (any, error) {
	for _, env := range flag.Envs {
		if _, ok := os.LookupEnv(env); ok {
			return nil, nil
		}
	}
	value, ok := f.values[flag.Name]
	if !ok {
		return nil, nil
	}
	switch v := value.(type) {
	case []any, map[string]any, string, bool:
		return v, nil
	default:
		return fmt.Sprint(v), nil
	}
}

// settingNames are the flags of all commands that are settings of a process: those that are in a section.
func settingNames(node *kong.Node) map[string]bool {
	names := map[string]bool{}
	var walk func(*kong.Node)
	walk = func(n *kong.Node) {
		for _, flag := range n.Flags {
			if isSetting(flag) {
				names[flag.Name] = true
			}
		}
		for _, child := range n.Children {
			walk(child)
		}
	}
	walk(node)
	return names
}

// isSetting reports whether a flag may stand in a configuration file: it belongs to a section.
func isSetting(flag *kong.Flag) bool {
	return flag.Group != nil && slices.Contains([]string{"api", "store", "kafka", "server", "relay", "writer", "resolver", "log"}, flag.Group.Key)
}

// nameVariables gives every setting its environment variable. Other flags have none: --yes must come from a person.
func nameVariables(node *kong.Node) {
	for _, flag := range node.Flags {
		if isSetting(flag) || flag.Name == "config" || flag.Name == "output" {
			flag.Envs = []string{"OUTBOX_" + strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_"))}
			flag.Tag.Envs = flag.Envs
		}
	}
	for _, child := range node.Children {
		nameVariables(child)
	}
}

// decodePath reads a setting that is a path: relative to the working directory, or to the home directory after "~". Empty is
// no path; kong's own takes it for the working directory.
func decodePath(ctx *kong.DecodeContext, target reflect.Value) error {
	var path string
	if err := ctx.Scan.PopValueInto("path", &path); err != nil {
		return err
	}
	if path != "" && path != "-" {
		path = kong.ExpandPath(path)
	}
	target.SetString(path)
	return nil
}

package main

import (
	"fmt"
	"runtime"

	"github.com/outbox-platform/outbox/migrations"
)

// version is set by the linker: a tag, or a commit.
var version = "development"

type versionCmd struct {
	outputSettings
}

// Run prints the version.
func (c *versionCmd) Run(s streams) error {
	if c.json() {
		return writeJSON(s.out, map[string]any{"version": version, "go": runtime.Version(), "schema": migrations.Revision})
	}
	_, err := fmt.Fprintf(s.out, "outbox %s (%s, schema revision %d)\n", version, runtime.Version(), migrations.Revision)
	return err
}

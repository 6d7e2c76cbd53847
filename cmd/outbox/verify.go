package main

import (
	"context"
	"fmt"

	"github.com/outbox-platform/outbox/store"
)

type verifyCmd struct {
	outputSettings
	Store storeSettings `embed:"" prefix:"store-" group:"store"`
}

// Help implements kong.HelpProvider.
func (*verifyCmd) Help() string {
	return `Checks every invariant of the stored state in one snapshot, on a store that is in use or not, and changes nothing. A
violation is a bug or damage: keep the output and the store's backups.

Example:
  outbox verify --store-dsn postgres://outbox_read@db/outbox

` + exitCodesHelp
}

// Run verifies the store.
func (c *verifyCmd) Run(ctx context.Context, s streams) error {
	config, err := c.Store.config("outbox-verify")
	if err != nil {
		return err
	}
	st, err := store.Open(ctx, config)
	if err != nil {
		return err
	}
	defer st.Close()
	violations, err := st.Verify(ctx)
	if err != nil {
		return err
	}
	if c.json() {
		out := make([]map[string]string, len(violations))
		for i, v := range violations {
			out[i] = map[string]string{"invariant": v.Invariant, "detail": v.Detail}
		}
		if err := writeJSON(s.out, map[string]any{"violations": out}); err != nil {
			return err
		}
	} else {
		for _, v := range violations {
			fmt.Fprintf(s.out, "%s: %s\n", v.Invariant, v.Detail)
		}
	}
	if len(violations) > 0 {
		return codedError{exitViolation, fmt.Errorf("%d violations found", len(violations))}
	}
	if !c.json() {
		fmt.Fprintln(s.out, "no violation found")
	}
	return nil
}

package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/outbox-platform/outbox/store"
)

// Pauses between two tries to reach a store that is away at the start.
const (
	openStoreFirst = 100 * time.Millisecond
	openStoreMost  = 5 * time.Second
)

// openStore opens the store, and waits for one that is away as long as ctx lasts: database, servers and relays may be started
// in any order, and a process that is started while the database fails over needs nobody to start it again. What waiting does
// not cure (a schema to migrate, a store that may lose commits, a copy) is returned at once.
func openStore(ctx context.Context, config store.Config, log *slog.Logger) (*store.Store, error) {
	for pause := openStoreFirst; ; pause = min(2*pause, openStoreMost) {
		st, err := store.Open(ctx, config)
		if err == nil || !errors.Is(err, store.ErrUnavailable) || ctx.Err() != nil {
			return st, err
		}
		log.Warn("the store cannot be reached; trying again until it can (is --store-dsn right?)", "error", err, "pause", pause.String())
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, err
		}
	}
}

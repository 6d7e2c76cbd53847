package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/outbox-platform/outbox/store"
)

// secret is a setting that is never printed.
type secret string

// String implements fmt.Stringer, so that no log shows it.
func (s secret) String() string {
	if s == "" {
		return ""
	}
	return "********"
}

// fromFile returns a secret that is given itself or by the name of a file, not both. A trailing newline in the file is not
// part of it.
func (s secret) fromFile(setting, file string) (string, error) {
	switch {
	case file == "":
		return string(s), nil
	case s != "":
		return "", usagef("%s and %s-file are both given: keep one", setting, setting)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", usagef("%s-file: %w", setting, err)
	}
	return strings.TrimRight(string(b), "\r\n"), nil
}

// storeSettings say how to reach the store.
type storeSettings struct {
	DSN              secret        `name:"dsn" placeholder:"DSN" help:"PostgreSQL connection string of the store, for example postgres://outbox@db/outbox."`
	DSNFile          string        `name:"dsn-file" type:"path" placeholder:"FILE" help:"File that holds it."`
	MaxConns         int32         `name:"max-conns" default:"8" help:"Connections for everything but writing and reading the log, which have their own."`
	StatementTimeout time.Duration `name:"statement-timeout" default:"5s" help:"Limit of every statement."`
	Unsafe           bool          `name:"unsafe" help:"Accept a store that may lose what it acknowledged (fsync or synchronous_commit off). Never in production."`
}

func (s storeSettings) dsn() (string, error) {
	dsn, err := s.DSN.fromFile("store-dsn", s.DSNFile)
	if err == nil && dsn == "" {
		err = usagef("the store's address is missing: give --store-dsn, OUTBOX_STORE_DSN or OUTBOX_STORE_DSN_FILE")
	}
	return dsn, err
}

// config is what store.Open wants; name is shown in pg_stat_activity.
func (s storeSettings) config(name string) (store.Config, error) {
	dsn, err := s.dsn()
	if err != nil {
		return store.Config{}, err
	}
	if s.MaxConns < 1 {
		return store.Config{}, usagef("store-max-conns must be positive: %d", s.MaxConns)
	}
	if s.StatementTimeout < time.Second {
		return store.Config{}, usagef("store-statement-timeout must be at least 1s: %s", s.StatementTimeout)
	}
	return store.Config{
		DSN: dsn, Unsafe: s.Unsafe, MaxConns: s.MaxConns, StatementTimeout: s.StatementTimeout, ApplicationName: name,
	}, nil
}

// writerSettings size the group-commit writer.
type writerSettings struct {
	MaxQueued      int           `name:"max-queued" default:"16384" help:"Calls waiting to be stored; beyond it RESOURCE_EXHAUSTED."`
	MaxQueuedBytes int64         `name:"max-queued-bytes" default:"67108864" help:"Bytes waiting to be stored."`
	MaxBatch       int           `name:"max-batch" default:"512" help:"Calls in one batch."`
	MaxBatchBytes  int           `name:"max-batch-bytes" default:"1048576" help:"Bytes in one batch."`
	SecondWriterAt int           `name:"second-writer-at" default:"64" help:"Calls waiting at which a second batch is put in flight beside the first."`
	DecisionWait   time.Duration `name:"decision-wait" default:"1ms" help:"How long a client's Commit or Abort may wait to share the batch of the next Prepare, while Prepares come often; 0: never."`
	MaxWait        time.Duration `name:"max-wait" default:"5s" help:"How long a call is tried while the store is away, before UNAVAILABLE."`
}

func (w writerSettings) config() (store.WriterConfig, error) {
	var errs []error
	for _, v := range []struct {
		name  string
		value int64
	}{
		{"writer-max-queued", int64(w.MaxQueued)},
		{"writer-max-queued-bytes", w.MaxQueuedBytes},
		{"writer-max-batch", int64(w.MaxBatch)},
		{"writer-max-batch-bytes", int64(w.MaxBatchBytes)},
		{"writer-second-writer-at", int64(w.SecondWriterAt)},
		{"writer-max-wait", int64(w.MaxWait)},
	} {
		if v.value <= 0 {
			errs = append(errs, fmt.Errorf("%s must be positive: %d", v.name, v.value))
		}
	}
	if w.DecisionWait < 0 || w.DecisionWait > longestDecisionWait {
		errs = append(errs, fmt.Errorf("writer-decision-wait must be between 0 and %s: %s", longestDecisionWait, w.DecisionWait))
	}
	if w.MaxBatch > w.MaxQueued {
		errs = append(errs, fmt.Errorf("writer-max-batch must not be above writer-max-queued: %d > %d", w.MaxBatch, w.MaxQueued))
	}
	if int64(w.MaxBatchBytes) > w.MaxQueuedBytes {
		errs = append(errs, fmt.Errorf("writer-max-batch-bytes must not be above writer-max-queued-bytes: %d > %d", w.MaxBatchBytes, w.MaxQueuedBytes))
	}
	if err := errors.Join(errs...); err != nil {
		return store.WriterConfig{}, codedError{exitUsage, err}
	}
	return store.WriterConfig{
		MaxQueued: w.MaxQueued, MaxQueuedBytes: w.MaxQueuedBytes, MaxBatch: w.MaxBatch, MaxBatchBytes: w.MaxBatchBytes,
		SecondWriterAt: w.SecondWriterAt, MaxWait: w.MaxWait, DecisionWait: cmp.Or(w.DecisionWait, -1),
	}, nil
}

// longestDecisionWait: every event waits that long for its Commit.
const longestDecisionWait = 100 * time.Millisecond

// applyDefaults fills settings with the defaults of the command line.
func applyDefaults(settings any) error {
	if err := kong.ApplyDefaults(settings); err != nil {
		return fmt.Errorf("applying the defaults of the settings: %w", err)
	}
	return nil
}

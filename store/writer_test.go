package store_test

import (
	"context"
	"testing"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// runWriter runs a writer until the test ends.
func runWriter(t testing.TB, st *store.Store, cfg store.WriterConfig) *store.Writer {
	t.Helper()
	w := store.NewWriter(st, cfg)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error("the writer ended with", err)
		}
	})
	return w
}

func prepare(k store.Key, events ...store.Event) *store.Request {
	return &store.Request{Kind: store.KindPrepare, Key: k, Events: events, Database: storetest.DatabaseTransaction(7)}
}

func TestWriterPrepareCommit(t *testing.T) {
	db := storetest.New(t)
	w := runWriter(t, db.Store, store.WriterConfig{})
	k := storetest.Key(1)
	r := prepare(k, storetest.Event("orders", "order", "1", "x"))
	a, err := w.Do(t.Context(), r)
	if err != nil || a.Shards == 0 {
		t.Fatal(a, err)
	}
	again, err := w.Do(t.Context(), r)
	if err != nil || again.Shards != a.Shards {
		t.Fatal(again, err)
	}
	_, err = w.Do(t.Context(), &store.Request{Kind: store.KindCommit, Key: k})
	if err != nil {
		t.Fatal(err)
	}
}

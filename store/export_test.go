package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// The statements, for tests that drive or change them.
const (
	AppendSQL  = appendSQL
	ReadAllSQL = readAllSQL
)

// Range of accepted revisions.
const (
	OldestRevision = oldestRevision
	NewestRevision = newestRevision
)

// Conn is the reader's connection.
func (r *Reader) Conn() *pgx.Conn { return r.conn }

// Pool is the store's pool.
func (s *Store) Pool() *pgxpool.Pool { return s.pool }

// Digest is the content digest of a transaction with these events.
func Digest(events []Event) uint64 {
	r := Request{Kind: KindPublish, Events: events}
	r.enc.encode(&r, 16, 0, time.Now())
	defer r.enc.release()
	return r.enc.digest
}

// Held is how many requests wait behind earlier ones of their transaction.
func (w *Writer) Held() int {
	w.queue.mu.Lock()
	defer w.queue.mu.Unlock()
	n := 0
	for _, r := range w.queue.heads {
		for r = r.enc.next; r != nil; r = r.enc.next {
			n++
		}
	}
	return n
}

// Suspicious reports whether the next Read looks for foreign transactions.
func (r *Reader) Suspicious() bool { return r.horizon.suspicious(time.Now()) }

// TruncationPaused reports whether the last attempt to empty a generation found it locked.
func (s *Store) TruncationPaused() bool { return !s.maintenance.truncateAfter.IsZero() }

// TruncateAgain lets the next pass try at once to empty a generation that was found locked.
func (s *Store) TruncateAgain() { s.maintenance.truncateAfter = time.Time{} }

// AppendTogether stores requests in one statement, whatever they are.
func AppendTogether(ctx context.Context, s *Store, requests ...*Request) error {
	w := NewWriter(s, WriterConfig{})
	for _, r := range requests {
		r.enc.encode(r, s.shardCount, w.cfg.MaxWait, w.now())
		defer r.enc.release()
	}
	a := newAppender(w)
	defer a.disconnect(ctx)
	return a.attempt(ctx, requests)
}

package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/outbox-platform/outbox/internal/fault"
)

// contentionTries is how often a batch is sent again after a deadlock or serialization failure. Sorted keys make these
// rare; nothing makes them impossible.
const contentionTries = 10

// appender is one of a writer's loops: it takes batches and stores them over a connection of its own.
type appender struct {
	w     *Writer
	taken []*Request
	batch batch

	conn    *pgx.Conn
	append  *pgconn.StatementDescription
	resolve *pgconn.StatementDescription
}

func newAppender(w *Writer) *appender { return &appender{w: w} }

func (a *appender) run(ctx context.Context) {
	defer a.disconnect(ctx)
	for {
		var from choice
		a.taken, from = a.w.queue.take(a.taken[:0])
		if from == nothing {
			return
		}
		a.store(ctx, a.taken)
		a.batch.forget()
		clear(a.taken)
		a.w.queue.batchDone(from)
	}
}

// store writes a batch and answers its requests, or hands those that lost to the look-up. It returns when none of them is
// left.
//
// A connection that breaks leaves the outcome open. The same batch is sent again then: a Prepare that is already there is
// found by its digest, a decision by its state, so that nothing is stored twice.
func (a *appender) store(ctx context.Context, requests []*Request) {
	contention := 0
	for pause := firstPause; len(requests) > 0; {
		err := a.attempt(ctx, requests)
		switch {
		case err == nil:
			return
		case errors.Is(err, ErrContention):
			if contention++; contention == contentionTries {
				a.w.refuse(requests, err)
				return
			}
			a.w.pause(ctx, rand.N(time.Millisecond<<min(contention, 6))) //nolint:gosec // jitter
		case errors.Is(err, ErrInvalid) && len(requests) > 1:
			// One request makes the statement fail for all: halve until it is alone.
			half := len(requests) / 2
			a.store(ctx, requests[:half])
			a.store(ctx, requests[half:])
			return
		case errors.Is(err, ErrUnavailable):
			a.disconnect(ctx)
			requests = a.giveUp(requests, err)
			if len(requests) > 0 {
				a.w.pause(ctx, pause)
				pause = min(2*pause, longestPause)
			}
		default:
			a.w.refuse(requests, err)
			return
		}
	}
}

// Pauses between attempts while the store is away.
const (
	firstPause   = 5 * time.Millisecond
	longestPause = 250 * time.Millisecond
)

// giveUp answers the requests whose time is over, of this batch and of the queue, and returns the rest of the batch.
func (a *appender) giveUp(requests []*Request, err error) []*Request {
	now := a.w.now()
	kept := requests[:0]
	var late []*Request
	for _, r := range requests {
		if now.After(r.enc.deadline) {
			late = append(late, r)
		} else {
			kept = append(kept, r)
		}
	}
	late = append(late, a.w.queue.expired(now)...)
	a.w.refuse(late, err)
	return kept
}

// attempt sends one statement and, if it succeeds, answers.
func (a *appender) attempt(ctx context.Context, requests []*Request) error {
	oldest := requests[0].enc.queued
	for _, r := range requests[1:] {
		if r.enc.queued.Before(oldest) {
			oldest = r.enc.queued
		}
	}
	started := a.w.now()
	deadline := oldest.Add(a.w.cfg.MaxWait)
	if soonest := started.Add(shortestAttempt); deadline.Before(soonest) {
		deadline = soonest
	}
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	if err := a.connect(ctx); err != nil {
		return err
	}
	a.batch.build(requests)
	fault.Point("writer.before-append")
	stale, err := a.execute(ctx)
	if err != nil {
		return storeError("appending a batch", err)
	}
	a.w.cfg.OnBatch(len(requests), started.Sub(oldest), a.w.now().Sub(started))
	fault.Point("writer.after-append")
	won, lost := a.batch.split(stale)
	a.w.accept(won, lost)
	return nil
}

// shortestAttempt is the time that an attempt has even if the oldest request of its batch is about to be given up.
const shortestAttempt = time.Second

func (a *appender) execute(ctx context.Context) (stale []int32, err error) {
	if s := a.w.backendOf(); s != nil {
		return s.append(&a.batch)
	}
	statement := a.append
	if a.batch.resolved > 0 {
		statement = a.resolve
	}
	result := a.conn.PgConn().ExecStatement(ctx, statement, a.batch.parameters(), binaryFormats, binaryFormats)
	var np, nc int64
	rows := 0
	for result.NextRow() {
		v := result.Values()
		np, nc, stale = int64(binary.BigEndian.Uint64(v[0])), int64(binary.BigEndian.Uint64(v[1])), int4s(v[2]) //nolint:gosec // counts
		rows++
	}
	// The row arrives before the transaction is committed: only Close tells whether it was.
	if _, err := result.Close(); err != nil {
		return nil, err
	}
	if rows != 1 || int(np+nc)+len(stale) != len(a.batch.requests) {
		return nil, fmt.Errorf("%d rows with %d stored, %d decided, %d stale do not add up to %d requests", rows, np, nc, len(stale), len(a.batch.requests))
	}
	return stale, nil
}

// binaryFormats says that all values are in binary format.
var binaryFormats = []int16{1}

// connect makes sure that there is a connection with the statements prepared.
func (a *appender) connect(ctx context.Context) error {
	if a.w.backendOf() != nil || a.conn != nil && !a.conn.IsClosed() {
		return nil
	}
	a.disconnect(ctx)
	conn, _, err := a.w.st.dial(ctx, pointLookups)
	if err != nil {
		return err
	}
	a.conn = conn
	if a.append, err = conn.PgConn().Prepare(ctx, "append", appendSQL, nil); err == nil {
		a.resolve, err = conn.PgConn().Prepare(ctx, "resolve", resolveSQL, nil)
	}
	if err == nil && fault.Mutant("M7") { // acknowledged before it is flushed
		_, err = conn.Exec(ctx, "SET synchronous_commit = off")
	}
	if err != nil {
		a.disconnect(ctx)
		return storeError("preparing the append statement", err)
	}
	return nil
}

func (a *appender) disconnect(ctx context.Context) { closeConn(ctx, &a.conn) }

// closeConn closes a connection that may be broken, and does not wait long for the other end.
func closeConn(ctx context.Context, conn **pgx.Conn) {
	if *conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	_ = (*conn).Close(ctx) // it may be gone already
	*conn = nil
}

// accept answers the requests of a stored batch that won and hands the others to the look-up.
func (w *Writer) accept(won, lost []*Request) {
	var decided ShardSet
	for _, r := range won {
		if r.enc.as != KindPrepare {
			decided |= r.enc.shards
		}
	}
	w.queue.settle(won, lost, true)
	if decided != 0 {
		w.cfg.OnDecided(decided)
	}
	for _, r := range won {
		r.finish(nil)
	}
}

// refuse answers requests that were not stored, or of which that is unknown.
func (w *Writer) refuse(requests []*Request, err error) {
	w.queue.settle(requests, nil, false)
	for _, r := range requests {
		r.finish(err)
	}
}

// finish tells the caller. The request is his again before Done returns.
func (r *Request) finish(err error) {
	a := Answer{Err: err}
	if err == nil && r.Kind.stores() {
		a.Shards = r.enc.shards
	}
	r.enc.release()
	r.Done(r, a)
}

// sleep waits for d or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

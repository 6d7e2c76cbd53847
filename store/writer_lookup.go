package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// txLookupSQL reads the rows of tx for keys. $1 sources, $2 transactions.
const txLookupSQL = `
SELECT t.source_id, t.tx_id, t.state, t.shards, t.digest
FROM unnest($1::int[], $2::uuid[]) k(s, i)
JOIN outbox.tx t ON t.source_id = k.s AND t.tx_id = k.i`

// txLookup is the loop of a writer that reads tx: for requests that lost, to tell why, and for decisions that came without a
// token, to learn their shards. It is apart from the appenders so that batches do not wait for it.
type txLookup struct {
	w     *Writer
	taken []*Request
	conn  *pgx.Conn
}

func newTxLookup(w *Writer) *txLookup { return &txLookup{w: w} }

func (l *txLookup) run(ctx context.Context) {
	defer closeConn(ctx, &l.conn)
	for {
		var more bool
		l.taken, more = l.w.queue.takeWanting(l.taken[:0])
		if !more {
			return
		}
		l.resolve(ctx, l.taken)
		clear(l.taken)
	}
}

// resolve answers the requests or puts them back into the queue.
func (l *txLookup) resolve(ctx context.Context, requests []*Request) {
	for pause := firstPause; len(requests) > 0; pause = min(2*pause, longestPause) {
		rows, err := l.read(ctx, requests)
		if err == nil {
			for _, r := range requests {
				row, found := rows[r.Key]
				l.w.conclude(r, judge(r, row, found))
			}
			return
		}
		if !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrContention) {
			l.w.refuse(requests, err)
			return
		}
		closeConn(ctx, &l.conn)
		now := l.w.now()
		kept, late := requests[:0], []*Request(nil)
		for _, r := range requests {
			if now.After(r.enc.deadline) {
				late = append(late, r)
			} else {
				kept = append(kept, r)
			}
		}
		l.w.refuse(late, err)
		if requests = kept; len(requests) > 0 {
			l.w.pause(ctx, pause)
		}
	}
}

// txRow is what tx says about a transaction.
type txRow struct {
	state  State
	shards ShardSet
	digest uint64
}

func (l *txLookup) read(ctx context.Context, requests []*Request) (map[Key]txRow, error) {
	if s := l.w.backendOf(); s != nil {
		return s.read(requests)
	}
	ctx, cancel := context.WithTimeout(ctx, max(l.w.cfg.MaxWait, shortestAttempt))
	defer cancel()
	if l.conn == nil || l.conn.IsClosed() {
		conn, _, err := l.w.st.dial(ctx, pointLookups)
		if err != nil {
			return nil, err
		}
		l.conn = conn
	}
	sources, ids := make([]int32, len(requests)), make([][16]byte, len(requests))
	for i, r := range requests {
		sources[i], ids[i] = r.Key.Source, r.Key.Transaction
	}
	found := make(map[Key]txRow, len(requests))
	var (
		key            Key
		row            txRow
		shards, digest int64
	)
	rows, err := l.conn.Query(ctx, txLookupSQL, sources, ids)
	if err == nil {
		_, err = pgx.ForEachRow(rows, []any{&key.Source, (*[16]byte)(&key.Transaction), &row.state, &shards, &digest}, func() error {
			row.shards, row.digest = ShardSet(shards), uint64(digest) //nolint:gosec // the same 64 bits
			found[key] = row
			return nil
		})
	}
	if err != nil {
		return nil, storeError("looking transactions up", err)
	}
	return found, nil
}

// verdict is what a look-up means for a request: its answer, or how it is to be tried again.
type verdict struct {
	again  bool
	as     Kind     // if again
	shards ShardSet // stored ones; 0: leave the request's own
	err    error    // if not again
}

// judge decides what becomes of a request, given what tx says about its transaction. Every way to answer a request that
// did not simply win is here.
func judge(r *Request, row txRow, found bool) verdict {
	if r.Kind.stores() {
		switch {
		case !found:
			// The row that was in the way is gone: purged, or never committed.
			return verdict{again: true, as: r.Kind}
		case row.digest != r.enc.digest:
			return verdict{err: ErrReused}
		case r.Kind == KindPrepare || row.state == Committed:
			return verdict{shards: row.shards}
		case row.state == Aborted:
			return verdict{err: &DecidedError{State: Aborted}}
		}
		// A Publish found the transaction prepared: the Prepare arrived although the caller believed that it had not.
		return verdict{again: true, as: KindCommit, shards: row.shards}
	}
	switch {
	case !found:
		return verdict{err: ErrUnknown}
	case row.state == stateOf(r.Kind):
		return verdict{shards: row.shards}
	case row.state != Prepared:
		return verdict{err: &DecidedError{State: row.state}}
	}
	// The token was wrong or missing, or the Prepare became visible only after the batch.
	return verdict{again: true, as: r.Kind, shards: row.shards}
}

// lookupTries bounds how often a request goes round. It takes a transaction that is purged and stored anew each time.
const lookupTries = 20

// conclude carries a verdict out.
func (w *Writer) conclude(r *Request, v verdict) {
	if v.shards != 0 {
		r.enc.shards = v.shards
	}
	if v.again {
		if r.enc.tries++; r.enc.tries < lookupTries {
			r.enc.as = v.as
			w.queue.again(r)
			return
		}
		v.err = fmt.Errorf("%w: transaction %s changed with every attempt", ErrContention, r.Key.Transaction)
	}
	w.queue.settle([]*Request{r}, nil, v.err == nil)
	r.finish(v.err)
}

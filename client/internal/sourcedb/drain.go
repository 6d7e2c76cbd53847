package sourcedb

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/outbox-platform/outbox/client"
	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/internal/fault"
)

// drainSQL reads the oldest spilled requests: so many of them as fit into a bound of bytes, and at least one.
const drainSQL = `
SELECT id, spilled, created_at < now() - $3::bigint * interval '1 microsecond'
FROM  (SELECT id, seq, spilled, created_at, sum(octet_length(spilled)) OVER (ORDER BY seq) - octet_length(spilled) AS before
       FROM (SELECT id, seq, spilled, created_at FROM outbox_marker
             WHERE spilled IS NOT NULL AND refused IS NULL ORDER BY seq LIMIT $1) oldest) measured
WHERE before < $2
ORDER BY seq`

const (
	drainedSQL = `UPDATE outbox_marker SET spilled = NULL WHERE id = ANY ($1::text[]::uuid[])`
	refusedSQL = `UPDATE outbox_marker SET refused = $2 WHERE id = $1`
)

const (
	// drainRows and drainBytes bound one step.
	drainRows  = 1000
	drainBytes = 16 << 20
	// drainParallel bounds the requests that are published at a time.
	drainParallel = 256
)

// errTooOld refuses a spilled request that may have been published before anybody can tell.
var errTooOld = errors.New("older than the time for which the platform remembers whether it had this request: it may have been published already")

// spilledRow is one spilled request.
type spilledRow struct {
	id      uuid.UUID
	request []byte
	tooOld  bool

	after []*spilledRow // earlier requests of the same aggregates
	done  chan struct{}
	err   error // why it was not published
	final bool  // it never will be
	stuck bool  // not tried: err is an earlier request's
}

// drainLoop drains when there may be something and the platform may be reached.
func (d *Database) drainLoop(ctx context.Context) {
	for ctx.Err() == nil {
		link, changed := d.c.Link()
		if link != client.LinkDown {
			if err := d.drainAll(ctx); err != nil && ctx.Err() == nil {
				d.c.Logger().Warn("draining spilled requests", "database", d.name, "error", err)
			}
		}
		t := time.NewTimer(d.upkeep.DrainInterval*9/10 + rand.N(d.upkeep.DrainInterval/5+1))
		select {
		case <-ctx.Done():
		case <-changed:
		case <-t.C:
		case <-d.wake:
		}
		t.Stop()
	}
}

func (d *Database) wakeUp() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// drainAll drains until nothing more can be.
func (d *Database) drainAll(ctx context.Context) error {
	waiting := false
	if err := d.pool.QueryRow(ctx, mustSpillSQL).Scan(&waiting); err != nil || !waiting {
		return err
	}
	for {
		more, err := d.DrainOnce(ctx)
		if err != nil || !more {
			return err
		}
	}
}

// DrainOnce publishes the oldest spilled requests, in order per aggregate, and clears those that the platform has taken. One
// process at a time does it. more: there are others, and it makes sense to go on.
func (d *Database) DrainOnce(ctx context.Context) (more bool, err error) {
	var rows []*spilledRow
	ran, err := d.locked(ctx, lockDrain, func(ctx context.Context, q Queryer) error {
		var err error
		if rows, err = d.readSpilled(ctx, q); err != nil || len(rows) == 0 {
			return err
		}
		order(rows)
		d.publish(ctx, rows)
		return d.settle(ctx, q, rows)
	})
	if err != nil || !ran || len(rows) == 0 {
		return false, err
	}
	var done client.UpkeepCounts
	for _, r := range rows {
		switch {
		case r.err == nil:
			done.Drained++
			d.acknowledged(r.id)
		case r.final:
			done.Refused++
			kind := client.AlarmRefused
			if client.IsAlreadyDecided(r.err) {
				kind = client.AlarmContradiction
			}
			d.c.Report(client.Alarm{Kind: kind, TransactionID: r.id.String(), Database: d.name, Err: r.err})
		default:
			err = firstFailure(err, r)
		}
	}
	d.c.Count(done)
	return int(done.Drained+done.Refused) == len(rows), err
}

// firstFailure keeps the first failure that is not only another one's consequence.
func firstFailure(first error, r *spilledRow) error {
	if first != nil || r.stuck {
		return first
	}
	return fmt.Errorf("publishing the spilled request %s: %w", r.id, r.err)
}

func (d *Database) readSpilled(ctx context.Context, q Queryer) ([]*spilledRow, error) {
	var r spilledRow
	var out []*spilledRow
	rows, err := q.Query(ctx, drainSQL, drainRows, drainBytes, d.upkeep.SpillRetention.Microseconds())
	err = each(rows, err, func() {
		out = append(out, &spilledRow{id: r.id, request: r.request, tooOld: r.tooOld, done: make(chan struct{})})
	}, &r.id, &r.request, &r.tooOld)
	return out, err
}

// order makes every request wait for the earlier ones of its aggregates.
func order(rows []*spilledRow) {
	type aggregate struct{ kind, id string }
	last := make(map[aggregate]*spilledRow)
	for _, r := range rows {
		var p outboxv1.PrepareRequest
		if proto.Unmarshal(r.request, &p) != nil {
			continue // PublishSpilled will say so
		}
		for _, e := range p.GetEvents() {
			a := aggregate{e.GetAggregateType(), e.GetAggregateId()}
			if before := last[a]; before != nil && before != r {
				r.after = append(r.after, before)
			}
			last[a] = r
		}
	}
}

// publish publishes all rows. Requests of different aggregates do not wait for each other.
func (d *Database) publish(ctx context.Context, rows []*spilledRow) {
	var wg sync.WaitGroup
	places := make(chan struct{}, drainParallel)
	for _, r := range rows {
		wg.Go(func() {
			defer close(r.done)
			for _, before := range r.after {
				<-before.done
				if before.err != nil && !before.final {
					r.err, r.stuck = before.err, true
					return
				}
			}
			if r.tooOld {
				r.err, r.final = errTooOld, true
				return
			}
			places <- struct{}{}
			defer func() { <-places }()
			r.err = d.c.PublishSpilled(ctx, r.request)
			r.final = r.err != nil && refusedForGood(r.err)
		})
	}
	wg.Wait()
}

// refusedForGood tells whether the platform will give the same answer for ever. A source or an identity that is not accepted
// is no fault of the request: somebody will put that right.
func refusedForGood(err error) bool {
	var e *client.Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Code {
	case codes.InvalidArgument, codes.AlreadyExists, codes.FailedPrecondition:
		return true
	case codes.PermissionDenied:
		return e.Reason == client.ReasonTopicDenied
	default:
		return false
	}
}

// settle writes down what became of the rows.
func (d *Database) settle(ctx context.Context, q Queryer, rows []*spilledRow) error {
	var drained []string
	for _, r := range rows {
		if r.err == nil {
			drained = append(drained, r.id.String())
		}
		if !r.final {
			continue
		}
		if _, err := q.Exec(ctx, refusedSQL, r.id, r.err.Error()); err != nil {
			return fmt.Errorf("marking a request as refused: %w", err)
		}
	}
	if len(drained) == 0 {
		return nil
	}
	fault.Point("client.after-drain")
	if _, err := q.Exec(ctx, drainedSQL, drained); err != nil {
		return fmt.Errorf("clearing drained requests: %w", err)
	}
	return nil
}

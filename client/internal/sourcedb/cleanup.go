package sourcedb

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/client"
)

const (
	// deleteSQL deletes markers that are old enough by the database's clock and carry no spilled request.
	deleteSQL = `
DELETE FROM outbox_marker
WHERE id = ANY ($1::text[]::uuid[]) AND spilled IS NULL AND created_at <= now() - $2::bigint * interval '1 microsecond'`
	// oldSQL reads old markers by id. The bound on the id keeps it from reading the young ones.
	oldSQL = `
SELECT id FROM outbox_marker
WHERE id > $1 AND id < $2 AND spilled IS NULL AND created_at <= now() - $3::bigint * interval '1 microsecond'
ORDER BY id LIMIT $4`
)

const (
	cleanRows       = 1000
	janitorRows     = 500
	janitorParallel = 16
	// janitorGrace is how much older than the retention a marker must be for the janitor: the process that wrote it deletes it
	// for less.
	janitorGrace = 5 * time.Minute
)

// acknowledged remembers a marker to delete.
func (d *Database) acknowledged(id uuid.UUID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.acked) < d.upkeep.MaxAcknowledged {
		d.acked = append(d.acked, id)
	}
}

// due takes markers off the list that are past their retention by this process's clock.
func (d *Database) due() []string {
	before := time.Now().Add(-d.upkeep.MarkerRetention)
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for n < len(d.acked) && n < cleanRows && client.IDTime(d.acked[n]).Before(before) {
		n++
	}
	out := make([]string, n)
	for i, id := range d.acked[:n] {
		out[i] = id.String()
	}
	d.acked = d.acked[n:]
	if len(d.acked) == 0 {
		d.acked = nil // let go of the array
	}
	return out
}

func (d *Database) cleanAll(ctx context.Context) error {
	for {
		n, err := d.CleanOnce(ctx)
		if err != nil || n < cleanRows {
			return err
		}
	}
}

// CleanOnce deletes a batch of markers whose Commit was acknowledged and whose retention is over. It returns how many it
// took off its list. What a failure leaves behind, the janitor finds.
func (d *Database) CleanOnce(ctx context.Context) (int, error) {
	ids := d.due()
	if len(ids) == 0 {
		return 0, nil
	}
	deleted, err := d.pool.Exec(ctx, deleteSQL, ids, d.upkeep.MarkerRetention.Microseconds())
	d.c.Count(client.UpkeepCounts{MarkersDeleted: uint64(max(0, deleted))})
	return len(ids), err
}

func (d *Database) tidyAll(ctx context.Context) error {
	if link, _ := d.c.Link(); link == client.LinkDown {
		return nil
	}
	after := uuid.Nil
	for {
		next, more, err := d.TidyOnce(ctx, after)
		if err != nil || !more {
			return err
		}
		after = next
	}
}

// TidyOnce looks at a batch of old markers behind an id, asks the platform about each, and deletes those whose decision it
// knows, or has forgotten in due time. It is one process's work at a time.
func (d *Database) TidyOnce(ctx context.Context, after uuid.UUID) (next uuid.UUID, more bool, err error) {
	age := d.upkeep.MarkerRetention + janitorGrace
	var ids []uuid.UUID
	ran, err := d.locked(ctx, lockJanitor, func(ctx context.Context, q Queryer) error {
		var err error
		if ids, err = d.old(ctx, q, after, age); err != nil || len(ids) == 0 {
			return err
		}
		done, err := d.ask(ctx, ids)
		if len(done) > 0 {
			deleted, e := q.Exec(ctx, deleteSQL, done, age.Microseconds())
			if e != nil {
				return e
			}
			d.c.Count(client.UpkeepCounts{MarkersDeleted: uint64(deleted)})
		}
		if err != nil {
			d.c.Logger().Warn("asking about old markers", "database", d.name, "error", err)
		}
		return nil
	})
	if err != nil || !ran || len(ids) < janitorRows {
		return uuid.Nil, false, err
	}
	return ids[len(ids)-1], true, nil
}

func (d *Database) old(ctx context.Context, q Queryer, after uuid.UUID, age time.Duration) ([]uuid.UUID, error) {
	var id uuid.UUID
	var ids []uuid.UUID
	rows, err := q.Query(ctx, oldSQL, after, firstID(time.Now().Add(-age)), age.Microseconds(), janitorRows)
	err = each(rows, err, func() { ids = append(ids, id) }, &id)
	return ids, err
}

// firstID is the smallest UUIDv7 of a time.
func firstID(t time.Time) uuid.UUID {
	var id uuid.UUID
	ms := t.UnixMilli()
	for i := range 6 {
		id[i] = byte(ms >> (40 - 8*i))
	}
	id[6] = 0x70
	return id
}

// ask returns the markers that may go. err is the first failure to ask; those asked for in vain stay.
func (d *Database) ask(ctx context.Context, ids []uuid.UUID) (done []string, err error) {
	var (
		wg     sync.WaitGroup
		mu     sync.Mutex
		places = make(chan struct{}, janitorParallel)
	)
	for _, id := range ids {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			gone, e := d.finished(ctx, id)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case e != nil && err == nil:
				err = e
			case gone:
				done = append(done, id.String())
			}
		})
	}
	wg.Wait()
	return done, err
}

// finished tells whether the marker of an old committed transaction is needed no more.
func (d *Database) finished(ctx context.Context, id uuid.UUID) (bool, error) {
	tx, err := d.c.GetTransaction(ctx, id)
	var refused *client.Error
	switch {
	case errors.As(err, &refused) && client.IsUnknownTransaction(err):
		return d.forgotten(id, refused), nil
	case err != nil:
		return false, err
	}
	switch tx.State {
	case client.StateCommitted:
		return true, nil
	case client.StateAborted:
		d.alarm(client.AlarmContradiction, id, errors.New("the marker is there, and the platform holds the transaction for aborted"))
		return false, nil
	default:
		d.c.CommitLater(id, nil, nil) // the marker is proof enough
		return false, nil
	}
}

// forgotten tells whether the platform does not know the transaction because it is past retention. A younger one was lost.
func (d *Database) forgotten(id uuid.UUID, err *client.Error) bool {
	horizon, parseErr := time.Parse(time.RFC3339Nano, err.Metadata["retention_horizon"])
	made := client.IDTime(id)
	if parseErr == nil && !made.IsZero() && made.Before(horizon) {
		return true
	}
	d.alarm(client.AlarmLost, id, fmt.Errorf("the platform does not know a committed transaction that it should know: %w", err))
	return false
}

func (d *Database) alarm(k client.AlarmKind, id uuid.UUID, err error) {
	d.c.Report(client.Alarm{Kind: k, TransactionID: id.String(), Database: d.name, Err: err})
}

package simulation

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/outbox-platform/outbox/store"
)

// Database is a source's PostgreSQL in memory: transactions, their xids, and the marker table. A crash forgets the xids that
// no flushed record mentions: they are given out again.
type Database struct {
	name     string
	timeline uint32
	nextXID  uint64
	flushed  uint64 // the highest xid that survives a crash
	running  map[uint64]bool
	status   map[uint64]string
	markers  map[store.TransactionID]bool
	away     bool
	// access lets others go first. nil: nobody.
	access func()
}

// NewDatabase returns an empty database.
func NewDatabase(name string) *Database {
	return &Database{
		name: name, timeline: 1, nextXID: 700, flushed: 699, running: map[uint64]bool{}, status: map[uint64]string{},
		markers: map[store.TransactionID]bool{},
	}
}

// Begin starts a transaction that writes.
func (d *Database) Begin() *store.DatabaseTransaction {
	xid := d.nextXID
	d.nextXID++
	d.running[xid] = true
	return &store.DatabaseTransaction{
		Database: d.name, XID: xid, SystemIdentifier: 7, Timeline: d.timeline, DatabaseOID: 5, MarkerOID: 6, Mode: store.ModeMarker,
	}
}

// Commit commits a transaction with its marker. The flush makes every xid durable that was given out before.
func (d *Database) Commit(xid uint64, marker store.TransactionID) {
	delete(d.running, xid)
	d.status[xid] = "committed"
	d.markers[marker] = true
	d.flushed = d.nextXID - 1
}

// Rollback ends a transaction.
func (d *Database) Rollback(xid uint64) {
	delete(d.running, xid)
	d.status[xid] = "aborted"
}

// Crash ends what runs, and forgets the xids that were not flushed.
func (d *Database) Crash() {
	for xid := range d.running {
		d.status[xid] = "aborted"
	}
	for xid := range d.status {
		if xid > d.flushed {
			delete(d.status, xid)
		}
	}
	clear(d.running)
	d.nextXID = d.flushed + 1
}

// FailOver promotes a standby that has everything that was committed.
func (d *Database) FailOver() {
	d.Crash()
	d.timeline++
}

var errAway = errors.New("connection refused")

// Query answers the verdict query.
func (d *Database) Query(_ context.Context, _ string, args ...any) (pgx.Rows, error) {
	if d.access != nil {
		d.access()
	}
	if d.away {
		return nil, errAway
	}
	ids, xids := args[0].([]string), args[1].([]string) //nolint:forcetypeassert,errcheck // as the resolver calls it
	r := &rows{}
	for i := range ids {
		id := uuid.MustParse(ids[i])
		xid, err := strconv.ParseUint(xids[i], 10, 64)
		if err != nil {
			return nil, err
		}
		ended := xid < d.nextXID && !d.running[xid]
		status := ""
		if ended {
			status = d.status[xid]
		}
		r.all = append(r.all, []any{
			id, false, int64(7), int64(d.timeline), int64(5), int64(6), false, d.markers[store.TransactionID(id)], ended, xid < d.nextXID, status, "snapshot",
		})
	}
	return r, nil
}

// QueryRow answers pg_xact_status.
func (d *Database) QueryRow(_ context.Context, sql string, args ...any) pgx.Row {
	if d.access != nil {
		d.access()
	}
	if d.away {
		return row{err: errAway}
	}
	if !strings.Contains(sql, "pg_xact_status") {
		return row{err: fmt.Errorf("unknown query %s", sql)}
	}
	xid, err := strconv.ParseUint(args[0].(string), 10, 64) //nolint:forcetypeassert,errcheck // as the resolver calls it
	switch {
	case err != nil:
		return row{err: err}
	case xid >= d.nextXID:
		return row{err: &pgconn.PgError{Code: "22023", Message: "transaction ID is in the future"}}
	case d.running[xid]:
		return row{status: "in progress"}
	}
	return row{status: d.status[xid]}
}

// row is the answer of pg_xact_status.
type row struct {
	status string
	err    error
}

func (r row) Scan(dest ...any) error {
	if r.err == nil {
		*dest[0].(**string) = &r.status //nolint:forcetypeassert,errcheck // as the resolver calls it
	}
	return r.err
}

// rows are the answer of the verdict query.
type rows struct {
	all [][]any
	now []any
}

var _ pgx.Rows = (*rows)(nil)

func (r *rows) Next() bool {
	if len(r.all) == 0 {
		return false
	}
	r.now, r.all = r.all[0], r.all[1:]
	return true
}

func (r *rows) Scan(dest ...any) error {
	for i, to := range dest {
		switch to := to.(type) {
		case *uuid.UUID:
			*to = r.now[i].(uuid.UUID) //nolint:forcetypeassert,errcheck // as Query makes them
		case *bool:
			*to = r.now[i].(bool) //nolint:forcetypeassert,errcheck // as Query makes them
		case *int64:
			*to = r.now[i].(int64) //nolint:forcetypeassert,errcheck // as Query makes them
		case *string:
			*to = r.now[i].(string) //nolint:forcetypeassert,errcheck // as Query makes them
		default:
			return fmt.Errorf("column %d: cannot scan into %T", i, to)
		}
	}
	return nil
}

func (r *rows) Close()                                       {}
func (r *rows) Err() error                                   { return nil }
func (r *rows) CommandTag() pgconn.CommandTag                { return pgconn.CommandTag{} }
func (r *rows) FieldDescriptions() []pgconn.FieldDescription { return nil }
func (r *rows) Values() ([]any, error)                       { return r.now, nil }
func (r *rows) RawValues() [][]byte                          { return nil }
func (r *rows) Conn() *pgx.Conn                              { return nil }
func (r *rows) TypeMap() *pgtype.Map                         { return nil }

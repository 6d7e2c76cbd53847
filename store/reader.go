package store

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Cursor is how far a shard has been read.
type Cursor struct {
	Shard int16
	Position
}

// Reader reads the log for one relay over a connection of its own. Not safe for concurrent use.
type Reader struct {
	st      *Store
	conn    *pgx.Conn
	server  server // as it was when the connection was made; kept while there is none
	changed bool   // ErrStoreChanged is still to be told
	read    *pgconn.StatementDescription
	readAll *pgconn.StatementDescription
	readAt  *pgconn.StatementDescription

	horizon     horizon
	generations []int16 // in use, as the last Read saw

	shards, xids, seqs, foreign array
	params                      [8][]byte
}

// readSQL returns the segments after each cursor and below the horizon, and in every row (there is always one) the
// snapshot and the generations in use that this very statement saw.
//
// $1–$3 cursors: shard, xid, seq. $4 limit per shard. $5 xids of foreign transactions, which never write the log: they do
// not hold the horizon. $6–$8 generations: only IN with separate parameters makes the executor leave the other partitions
// alone (with = ANY it probes all of them). Generations in use that are not among them make Read ask again, all of them then, so
// that nothing in a generation just opened is passed over.
//
// A row is visible only once its transaction has committed, and every transaction below the horizon has ended in this
// snapshot: no row can appear later before one that is returned.
const (
	readSQL    = readHeadSQL + `e.gen IN ($6, $7, $8)` + readTailSQL
	readAllSQL = readHeadSQL + `true` + readTailSQL

	readHeadSQL = `
SELECT h.snapshot, (SELECT array_agg(gen) FROM outbox.generation WHERE used) AS generations, l.shard, l.xid, l.seq, l.stale, l.body
FROM (SELECT s AS snapshot,
             greatest(pg_snapshot_xmin(s), coalesce((SELECT min(x) FROM pg_snapshot_xip(s) x WHERE x <> ALL($5::xid8[])), pg_snapshot_xmax(s))) AS horizon
      FROM pg_current_snapshot() s OFFSET 0) h
LEFT JOIN LATERAL (
  SELECT e.* FROM unnest($1::smallint[], $2::xid8[], $3::int[]) k(shard, xid, seq),
  LATERAL (SELECT e.shard, e.xid, e.seq, e.stale, e.body FROM outbox.log e
           WHERE e.shard = k.shard AND `
	readTailSQL = ` AND (e.xid, e.seq) > (k.xid, k.seq) AND e.xid < h.horizon
           ORDER BY e.xid, e.seq LIMIT $4::int) e) l ON true`
)

// readAtSQL returns named segments of a shard. $1 shard, $2 xids, $3 seqs.
const readAtSQL = `
SELECT e.shard, e.xid, e.seq, e.stale, e.body
FROM unnest($2::xid8[], $3::int[]) k(xid, seq)
JOIN outbox.log e ON e.shard = $1::smallint AND e.xid = k.xid AND e.seq = k.seq
ORDER BY e.xid, e.seq`

// prunedGenerations is how many generations readSQL names; more than that are in use only while the ring lags.
const prunedGenerations = 3

// OpenReader connects a reader.
func (s *Store) OpenReader(ctx context.Context) (*Reader, error) {
	r := &Reader{st: s}
	if err := r.connect(ctx); err != nil {
		return nil, err
	}
	return r, nil
}

// Read returns the segments after each cursor that are below the horizon, at most limit per shard, in order per shard.
// It never skips a segment: one that becomes visible later is never before one returned. When a foreign transaction (one
// that does not write the log) holds the horizon, it is stepped over.
//
// ErrUnavailable: the connection is gone; Read reconnects at the next call. If the server then is another one (system
// identifier or timeline changed), Read returns ErrStoreChanged once: drop all memory and start from the checkpoints.
func (r *Reader) Read(ctx context.Context, cursors []Cursor, limit int) ([]Segment, error) {
	ctx, cancel := r.st.bound(ctx)
	defer cancel()
	if err := r.connect(ctx); err != nil {
		return nil, err
	}
	if r.horizon.suspicious(time.Now()) {
		if err := r.findForeign(ctx); err != nil {
			return nil, r.failed(ctx, "looking for foreign transactions", err)
		}
	}
	r.setCursors(cursors, limit)
	segments, complete, err := r.readOnce(ctx, len(cursors))
	if err == nil && !complete {
		// A generation was opened since the last read. What was returned may lack its segments: read again, whatever is in use.
		r.generations = r.generations[:0]
		segments, _, err = r.readOnce(ctx, len(cursors))
	}
	if err != nil {
		return nil, r.failed(ctx, "reading the log", err)
	}
	return segments, nil
}

// ReadAt returns the named segments of one shard, in order; missing ones are left out.
func (r *Reader) ReadAt(ctx context.Context, shard int16, at []Position) ([]Segment, error) {
	ctx, cancel := r.st.bound(ctx)
	defer cancel()
	if err := r.connect(ctx); err != nil {
		return nil, err
	}
	r.xids.reset(oidXID8)
	r.seqs.reset(oidInt4)
	for _, p := range at {
		r.xids.int8(p.XID)
		r.seqs.int4(p.Seq)
	}
	params := append(r.params[:0], binary.BigEndian.AppendUint16(nil, uint16(shard)), r.xids.value(), r.seqs.value()) //nolint:gosec // bytes of an int16
	result := r.conn.PgConn().ExecStatement(ctx, r.readAt, params, binaryFormats, binaryFormats)
	segments := make([]Segment, 0, len(at))
	for result.NextRow() {
		segments = append(segments, segmentOf(result.Values()))
	}
	if _, err := result.Close(); err != nil {
		return nil, r.failed(ctx, "reading segments", err)
	}
	return segments, nil
}

// Close closes the connection.
func (r *Reader) Close(ctx context.Context) error {
	if r.conn == nil {
		return nil
	}
	err := r.conn.Close(ctx)
	r.conn = nil
	return storeError("closing the reader", err)
}

func (r *Reader) setCursors(cursors []Cursor, limit int) {
	r.shards.reset(oidInt2)
	r.xids.reset(oidXID8)
	r.seqs.reset(oidInt4)
	for _, c := range cursors {
		r.shards.int2(c.Shard)
		r.xids.int8(c.XID)
		r.seqs.int4(c.Seq)
	}
	r.params[0], r.params[1], r.params[2] = r.shards.value(), r.xids.value(), r.seqs.value()
	r.params[3] = binary.BigEndian.AppendUint32(r.params[3][:0], uint32(limit)) //nolint:gosec // small
	r.params[4] = r.horizon.foreignArray(&r.foreign)
}

// readOnce runs the statement. complete is false if generations were in use that the statement was not told of.
func (r *Reader) readOnce(ctx context.Context, shards int) (segments []Segment, complete bool, err error) {
	statement, params, asked := r.readAll, r.params[:5], []int16(nil)
	if n := len(r.generations); 0 < n && n <= prunedGenerations {
		statement, params, asked = r.read, r.params[:8], slices.Clone(r.generations)
		for i := range prunedGenerations {
			r.params[5+i] = binary.BigEndian.AppendUint16(r.params[5+i][:0], uint16(asked[min(i, n-1)])) //nolint:gosec // bytes of an int16
		}
	}
	result := r.conn.PgConn().ExecStatement(ctx, statement, params, binaryFormats, binaryFormats)
	for first := true; result.NextRow(); first = false {
		v := result.Values()
		if first {
			r.horizon.observe(time.Now(), v[0])
			r.generations = int2s(r.generations[:0], v[1])
			complete = len(asked) == 0 || !slices.ContainsFunc(r.generations, func(g int16) bool { return !slices.Contains(asked, g) })
			segments = make([]Segment, 0, shards)
		}
		if v[2] != nil {
			segments = append(segments, segmentOf(v[2:]))
		}
	}
	if _, err := result.Close(); err != nil {
		return nil, false, err
	}
	return segments, complete, nil
}

// segmentOf copies a row of shard, xid, seq, stale, body.
func segmentOf(v [][]byte) Segment {
	return Segment{
		Shard:    int16(binary.BigEndian.Uint16(v[0])),                                                    //nolint:gosec // bytes of an int16
		Position: Position{XID: binary.BigEndian.Uint64(v[1]), Seq: int32(binary.BigEndian.Uint32(v[2]))}, //nolint:gosec // bytes of an int32
		Stale:    int4s(v[3]),
		Body:     slices.Clone(v[4]),
	}
}

// connect makes sure that there is a connection, and tells once if it leads to another server than before.
func (r *Reader) connect(ctx context.Context) error {
	if r.conn == nil || r.conn.IsClosed() {
		closeConn(ctx, &r.conn)
		conn, found, err := r.st.dial(ctx, pointLookups, readerSettings)
		if err != nil {
			return err
		}
		if err := r.prepare(ctx, conn); err != nil {
			closeConn(ctx, &conn)
			return storeError("preparing the read statements", err)
		}
		r.changed = r.changed || r.server.systemIdentifier != 0 && !r.server.same(found)
		r.conn, r.server = conn, found
		// Transaction ids may be given out again after a crash: what was known of them is void.
		r.horizon.forget()
		r.generations = r.generations[:0]
	}
	if r.changed {
		r.changed = false
		return ErrStoreChanged
	}
	return nil
}

// readerSettings: the index gives the order; a sort would read all of the log first.
var readerSettings = map[string]string{"enable_sort": "off"}

func (r *Reader) prepare(ctx context.Context, conn *pgx.Conn) (err error) {
	pg := conn.PgConn()
	if r.read, err = pg.Prepare(ctx, "read", readSQL, nil); err != nil {
		return err
	}
	if r.readAll, err = pg.Prepare(ctx, "read_all", readAllSQL, nil); err != nil {
		return err
	}
	r.readAt, err = pg.Prepare(ctx, "read_at", readAtSQL, nil)
	return err
}

// failed drops the connection if the error says that it is of no use any more.
func (r *Reader) failed(ctx context.Context, doing string, err error) error {
	err = storeError(doing, err)
	if errors.Is(err, ErrUnavailable) {
		closeConn(ctx, &r.conn)
	}
	return err
}

package store

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"
)

// appendSQL is the whole write path: it stores prepares and publishes, decides, and appends to the log, in one
// transaction that is durable when it answers.
//
// $1–$5 prepares and publishes: source, transaction, state, shards, digest. $6–$9 decisions: source, transaction, state,
// shards. $10–$12 segments: shard, seq, body. Keys are sorted, so that two batches take row locks in one order.
//
// Whoever comes first wins: an insert of a known key does nothing, a decision needs state = 0 (re-checked under the row
// lock). The ordinals of the losers go into stale, +n for the n-th prepare, -n for the n-th decision; NULL says that all
// won. np and nc are counted apart, and a batch without a winner is not logged at all: array_agg over no rows is NULL,
// which would say that all of its records are valid.
//
// The generation is read by the statement itself, so that nobody writes into one that was closed before the statement
// began.
const appendSQL = appendHeadSQL + appendTailSQL

// resolveSQL is appendSQL with the evidence of decisions that are not the client's own, and of publishes that their callers keep:
// $13–$18 source, transaction, state, method, evidence, actor. It is stored for those that win.
const resolveSQL = appendHeadSQL + `,
r AS (
  INSERT INTO outbox.resolution (source_id, tx_id, state, method, evidence, actor)
  SELECT v.s, v.i, v.st, v.m, v.e, v.a
  FROM unnest($13::int[], $14::uuid[], $15::smallint[], $16::text[], $17::jsonb[], $18::text[]) v(s, i, st, m, e, a)
  JOIN (SELECT source_id, tx_id FROM c UNION ALL SELECT source_id, tx_id FROM p) w ON w.source_id = v.s AND w.tx_id = v.i
  ON CONFLICT (source_id, tx_id) DO UPDATE
  SET state = excluded.state, method = excluded.method, evidence = excluded.evidence, actor = excluded.actor, resolved_at = now())` + appendTailSQL

const appendHeadSQL = `
WITH p AS (
  INSERT INTO outbox.tx (source_id, tx_id, state, shards, digest, log_xid, decided_at)
  SELECT u.s, u.i, u.st, u.sh, u.d, pg_current_xact_id(), CASE WHEN u.st <> 0 THEN now() END
  FROM unnest($1::int[], $2::uuid[], $3::smallint[], $4::bigint[], $5::bigint[]) u(s, i, st, sh, d)
  ON CONFLICT (source_id, tx_id) DO NOTHING
  RETURNING source_id, tx_id),
c AS (
  UPDATE outbox.tx t SET state = v.st, decided_at = now()
  FROM unnest($6::int[], $7::uuid[], $8::smallint[], $9::bigint[]) v(s, i, st, sh)
  WHERE t.source_id = v.s AND t.tx_id = v.i AND t.state = 0 AND t.shards = v.sh
  RETURNING t.source_id, t.tx_id),
n AS MATERIALIZED (SELECT (SELECT count(*) FROM p) AS np, (SELECT count(*) FROM c) AS nc),
f AS MATERIALIZED (
  SELECT np, nc,
    CASE WHEN np <> cardinality($1) THEN
      (SELECT array_agg(u.o::int ORDER BY u.o) FROM unnest($1, $2) WITH ORDINALITY u(s, i, o) WHERE (u.s, u.i) NOT IN (SELECT source_id, tx_id FROM p)) END
    || CASE WHEN nc <> cardinality($6) THEN
      (SELECT array_agg(-u.o::int ORDER BY u.o) FROM unnest($6, $7) WITH ORDINALITY u(s, i, o) WHERE (u.s, u.i) NOT IN (SELECT source_id, tx_id FROM c)) END AS stale
  FROM n),
l AS (
  INSERT INTO outbox.log (shard, seq, gen, stale, body)
  SELECT g.h, g.q, (SELECT gen FROM outbox.control), f.stale, g.b
  FROM f, unnest($10::smallint[], $11::int[], $12::bytea[]) g(h, q, b)
  WHERE f.np + f.nc > 0)`

const appendTailSQL = `
SELECT np, nc, stale FROM f`

// batch turns requests into the parameters of appendSQL. It is used again and again, so it hardly allocates.
type batch struct {
	requests  []*Request // in the order of arrival
	prepares  []*Request // sorted by key: the n-th has ordinal n
	decisions []*Request
	won, lost []*Request      // after split
	resolved  int             // requests with evidence
	byShard   [64][]recordRef // in the order of arrival

	params [18]array
	values [18][]byte
}

// recordRef names a record of a request: one of its events, or its decision.
type recordRef struct {
	r     *Request
	event int32 // -1: the decision
}

// byKey is the one order in which all writers lock rows.
func byKey(a, b *Request) int {
	return cmp.Or(cmp.Compare(a.Key.Source, b.Key.Source), bytes.Compare(a.Key.Transaction[:], b.Key.Transaction[:]))
}

// build fills the batch. No two requests have the same key.
func (b *batch) build(requests []*Request) {
	b.requests, b.prepares, b.decisions = requests, b.prepares[:0], b.decisions[:0]
	b.resolved = 0
	for i := range b.byShard {
		b.byShard[i] = b.byShard[i][:0]
	}
	for _, r := range requests {
		if r.Resolution != nil {
			b.resolved++
		}
		if r.enc.as.stores() {
			b.prepares = append(b.prepares, r)
			for i := range r.enc.payload.events {
				s := r.enc.payload.events[i].shard
				b.byShard[s] = append(b.byShard[s], recordRef{r, int32(i)}) //nolint:gosec // few
			}
			continue
		}
		b.decisions = append(b.decisions, r)
		for s := range b.byShard {
			if r.enc.shards.Has(int16(s)) { //nolint:gosec // below 64
				b.byShard[s] = append(b.byShard[s], recordRef{r, -1})
			}
		}
	}
	slices.SortFunc(b.prepares, byKey)
	slices.SortFunc(b.decisions, byKey)
	b.keys()
	b.segments()
	b.resolutions()
}

// keys fills $1–$9 and gives out the ordinals.
func (b *batch) keys() {
	p := &b.params
	for i, element := range [...]uint32{oidInt4, oidUUID, oidInt2, oidInt8, oidInt8, oidInt4, oidUUID, oidInt2, oidInt8} {
		p[i].reset(element)
	}
	for i, r := range b.prepares {
		r.enc.ordinal = int32(i + 1) //nolint:gosec // few
		p[0].int4(r.Key.Source)
		p[1].uuid(r.Key.Transaction)
		p[2].int2(int16(stateOf(r.enc.as)))
		p[3].int8(uint64(r.enc.shards))
		p[4].int8(r.enc.digest)
	}
	for i, r := range b.decisions {
		r.enc.ordinal = int32(i + 1) //nolint:gosec // few
		p[5].int4(r.Key.Source)
		p[6].uuid(r.Key.Transaction)
		p[7].int2(int16(stateOf(r.enc.as)))
		p[8].int8(uint64(r.enc.shards))
	}
}

// stateOf is the state in which a request of this kind leaves its transaction.
func stateOf(k Kind) State {
	switch k {
	case KindPublish, KindCommit:
		return Committed
	case KindAbort:
		return Aborted
	case KindPrepare:
	}
	return Prepared
}

// segments fills $10–$12: per shard the records in the order of arrival, cut into bodies.
func (b *batch) segments() {
	b.params[9].reset(oidInt2)
	b.params[10].reset(oidInt4)
	b.params[11].reset(oidBytea)
	seq := int32(0)
	for shard, refs := range b.byShard {
		for len(refs) > 0 {
			b.params[9].int2(int16(shard)) //nolint:gosec // below 64
			b.params[10].int4(seq)
			refs = b.segment(&b.params[11], refs)
			seq++
		}
	}
}

// segment writes one body and returns the records that did not fit.
func (b *batch) segment(bodies *array, refs []recordRef) []recordRef {
	at := bodies.open()
	out := append(bodies.b, segmentFormat)
	start := len(out)
	var before *Request
	for len(refs) > 0 {
		ref := refs[0]
		r := ref.r
		var head, content []byte
		kind := byte(recordMore)
		ordinal := uint64(r.enc.ordinal) //nolint:gosec // positive
		size := 1
		switch {
		case ref.event < 0:
			kind = recordCommit
			if r.enc.as == KindAbort {
				kind = recordAbort
			}
			var key [binary.MaxVarintLen32 + 16]byte
			content = appendKey(key[:0], r.Key)
		default:
			p := r.enc.payload
			e := p.events[ref.event]
			content = p.b[e.start:e.end]
			if r != before {
				kind, head = recordKind(stateOf(r.enc.as)), p.b[:p.head]
			}
		}
		length := uint64(len(head) + len(content)) //nolint:gosec // not negative
		if kind != recordMore {
			size += uvarintLen(ordinal)
		}
		size += uvarintLen(length) + int(length) //nolint:gosec // far from 2³¹
		if len(out) > start && len(out)-start+1+size > segmentBytes {
			break
		}
		out = append(out, kind)
		if kind != recordMore {
			out = binary.AppendUvarint(out, ordinal)
		}
		out = binary.AppendUvarint(out, length)
		out = append(out, head...)
		out = append(out, content...)
		before = r
		refs = refs[1:]
	}
	bodies.b = out
	bodies.close(at)
	return refs
}

// resolutions fills $13–$18, if any request carries evidence.
func (b *batch) resolutions() {
	if b.resolved == 0 {
		return
	}
	p := b.params[12:]
	for i, element := range [...]uint32{oidInt4, oidUUID, oidInt2, oidText, oidJSONB, oidText} {
		p[i].reset(element)
	}
	for _, r := range b.requests {
		if r.Resolution == nil {
			continue
		}
		p[0].int4(r.Key.Source)
		p[1].uuid(r.Key.Transaction)
		p[2].int2(int16(stateOf(r.enc.as)))
		p[3].text(r.Resolution.Method)
		p[4].jsonb(r.Resolution.Evidence)
		p[5].text(r.Resolution.Actor)
	}
}

// parameters returns the values for appendSQL, or for resolveSQL if the batch carries evidence.
func (b *batch) parameters() [][]byte {
	n := 12
	if b.resolved > 0 {
		n = 18
	}
	for i := range n {
		b.values[i] = b.params[i].value()
	}
	return b.values[:n]
}

// split puts the requests that the statement named as stale apart. The order of the others stays.
func (b *batch) split(stale []int32) (won, lost []*Request) {
	if len(stale) == 0 {
		return b.requests, nil
	}
	b.lost = b.lost[:0]
	for _, o := range stale {
		if o > 0 {
			b.prepares[o-1].enc.lost = true
		} else {
			b.decisions[-o-1].enc.lost = true
		}
	}
	b.won = b.won[:0]
	for _, r := range b.requests {
		if r.enc.lost {
			r.enc.lost = false
			b.lost = append(b.lost, r)
		} else {
			b.won = append(b.won, r)
		}
	}
	return b.won, b.lost
}

// forget lets go of the requests, so that they can be collected, and of buffers that one large batch has blown up.
func (b *batch) forget() {
	clear(b.prepares)
	clear(b.decisions)
	clear(b.won)
	clear(b.lost)
	for i := range b.byShard {
		clear(b.byShard[i])
	}
	if bodies := &b.params[11]; cap(bodies.b) > keptBodies {
		bodies.b = nil
	}
	b.requests = nil
}

const keptBodies = 4 << 20

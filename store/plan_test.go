package store_test

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/store"
)

// The tests below ask PostgreSQL for the plan of every statement that the package has prepared on a connection: those that
// were really sent, not copies. Generic plans, because connections live long and a plan made on an empty table stays. What is
// planned anew each time (rowSettings, HurryInDoubt) is explained like that, too; TestPlansOfATableThatWasEmpty looks at what it does.

// planNode is a node of EXPLAIN (FORMAT JSON).
type planNode struct {
	Type     string     `json:"Node Type"`
	Relation string     `json:"Relation Name"`
	Index    string     `json:"Index Name"`
	Arbiters []string   `json:"Conflict Arbiter Indexes"`
	Plans    []planNode `json:"Plans"`
}

func (n *planNode) walk(fn func(*planNode)) {
	fn(n)
	for i := range n.Plans {
		n.Plans[i].walk(fn)
	}
}

// big tables are those that must never be read from end to end.
var big = regexp.MustCompile(`^(tx|log_\d|parked|dead_letter)$`)

// statement is one that a session has prepared.
type statement struct {
	name, sql string
	types     []string
}

// prepared returns what the session has prepared that touches one of the tables.
func prepared(t *testing.T, conn *pgx.Conn) []statement {
	t.Helper()
	rows, err := conn.Query(t.Context(), `SELECT name, statement, parameter_types::text[] FROM pg_prepared_statements`, pgx.QueryExecModeExec)
	if err != nil {
		t.Fatal(err)
	}
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (s statement, err error) {
		return s, row.Scan(&s.name, &s.sql, &s.types)
	})
	if err != nil {
		t.Fatal(err)
	}
	verb := regexp.MustCompile(`^(WITH|SELECT|INSERT|UPDATE|DELETE)\b`)
	return slices.DeleteFunc(all, func(s statement) bool {
		return !verb.MatchString(strings.TrimSpace(s.sql)) || !strings.Contains(s.sql, "outbox.")
	})
}

// explain returns the generic plan of a prepared statement. Parameters do not matter to it, but generations are pruned by
// their values when it is made ready.
func explain(t *testing.T, conn *pgx.Conn, s statement) *planNode {
	t.Helper()
	args := make([]string, len(s.types))
	for i, typ := range s.types {
		switch {
		case typ == "smallint":
			args[i] = "0"
		case strings.HasSuffix(typ, "[]"):
			args[i] = "'{}'"
		default:
			args[i] = "NULL"
		}
	}
	call := pgx.Identifier{s.name}.Sanitize()
	if len(args) > 0 {
		call += "(" + strings.Join(args, ", ") + ")"
	}
	var raw []byte
	if err := conn.QueryRow(t.Context(), `EXPLAIN (FORMAT JSON) EXECUTE `+call, pgx.QueryExecModeSimpleProtocol).Scan(&raw); err != nil {
		t.Fatalf("explaining %s: %v", s.sql, err)
	}
	var plans []struct{ Plan planNode }
	if err := json.Unmarshal(raw, &plans); err != nil {
		t.Fatal(err)
	}
	return &plans[0].Plan
}

// session is a connection whose statements are explained.
type session struct {
	name     string
	conn     *pgx.Conn
	settings string // how plans are made in the transactions that send them
}

// exercise makes the package send its statements and returns the connections that they were prepared on.
func exercise(t *testing.T, w *world) []session {
	t.Helper()
	ctx := t.Context()
	no := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// Servers and relays: what they ask is answered by index whatever the planner knows. What it asks in a step, with the
	// settings of a step.
	k := w.prepare("plan")
	e := w.eventsOf(k)[0]
	parked := store.Parked{EventPosition: e.EventPosition, Key: k, Aggregate: e.aggregate(), Cause: store.CauseInDoubt,
		Database: e.record.Database, Body: store.EncodeEvent(nil, &e.record)}
	relay := w.openOne()
	leases, err := relay.AcquireShards(ctx, "planner", time.Minute, 64)
	no(err)
	for _, l := range leases {
		if l.Shard != e.shard {
			continue
		}
		step := store.Step{Shard: l.Shard, Epoch: l.Epoch, Checkpoint: l.Checkpoint, Park: []store.Parked{parked},
			Decide: []store.ParkedDecision{{Key: k, State: store.Committed}},
			Bury:   []store.DeadLetter{{EventPosition: e.EventPosition, Key: k, Aggregate: e.aggregate(), Body: parked.Body}},
			Exhume: []store.EventPosition{e.EventPosition}, Unpark: []store.EventPosition{e.EventPosition}}
		fenced, err := relay.Steps(ctx, time.Minute, []store.Step{step})
		no(err)
		if len(fenced) > 0 {
			t.Fatal("fenced")
		}
		// What was set aside for the plans only goes again.
		step.Park, step.Bury, step.Decide = nil, nil, nil
		_, err = relay.Steps(ctx, time.Minute, []store.Step{step})
		no(err)
	}
	no(relay.ReleaseShards(ctx, []int16{leases[0].Shard}, []int64{leases[0].Epoch}))
	_, err = relay.LoadParked(ctx, e.shard)
	no(err)
	_, err = relay.LoadParkedOf(ctx, []store.ParkedAfter{{Shard: e.shard, Aggregate: e.aggregate()}}, 10)
	no(err)
	_, err = relay.LoadDeadQueues(ctx, e.shard)
	no(err)
	_, err = relay.LoadDeadLettersOf(ctx, e.shard, e.aggregate(), store.EventPosition{}, 10)
	no(err)
	_, err = relay.States(ctx, []store.Key{k})
	no(err)
	_, err = relay.ClaimInDoubt(ctx, 10, time.Minute)
	no(err)
	_, _, err = relay.HurryInDoubt(ctx, k.Source, "default", store.TransactionID{}, 10, time.Minute)
	no(err)
	no(relay.RecordAnswer(ctx, []store.Key{k}, "IN_PROGRESS", time.Minute))
	_, err = relay.Memories(ctx, []store.Key{k}, time.Minute)
	no(err)

	operator := w.openOne()
	_, err = operator.Transaction(ctx, k)
	no(err)
	_, err = operator.Shards(ctx)
	no(err)

	maintainer := w.openOne()
	_, err = maintainer.MaintainOnce(ctx, store.MaintenanceConfig{})
	no(err)

	verifier := w.openOne()
	_, err = verifier.Verify(ctx)
	no(err)

	reader, err := w.Store.OpenReader(ctx)
	no(err)
	t.Cleanup(func() { _ = reader.Close(context.WithoutCancel(ctx)) })
	_, err = reader.Read(ctx, []store.Cursor{{Shard: e.shard}}, 10)
	no(err)

	writer, err := store.PrepareWriterStatements(ctx, w.Store)
	no(err)
	t.Cleanup(func() { _ = writer.Close(context.WithoutCancel(ctx)) })

	const pointLookups = `SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; `
	return []session{
		{"relay", relay.TheConn(t), pointLookups}, {"operator", operator.TheConn(t), pointLookups}, {"maintainer", maintainer.TheConn(t), pointLookups},
		{"verifier", verifier.TheConn(t), pointLookups}, {"reader", reader.Conn(), ``}, {"writer", writer, ``},
	}
}

// scansOf explains everything that was prepared and returns the plan nodes that read or write a table, by statement.
func scansOf(t *testing.T, s session) map[string][]planNode {
	t.Helper()
	if _, err := s.conn.Exec(t.Context(), s.settings+`SET plan_cache_mode = force_generic_plan`, pgx.QueryExecModeSimpleProtocol); err != nil {
		t.Fatal(err)
	}
	found := map[string][]planNode{}
	for _, st := range prepared(t, s.conn) {
		found[st.sql] = nil
		explain(t, s.conn, st).walk(func(n *planNode) { found[st.sql] = append(found[st.sql], *n) })
	}
	if len(found) == 0 {
		t.Fatalf("nothing was prepared by the %s", s.name)
	}
	return found
}

// expectations: which index a statement, recognised by a piece of it, must use. Only on a large store: on an empty one any
// index is as good as another.
var expectations = []struct{ session, piece, index string }{
	{"writer", "INSERT INTO outbox.tx", "tx_pkey"},
	{"writer", "INSERT INTO outbox.resolution", "tx_pkey"},
	{"reader", "e.gen IN ($6, $7, $8)", "log_0_shard_xid_seq_idx"},
	{"reader", "ORDER BY e.xid, e.seq LIMIT", "log_0_shard_xid_seq_idx"},
	{"reader", "e.xid = k.xid AND e.seq = k.seq", "log_0_shard_xid_seq_idx"},
	{"relay", "UPDATE outbox.parked p SET state = u.state", "parked_tx"},
	{"relay", "INSERT INTO outbox.parked", "parked_pkey"},
	{"relay", "DELETE FROM outbox.parked", "parked_pkey"},
	{"relay", "DELETE FROM outbox.dead_letter", "dead_letter_pkey"},
	{"relay", "p.agg = k.agg AND p.source_id = k.source_id", "parked_aggregate"},
	{"relay", "(xid, seq, record) > ($6::xid8, $7, $8)", "dead_letter_aggregate"},
	{"relay", "SELECT k.s, k.i, t.state", "tx_pkey"},
	{"relay", "p.check_at <= now()", "parked_in_doubt"},
	{"relay", "p.tx_id > $3", "parked_tx"},
	{"operator", "FROM outbox.tx t LEFT JOIN outbox.resolution", "tx_pkey"},
	{"operator", "FROM outbox.parked WHERE source_id = $1 AND tx_id = $2", "parked_tx"},
	{"operator", "FROM outbox.log WHERE shard = ANY($1) AND xid = $2", "log_0_shard_xid_seq_idx"},
	{"operator", "WITH ORDINALITY u (shard, agg, type, id, n),", "parked_aggregate"},
	{"operator", "FROM outbox.shard s ORDER BY s.shard", "log_0_shard_xid_seq_idx"},
	{"maintainer", "DELETE FROM outbox.tx", "parked_tx"},
	{"maintainer", "DELETE FROM outbox.tx", "dead_letter_pkey"},
	{"maintainer", "DELETE FROM outbox.tx", "resolution_pkey"},
	{"verifier", "ORDER BY l.xid, l.seq LIMIT", "log_0_shard_xid_seq_idx"},
	{"verifier", "t.digest", "tx_pkey"},
}

func TestPlansOnAnEmptyStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	checkPlans(t, w)
}

func TestPlansOnALargeStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.grow()
	plans := checkPlans(t, w)
	for sql, nodes := range plans["maintainer"] {
		if strings.Contains(sql, "DELETE FROM outbox.tx") &&
			!slices.ContainsFunc(nodes, func(n planNode) bool { return n.Type == "Tid Range Scan" && n.Relation == "tx" }) {
			t.Errorf("the purge does not keep to its pages:\n%s", outline(nodes))
		}
	}
	for name, found := range plans {
		for _, want := range expectations {
			if want.session != name {
				continue
			}
			recognised := false
			for sql, nodes := range found {
				if !strings.Contains(sql, want.piece) {
					continue
				}
				recognised = true
				if !slices.ContainsFunc(nodes, func(n planNode) bool { return n.Index == want.index || slices.Contains(n.Arbiters, want.index) }) {
					t.Errorf("%s: %s is not used by\n%s\n%s", name, want.index, sql, outline(nodes))
				}
			}
			if !recognised {
				t.Errorf("%s: no statement with %q was prepared", name, want.piece)
			}
		}
	}
}

// checkPlans fails the test for every sequential scan of a big table, and for every plan that reads the log in another
// order than its index gives. It returns the nodes by session and statement.
func checkPlans(t *testing.T, w *world) map[string]map[string][]planNode {
	t.Helper()
	all := map[string]map[string][]planNode{}
	for _, s := range exercise(t, w) {
		all[s.name] = scansOf(t, s)
		for sql, nodes := range all[s.name] {
			for _, n := range nodes {
				if n.Type == "Seq Scan" && big.MatchString(n.Relation) {
					t.Errorf("%s: sequential scan of %s by\n%s\n%s", s.name, n.Relation, sql, outline(nodes))
				}
				if strings.Contains(n.Type, "Sort") && s.name == "reader" && strings.Contains(sql, "LIMIT $4") {
					t.Errorf("reader: the log is sorted by\n%s\n%s", sql, outline(nodes))
				}
			}
		}
	}
	return all
}

func outline(nodes []planNode) string {
	var b strings.Builder
	for _, n := range nodes {
		fmt.Fprintf(&b, "  %s %s %s\n", n.Type, n.Relation, n.Index)
	}
	return b.String()
}

// grow fills the store as if it had worked for long: 200,000 transactions, three generations of log, some of it set aside.
func (w *world) grow() {
	w.t.Helper()
	// The only record of these segments lost.
	body := store.EncodeEvent(nil, &store.Record{Key: store.Key{Source: 1}, Event: events("grown")[0]})
	w.Exec(w.t, `INSERT INTO outbox.log (xid, seq, shard, gen, stale, body)
		SELECT (i / 50)::text::xid8, i % 50, i % 16, i / 20000, '{0}', $1 FROM generate_series(0, 59999) i`, body)
	for _, sql := range []string{
		`INSERT INTO outbox.tx (source_id, tx_id, state, shards, digest, log_xid, prepared_at, decided_at)
		 SELECT 1 + i % 7, gen_random_uuid(), 1, 1 << i % 16, i, (i / 50)::text::xid8, now(), now() FROM generate_series(1, 200000) i`,
		`INSERT INTO outbox.parked (xid, agg, seq, record, shard, cause, state, source_id, tx_id, aggregate_type, aggregate_id, topic, body, database, mode, check_at)
		 SELECT log_xid, digest, 0, digest, 0, 2, CASE WHEN digest % 50 = 0 THEN 0 ELSE 1 END, source_id, tx_id, 'order', digest::text, 'orders', '\x01', 'default', 1, now()
		 FROM outbox.tx WHERE digest % 10 = 0`,
		`INSERT INTO outbox.dead_letter (xid, agg, seq, record, shard, queue, source_id, tx_id, aggregate_type, aggregate_id, topic, error, attempts, body)
		 SELECT log_xid, digest, 0, digest, 0, true, source_id, tx_id, 'order', digest::text, 'orders', 'e', 1, '\x01' FROM outbox.tx WHERE digest % 40 = 1`,
		`UPDATE outbox.generation SET used = true, closed_at = now() WHERE gen < 2`,
		`UPDATE outbox.generation SET used = true WHERE gen = 2`,
		`UPDATE outbox.control SET gen = 2`,
		`VACUUM (ANALYZE) outbox.tx, outbox.log, outbox.parked, outbox.dead_letter`,
	} {
		w.Exec(w.t, sql)
	}
}

// openOne opens a store with a single connection.
func (w *world) openOne() *store.Store {
	w.t.Helper()
	st, err := store.Open(w.t.Context(), store.Config{DSN: w.DSN, MaxConns: 1})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(st.Close)
	return st
}

package pgxoutbox_test

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/server"
	"github.com/outbox-platform/outbox/server/resolver"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// deciders is a platform of two servers, each with a resolver, and a service with an instance that can be asked and a database
// that can be looked into. All of them may decide one transaction.
type deciders struct {
	t        *testing.T
	platform *storetest.Database
	db       *storetest.Database // of the service
	source   *store.Source
	servers  [2]decidingServer
}

type decidingServer struct {
	calls    outboxv1.OutboxServiceClient
	admin    outboxv1.AdminServiceClient
	resolver *resolver.Resolver
}

func newDeciders(t *testing.T) *deciders {
	t.Helper()
	d := &deciders{t: t, platform: storetest.New(t), db: storetest.New(t, storetest.WithoutSchema())}
	d.db.Exec(t, "SET search_path = public; "+schema+client.MarkerDDL)
	t.Setenv("OUTBOX_TEST_DECIDERS_DSN", d.db.DSN)
	var err error
	d.source, _, err = d.platform.Store.ApplySource(t.Context(), store.Source{
		Name: "orders", Topics: []string{"*"}, RecordProfile: 1, FailurePolicy: 1, CloudEventsSource: "/orders",
		Databases: []store.SourceDatabase{{Name: "default", Mode: store.ModeMarker, DSNRef: "env:OUTBOX_TEST_DECIDERS_DSN"}},
	}, "test", "test")
	if err != nil {
		t.Fatal(err)
	}
	for i := range d.servers {
		address := d.server(i)
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		d.servers[i].calls, d.servers[i].admin = outboxv1.NewOutboxServiceClient(conn), outboxv1.NewAdminServiceClient(conn)
		d.instance(address)
	}
	return d
}

func (d *deciders) server(i int) (address string) {
	d.t.Helper()
	cfg, err := server.DefaultConfig()
	if err != nil {
		d.t.Fatal(err)
	}
	cfg.GRPCListen, cfg.HTTPListen = "127.0.0.1:0", "127.0.0.1:0"
	log, st := slog.New(slog.DiscardHandler), d.platform.Open(d.t)
	w := store.NewWriter(st, store.WriterConfig{})
	s, err := server.New(cfg, st, w, log, prometheus.NewRegistry())
	if err != nil {
		d.t.Fatal(err)
	}
	r, err := resolver.New(resolver.Config{}, st, w, s.Sessions(), log, prometheus.NewRegistry())
	if err != nil {
		d.t.Fatal(err)
	}
	s.UseResolver(r)
	d.servers[i].resolver = r
	ctx, cancel := context.WithCancel(context.WithoutCancel(d.t.Context()))
	done := make(chan error, 3)
	for _, run := range []func(context.Context) error{w.Run, r.Run, s.Serve} {
		go func() { done <- run(ctx) }()
	}
	d.t.Cleanup(func() {
		cancel()
		for range 3 {
			if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
				d.t.Error(err)
			}
		}
	})
	return s.GRPCAddr()
}

// instance is an instance of the service that answers questions.
func (d *deciders) instance(address string) {
	d.t.Helper()
	w := &world{t: d.t, dsn: d.db.DSN}
	c, err := client.New(client.Config{Target: address, Source: "orders", Plaintext: true, CloseTimeout: time.Millisecond})
	if err != nil {
		d.t.Fatal(err)
	}
	pool := w.connect(d.db.DSN)
	d.t.Cleanup(func() { c.Close() })
	if err := pgxoutbox.Register(c, "", pool, pgxoutbox.Upkeep{DrainInterval: time.Hour, JanitorInterval: time.Hour}); err != nil {
		d.t.Fatal(err)
	}
	if err := c.Connect(d.t.Context()); err != nil {
		d.t.Fatal(err)
	}
}

// contested is one transaction, and what was answered about it.
type contested struct {
	d       *deciders
	rt      *rapid.T
	conn    *pgx.Conn
	key     store.Key
	parked  store.Parked
	prepare *outboxv1.PrepareRequest
	truth   outboxv1.Transaction_State

	mu      sync.Mutex
	answers []claim
}

// claim is what somebody was told: the state is final, and it is this one.
type claim struct {
	who   string
	state outboxv1.Transaction_State
}

const (
	isPrepared  = outboxv1.Transaction_STATE_PREPARED
	isCommitted = outboxv1.Transaction_STATE_COMMITTED
	isAborted   = outboxv1.Transaction_STATE_ABORTED
)

// begin writes a marker, prepares, and ends the transaction as the truth is to be.
func (d *deciders) begin(rt *rapid.T) *contested {
	ctx := d.t.Context()
	id := client.NewID()
	c := &contested{d: d, rt: rt, key: store.Key{Source: d.source.ID, Transaction: store.TransactionID(id)}, truth: isAborted}
	var err error
	if c.conn, err = pgx.Connect(ctx, d.db.DSN); err != nil {
		rt.Fatal(err)
	}
	defer c.conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it is all over
	tx, err := c.conn.Begin(ctx)
	if err != nil {
		rt.Fatal(err)
	}
	at := &store.DatabaseTransaction{Database: "default", Mode: store.ModeMarker}
	err = tx.QueryRow(ctx, `INSERT INTO outbox_marker (id) VALUES ($1) RETURNING pg_current_xact_id()::text::bigint, (SELECT system_identifier FROM pg_control_system()),
		('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint, (SELECT oid::bigint FROM pg_database WHERE datname = current_database()),
		'outbox_marker'::regclass::oid::bigint`, id).Scan(&at.XID, &at.SystemIdentifier, &at.Timeline, &at.DatabaseOID, &at.MarkerOID)
	if err != nil {
		rt.Fatal(err)
	}
	c.parked = store.Parked{Key: c.key, Database: at}
	event := client.NewID()
	c.prepare = &outboxv1.PrepareRequest{
		Source: "orders", TransactionId: id[:],
		DatabaseTransaction: &outboxv1.DatabaseTransaction{
			Database: "default", Xid: at.XID, SystemIdentifier: at.SystemIdentifier, Timeline: at.Timeline, DatabaseOid: at.DatabaseOID, MarkerOid: at.MarkerOID,
			Mode: outboxv1.DatabaseMode_DATABASE_MODE_MARKER,
		},
		Events: []*outboxv1.Event{{EventId: event[:], Topic: "orders", AggregateType: "order", AggregateId: event.String(), EventType: "t", Payload: []byte("x")}},
	}
	if _, err := d.servers[0].calls.Prepare(ctx, c.prepare); err != nil {
		rt.Fatal(err)
	}
	end := tx.Rollback
	if rapid.Bool().Draw(rt, "the source commits") {
		end, c.truth = tx.Commit, isCommitted
	}
	if err := end(ctx); err != nil {
		rt.Fatal(err)
	}
	return c
}

// said notes what an answer means for the state: it succeeded, or it was refused because the state is the other one.
func (c *contested) said(who string, err error, success outboxv1.Transaction_State) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err == nil:
		c.answers = append(c.answers, claim{who, success})
	case status.Code(err) == codes.FailedPrecondition && success == isCommitted:
		c.answers = append(c.answers, claim{who, isAborted})
	case status.Code(err) == codes.FailedPrecondition && success == isAborted:
		c.answers = append(c.answers, claim{who, isCommitted})
	default:
		c.answers = append(c.answers, claim{who + ": " + err.Error(), 0})
	}
}

// The parties. Each calls server s.
var parties = map[string]func(c *contested, s *decidingServer){
	"client's commit": func(c *contested, s *decidingServer) { c.decide(s, isCommitted) },
	"client's abort":  func(c *contested, s *decidingServer) { c.decide(s, isAborted) },
	"client's own word": func(c *contested, s *decidingServer) {
		c.decide(s, c.truth)
	},
	"drained twin": func(c *contested, s *decidingServer) {
		_, err := s.calls.Publish(c.d.t.Context(), &outboxv1.PublishRequest{Source: "orders", TransactionId: c.key.Transaction[:], Events: c.prepare.GetEvents(), KeptByCaller: true})
		c.said("Publish", err, isCommitted)
	},
	"late prepare": func(c *contested, s *decidingServer) {
		if _, err := s.calls.Prepare(c.d.t.Context(), c.prepare); err != nil {
			c.said("Prepare", err, isPrepared)
		}
	},
	"broken session": func(c *contested, s *decidingServer) {
		s.resolver.SessionBroke("orders", "instance", []store.Parked{c.parked})
	},
	"operator's check": func(c *contested, s *decidingServer) {
		resp, err := s.admin.CheckTransaction(c.d.t.Context(), &outboxv1.CheckTransactionRequest{Source: "orders", TransactionId: c.key.Transaction[:]})
		if status.Code(err) != codes.FailedPrecondition { // decided already
			c.said("CheckTransaction", err, resp.GetState())
		}
	},
	"operator's commit": func(c *contested, s *decidingServer) { c.operate(s, isCommitted) },
	"operator's abort":  func(c *contested, s *decidingServer) { c.operate(s, isAborted) },
	"onlooker": func(c *contested, s *decidingServer) {
		resp, err := s.calls.GetTransaction(c.d.t.Context(), &outboxv1.GetTransactionRequest{Source: "orders", TransactionId: c.key.Transaction[:]})
		c.said("GetTransaction", err, resp.GetTransaction().GetState())
	},
}

func (c *contested) decide(s *decidingServer, what outboxv1.Transaction_State) {
	ctx, id := c.d.t.Context(), c.key.Transaction[:]
	if what == isCommitted {
		_, err := s.calls.Commit(ctx, &outboxv1.CommitRequest{Source: "orders", TransactionId: id})
		c.said("Commit", err, what)
		return
	}
	_, err := s.calls.Abort(ctx, &outboxv1.AbortRequest{Source: "orders", TransactionId: id})
	c.said("Abort", err, what)
}

func (c *contested) operate(s *decidingServer, what outboxv1.Transaction_State) {
	_, err := s.admin.DecideTransaction(c.d.t.Context(), &outboxv1.DecideTransactionRequest{Source: "orders", TransactionId: c.key.Transaction[:], Decision: what, Reason: "race"})
	c.said("DecideTransaction", err, what)
}

// settled waits for the end, which the resolvers bring if nobody else did.
func (c *contested) settled() *store.Transaction {
	for end := time.Now().Add(20 * time.Second); ; {
		tx, err := c.d.platform.Store.Transaction(c.d.t.Context(), c.key)
		if err != nil {
			c.rt.Fatal(err)
		}
		if tx.State != store.Prepared {
			return tx
		}
		if time.Now().After(end) {
			c.rt.Fatal("nobody decides it")
		}
		c.d.servers[0].resolver.SessionBroke("orders", "instance", []store.Parked{c.parked})
		<-time.After(5 * time.Millisecond)
	}
}

// agree checks that everybody was told the same.
func (c *contested) agree(when string, state outboxv1.Transaction_State) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.answers {
		if a.state != state && (a.state != isPrepared || when != "during") {
			c.rt.Fatalf("%s: it is %s, and %s was told %s", when, state, a.who, a.state)
		}
	}
	c.answers = nil
}

// Everybody who may decide a transaction does so at the same time, in every combination, through two servers: the client's word,
// right or wrong, the drained twin of its Prepare, broken sessions, operators who check and operators who decide. There is exactly
// one terminal state, which is the source's truth unless somebody was wrong; one evidence row if and only if it was not the client
// who decided; and everybody is told the same, then and ever after.
func TestEverybodyDecides(t *testing.T) {
	d := newDeciders(t)
	kinds := slices.Sorted(maps.Keys(parties))
	winners := map[string]int{}
	rapid.Check(t, func(rt *rapid.T) {
		c := d.begin(rt)
		present := rapid.SliceOfN(rapid.SampledFrom(kinds), 1, 8).Draw(rt, "parties")
		where := rapid.SliceOfN(rapid.IntRange(0, 1), len(present), len(present)).Draw(rt, "servers")
		start := make(chan struct{})
		var all sync.WaitGroup
		for i, name := range present {
			all.Go(func() {
				<-start
				parties[name](c, &d.servers[where[i]])
			})
		}
		close(start)
		all.Wait()

		tx := c.settled()
		state := map[store.State]outboxv1.Transaction_State{store.Committed: isCommitted, store.Aborted: isAborted}[tx.State]
		winners[tx.DecidedBy]++
		c.agree("during", state)
		mayBeWrong := func(name string) bool {
			switch name {
			case "client's own word", "late prepare", "broken session", "operator's check", "onlooker":
				return false
			case "drained twin", "client's commit", "operator's commit":
				return c.truth == isAborted
			}
			return c.truth == isCommitted
		}
		excused := false
		for _, name := range present {
			excused = excused || mayBeWrong(name)
		}
		if state != c.truth && !excused {
			rt.Fatalf("it is %s by %s, the source's database says %s, and nobody said otherwise", state, tx.DecidedBy, c.truth)
		}
		rows := storetest.Query[string](t, d.platform, `SELECT method || ' ' || state FROM outbox.resolution WHERE source_id = $1 AND tx_id = $2`, c.key.Source, [16]byte(c.key.Transaction))
		want := []string{tx.DecidedBy + " " + strconv.Itoa(int(tx.State))}
		twin := len(rows) == 1 && slices.Contains(present, "drained twin") && state == isCommitted // which leaves a row if it wins
		if tx.DecidedBy == "client" && !twin {
			want = nil
		}
		if strings.Join(rows, ",") != strings.Join(want, ",") {
			rt.Fatalf("decided by %s as %s; evidence %v", tx.DecidedBy, state, rows)
		}
		// Ever after.
		for i := range d.servers {
			for _, name := range kinds {
				if name != "broken session" {
					parties[name](c, &d.servers[i])
				}
			}
		}
		c.agree("afterwards", state)
		if again := c.settled(); again.State != tx.State || again.DecidedBy != tx.DecidedBy || !again.DecidedAt.Equal(tx.DecidedAt) {
			rt.Fatalf("it was %s by %s, and is %s by %s", tx.State, tx.DecidedBy, again.State, again.DecidedBy)
		}
	})
	t.Logf("decided by: %v", winners)
	if !t.Failed() && len(winners) < 3 {
		t.Errorf("only %v ever won: the races proved nothing", winners)
	}
	if bad, err := d.platform.Store.Verify(t.Context()); err != nil || len(bad) != 0 {
		t.Errorf("verify: %v, %v", bad, err)
	}
	if n := storetest.Query[int64](t, d.platform, `SELECT count(*) FROM outbox.resolution r JOIN outbox.tx USING (source_id, tx_id) WHERE r.state <> tx.state`); n[0] != 0 {
		t.Errorf("%d evidence rows contradict the state", n[0])
	}
}

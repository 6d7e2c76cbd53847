package server

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func hello(source string, databases ...string) *outboxv1.SessionRequest_Hello {
	return &outboxv1.SessionRequest_Hello{Source: source, Databases: databases, Sdk: "test/1", Instance: "pod-1"}
}

// resultError is a result's status as an error.
func resultError(r *outboxv1.SessionResponse_Result) error {
	if r.GetStatus() == nil {
		return nil
	}
	return status.ErrorProto(r.GetStatus())
}

func TestSessionCarriesEveryCall(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	s := openSession(t, t.Context(), r.client, hello("orders", "default"))
	committed, aborted := newPrepare("orders"), newPrepare("orders")
	sendCalls(t, s,
		callPrepareOf(1, committed), callPrepareOf(2, aborted),
		callPublishOf(3, &outboxv1.PublishRequest{Source: "orders", TransactionId: newID(), Events: []*outboxv1.Event{newEvent("x")}}))
	got := receiveResults(t, s, 3)
	for id, res := range got {
		if res.GetStatus() != nil || (len(res.GetToken()) > 0) != (id != 3) {
			t.Fatalf("result %v", res)
		}
	}
	sendCalls(t, s,
		callCommitOf(4, &outboxv1.CommitRequest{Source: "orders", TransactionId: committed.GetTransactionId(), Token: got[1].GetToken()}),
		callAbortOf(5, &outboxv1.AbortRequest{Source: "orders", TransactionId: aborted.GetTransactionId(), Token: got[2].GetToken()}))
	for _, res := range receiveResults(t, s, 2) {
		if res.GetStatus() != nil {
			t.Fatalf("result %v", res)
		}
	}
	// Closing our side ends the session once everything is answered.
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		t.Fatalf("after closing: %v, want the end", err)
	}
}

// A Commit right behind its Prepare, not waiting for it, works.
func TestSessionPipelinesPrepareAndCommit(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	s := openSession(t, t.Context(), r.client, hello("orders"))
	var id uint64
	for range 100 {
		req := newPrepare("orders")
		sendCalls(t, s, callPrepareOf(id, req), callCommitOf(id+1, &outboxv1.CommitRequest{Source: "orders", TransactionId: req.GetTransactionId()}))
		id += 2
	}
	for _, res := range receiveResults(t, s, 200) {
		if res.GetStatus() != nil {
			t.Fatalf("result %v", res)
		}
	}
}

func TestSessionRefusesCallsAlone(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	r.register(t, "payments")
	s := openSession(t, t.Context(), r.client, hello("orders"))
	bad := newPrepare("orders")
	bad.Events[0].Topic = "__consumer_offsets"
	sendCalls(t, s,
		callPrepareOf(1, bad),
		callPrepareOf(2, newPrepare("payments")),
		&outboxv1.SessionRequest_Call{CallId: 3},
		callCommitOf(4, &outboxv1.CommitRequest{Source: "orders", TransactionId: newID()}),
		callPrepareOf(5, newPrepare("orders")))
	got := receiveResults(t, s, 5)
	wantError(t, resultError(got[1]), codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
	wantError(t, resultError(got[2]), codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DENIED)
	wantError(t, resultError(got[3]), codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
	wantError(t, resultError(got[4]), codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_UNKNOWN)
	if got[5].GetStatus() != nil {
		t.Fatalf("the good call: %v", got[5])
	}
}

func TestSessionProtocolViolations(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	calls := &outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Calls_{Calls: &outboxv1.SessionRequest_Calls{
		Calls: []*outboxv1.SessionRequest_Call{callPrepareOf(1, newPrepare("orders"))},
	}}}
	helloAgain := &outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Hello_{Hello: hello("orders")}}
	for name, c := range map[string]struct {
		first, second *outboxv1.SessionRequest
		code          codes.Code
		reason        outboxv1.ErrorReason
	}{
		"calls first":         {calls, nil, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID},
		"nothing in it":       {&outboxv1.SessionRequest{}, nil, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID},
		"unknown source":      {&outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Hello_{Hello: hello("nobody")}}, nil, codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DENIED},
		"unknown database":    {&outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Hello_{Hello: hello("orders", "other")}}, nil, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID},
		"hello twice":         {helloAgain, helloAgain, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID},
		"no calls":            {helloAgain, &outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Calls_{Calls: &outboxv1.SessionRequest_Calls{}}}, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID},
		"answer without a tx": {helloAgain, &outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_CheckAnswers_{CheckAnswers: &outboxv1.SessionRequest_CheckAnswers{Answers: []*outboxv1.SessionRequest_CheckAnswer{{}}}}}, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := r.client.Session(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Send(c.first); err != nil {
				t.Fatal(err)
			}
			if c.second != nil {
				_ = s.Send(c.second) // the server may have ended it already
			}
			for err == nil {
				_, err = s.Recv()
			}
			wantError(t, err, c.code, c.reason)
		})
	}
	// Closing without a word.
	s, err := r.client.Session(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = s.CloseSend()
	_, err = s.Recv()
	wantError(t, err, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
}

// Calls beyond the limit are refused one by one, and the session goes on.
func TestSessionBoundsOpenCalls(t *testing.T) {
	var mu sync.Mutex
	var held []*store.Request
	w := newMemoryWriter(t)
	w.answer = func(r *store.Request) {
		mu.Lock()
		defer mu.Unlock()
		held = append(held, r)
	}
	r := startWithout(t, w, func(c *Config) { c.MaxOpenCalls = 2 })
	s := openSession(t, t.Context(), r.client, hello("orders"))
	for id := range uint64(3) {
		sendCalls(t, s, callPrepareOf(id, newPrepare("orders")))
	}
	md, _ := wantError(t, resultError(receiveResults(t, s, 1)[2]), codes.ResourceExhausted, outboxv1.ErrorReason_ERROR_REASON_QUOTA_EXCEEDED)
	if md["quota"] != "open_calls" {
		t.Errorf("metadata %v", md)
	}
	mu.Lock()
	for _, q := range held {
		q.Done(q, store.Answer{Shards: 1})
	}
	held = nil
	mu.Unlock()
	if got := receiveResults(t, s, 2); got[0].GetStatus() != nil || got[1].GetStatus() != nil {
		t.Fatalf("results %v", got)
	}
	sendCalls(t, s, callPrepareOf(9, newPrepare("orders")))
	storetest.Eventually(t, 5*time.Second, func() bool { mu.Lock(); defer mu.Unlock(); return len(held) == 1 })
	held[0].Done(held[0], store.Answer{Shards: 1})
	receiveResults(t, s, 1)
}

// A client that sends and never reads neither blocks the writer nor makes the server keep more than a bound.
func TestSessionSlowReader(t *testing.T) {
	w := newMemoryWriter(t)
	r := startWithout(t, w, func(c *Config) { c.MaxOpenCalls = 64 })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := openSession(t, ctx, r.client, hello("orders"))
	stuck := make(chan struct{})
	go func() {
		defer close(stuck)
		for id := uint64(0); ; id++ {
			// Refused calls are answered with an error, which fills the client's window soonest.
			calls := &outboxv1.SessionRequest_Calls{}
			for range 64 {
				calls.Calls = append(calls.Calls, &outboxv1.SessionRequest_Call{CallId: id})
			}
			if s.Send(&outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Calls_{Calls: calls}}) != nil {
				return
			}
		}
	}()
	live := func() *session {
		r.sessions.mu.Lock()
		defer r.sessions.mu.Unlock()
		return r.sessions.bySource["orders"][0]
	}()
	storetest.Eventually(t, 10*time.Second, func() bool {
		live.mu.Lock()
		defer live.mu.Unlock()
		return len(live.results) >= 2*64
	})
	// Others are served meanwhile.
	other := openSession(t, t.Context(), r.client, hello("orders"))
	for id := range uint64(100) {
		sendCalls(t, other, callPrepareOf(id, newPrepare("orders")))
	}
	receiveResults(t, other, 100)
	live.mu.Lock()
	if n := len(live.results); n > 2*64+maxCallsOfProto {
		t.Errorf("%d results are queued", n)
	}
	live.mu.Unlock()
	cancel()
	<-stuck
}

// broken is one SessionBroke.
type broken struct {
	source, instance string
	undecided        []store.Parked
}

// watcher keeps what it is told.
type watcher struct {
	opened chan string
	broke  chan broken
}

func newWatcher() *watcher {
	return &watcher{opened: make(chan string, 16), broke: make(chan broken, 16)}
}

func (w *watcher) SessionOpened(source string, _ []string) { w.opened <- source }
func (w *watcher) SessionBroke(source, instance string, undecided []store.Parked) {
	w.broke <- broken{source, instance, undecided}
}

// A session that breaks reports what it prepared and did not hear the end of, and nothing else.
func TestSessionBreakReportsUndecided(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	w := newWatcher()
	r.Sessions().Watch(w)
	ctx, cancel := context.WithCancel(t.Context())
	s := openSession(t, ctx, r.client, hello("orders", "default"))
	if src := <-w.opened; src != "orders" {
		t.Fatalf("opened %q", src)
	}
	undecided, committed, aborted, private := newPrepare("orders"), newPrepare("orders"), newPrepare("orders"), newPrepare("orders")
	private.DatabaseTransaction.Mode = outboxv1.DatabaseMode_DATABASE_MODE_CLIENT_ONLY
	sendCalls(t, s, callPrepareOf(1, undecided), callPrepareOf(2, committed), callPrepareOf(3, aborted), callPrepareOf(4, private))
	receiveResults(t, s, 4)
	sendCalls(t, s,
		callCommitOf(5, &outboxv1.CommitRequest{Source: "orders", TransactionId: committed.GetTransactionId()}),
		callAbortOf(6, &outboxv1.AbortRequest{Source: "orders", TransactionId: aborted.GetTransactionId()}))
	receiveResults(t, s, 2)
	cancel()
	b := <-w.broke
	if b.source != "orders" || b.instance != "pod-1" || len(b.undecided) != 1 ||
		b.undecided[0].Key.Transaction != store.TransactionID(undecided.GetTransactionId()) || b.undecided[0].Database.XID != 700 {
		t.Fatalf("broke: %+v", b)
	}
}

// A Prepare that is answered after its session broke is reported too.
func TestLateAnswerIsReported(t *testing.T) {
	held := make(chan *store.Request, 1)
	mw := newMemoryWriter(t)
	mw.answer = func(r *store.Request) { held <- r }
	r := startWithout(t, mw)
	w := newWatcher()
	r.Sessions().Watch(w)
	ctx, cancel := context.WithCancel(t.Context())
	s := openSession(t, ctx, r.client, hello("orders"))
	sendCalls(t, s, callPrepareOf(1, newPrepare("orders")))
	req := <-held
	cancel()
	storetest.Eventually(t, 5*time.Second, func() bool { return metric(t, r, "outbox_sessions") == 0 })
	req.Done(req, store.Answer{Shards: 1})
	if b := <-w.broke; len(b.undecided) != 1 || b.undecided[0].Key != req.Key {
		t.Fatalf("broke: %+v", b)
	}
}

// answerer answers check questions as its database says.
func answerer(t testing.TB, s outboxv1.OutboxService_SessionClient, answer func(*outboxv1.SessionResponse_CheckQuestion) []*outboxv1.SessionRequest_CheckAnswers) <-chan struct{} {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			resp, err := s.Recv()
			if err != nil {
				return
			}
			if q := resp.GetCheckQuestion(); q != nil {
				for _, a := range answer(q) {
					if s.Send(&outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_CheckAnswers_{CheckAnswers: a}}) != nil {
						return
					}
				}
			}
		}
	}()
	return done
}

// saying answers every transaction with one outcome.
func saying(o outboxv1.SessionRequest_CheckAnswer_Outcome, evidence string) func(*outboxv1.SessionResponse_CheckQuestion) []*outboxv1.SessionRequest_CheckAnswers {
	return func(q *outboxv1.SessionResponse_CheckQuestion) []*outboxv1.SessionRequest_CheckAnswers {
		m := &outboxv1.SessionRequest_CheckAnswers{QuestionId: q.GetQuestionId()}
		for _, tx := range q.GetTransactions() {
			m.Answers = append(m.Answers, &outboxv1.SessionRequest_CheckAnswer{TransactionId: tx.GetTransactionId(), Outcome: o, Evidence: evidence})
		}
		return []*outboxv1.SessionRequest_CheckAnswers{m}
	}
}

func checkOf(ids ...[]byte) (txs []*outboxv1.SessionResponse_CheckTransaction) {
	for _, id := range ids {
		txs = append(txs, &outboxv1.SessionResponse_CheckTransaction{TransactionId: id, DatabaseTransaction: &outboxv1.DatabaseTransaction{Xid: 700}})
	}
	return txs
}

const (
	saysCommitted = outboxv1.SessionRequest_CheckAnswer_OUTCOME_COMMITTED
	saysAborted   = outboxv1.SessionRequest_CheckAnswer_OUTCOME_ABORTED
	saysRunning   = outboxv1.SessionRequest_CheckAnswer_OUTCOME_IN_PROGRESS
	saysUnknown   = outboxv1.SessionRequest_CheckAnswer_OUTCOME_UNKNOWN
)

func TestAsk(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	r.register(t, "payments")
	ask := func(t *testing.T, source, database string, ids ...[]byte) ([]*outboxv1.SessionRequest_CheckAnswer, error) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		return r.Sessions().Ask(ctx, source, database, checkOf(ids...))
	}
	open := func(t *testing.T, source, instance string, answer func(*outboxv1.SessionResponse_CheckQuestion) []*outboxv1.SessionRequest_CheckAnswers) outboxv1.OutboxService_SessionClient {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		h := hello(source, "default")
		h.Instance = instance
		s := openSession(t, ctx, r.client, h)
		done := answerer(t, s, answer)
		t.Cleanup(func() {
			cancel()
			<-done
			storetest.Eventually(t, 5*time.Second, func() bool { return len(r.sessions.candidates(source, "default", nil)) == 0 })
		})
		return s
	}
	silent := func(*outboxv1.SessionResponse_CheckQuestion) []*outboxv1.SessionRequest_CheckAnswers { return nil }

	t.Run("nobody", func(t *testing.T) {
		if _, err := ask(t, "orders", "default", newID()); !errors.Is(err, ErrNoSession) {
			t.Fatalf("%v, want ErrNoSession", err)
		}
		open(t, "payments", "p", saying(saysCommitted, ""))
		if _, err := ask(t, "orders", "default", newID()); !errors.Is(err, ErrNoSession) {
			t.Fatalf("%v: another source was asked", err)
		}
		if _, err := ask(t, "payments", "other", newID()); !errors.Is(err, ErrNoSession) {
			t.Fatalf("%v: it cannot answer for that database", err)
		}
	})
	t.Run("committed", func(t *testing.T) {
		open(t, "orders", "pod-1", saying(saysCommitted, `{"timeline":"1"}`))
		got, err := ask(t, "orders", "default", newID(), newID())
		if err != nil || len(got) != 2 {
			t.Fatalf("%v, %v", got, err)
		}
		for _, v := range got {
			if v.GetOutcome() != saysCommitted || !strings.Contains(v.GetEvidence(), `"timeline":"1"`) || !strings.Contains(v.GetEvidence(), `"instance":"pod-1"`) {
				t.Errorf("verdict %v", v)
			}
		}
	})
	t.Run("silent one first", func(t *testing.T) {
		open(t, "orders", "silent", silent)
		open(t, "orders", "answering", saying(saysAborted, ""))
		for range 2 { // whoever is first
			got, err := ask(t, "orders", "default", newID())
			if err != nil || len(got) != 1 || got[0].GetOutcome() != saysAborted || !strings.Contains(got[0].GetEvidence(), `"answering"`) {
				t.Fatalf("%v, %v", got, err)
			}
		}
	})
	t.Run("unknown is asked elsewhere", func(t *testing.T) {
		open(t, "orders", "standby", saying(saysUnknown, ""))
		open(t, "orders", "primary", saying(saysCommitted, ""))
		for range 2 {
			got, err := ask(t, "orders", "default", newID())
			if err != nil || len(got) != 1 || got[0].GetOutcome() != saysCommitted {
				t.Fatalf("%v, %v", got, err)
			}
		}
	})
	t.Run("running", func(t *testing.T) {
		open(t, "orders", "pod-1", saying(saysRunning, ""))
		got, err := ask(t, "orders", "default", newID())
		if err != nil || len(got) != 1 || got[0].GetOutcome() != saysRunning {
			t.Fatalf("%v, %v", got, err)
		}
	})
	t.Run("breaks while asked", func(t *testing.T) {
		var s outboxv1.OutboxService_SessionClient
		s = open(t, "orders", "pod-1", func(*outboxv1.SessionResponse_CheckQuestion) []*outboxv1.SessionRequest_CheckAnswers {
			_ = s.CloseSend()
			return nil
		})
		began := time.Now()
		got, err := ask(t, "orders", "default", newID())
		if err != nil || len(got) != 0 || time.Since(began) > 4*time.Second {
			t.Fatalf("%v, %v after %s; want an empty answer at once", got, err, time.Since(began))
		}
	})
	t.Run("lies are dropped", func(t *testing.T) {
		asked := newID()
		open(t, "orders", "pod-1", func(q *outboxv1.SessionResponse_CheckQuestion) []*outboxv1.SessionRequest_CheckAnswers {
			a := func(question uint64, id []byte, o outboxv1.SessionRequest_CheckAnswer_Outcome, evidence string) *outboxv1.SessionRequest_CheckAnswers {
				return &outboxv1.SessionRequest_CheckAnswers{QuestionId: question, Answers: []*outboxv1.SessionRequest_CheckAnswer{{TransactionId: id, Outcome: o, Evidence: evidence}}}
			}
			return []*outboxv1.SessionRequest_CheckAnswers{
				a(q.GetQuestionId()+77, asked, saysCommitted, ""), // no such question
				a(q.GetQuestionId(), newID(), saysCommitted, ""),  // not asked for
				a(q.GetQuestionId(), asked, saysAborted, `{"n":1,"big":1e99999,"deep":{"x":1},"nul":"a\u0000b\ud800","ok":true}`),
			}
		})
		got, err := ask(t, "orders", "default", asked)
		if err != nil || len(got) != 1 || got[0].GetOutcome() != saysAborted ||
			got[0].GetEvidence() != `{"database":{"n":1,"nul":"ab`+"\ufffd"+`","ok":true},"instance":"pod-1","sdk":"test/1"}` {
			t.Fatalf("%v, %v", got, err)
		}
		if n := metric(t, r, "outbox_stray_check_answers_total"); n < 2 {
			t.Errorf("%v stray answers, want 2 or more", n)
		}
	})
	t.Run("no such outcome", func(t *testing.T) {
		open(t, "orders", "pod-1", saying(99, "[1]"))
		got, err := ask(t, "orders", "default", newID())
		if err != nil || len(got) != 1 || got[0].GetOutcome() != saysUnknown {
			t.Fatalf("%v, %v", got, err)
		}
	})
	t.Run("who prepared is asked first", func(t *testing.T) {
		for _, name := range []string{"a", "b", "c"} {
			open(t, "orders", name, saying(saysCommitted, ""))
		}
		id := newID()
		for _, ses := range r.sessions.candidates("orders", "default", nil) {
			if ses.instance == "b" {
				ses.mu.Lock()
				ses.undecided[store.TransactionID(id)] = store.DatabaseTransaction{}
				ses.mu.Unlock()
			}
		}
		for range 6 {
			got, err := ask(t, "orders", "default", id)
			if err != nil || len(got) != 1 || !strings.Contains(got[0].GetEvidence(), `"instance":"b"`) {
				t.Fatalf("%v, %v; want b to answer", got, err)
			}
		}
	})
}

// Sessions are told to move long before their connection is cut.
func TestSessionIsAskedToMove(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t), func(c *Config) { c.MaxConnectionAge = time.Second })
	s := openSession(t, t.Context(), r.client, hello("orders"))
	resp, err := s.Recv()
	if err != nil || resp.GetDrainNotice() == nil {
		t.Fatalf("%v, %v; want a notice", resp, err)
	}
}

func TestSessionLimit(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t), func(c *Config) { c.MaxSessions = 1 })
	openSession(t, t.Context(), r.client, hello("orders"))
	s, err := r.client.Session(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Hello_{Hello: hello("orders")}}); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = s.Recv()
	}
	wantError(t, err, codes.ResourceExhausted, outboxv1.ErrorReason_ERROR_REASON_QUOTA_EXCEEDED)
}

package server

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/outbox-platform/outbox/store"
)

// submitter is what the server needs of store.Writer. Benchmarks of the RPC cost alone put a store-less one here.
type submitter interface {
	Submit(*store.Request) error
}

// call is one Prepare, Publish, Commit or Abort on its way to the store and back. It is one allocation for the common
// transaction of one event.
type call struct {
	request  store.Request
	database store.DatabaseTransaction
	one      [1]store.Event

	server  *Server
	source  *source
	started time.Time
	bytes   int64
	// Where the answer goes: a session, or else wait.
	session *session
	id      uint64
	wait    chan store.Answer
}

// key names the transaction.
func (c *call) key(kind store.Kind, src *source, id []byte) {
	c.request.Kind = kind
	c.request.Key = store.Key{Source: src.ID, Transaction: store.TransactionID(id)}
}

// submit hands a validated call to the writer. After nil its answer will come; after an error nothing happened.
func (c *call) submit() *apiError {
	s := c.server
	open := c.source.open.Add(1)
	if most := s.cfg.MaxSourceCalls; most > 0 && open > int64(most) {
		c.source.open.Add(-1)
		return quotaExceeded(c.source.Name, "calls", most)
	}
	c.request.Opaque = c
	c.request.Done = answered
	s.metrics.openCalls.Inc()
	if err := s.writer.Submit(&c.request); err != nil {
		s.metrics.openCalls.Dec()
		c.source.open.Add(-1)
		return transactionError(err, c.request.Key.Transaction)
	}
	return nil
}

// answered is store.Request.Done of every call. It runs on a goroutine of the writer and never blocks.
func answered(r *store.Request, a store.Answer) {
	c := r.Opaque.(*call) //nolint:forcetypeassert // submit put it there
	c.source.open.Add(-1)
	c.server.metrics.openCalls.Dec()
	if c.session != nil {
		c.session.answer(c, a)
		return
	}
	c.wait <- a // has room for the one answer
}

// await waits for the answer of a unary call.
func (c *call) await(ctx context.Context) (store.Answer, *apiError) {
	select {
	case a := <-c.wait:
		return a, c.outcome(a.Err)
	case <-ctx.Done():
		return store.Answer{}, otherError(ctx.Err())
	}
}

// outcome counts an answer and translates its error.
func (c *call) outcome(err error) *apiError {
	e := transactionError(err, c.request.Key.Transaction)
	code := codes.OK
	if e != nil {
		code = e.code
	}
	m := c.server.metrics
	m.observe(c.request.Kind, code, time.Since(c.started))
	switch {
	case e == nil && (c.request.Kind == store.KindPrepare || c.request.Kind == store.KindPublish):
		m.events.Add(float64(len(c.request.Events)))
		m.eventBytes.Add(float64(c.bytes))
	case e != nil && e.code == codes.FailedPrecondition:
		c.contradiction(e)
	}
	return e
}

// contradiction raises the alarm when a source's decision is not the one on record: it and the platform disagree about
// history.
func (c *call) contradiction(e *apiError) {
	c.server.metrics.contradictions.WithLabelValues(kindName(c.request.Kind)).Inc()
	c.server.log.Error("a source contradicts the decision on record", "source", c.source.Name,
		"transaction_id", c.request.Key.Transaction.String(), "call", kindName(c.request.Kind), "state", e.metadata["state"])
}

// kindName is the name of a call in metrics and logs.
func kindName(k store.Kind) string {
	switch k {
	case store.KindPrepare:
		return "prepare"
	case store.KindPublish:
		return "publish"
	case store.KindCommit:
		return "commit"
	case store.KindAbort:
		return "abort"
	}
	return "invalid"
}

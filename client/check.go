package client

import (
	"context"
	"fmt"
	"slices"

	"github.com/google/uuid"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// Outcome is what a source database says about one transaction. Only OutcomeCommitted and OutcomeAborted end it.
type Outcome int32

// The outcomes.
const (
	// OutcomeUnknown: it cannot be said.
	OutcomeUnknown = Outcome(outboxv1.SessionRequest_CheckAnswer_OUTCOME_UNKNOWN)
	// OutcomeCommitted: the transaction is committed.
	OutcomeCommitted = Outcome(outboxv1.SessionRequest_CheckAnswer_OUTCOME_COMMITTED)
	// OutcomeAborted: the transaction has ended and did not commit.
	OutcomeAborted = Outcome(outboxv1.SessionRequest_CheckAnswer_OUTCOME_ABORTED)
	// OutcomeInProgress: it is still running.
	OutcomeInProgress = Outcome(outboxv1.SessionRequest_CheckAnswer_OUTCOME_IN_PROGRESS)
)

// String returns the outcome's name in the API, for example "IN_PROGRESS".
func (o Outcome) String() string {
	switch o {
	case OutcomeCommitted:
		return "COMMITTED"
	case OutcomeAborted:
		return "ABORTED"
	case OutcomeInProgress:
		return "IN_PROGRESS"
	}
	return "UNKNOWN"
}

// CheckTransaction is a transaction that the platform asks about.
type CheckTransaction struct {
	// ID is its id.
	ID uuid.UUID
	// Database is what Prepare said about it.
	Database DatabaseTransaction
}

// Verdict is what a source database says about one transaction.
type Verdict struct {
	// ID is the transaction's id.
	ID uuid.UUID
	// Outcome is the answer.
	Outcome Outcome
	// Reason says why the outcome is unknown, or is a note.
	Reason string
	// Evidence is what the answer rests on, a JSON object.
	Evidence string
	// NaiveWrong: pg_xact_status alone would have said something else that is wrong.
	NaiveWrong bool
	// FailedOverTo is the timeline that the server is on, when nothing but that keeps an unmarked transaction from being
	// OutcomeAborted; else 0. The outcome is OutcomeUnknown then.
	FailedOverTo uint32
}

// Database is a source database that is registered with a client. pgxoutbox.Register and sqloutbox.Register make one.
type Database interface {
	// Check answers for transactions. It leaves out those it cannot say anything about. It is called concurrently.
	Check(ctx context.Context, transactions []CheckTransaction) []Verdict
	// Run does the database's upkeep (draining spilled requests, deleting markers) until ctx ends.
	Run(ctx context.Context) error
}

const (
	// maxChecks bounds the check-back questions that are worked on at a time. More are not answered: the server asks again.
	maxChecks = 8
	// maxReason and maxEvidence are the limits of the API.
	maxReason, maxEvidence = 1024, 4096
)

// RegisterDatabase lets the client answer check-back questions about a source database and keeps its upkeep running until
// Close. An empty name is "default". A name can be registered once.
func (c *Client) RegisterDatabase(name string, db Database) error {
	if name == "" {
		name = DefaultDatabase
	}
	if err := c.addDatabase(name, db); err != nil {
		return err
	}
	for _, s := range c.sessions {
		s.renew() // Hello names the databases
	}
	return nil
}

func (c *Client) addDatabase(name string, db Database) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return errClosed
	}
	if _, again := c.databases[name]; again {
		return fmt.Errorf("client: database %q is registered already", name)
	}
	c.databases[name] = db
	c.wg.Go(func() { c.keepRunning(name, db) })
	c.startLocked()
	return nil
}

// Registered returns the database registered under a name, or nil.
func (c *Client) Registered(name string) Database {
	if name == "" {
		name = DefaultDatabase
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.databases[name]
}

func (c *Client) databaseNames() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	names := make([]string, 0, len(c.databases))
	for n := range c.databases {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// databasesChanged tells whether there are other databases than when there were so many. None is ever taken away.
func (c *Client) databasesChanged(known int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.databases) != known
}

// keepRunning runs a database's upkeep and starts it again when it fails.
func (c *Client) keepRunning(name string, db Database) {
	delays := c.retryDelays()
	delays.MaxInterval = c.cfg.MaxReconnectDelay
	for c.upkeep.Err() == nil {
		err := guard(func() error { return db.Run(c.upkeep) })
		if c.upkeep.Err() != nil {
			return
		}
		c.cfg.Logger.Warn("upkeep of a source database ended; starting it again", "database", name, "error", err)
		sleep(c.upkeep, delays.NextBackOff())
	}
}

// answerCheck works on one question in the background.
func (c *Client) answerCheck(st *stream, q *outboxv1.SessionResponse_CheckQuestion) {
	select {
	case c.checking <- struct{}{}:
	default:
		return
	}
	c.wg.Go(func() {
		defer func() { <-c.checking }()
		ctx, cancel := context.WithTimeout(c.life, c.cfg.CheckTimeout)
		defer cancel()
		answers := c.verdicts(ctx, q)
		if len(answers) == 0 {
			return
		}
		c.stats.checked.Add(uint64(len(answers)))
		st.answer(&outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_CheckAnswers_{
			CheckAnswers: &outboxv1.SessionRequest_CheckAnswers{QuestionId: q.GetQuestionId(), Answers: answers},
		}})
	})
}

// verdicts asks the database. A panic in it must not take the service down, and is no answer.
func (c *Client) verdicts(ctx context.Context, q *outboxv1.SessionResponse_CheckQuestion) []*outboxv1.SessionRequest_CheckAnswer {
	db := c.Registered(q.GetDatabase())
	if db == nil {
		return nil
	}
	asked := make([]CheckTransaction, 0, len(q.GetTransactions()))
	for _, t := range q.GetTransactions() {
		if id, err := uuid.FromBytes(t.GetTransactionId()); err == nil {
			asked = append(asked, CheckTransaction{ID: id, Database: databaseTransactionOf(t.GetDatabaseTransaction())})
		}
	}
	var verdicts []Verdict
	err := guard(func() error {
		verdicts = db.Check(ctx, asked)
		return nil
	})
	if err != nil {
		c.cfg.Logger.Error("answering a check-back question", "database", q.GetDatabase(), "error", err)
	}
	out := make([]*outboxv1.SessionRequest_CheckAnswer, 0, len(verdicts))
	for _, v := range verdicts {
		out = append(out, &outboxv1.SessionRequest_CheckAnswer{
			TransactionId: v.ID[:], Outcome: outboxv1.SessionRequest_CheckAnswer_Outcome(v.Outcome),
			Reason: clip(v.Reason, maxReason), Evidence: evidence(v.Evidence), NaiveWrong: v.NaiveWrong,
			FailedOverTo: v.FailedOverTo,
		})
	}
	return out
}

// evidence leaves out what would be cut: half a JSON object is none.
func evidence(s string) string {
	if len(s) > maxEvidence {
		return ""
	}
	return s
}

// guard runs f and turns a panic into an error.
func guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return f()
}

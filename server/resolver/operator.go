package resolver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

// PreconditionError: an operator's wish cannot be granted as things are.
type PreconditionError struct{ Why string }

func (e *PreconditionError) Error() string { return e.Why }

// FailedPrecondition tells servers what kind of error it is.
func (e *PreconditionError) FailedPrecondition() bool { return true }

// Check asks about one transaction now, both ways, decides it if the answer is conclusive, and returns the best answer:
// OUTCOME_UNKNOWN without a method when nobody could be asked. The state of the transaction is the caller's to read.
func (r *Resolver) Check(ctx context.Context, transaction store.Parked) (*outboxv1.CheckTransactionResponse, error) {
	if transaction.Database == nil {
		return nil, &PreconditionError{Why: "it has no database transaction"}
	}
	r.mu.Lock()
	l := r.laneLocked(laneKey{source: transaction.Key.Source, database: transaction.Database.Database})
	r.mu.Unlock()
	if l == nil {
		return nil, store.ErrUnavailable
	}
	began := time.Now()
	best, answered := l.inquire(ctx, []store.Parked{transaction}, nil)[transaction.Key]
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	resp := &outboxv1.CheckTransactionResponse{Outcome: unknown, Reason: "nobody could be asked: no session of the source, and no database that answers"}
	if !answered {
		return resp, nil
	}
	resp.Outcome, resp.Reason, resp.Evidence, resp.Method = best.outcome, best.reason, best.evidence, best.method
	if !conclusive(best.outcome) || best.over {
		return resp, nil
	}
	_, err := r.writer.Do(ctx, decision(best, r.name))
	var other *store.DecidedError
	if err != nil && !errors.As(err, &other) {
		return nil, fmt.Errorf("writing the decision: %w", err)
	}
	r.outcome(best, began, err)
	return resp, nil
}

// ConfirmFailover decides every in-doubt transaction that was prepared on a timeline of a source database whose primary an
// operator knows to be fenced: by its marker on the present primary. The database is asked directly, or without a dsn_ref, the
// source's live sessions are. With only, it decides nothing and counts.
func (r *Resolver) ConfirmFailover(ctx context.Context, src *store.Source, database string, timeline uint32, actor, reason string, only bool) (*outboxv1.ConfirmFailoverResponse, error) {
	ref := ""
	for _, d := range src.Databases {
		if d.Name == database {
			ref = d.DSNRef
		}
	}
	ask := r.askSessions(src.Name, database)
	if ref != "" {
		pool, err := openDatabase(ctx, ref, r.cfg.AskTimeout)
		if err != nil {
			return nil, &PreconditionError{Why: err.Error()}
		}
		defer pool.Close()
		ask = func(ctx context.Context, concerned []store.Parked) (map[store.Key]finding, error) {
			return judgeAll(ctx, pool, concerned)
		}
	}
	resp := &outboxv1.ConfirmFailoverResponse{}
	for page := ""; ; {
		found, next, err := r.store.InDoubtTransactions(ctx, src.Name, page, 0)
		if err != nil {
			return nil, err
		}
		var concerned []store.Parked
		for i := range found {
			if d := found[i].Head.Database; d != nil && d.Database == database && d.Timeline == timeline {
				concerned = append(concerned, found[i].Head)
			}
		}
		if err := r.failOver(ctx, ask, concerned, timeline, actor, reason, only, resp); err != nil {
			return nil, err
		}
		if page = next; page == "" {
			return resp, nil
		}
	}
}

// inquirer finds out about transactions of one source database.
type inquirer func(ctx context.Context, concerned []store.Parked) (map[store.Key]finding, error)

// askSessions asks live sessions of a source that has no dsn_ref.
func (r *Resolver) askSessions(source, database string) inquirer {
	return func(ctx context.Context, concerned []store.Parked) (map[store.Key]finding, error) {
		ctx, cancel := context.WithTimeout(ctx, r.cfg.AskTimeout)
		defer cancel()
		questions, keys := questionsAbout(concerned)
		answers, err := r.sessions.Ask(ctx, source, database, questions)
		if err != nil {
			return nil, fmt.Errorf("source %q has no dsn_ref for database %q, and no live session of it answers (%w): "+
				"start an instance, or decide its transactions one by one", source, database, err)
		}
		found := make(map[store.Key]finding, len(answers))
		for _, a := range answers {
			if k, asked := keys[store.TransactionID(a.GetTransactionId())]; asked {
				found[k] = finding{
					outcome: a.GetOutcome(), evidence: a.GetEvidence(), naiveWrong: a.GetNaiveWrong(), method: methodCheckBack,
					otherTimeline: a.GetFailedOverTo() != 0, failedOver: a.GetFailedOverTo(),
				}
			}
		}
		return found, nil
	}
}

// failOver decides one page.
func (r *Resolver) failOver(ctx context.Context, ask inquirer, concerned []store.Parked, timeline uint32, actor, reason string, only bool, resp *outboxv1.ConfirmFailoverResponse) error {
	if len(concerned) == 0 {
		return nil
	}
	began := time.Now()
	seen, err := ask(ctx, concerned)
	if err != nil {
		return &PreconditionError{Why: err.Error()}
	}
	answers := make([]answer, 0, len(concerned))
	for _, t := range concerned {
		f := seen[t.Key]
		a := answer{key: t.Key, method: cmp.Or(f.method, methodDirect), outcome: f.outcome, evidence: f.evidence, naiveWrong: f.naiveWrong}
		if f.otherTimeline && f.failedOver > timeline {
			a.method, a.outcome = methodOperator, aborted
			a.evidence = confirmed(f.evidence, reason)
		}
		answers = append(answers, a)
	}
	for _, a := range r.remember(ctx, concerned, answers) {
		switch {
		case a.over:
			continue
		case a.outcome == committed:
			resp.Committed++
		case a.outcome == aborted:
			resp.Aborted++
		default:
			resp.Undecided++
			continue
		}
		if only {
			continue
		}
		_, err := r.writer.Do(ctx, decision(a, actor))
		var other *store.DecidedError
		if err != nil && !errors.As(err, &other) && !errors.Is(err, store.ErrUnknown) {
			return fmt.Errorf("writing a decision: %w", err)
		}
		r.outcome(a, began, err)
	}
	return nil
}

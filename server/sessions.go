package server

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"time"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

// ErrNoSession: no live session of the source can answer for the database.
var ErrNoSession = errors.New("no live session can answer for the source database")

// SessionWatcher is told what becomes of sessions. Its methods are called by goroutines that serve callers: they must
// not block.
type SessionWatcher interface {
	// SessionOpened: a source can answer for these databases now.
	SessionOpened(source string, databases []string)
	// SessionBroke: a session has ended, and these transactions that it prepared are undecided; of each only Key and
	// Database are set. It may be called more than once for one session: answers of Prepares that were under way come later.
	SessionBroke(source, instance string, undecided []store.Parked)
}

// rank orders answers by what they tell: 2 ends the question for good.
func rank(a *outboxv1.SessionRequest_CheckAnswer) int {
	switch a.GetOutcome() {
	case outboxv1.SessionRequest_CheckAnswer_OUTCOME_COMMITTED, outboxv1.SessionRequest_CheckAnswer_OUTCOME_ABORTED:
		return 2
	case outboxv1.SessionRequest_CheckAnswer_OUTCOME_IN_PROGRESS:
		return 1
	}
	return 0
}

// askPatience is how long Ask waits for one session before it asks the next one too.
const askPatience = 250 * time.Millisecond

// maxAsked is how many transactions one question may hold.
const maxAsked = 1000

// Sessions are the live sessions of this server. Safe for concurrent use.
type Sessions struct {
	metrics *metrics
	most    int
	stop    chan struct{} // closed: sessions end now

	mu       sync.Mutex
	next     uint64
	live     map[uint64]*session
	bySource map[string][]*session
	draining bool
	stopped  bool
	watcher  SessionWatcher
}

func newSessions(m *metrics, most int) *Sessions {
	return &Sessions{
		metrics:  m,
		most:     most,
		stop:     make(chan struct{}),
		live:     make(map[uint64]*session),
		bySource: make(map[string][]*session),
	}
}

// Watch makes w hear of sessions from now on. There is one watcher at most; call it before Serve.
func (s *Sessions) Watch(w SessionWatcher) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watcher = w
}

func (s *Sessions) add(ses *session) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.draining:
		return errDraining
	case len(s.live) >= s.most:
		return quotaExceeded(ses.source.Name, "sessions", s.most)
	}
	s.next++
	ses.id = s.next
	s.live[ses.id] = ses
	s.bySource[ses.source.Name] = append(s.bySource[ses.source.Name], ses)
	s.metrics.sessions.Inc()
	if s.watcher != nil && len(ses.databases) > 0 {
		s.watcher.SessionOpened(ses.source.Name, ses.databases)
	}
	return nil
}

func (s *Sessions) remove(ses *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.live, ses.id)
	list := s.bySource[ses.source.Name]
	for i := range list {
		if list[i] == ses {
			// A copy: Ask may be reading the old one.
			list = append(append(make([]*session, 0, len(list)), list[:i]...), list[i+1:]...)
			break
		}
	}
	if len(list) == 0 {
		delete(s.bySource, ses.source.Name)
	} else {
		s.bySource[ses.source.Name] = list
	}
	s.metrics.sessions.Dec()
}

func (s *Sessions) broke(ses *session, undecided []store.Parked) {
	s.mu.Lock()
	w := s.watcher
	s.mu.Unlock()
	s.metrics.orphaned.Add(float64(len(undecided)))
	if w != nil {
		w.SessionBroke(ses.source.Name, ses.instance, undecided)
	}
}

// drain tells every session to move, and refuses new ones.
func (s *Sessions) drain(grace time.Duration) {
	s.mu.Lock()
	s.draining = true
	live := make([]*session, 0, len(s.live))
	for _, ses := range s.live {
		live = append(live, ses)
	}
	s.mu.Unlock()
	for _, ses := range live {
		ses.tell(drainNotice(grace))
	}
}

// end makes every session end now.
func (s *Sessions) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stopped {
		s.stopped = true
		close(s.stop)
	}
}

// question is one Ask under way. Several sessions may be asked it, one after the other.
type question struct {
	wanted  map[store.TransactionID]struct{}
	replies chan reply
}

type reply struct {
	session *session
	answers []*outboxv1.SessionRequest_CheckAnswer
	gone    bool
}

// reply passes answers on without ever blocking; what a flood leaves no room for is lost.
func (q *question) reply(s *session, answers []*outboxv1.SessionRequest_CheckAnswer, gone bool) {
	select {
	case q.replies <- reply{session: s, answers: answers, gone: gone}:
	default:
	}
}

// Ask asks live sessions of a source what became of transactions of one of its databases: first those that prepared them,
// then the others, the next one as soon as one has failed to answer for askPatience. It returns the best answer for each
// transaction that got one; of several conclusive ones the first. It ends when all are conclusive or in progress, when no
// session is left to ask, or with ctx; then without an error if there is any answer.
// The evidence of an answer is a JSON object that PostgreSQL can store: who answered, and what of its own evidence is plain.
//
// ErrNoSession: nobody could be asked.
func (s *Sessions) Ask(ctx context.Context, source, database string, transactions []*outboxv1.SessionResponse_CheckTransaction) ([]*outboxv1.SessionRequest_CheckAnswer, error) {
	transactions = transactions[:min(len(transactions), maxAsked)]
	q := &question{wanted: make(map[store.TransactionID]struct{}, len(transactions))}
	for _, t := range transactions {
		if len(t.GetTransactionId()) == len(store.TransactionID{}) {
			q.wanted[store.TransactionID(t.GetTransactionId())] = struct{}{}
		}
	}
	candidates := s.candidates(source, database, q.wanted)
	if len(candidates) == 0 {
		return nil, ErrNoSession
	}
	q.replies = make(chan reply, 4*len(candidates)+16)
	asked := make(map[*session]uint64)
	defer func() {
		for ses, id := range asked {
			ses.forget(id)
		}
	}()
	best := make(answers, len(q.wanted))
	patience := time.NewTimer(0) // the first one is asked at once
	defer patience.Stop()
	waiting := make(map[*session]int) // how many answers each still owes
	for {
		select {
		case <-patience.C:
			candidates = askNext(candidates, q, database, transactions, asked, waiting)
			if len(waiting) == 0 {
				return best.list(len(asked))
			}
			if len(candidates) > 0 {
				patience.Reset(askPatience)
			}
		case r := <-q.replies:
			q.merge(best, r)
			if best.settled(len(q.wanted)) {
				return best.list(len(asked))
			}
			if waiting[r.session] -= len(r.answers); r.gone || waiting[r.session] <= 0 {
				delete(waiting, r.session)
				patience.Reset(0)
			}
		case <-ctx.Done():
			if len(best) > 0 {
				return best.list(len(asked))
			}
			return nil, ctx.Err()
		}
	}
}

// askNext asks the first candidate that takes the question, and returns those behind it.
func askNext(candidates []*session, q *question, database string, transactions []*outboxv1.SessionResponse_CheckTransaction,
	asked map[*session]uint64, waiting map[*session]int,
) []*session {
	for len(candidates) > 0 {
		ses := candidates[0]
		candidates = candidates[1:]
		if id, ok := ses.ask(q, database, transactions); ok {
			asked[ses] = id
			waiting[ses] = len(q.wanted)
			break
		}
	}
	return candidates
}

// answers are the best so far.
type answers map[store.TransactionID]*outboxv1.SessionRequest_CheckAnswer

// merge keeps the best answer for each transaction; of equals the first.
func (q *question) merge(best answers, r reply) {
	for _, a := range r.answers {
		id := store.TransactionID(a.GetTransactionId())
		if old, have := best[id]; !have || rank(a) > rank(old) {
			best[id] = a
		}
	}
}

// settled reports whether asking others could not tell more.
func (best answers) settled(wanted int) bool {
	if len(best) < wanted {
		return false
	}
	for _, a := range best {
		if rank(a) == 0 {
			return false
		}
	}
	return true
}

func (best answers) list(asked int) ([]*outboxv1.SessionRequest_CheckAnswer, error) {
	if asked == 0 {
		return nil, ErrNoSession
	}
	all := make([]*outboxv1.SessionRequest_CheckAnswer, 0, len(best))
	for _, a := range best {
		all = append(all, a)
	}
	return all, nil
}

// candidates are the sessions that can answer, those that prepared one of the transactions first.
func (s *Sessions) candidates(source, database string, wanted map[store.TransactionID]struct{}) []*session {
	s.mu.Lock()
	live := s.bySource[source]
	s.next++ // others take turns
	turn := s.next
	s.mu.Unlock()
	var first, others []*session
	for i := range live {
		ses := live[(turn+uint64(i))%uint64(len(live))] //nolint:gosec // an index
		switch {
		case !ses.answersFor(database):
		case ses.prepared(wanted):
			first = append(first, ses)
		default:
			others = append(others, ses)
		}
	}
	return append(first, others...)
}

func (s *session) answersFor(database string) bool {
	for _, d := range s.databases {
		if d == database {
			return true
		}
	}
	return false
}

// prepared reports whether the session prepared one of the transactions.
func (s *session) prepared(wanted map[store.TransactionID]struct{}) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.undecided) < len(wanted) {
		for id := range s.undecided {
			if _, ok := wanted[id]; ok {
				return true
			}
		}
		return false
	}
	for id := range wanted {
		if _, ok := s.undecided[id]; ok {
			return true
		}
	}
	return false
}

// ask queues a question; false: the session is closed, or has too many.
func (s *session) ask(q *question, database string, transactions []*outboxv1.SessionResponse_CheckTransaction) (id uint64, ok bool) {
	s.server.sessions.mu.Lock()
	s.server.sessions.next++
	id = s.server.sessions.next
	s.server.sessions.mu.Unlock()
	s.mu.Lock()
	if s.closed || len(s.questions) >= maxQuestions {
		s.mu.Unlock()
		return 0, false
	}
	s.questions[id] = q
	s.mu.Unlock()
	return id, s.tell(&outboxv1.SessionResponse{Response: &outboxv1.SessionResponse_CheckQuestion_{
		CheckQuestion: &outboxv1.SessionResponse_CheckQuestion{QuestionId: id, Database: database, Transactions: transactions},
	}})
}

// forget withdraws a question: answers to it are ignored from now on.
func (s *session) forget(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.questions, id)
}

// checkAnswers passes on the answers to a question of ours; answers to other questions, and about transactions that were
// not asked for, are dropped. A source can only answer for itself: the questions of a session are about its source.
func (s *session) checkAnswers(m *outboxv1.SessionRequest_CheckAnswers) {
	s.mu.Lock()
	q := s.questions[m.GetQuestionId()]
	s.mu.Unlock()
	if q == nil {
		s.server.metrics.strayAnswers.Add(float64(len(m.GetAnswers())))
		return
	}
	answers := make([]*outboxv1.SessionRequest_CheckAnswer, 0, len(m.GetAnswers()))
	seen := make(map[store.TransactionID]struct{}, len(m.GetAnswers()))
	for _, a := range m.GetAnswers() {
		id := store.TransactionID(a.GetTransactionId())
		_, wanted := q.wanted[id]
		_, again := seen[id]
		if !wanted || again {
			s.server.metrics.strayAnswers.Inc()
			continue
		}
		seen[id] = struct{}{}
		if _, known := outboxv1.SessionRequest_CheckAnswer_Outcome_name[int32(a.GetOutcome())]; !known {
			a.Outcome = outboxv1.SessionRequest_CheckAnswer_OUTCOME_UNKNOWN
		}
		a.Reason = plainText(a.GetReason())
		a.Evidence = s.evidence(a.GetEvidence())
		answers = append(answers, a)
	}
	q.reply(s, answers, false)
}

// evidence makes the evidence of an answer from what the source sent: who answered, and the plain values of its JSON
// object. Whatever it sent, the result is a JSON object that PostgreSQL can store.
func (s *session) evidence(sent string) string {
	kept := map[string]any{}
	var o map[string]any
	d := json.NewDecoder(strings.NewReader(sent))
	d.UseNumber()
	if d.Decode(&o) == nil {
		for k, v := range o {
			switch v := v.(type) {
			case bool:
				kept[plainText(k)] = v
			case string:
				kept[plainText(k)] = plainText(v)
			case json.Number:
				if n, err := v.Int64(); err == nil {
					kept[plainText(k)] = n
				}
			}
		}
	}
	b, err := json.Marshal(map[string]any{"instance": plainText(s.instance), "sdk": plainText(s.sdk), "database": kept})
	if err != nil {
		return "{}" // such values can always be encoded
	}
	return string(b)
}

// plainText is text without NUL, which PostgreSQL cannot store.
func plainText(text string) string { return strings.ReplaceAll(text, "\x00", "") }

package kafka

import (
	"errors"
	"time"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"

	"github.com/outbox-platform/outbox/relay"
)

// wave is what one transaction is to carry.
type wave struct {
	entries []*entry
	topics  map[string]bool     // of the entries; true: its records go one by one
	pending int                 // handed to librdkafka and not reported by it
	held    map[string][]*entry // of those topics, by topic; the first is under way
	bytes   int64               // of the entries
	begun   time.Time           // its transaction; zero: it came to none

	committed bool
	failure   error            // first reason not to commit
	trouble   *relay.SinkError // that reason, when it passes by itself but not at once
}

// takeWave takes the next wave from a queue, of so many bytes at most but one entry at least. Entries that are to be tried apart go
// with others of their topic only.
func takeWave(queue []*entry, most int64) (*wave, []*entry) {
	w := &wave{topics: make(map[string]bool), held: make(map[string][]*entry)}
	first := queue[0]
	rest := queue[:0:0]
	for i, e := range queue {
		full := len(w.entries) > 0 && (len(w.entries) == maxWaveRecords || w.bytes+e.bytes > most)
		if full && !first.apart {
			rest = append(rest, queue[i:]...)
			break
		}
		if full || e.apart != first.apart || e.apart && e.d.Record.Topic != first.d.Record.Topic {
			rest = append(rest, e)
			continue
		}
		e.verdict, e.err, e.offset = nil, nil, -1
		// Of a topic all or none: a neighbour in its batch would spoil the proof.
		w.topics[e.d.Record.Topic] = w.topics[e.d.Record.Topic] || e.alone
		w.bytes += e.bytes
		w.entries = append(w.entries, e)
	}
	return w, rest
}

// carry puts a wave into a transaction and commits it, or aborts it. An error: the producer is of no use any more.
func (t *transactor) carry(w *wave) error {
	if t.since.IsZero() {
		t.since = time.Now()
	}
	if w.trouble = t.introduce(w); w.trouble != nil {
		return nil //nolint:nilerr // the wave's trouble, not the producer's
	}
	if err := t.rd.BeginTransaction(); err != nil {
		return err
	}
	w.begun = time.Now()
	patience := t.sink.cfg.TransactionTimeout + min(t.sink.cfg.TransactionTimeout, stuckMost)
	t.until = w.begun.Add(patience)
	stuck := time.NewTimer(patience)
	defer stuck.Stop()
	t.send(w)
	if w.failure != nil { // librdkafka took no more of it: it says why when it is asked to commit
		if err := t.commit(w); err != nil {
			return err
		}
	}
	for w.pending > 0 && w.failure == nil && !w.committed {
		select {
		case <-t.wake:
		case <-stuck.C:
			return errStuck
		case <-t.quit:
			return errStopped // whoever is next aborts the transaction
		}
		if err := t.look(w); err != nil {
			return err
		}
	}
	if hold := t.beforeCommit.Load(); w.failure == nil && hold != nil {
		(*hold)()
		if err := t.look(w); err != nil {
			return err
		}
	}
	if w.failure == nil && !w.committed {
		if err := t.commit(w); err != nil {
			return err
		}
	}
	if !w.committed {
		t.client.purge()
	}
	if err := t.awaitReports(w); err != nil {
		return err
	}
	if w.committed {
		t.sink.metrics.committed.Inc()
		return nil
	}
	t.sink.metrics.aborted.Inc()
	return t.outcome(inSlices(t.rd.AbortTransaction, t.unwanted))
}

// introduce makes topics known to the producer, which has its own idea of them.
func (t *transactor) introduce(w *wave) *relay.SinkError {
	for name, alone := range w.topics {
		version, goesAlone := t.sink.topicNews(name)
		w.topics[name] = alone || goesAlone
		if known, ok := t.known[name]; ok && known == version {
			continue
		}
		if _, err := t.rd.GetMetadata(&name, false, int(lookUpTimeout.Milliseconds())); err != nil {
			return &relay.SinkError{Class: relay.ClassCluster, Code: judge(err).Code, Detail: "reading the metadata of a topic: " + err.Error()}
		}
		t.known[name] = version
	}
	return nil
}

// send hands the wave to librdkafka. Records that are to go alone wait in w.held for the one before.
func (t *transactor) send(w *wave) {
	for _, e := range w.entries {
		if w.failure != nil {
			return
		}
		topic := e.d.Record.Topic
		e.alone = w.topics[topic]
		if !e.alone {
			t.hand(w, e)
			continue
		}
		w.held[topic] = append(w.held[topic], e)
		if len(w.held[topic]) == 1 {
			t.hand(w, e)
		}
	}
}

// hand gives one record to librdkafka.
func (t *transactor) hand(w *wave, e *entry) {
	err := t.produce(e)
	if err == nil {
		w.pending++
		if wait := t.afterHandingOver.Load(); wait != nil {
			(*wait)(e.d.Record.Topic)
		}
		return
	}
	if e.verdict = judge(err); e.verdict.Class <= relay.ClassTopic {
		// Nothing was queued: the others go on without it.
		if e.verdict.Class == relay.ClassTopic {
			t.sink.topicFailed(e.d.Record.Topic, e.verdict)
		}
		t.handNext(w, e)
		return
	}
	e.verdict = nil
	w.failure = err
}

// handNext hands over the next record that waited for this one.
func (t *transactor) handNext(w *wave, e *entry) {
	if !e.alone || w.failure != nil {
		return
	}
	topic := e.d.Record.Topic
	w.held[topic] = w.held[topic][1:]
	if len(w.held[topic]) > 0 {
		t.hand(w, w.held[topic][0])
	}
}

// look takes what happened to the wave since the last time. An error: the producer died.
func (t *transactor) look(w *wave) error {
	t.mu.Lock()
	landed, purging, suspect, fatal := t.landed, t.purging, t.suspect, t.fatal
	t.landed = nil
	t.mu.Unlock()
	for _, e := range landed {
		w.pending--
		if err := t.judgeRecord(w, e); err != nil {
			fatal = errors.Join(fatal, err)
		}
	}
	switch {
	case fatal != nil:
		return fatal
	case w.failure != nil:
	case purging:
		w.failure = errPurged
	case suspect:
		// It says why only when it is asked to commit, which it will not do.
		t.mu.Lock()
		t.suspect = false
		t.mu.Unlock()
		return t.commit(w)
	}
	return nil //nolint:nilerr // failures are the wave's
}

// judgeRecord takes one report. An error: the producer is of no use any more, also when librdkafka would go on.
func (t *transactor) judgeRecord(w *wave, e *entry) error {
	s := t.sink
	if e.err == nil && e.offset >= 0 {
		t.handNext(w, e)
		return nil
	}
	if e.err == nil {
		// As in Sink.unproven; here nothing is written twice, as the transaction is aborted.
		s.implied.Add(1)
		w.failure = errImplied
		return nil
	}
	if w.failure == nil {
		w.failure = e.err
	}
	v := judge(e.err)
	switch v.Class { //nolint:exhaustive // the others concern the transaction
	case relay.ClassRecord:
		if w.trouble != nil && w.trouble.Class == relay.ClassRecord {
			w.trouble = nil // it was this record's
		}
		if !e.alone {
			// Its whole batch was refused, and it may have been a neighbour's fault. Alone it gets a verdict of its own.
			s.metrics.solo.Inc()
			e.alone, e.tooLarge = true, v.Code == codeTooLarge
			return nil
		}
		e.verdict = v
	case relay.ClassTopic:
		s.topicFailed(e.d.Record.Topic, v)
		e.verdict = v
	case relay.ClassCluster:
		w.trouble = v
	case relay.ClassFatal:
		return e.err
	}
	return nil
}

// errImplied aborts a transaction with a record whose place nobody knows.
var errImplied = errors.New("acknowledged only by implication")

// commit asks for the commit. When the transaction can only be aborted, the wave has failed. An error: the producer died, or
// what becomes of the transaction is not known.
func (t *transactor) commit(w *wave) error {
	err := inSlices(t.rd.CommitTransaction, t.unwanted)
	var e ck.Error
	switch {
	case err == nil:
		w.committed = true
		return nil
	case !errors.As(err, &e) || !e.TxnRequiresAbort():
		return t.outcome(err)
	}
	if w.failure == nil {
		w.failure = err
	}
	t.blame(w, judge(err))
	return nil
}

// blame finds out whom an error of a transaction concerns that no record was reported with.
func (t *transactor) blame(w *wave, v *relay.SinkError) {
	switch {
	case v.Class != relay.ClassTopic:
		w.trouble = v
	case w.entries[0].apart:
		t.sink.topicFailed(w.entries[0].d.Record.Topic, v)
		for _, e := range w.entries {
			e.verdict = v
		}
	default: // one of its topics; each is looked at, and tried for itself
		t.sink.suspectTopics(w.topics)
		for _, e := range w.entries {
			e.apart = true
		}
	}
}

// awaitReports waits until librdkafka has given back all records of a transaction whose fate is known. That a transaction is
// broken may have been known before the report of the record that broke it, which must not be missed then: the record would be
// tried again with its neighbours, for ever.
func (t *transactor) awaitReports(w *wave) error {
	limit := time.NewTimer(retireWait)
	defer limit.Stop()
	for {
		t.mu.Lock()
		landed := t.landed
		t.landed = nil
		t.mu.Unlock()
		for _, e := range landed {
			w.pending--
			if w.committed || e.err == nil || judge(e.err).Class != relay.ClassRecord {
				continue // purged, mostly
			}
			if err := t.judgeRecord(w, e); err != nil {
				return err
			}
		}
		if w.pending == 0 {
			return nil
		}
		select {
		case <-t.wake:
		case <-limit.C:
			return ck.NewError(ck.ErrTimedOut, "records of an ended transaction are not given back", false)
		}
	}
}

// unwanted reports whether nobody waits for the end of a transaction any more, or has waited long enough.
func (t *transactor) unwanted() bool {
	if !time.Now().Before(t.until) {
		return true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.purging || t.fatal != nil || t.stopped()
}

// outcome is the error of the last call of the transactional API, or why it was given up.
func (t *transactor) outcome(err error) error {
	var e ck.Error
	switch {
	case err == nil || !errors.As(err, &e) || !e.IsRetriable():
		return err
	case t.stopped():
		return errStopped
	case !time.Now().Before(t.until):
		return errStuck
	default:
		return errPurged
	}
}

package store

import (
	"cmp"
	"context"
	"fmt"
	"sync"
	"time"
)

// Kind of a request.
type Kind uint8

// The kinds.
const (
	KindPrepare Kind = iota // store events, undecided
	KindPublish             // store events, committed; commits a PREPARED transaction of the same content
	KindCommit
	KindAbort
)

// Request is one call on its way through the writer. It belongs to the writer from Submit until Done.
type Request struct {
	Kind Kind
	Key  Key
	// Database and Events: only for Prepare (Database required) and Publish (Database nil).
	Database *DatabaseTransaction
	Events   []Event
	// Shards: for Commit and Abort, from the token; 0: unknown, the writer looks it up.
	Shards ShardSet
	// Resolution: for Commit and Abort that did not come from the client itself, and KeptByCaller for Publish; stored with the
	// decision if it wins. A transaction is known for longer with one than without.
	Resolution *Resolution
	// Background: nobody waits for the answer, and there may be thousands of its kind at once. It goes in a batch with others
	// of its kind only, one such batch at a time, and these take a share of the writer's time while others use it, not all.
	Background bool
	// Done is called exactly once, by a goroutine of the writer, if Submit returned nil. It must not block.
	Done func(*Request, Answer)
	// Opaque is the caller's own.
	Opaque any

	enc    encoding
	answer chan Answer // of Do
}

// stores reports whether requests of this kind carry events.
func (k Kind) stores() bool { return k == KindPrepare || k == KindPublish }

// Answer is what became of a request.
type Answer struct {
	// Shards: the token, for Prepare and Publish.
	Shards ShardSet
	// Err: nil, ErrReused, ErrUnknown, *DecidedError, ErrUnavailable, ErrContention, ErrInvalid.
	Err error
}

// Resolution is the evidence of a decision that did not come from the client's own Commit or Abort.
type Resolution struct {
	Method   string // "check-back", "direct" or "operator"; "client" of KeptByCaller
	Evidence []byte // JSON
	Actor    string
}

// KeptByCaller is the Resolution of a Publish whose caller keeps the request and repeats it until it is answered, perhaps long
// after TxRetention. With it the transaction is known for ResolutionRetention, so that the repetition is found to be one. actor
// is the source's name.
func KeptByCaller(actor string) *Resolution {
	return &Resolution{Method: "client", Evidence: []byte(`{"kept_by_caller": true}`), Actor: actor}
}

// WriterConfig sets up a Writer. The zero value of a field means its default.
type WriterConfig struct {
	MaxQueued      int           // requests submitted and not answered; beyond it ErrBacklogFull. Default 16384
	MaxQueuedBytes int64         // their bytes. Default 64 MiB
	MaxBatch       int           // requests in a batch. Default 512
	MaxBatchBytes  int           // bytes in a batch. Default 1 MiB
	SecondWriterAt int           // queue length at which a second batch is put in flight beside the first. Default 64
	MaxWait        time.Duration // how long a request is tried while the store is away before ErrUnavailable. Default 5 s
	// DecisionWait is how long a client's own Commit or Abort may wait for a prepare to share its batch. It does so only
	// while prepares come at least that often. Default 1 ms; negative: never.
	DecisionWait time.Duration
	// OnDecided is told after each batch of which shards something was decided, published or aborted: the hint for relays
	// of the same process. It must not block.
	OnDecided func(ShardSet)
	// OnBatch is told the size of each batch and how long its oldest request waited in the queue. For metrics.
	OnBatch func(requests int, wait, statement time.Duration)
}

func (c WriterConfig) withDefaults() WriterConfig {
	c.MaxQueued = cmp.Or(c.MaxQueued, 16384)
	c.MaxQueuedBytes = cmp.Or(c.MaxQueuedBytes, 64<<20)
	c.MaxBatch = cmp.Or(c.MaxBatch, 512)
	c.MaxBatchBytes = cmp.Or(c.MaxBatchBytes, 1<<20)
	c.SecondWriterAt = cmp.Or(c.SecondWriterAt, 64)
	c.MaxWait = cmp.Or(c.MaxWait, 5*time.Second)
	c.DecisionWait = cmp.Or(c.DecisionWait, time.Millisecond)
	if c.OnDecided == nil {
		c.OnDecided = func(ShardSet) {}
	}
	if c.OnBatch == nil {
		c.OnBatch = func(int, time.Duration, time.Duration) {}
	}
	return c
}

// Writer is the group-commit batcher: one queue, one statement per batch, no linger. Safe for concurrent use.
//
// Order: a request answered before another one is submitted (to any writer of any process) comes before it in the log.
// Requests submitted one after the other by one goroutine, unanswered, keep their order within a batch only; requests of
// one transaction always keep it, because a later one is held until the earlier one is answered.
type Writer struct {
	st      *Store
	cfg     WriterConfig
	queue   queue
	stepped *SteppedWriter // nil, but in a simulation
}

// NewWriter returns a writer over its own connections to st. It works once Run is called.
func NewWriter(st *Store, cfg WriterConfig) *Writer {
	w := &Writer{st: st, cfg: cfg.withDefaults()}
	w.queue.init(w.cfg)
	return w
}

// Run works until ctx ends; then it refuses new requests with ErrUnavailable, answers those it has, and returns. While
// the store is away that takes MaxWait at most, plus the attempt under way.
func (w *Writer) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, w.queue.drain)
	defer stop()
	// The work itself is not cancelled with ctx: what was accepted is answered.
	work := context.WithoutCancel(ctx)
	var loops sync.WaitGroup
	for range writersPerProcess {
		loops.Go(func() { newAppender(w).run(work) })
	}
	loops.Go(func() { newTxLookup(w).run(work) })
	loops.Wait()
	return nil
}

// Submit queues a request. It never blocks. A nil error means that r.Done will be called; ErrBacklogFull, ErrUnavailable
// and ErrInvalid (a Prepare or Publish without events) mean that it will not and nothing happened.
func (w *Writer) Submit(r *Request) error {
	if err := w.queue.admits(); err != nil {
		return err
	}
	if r.Kind.stores() && len(r.Events) == 0 {
		return fmt.Errorf("%w: no events", ErrInvalid)
	}
	r.enc.encode(r, w.st.shardCount, w.cfg.MaxWait, w.now())
	if err := w.queue.submit(r); err != nil {
		r.enc.release()
		return err
	}
	return nil
}

// Do submits r and waits for its answer. If ctx ends first, its error is returned and the request may still take effect.
// It sets r.Done.
func (w *Writer) Do(ctx context.Context, r *Request) (Answer, error) {
	answer := answers.Get().(chan Answer) //nolint:forcetypeassert,errcheck // nothing else is put there
	r.Done = deliverAnswer
	r.answer = answer
	if err := w.Submit(r); err != nil {
		answers.Put(answer)
		return Answer{}, err
	}
	select {
	case a := <-answer:
		answers.Put(answer)
		return a, a.Err
	case <-ctx.Done():
		// The channel stays with the request: its answer may still come.
		return Answer{}, fmt.Errorf("waiting for the writer: %w", context.Cause(ctx))
	}
}

var answers = sync.Pool{New: func() any { return make(chan Answer, 1) }}

func deliverAnswer(r *Request, a Answer) { r.answer <- a }

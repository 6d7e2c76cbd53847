package store

import (
	"context"
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
	// Resolution: for Commit and Abort that did not come from the client itself; stored with the decision if it wins.
	Resolution *Resolution
	// Done is called exactly once, by a goroutine of the writer, if Submit returned nil. It must not block.
	Done func(*Request, Answer)
	// Opaque is the caller's own.
	Opaque any

	enc encoded
}

// Answer is what became of a request.
type Answer struct {
	// Shards: the token, for Prepare and Publish.
	Shards ShardSet
	// Err: nil, ErrReused, ErrUnknown, *DecidedError, ErrUnavailable, ErrContention, ErrInvalid.
	Err error
}

// Resolution is the evidence of a decision that did not come from the client's own Commit or Abort.
type Resolution struct {
	Method   string // "check-back", "direct" or "operator"
	Evidence []byte // JSON
	Actor    string
}

// WriterConfig sets up a Writer. The zero value of a field means its default.
type WriterConfig struct {
	MaxQueued      int           // requests waiting; beyond it ErrBacklogFull. Default 16384
	MaxQueuedBytes int64         // bytes waiting. Default 64 MiB
	MaxBatch       int           // requests in a batch. Default 512
	MaxBatchBytes  int           // bytes in a batch. Default 1 MiB
	SecondWriterAt int           // queue length at which a second batch is put in flight beside the first. Default 64
	MaxWait        time.Duration // how long a request is tried while the store is away before ErrUnavailable. Default 5 s
	// OnAppend is told after each batch to which shards it appended: the hint for relays of the same process. It must not
	// block.
	OnAppend func(ShardSet)
	// OnBatch is told the size of each batch and how long its oldest request waited in the queue. For metrics.
	OnBatch func(requests int, wait, statement time.Duration)
}

// Writer is the group-commit batcher: one queue, one statement per batch, no linger. Safe for concurrent use.
//
// Order: a request answered before another one is submitted (to any writer of any process) comes before it in the log.
// Requests submitted one after the other by one goroutine, unanswered, keep their order within a batch only.
type Writer struct{ writer }

// NewWriter returns a writer over its own connections to st. It works once Run is called.
func NewWriter(st *Store, cfg WriterConfig) *Writer { return newWriter(st, cfg) }

// Run works until ctx ends; then it refuses new requests with ErrUnavailable, answers those it has, and returns.
func (w *Writer) Run(ctx context.Context) error { return w.run(ctx) }

// Submit queues a request. It never blocks. A nil error means that r.Done will be called; ErrBacklogFull and
// ErrUnavailable mean that it will not and nothing happened.
func (w *Writer) Submit(r *Request) error { return w.submit(r) }

// Do submits r and waits for its answer. If ctx ends first, its error is returned and the request may still take effect.
// It sets r.Done.
func (w *Writer) Do(ctx context.Context, r *Request) (Answer, error) { return w.do(ctx, r) }

package client

import (
	"sync"
	"time"
)

// call is one call on its way. It is in exactly one place: in a session's queue, among a stream's open calls, or nowhere
// (answered, or given up by its caller). The session's mutex guards all fields but kind and body.
type call struct {
	kind kind
	body encoded
	head callHeader
	id   uint64

	// answer takes the result of a synchronous call; later that of a call nobody waits for. Exactly one is set.
	answer chan answer
	later  func(answer)

	queued     bool
	prev, next *call // neighbours in the queue
	stream     *stream
	sentAt     time.Time
	sends      int
	timer      *time.Timer
}

// answer is the end of a call.
type answer struct {
	token []byte
	err   *Error
}

// size is the number of bytes that the call takes in a message.
func (c *call) size() int { return c.head.n + len(c.body) }

func (c *call) deliver(a answer) {
	if c.later != nil {
		c.later(a)
		return
	}
	c.answer <- a // room for one, and delivered once
}

// calls recycles synchronous calls with their channel and timer.
var calls = sync.Pool{New: func() any {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return &call{answer: make(chan answer, 1), timer: t}
}}

func newCall(k kind, body encoded) *call {
	c := calls.Get().(*call)
	c.kind, c.body = k, body
	return c
}

// recycle gives back a call that was answered. One that was sent more than once is left to the collector: a dead stream may
// still hold its header.
func (c *call) recycle() {
	if c.sends > 1 {
		return
	}
	c.timer.Stop()
	*c = call{answer: c.answer, timer: c.timer}
	calls.Put(c)
}

// queue is a list of calls, oldest first, with removal from its middle.
type queue struct {
	head, tail *call
	len        int
}

func (q *queue) push(c *call) {
	c.queued, c.prev, c.next = true, q.tail, nil
	if q.tail == nil {
		q.head = c
	} else {
		q.tail.next = c
	}
	q.tail = c
	q.len++
}

// insert puts c back to where its id belongs. It is called with high ids first, on calls that are older than most.
func (q *queue) insert(c *call) {
	at := q.head
	for at != nil && at.id < c.id {
		at = at.next
	}
	if at == nil {
		q.push(c)
		return
	}
	c.queued, c.prev, c.next = true, at.prev, at
	if at.prev == nil {
		q.head = c
	} else {
		at.prev.next = c
	}
	at.prev = c
	q.len++
}

func (q *queue) remove(c *call) {
	if c.prev == nil {
		q.head = c.next
	} else {
		c.prev.next = c.next
	}
	if c.next == nil {
		q.tail = c.prev
	} else {
		c.next.prev = c.prev
	}
	c.queued, c.prev, c.next = false, nil, nil
	q.len--
}

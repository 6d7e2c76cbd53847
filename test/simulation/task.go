package simulation

import (
	"iter"
	"slices"
)

// task is an access on its way: it runs until it lets others go first, and goes on when its turn comes.
type task struct {
	resume func() (struct{}, bool)
	abort  func()
	yield  func(struct{}) bool
	done   func() // after its end
}

// process is a relay or a server: what it has begun ends with it.
type process struct {
	alive  bool
	paused bool
	tasks  []*task
}

// abandoned ends a task whose process is gone.
type abandoned struct{}

// begin starts a task; nothing of it happens before its first turn.
func (w *world) begin(owner *process, work, done func()) {
	t := &task{done: done}
	t.resume, t.abort = iter.Pull(func(yield func(struct{}) bool) {
		defer func() {
			if r := recover(); r != nil && r != (abandoned{}) {
				panic(r)
			}
		}()
		t.yield = yield
		work()
	})
	owner.tasks = append(owner.tasks, t)
}

// others lets others go first, if this is a task.
func (w *world) others() {
	if t := w.current; t != nil && !t.yield(struct{}{}) {
		panic(abandoned{})
	}
}

// turn lets a task go on.
func (w *world) turn(p *process, i int) {
	t := p.tasks[i]
	w.current = t
	_, more := t.resume()
	w.current = nil
	if more {
		return
	}
	if at := slices.Index(p.tasks, t); at >= 0 {
		p.tasks = slices.Delete(p.tasks, at, at+1)
	}
	t.done()
}

// kill ends a process and everything that it has begun.
func (w *world) kill(p *process) {
	p.alive, p.paused = false, false
	for _, t := range p.tasks {
		t.abort()
	}
	p.tasks = nil
}

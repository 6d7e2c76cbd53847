package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// group runs the parts of a process. The first part that ends early, or fails, ends all of them.
type group struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup
	mu     sync.Mutex
	errs   []error
}

func newGroup(ctx context.Context) *group {
	g := &group{}
	g.ctx, g.cancel = context.WithCancelCause(ctx)
	return g
}

// run starts a part; it works until its context ends.
func (g *group) run(name string, part func(context.Context) error) {
	g.wg.Go(func() {
		err := part(g.ctx)
		if g.ctx.Err() == nil && err == nil {
			err = errors.New("ended by itself")
		}
		if err != nil && !errors.Is(err, context.Canceled) {
			err = fmt.Errorf("%s: %w", name, err)
			g.mu.Lock()
			g.errs = append(g.errs, err)
			g.mu.Unlock()
		}
		g.cancel(err)
	})
}

// wait returns once all parts have ended, with what went wrong.
func (g *group) wait() error {
	g.wg.Wait()
	g.cancel(nil)
	g.mu.Lock()
	defer g.mu.Unlock()
	return errors.Join(g.errs...)
}

// detached runs a part that must outlive the group, and returns how to end it and wait for it.
func (g *group) detached(name string, part func(context.Context) error) (stop func() error) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(g.ctx))
	done := make(chan error, 1)
	go func() {
		err := part(ctx)
		if ctx.Err() == nil {
			if err == nil {
				err = errors.New("ended by itself")
			}
			g.cancel(err)
		}
		if errors.Is(err, context.Canceled) {
			err = nil
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
		done <- err
	}()
	return func() error {
		cancel()
		return <-done
	}
}

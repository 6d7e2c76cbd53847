// Package nemesis breaks a deployment in every way it knows: one fault at a time, then two, then several, and heals it.
package nemesis

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/test/robustness/cluster"
	"github.com/outbox-platform/outbox/test/robustness/driver"
	"github.com/outbox-platform/outbox/test/robustness/journal"
)

// errCannot: the fault does not apply to this deployment or machine. It is not counted.
var errCannot = errors.New("it cannot be done here")

// errMissed: it was tried, and nothing was hit.
var errMissed = errors.New("nothing was hit")

// fault is something that goes wrong and is over when strike returns.
type fault struct {
	name string
	// parts it needs for itself: two faults of one part do not strike at once.
	parts []string
	// disturbs: an event may be delivered twice because of it.
	disturbs bool
	strike   func(ctx context.Context, s *stroke) error
}

// stroke is one strike.
type stroke struct {
	*cluster.Cluster
	n      *Nemesis
	random *rand.Rand
}

// Nemesis strikes.
type Nemesis struct {
	cluster *cluster.Cluster
	journal *journal.Writer
	random  *rand.Rand
	say     func(string, ...any)
	only    []string

	mu           sync.Mutex
	busy         map[string]bool
	hits         map[string]int
	cannot       map[string]bool
	disturbances int
	jumps        int
	blocked      map[string]bool
	errs         []error
	last         []fault
}

// New returns a nemesis for a deployment. only, when not empty, names the faults that it may use.
func New(c *cluster.Cluster, seed uint64, only []string, say func(string, ...any)) (*Nemesis, error) {
	j, err := journal.Create(c.Journals, "nemesis")
	if err != nil {
		return nil, err
	}
	return &Nemesis{
		cluster: c, journal: j, random: rand.New(rand.NewPCG(seed, 99)), say: say, only: only, //nolint:gosec // a schedule
		busy: map[string]bool{}, hits: map[string]int{}, cannot: map[string]bool{}, blocked: map[string]bool{},
	}, nil
}

// Hits counts the strikes that hit, by fault and kill point.
func (n *Nemesis) Hits() map[string]int { n.mu.Lock(); defer n.mu.Unlock(); return maps.Clone(n.hits) }

// Cannot names the faults that do not apply here.
func (n *Nemesis) Cannot() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Sorted(maps.Keys(n.cannot))
}

// Disturbances counts the strikes after which an event may be delivered twice, Jumps leases taken away from the living.
func (n *Nemesis) Disturbances() (int, int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.disturbances, n.jumps
}

// jumped counts a jump of the clock by which leases go.
func (n *Nemesis) jumped() { n.mu.Lock(); defer n.mu.Unlock(); n.jumps++ }

// redriven notes aggregates that waited for an operator.
func (n *Nemesis) redriven(aggregates []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range aggregates {
		n.blocked[a] = true
	}
}

// Blocked are the aggregates that had to wait for an operator during the faults.
func (n *Nemesis) Blocked() map[string]bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.blocked)
}

// Err is what went wrong with the nemesis itself: then the run proves nothing.
func (n *Nemesis) Err() error { n.mu.Lock(); defer n.mu.Unlock(); return errors.Join(n.errs...) }

// Run strikes for a while: three fifths of it one fault at a time, a quarter two at a time, the rest four at a time. When it
// returns everything is healed.
func (n *Nemesis) Run(ctx context.Context, length time.Duration) {
	begun := time.Now()
	var under sync.WaitGroup
	slots := make(chan struct{}, 4)
	for i := range 4 {
		at := begun
		switch i {
		case 1:
			at = begun.Add(length * 3 / 5)
		case 2, 3:
			at = begun.Add(length * 17 / 20)
		}
		time.AfterFunc(time.Until(at), func() { slots <- struct{}{} })
	}
	end := time.After(length)
	for {
		select {
		case <-ctx.Done():
		case <-end:
		case <-slots:
			under.Go(func() {
				n.one(ctx)
				pause(ctx, time.Duration(200+n.intN(800))*time.Millisecond) // under load without it
				slots <- struct{}{}
			})
			continue
		}
		break
	}
	under.Wait()
	healing, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
	defer cancel()
	n.heal(healing)
}

func (n *Nemesis) intN(most int) int { n.mu.Lock(); defer n.mu.Unlock(); return n.random.IntN(most) }

// one strikes once.
func (n *Nemesis) one(ctx context.Context) {
	f, seed, ok := n.choose()
	if !ok {
		return
	}
	n.note(journal.Invoke, f.name, "")
	err := f.strike(ctx, &stroke{Cluster: n.cluster, n: n, random: rand.New(rand.NewPCG(seed, 7))}) //nolint:gosec // a schedule
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range f.parts {
		delete(n.busy, p)
	}
	note := ""
	switch {
	case errors.Is(err, errCannot):
		n.cannot[f.name] = true
		note = "cannot: " + err.Error()
	case errors.Is(err, errMissed), ctx.Err() != nil && err != nil:
		note = "missed"
	case err != nil:
		n.errs = append(n.errs, fmt.Errorf("%s: %w", f.name, err))
		note = "error: " + err.Error()
	default:
		n.hits[f.name]++
	}
	if f.disturbs {
		n.disturbances++
	}
	n.note(journal.OK, f.name, note)
}

// hit counts a kill point.
func (n *Nemesis) hit(name string) { n.mu.Lock(); defer n.mu.Unlock(); n.hits[name]++ }

func (n *Nemesis) note(t journal.Type, name, note string) {
	n.journal.Write(journal.Entry{Type: t, F: journal.Fault, State: name, Note: note, Tx: uuid.Nil})
	if t == journal.OK {
		n.say("%s%s", name, map[bool]string{true: "", false: " (" + note + ")"}[note == ""])
	}
}

// choose draws a fault whose parts are free, those first that were not drawn yet.
func (n *Nemesis) choose() (fault, uint64, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for range 2 {
		for i, f := range n.last {
			if slices.ContainsFunc(f.parts, func(p string) bool { return n.busy[p] }) {
				continue
			}
			n.last = slices.Delete(n.last, i, i+1)
			for _, p := range f.parts {
				n.busy[p] = true
			}
			return f, n.random.Uint64(), true
		}
		for _, f := range catalogue() {
			if (len(n.only) == 0 || slices.Contains(n.only, f.name)) && !n.cannot[f.name] {
				n.last = append(n.last, f)
			}
		}
		n.random.Shuffle(len(n.last), func(i, j int) { n.last[i], n.last[j] = n.last[j], n.last[i] })
	}
	return fault{}, 0, false
}

// heal ends whatever may still be broken.
func (n *Nemesis) heal(ctx context.Context) {
	c := n.cluster
	var errs []error
	for _, l := range c.Links {
		errs = append(errs, l.Heal())
	}
	for node := range c.Brokers.Nodes() {
		c.Brokers.Thaw(node)
	}
	for _, p := range c.Databases() { // back from wherever it is
		_, err := p.SetClock(0)
		errs = append(errs, err)
	}
	errs = append(errs, c.Brokers.Forgive(ctx))
	for _, p := range slices.Concat(c.Servers, c.Relays) {
		p.Thaw()
		if !p.Alive() {
			errs = append(errs, p.Start(ctx))
		}
	}
	for _, d := range c.Drivers() {
		d.Thaw()
		if !d.Alive() {
			errs = append(errs, d.Begin(ctx))
		}
		errs = append(errs, driver.Give(d.Control, driver.Work))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := errors.Join(errs...); err != nil {
		n.errs = append(n.errs, fmt.Errorf("heal: %w", err))
	}
}

// pause waits; ctx ends it early.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

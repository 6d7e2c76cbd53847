package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

const (
	// killDSNVariable is where the platform that the bench starts finds the source database.
	killDSNVariable = "OUTBOX_BENCH_SOURCE_DSN"
	// killPool is how many victims are started together and then killed one after the other.
	killPool = 8
	// killPoll is how often the platform is asked whether it has decided: the grain of what is measured.
	killPoll = 2 * time.Millisecond
	// killPatience is when a transaction is called undecided, and when one is called unknown that should be known.
	killPatience = 30 * time.Second
	// killUnheard is when a transaction that may never have arrived is called unknown. It is asked about again later.
	killUnheard = time.Second
	// killAll is the --resolver that means every one.
	killAll = "all"
)

func (c *Cmd) validateKill() error {
	switch {
	case c.Runs < 1:
		return fmt.Errorf("--runs must be at least 1: %d", c.Runs)
	case c.Target != targetOutbox:
		return fmt.Errorf("--target must be %s for the workload kill: nobody resolves anything in the other one", targetOutbox)
	case c.Server != "":
		return errors.New("--server cannot be given for the workload kill: the platform gets the source database's DSN from the bench")
	case c.HoldXID, c.History > 0, c.Transactions > 0:
		return errors.New("--hold-xid, --history and --transactions do not apply to the workload kill")
	case c.Transport != "session":
		return errors.New("--transport must be session for the workload kill: nobody can be asked otherwise")
	}
	return nil
}

// killRun kills services, one at a time.
type killRun struct {
	s        *stage
	db       *pgxpool.Pool // the truth
	topic    string
	runs     int
	only     string // resolver
	numbers  uint64
	arrivals *arrivals
	say      func(string, ...any)
}

// runKill prints one result per step and resolver.
func (c *Cmd) runKill(ctx context.Context, out io.Writer, say func(string, ...any), asJSON bool) error {
	o := *c
	o.Concurrency = []int{4} // connections of the surviving instance and of the bench itself
	if o.Broker == brokerAuto {
		o.Broker = brokerFake
	}
	s, err := buildStage(ctx, &o, say)
	if err != nil {
		return err
	}
	k := &killRun{s: s, db: s.sourcePool, runs: o.Runs, only: o.Resolver, arrivals: &arrivals{count: map[uint64]int{}}, say: say}
	p := killPrinter{w: out, json: asJSON}
	return errors.Join(k.run(ctx, &p), s.close(context.WithoutCancel(ctx)))
}

func (k *killRun) run(ctx context.Context, p *killPrinter) error {
	var err error
	if k.topic, err = k.s.newTopic(ctx); err != nil {
		return err
	}
	for _, sql := range []string{`DROP TABLE IF EXISTS outbox_marker`, client.MarkerDDL, killDDL} {
		if _, err := k.db.Exec(ctx, sql); err != nil {
			return fmt.Errorf("creating the source's tables: %w", err)
		}
	}
	if err := k.s.registerVictims(ctx); err != nil {
		return err
	}
	consuming, stop := context.WithCancel(ctx)
	consumed := make(chan error, 1)
	go func() { consumed <- consumeEach(consuming, strings.Split(k.s.brokers, ","), k.topic, k.arrivals.add) }()
	err = k.all(ctx, p)
	stop()
	return errors.Join(err, <-consumed)
}

// registerVictims makes a source known for each resolver: they share the database, and differ in who can be asked.
func (s *stage) registerVictims(ctx context.Context) error {
	conn, err := grpc.NewClient(s.api, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("dialing the platform: %w", err)
	}
	defer conn.Close()
	for _, r := range killResolvers {
		db := &outboxv1.SourceDatabase{Name: client.DefaultDatabase, Mode: outboxv1.DatabaseMode_DATABASE_MODE_MARKER}
		if r == killDirect {
			db.DsnRef = "env:" + killDSNVariable
		}
		_, err := outboxv1.NewAdminServiceClient(conn).ApplySource(ctx, &outboxv1.ApplySourceRequest{Reason: "bench", Source: &outboxv1.Source{
			Name: r.source(), Topics: []string{"bench.*"}, Databases: []*outboxv1.SourceDatabase{db},
		}})
		if err != nil {
			return fmt.Errorf("registering the source %s: %w", r.source(), err)
		}
	}
	return nil
}

// all kills at every step for every resolver, and looks in the end for events that arrived too late to be noticed before.
func (k *killRun) all(ctx context.Context, p *killPrinter) error {
	type died struct {
		step   killStep
		deaths []death
	}
	var everything []died
	for _, r := range killResolvers {
		if k.only != killAll && k.only != string(r) {
			continue
		}
		err := k.resolver(ctx, r, func(step killStep, deaths []death) error {
			everything = append(everything, died{step, deaths})
			return p.print(killResultOf(step, r, deaths))
		})
		if err != nil {
			return err
		}
	}
	if err := wait(ctx, killUnheard); err != nil {
		return err
	}
	wrong := 0
	for _, e := range everything {
		for i := range e.deaths {
			d := &e.deaths[i]
			d.arrived = k.arrivals.of(d.number)
			if why := d.wrong(e.step); why != "" {
				wrong++
				k.say("%s at step %s: %s", uuid.UUID(d.id), e.step, why)
			}
		}
	}
	if wrong > 0 {
		return fmt.Errorf("%w about %d of %d dead services", ErrWrong, wrong, len(everything)*k.runs)
	}
	return nil
}

// resolver kills at every step while only this resolver can find out.
func (k *killRun) resolver(ctx context.Context, r killResolver, done func(killStep, []death) error) (err error) {
	// Whoever asks has no session, so that it is no instance to be asked back.
	asker, err := client.New(client.Config{Target: k.s.api, Source: r.source(), Plaintext: true, Transport: client.TransportUnary})
	if err != nil {
		return fmt.Errorf("making the client: %w", err)
	}
	defer func() { err = errors.Join(err, asker.Close()) }()
	if r == killCheckBack {
		survivor, err := client.New(client.Config{Target: k.s.api, Source: r.source(), Plaintext: true, Instance: "survivor"})
		if err != nil {
			return fmt.Errorf("making the surviving instance: %w", err)
		}
		defer func() { err = errors.Join(err, survivor.Close()) }()
		if err := pgxoutbox.Register(survivor, "", k.db, pgxoutbox.Upkeep{}); err != nil {
			return fmt.Errorf("making the surviving instance: %w", err)
		}
		if err := survivor.Connect(ctx); err != nil {
			return fmt.Errorf("connecting the surviving instance: %w", err)
		}
	}
	// The first one pays for connections and caches, and is not counted.
	if _, err := k.step(ctx, asker, killCommitted, r, 1); err != nil {
		return fmt.Errorf("warming up: %w", err)
	}
	for _, step := range killSteps {
		k.say("killing %d services at step %s, resolver %s", k.runs, step, r)
		deaths, err := k.step(ctx, asker, step, r, k.runs)
		if err != nil {
			return fmt.Errorf("killing at step %s, resolver %s: %w", step, r, err)
		}
		if err := done(step, deaths); err != nil {
			return err
		}
	}
	return nil
}

// step kills runs services at one step.
func (k *killRun) step(ctx context.Context, asker *client.Client, step killStep, r killResolver, runs int) ([]death, error) {
	var deaths []death
	for len(deaths) < runs {
		if err := k.batch(ctx, asker, step, r, min(killPool, runs-len(deaths)), &deaths); err != nil {
			return nil, err
		}
	}
	if err := k.settle(ctx, deaths); err != nil {
		return nil, err
	}
	for i := range deaths { // unknown for ever?
		if d := &deaths[i]; d.seen == seenUnknown {
			tx, err := asker.GetTransaction(ctx, d.id)
			switch {
			case err == nil:
				d.seen, d.by = seenOf(tx.State), tx.DecidedBy
				d.nanos = int64(time.Since(d.died))
			case !client.IsUnknownTransaction(err):
				return nil, fmt.Errorf("asking for a transaction again: %w", err)
			}
		}
	}
	return deaths, nil
}

// batch starts victims together and kills them one after the other, so that starting does not disturb what is measured.
func (k *killRun) batch(ctx context.Context, asker *client.Client, step killStep, r killResolver, n int, deaths *[]death) error {
	victims := make([]*victim, 0, n)
	defer func() {
		for _, v := range victims {
			v.dismiss()
		}
	}()
	for range n {
		v, err := k.s.startVictim(ctx, k.topic, step, r)
		if err != nil {
			return err
		}
		victims = append(victims, v)
	}
	for _, v := range victims {
		if err := v.ready(); err != nil {
			return err
		}
	}
	for len(victims) > 0 {
		d, err := k.one(ctx, asker, victims[0], step)
		if err != nil {
			return err
		}
		if d.by != "" && !step.decider(r, d.by) {
			return fmt.Errorf("%s was decided by %s: not what was to be measured", uuid.UUID(d.id), d.by)
		}
		victims = victims[1:]
		*deaths = append(*deaths, d)
	}
	return nil
}

// one kills one service, waits for the decision, and reads the truth when the service's backend is gone.
func (k *killRun) one(ctx context.Context, asker *client.Client, v *victim, step killStep) (death, error) {
	k.numbers++
	line, died, err := v.doom(k.numbers)
	if err != nil {
		return death{}, errors.Join(err, ctx.Err())
	}
	d := death{number: k.numbers, id: line.Transaction, died: died}
	if err := d.observe(ctx, asker, step); err != nil {
		return d, err
	}
	if err := k.awaitBackend(ctx, line.Backend); err != nil {
		return d, err
	}
	if err := k.db.QueryRow(ctx, `SELECT EXISTS (SELECT FROM kill_order WHERE number = $1)`, int64(d.number)).Scan(&d.committed); err != nil {
		return d, fmt.Errorf("reading the truth: %w", err)
	}
	return d, nil
}

// observe asks the platform until it has decided.
func (d *death) observe(ctx context.Context, asker *client.Client, step killStep) error {
	tick := time.NewTicker(killPoll)
	defer tick.Stop()
	for {
		tx, err := asker.GetTransaction(ctx, d.id)
		waited := time.Since(d.died)
		switch {
		case err == nil:
			if d.seen = seenOf(tx.State); d.seen != seenUndecided {
				d.by, d.nanos = tx.DecidedBy, int64(waited)
				return nil
			}
		case !client.IsUnknownTransaction(err):
			return fmt.Errorf("asking for a transaction: %w", err)
		case step == killBeforePrepare, step.mayBeUnknown() && waited > killUnheard:
			return nil
		}
		if waited > killPatience {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// awaitBackend waits until the source database has noticed the death: what is not committed then never will be.
func (k *killRun) awaitBackend(ctx context.Context, pid uint32) error {
	for begin := time.Now(); ; {
		var there bool
		if err := k.db.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)`, int32(pid)).Scan(&there); err != nil {
			return fmt.Errorf("looking for a victim's backend: %w", err)
		}
		switch {
		case !there:
			return nil
		case time.Since(begin) > killPatience:
			return fmt.Errorf("the backend %d of a dead service is still there after %s", pid, killPatience)
		}
		if err := wait(ctx, killPoll); err != nil {
			return err
		}
	}
}

// settle waits until the events of what was decided COMMITTED have arrived, or time is up, and notes what arrived.
func (k *killRun) settle(ctx context.Context, deaths []death) error {
	for begin := time.Now(); ; {
		missing := false
		for i := range deaths {
			d := &deaths[i]
			d.arrived = k.arrivals.of(d.number)
			missing = missing || d.seen == seenCommitted && d.arrived == 0
		}
		if !missing || time.Since(begin) > killPatience {
			return nil
		}
		if err := wait(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

// wait returns early, with an error, when ctx ends.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// arrivals counts the records of each order.
type arrivals struct {
	mu    sync.Mutex
	count map[uint64]int
}

func (a *arrivals) add(number uint64, _ uint32, _ uint64, _ time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.count[number]++
}

func (a *arrivals) of(number uint64) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.count[number]
}

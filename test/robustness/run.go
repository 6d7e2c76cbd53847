package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/test/robustness/check"
	"github.com/outbox-platform/outbox/test/robustness/cluster"
	"github.com/outbox-platform/outbox/test/robustness/driver"
	"github.com/outbox-platform/outbox/test/robustness/journal"
	"github.com/outbox-platform/outbox/test/robustness/nemesis"
	"github.com/outbox-platform/outbox/test/system/history"
)

// defaultWorkers of each of the three drivers.
const defaultWorkers = 8

type runCmd struct {
	Length     time.Duration `default:"90s" help:"How long the nemesis strikes."`
	Seed       uint64        `default:"1" help:"Of the workload and of the faults."`
	Program    string        `required:"" type:"existingfile" help:"The outbox binary, built with -tags failpoints."`
	Old        string        `type:"existingfile" help:"An earlier outbox binary, to run beside it."`
	Apache     int           `help:"Real Apache Kafka with so many nodes instead of fake brokers."`
	Rate       float64       `default:"300" help:"Transactions a second of all drivers together. 0: as fast as it goes."`
	Workers    int           `default:"8" help:"Transactions at a time of each driver."`
	Aggregates int           `default:"200" help:"Of each source, some of them hot."`
	Hot        int           `default:"100" help:"How many of a hundred draws of an aggregate prefer a few of them."`
	Faults     []string      `help:"Only these faults. none: none at all."`
	Python     bool          `help:"One of the three services, another one from seed to seed, is written in Python. Needs Python: see tools/python-sdk.sh."`
	Clocks     bool          `help:"The clocks of databases jump too. Needs libfaketime: see test/prerequisites.sh."`
	Tmpfs      bool          `default:"true" negatable:"" help:"Every second seed: the store on a small file system in memory, so that its disk can be full. Needs root."`
	Out        string        `default:"bin/robustness-results" help:"Where the results go."`
	Keep       bool          `help:"Keep logs and journals of a valid run too."`
	Data       string        `help:"Where databases, brokers, logs and journals are kept. Default: the directory for temporary files. A file system in memory takes the load off a slow disk: processes are killed here, the machine is not, so that it is no gentler."`
	Processors int           `help:"GOMAXPROCS of every Go process, this one included. 0: as many as the machine has. 1 does the most work on a machine with fewer processors than processes."`
	Patience   time.Duration `default:"60s" help:"How long everything may take to be decided and published after the last fault."`
	// Consumers then read committed.
	Transactional bool     `help:"The relays write in Kafka transactions."`
	Env           []string `help:"More environment of servers and relays: other settings, as NAME=value."`

	// Of mutants.
	mutant    string
	profiles  map[string]int
	lagging   bool
	retention time.Duration
	small     bool // one server, two relays
	quiet     bool

	python *cluster.Python // found before the first run
}

// verdict is the last line.
type verdict struct {
	Verdict      string            `json:"verdict"`
	Transactions int               `json:"transactions"`
	Faults       map[string]int    `json:"faults"`
	Violations   []check.Violation `json:"violations"`
	Seed         uint64            `json:"seed"`

	Why     string        `json:"why,omitempty"`
	Summary check.Summary `json:"summary"`
	Cannot  []string      `json:"cannot,omitempty"`
	Decided float64       `json:"decided_seconds"`
	Settled float64       `json:"settled_seconds"`
	// Sights tell how it came to rest.
	Sights  []check.Sight `json:"sights,omitempty"`
	Seconds float64       `json:"seconds"`
	Broker  string        `json:"broker"`
	// Transactional: the relays wrote in Kafka transactions.
	Transactional bool `json:"transactional,omitempty"`
	// Python is the source whose service was a Python one.
	Python   string `json:"python,omitempty"`
	Revision string `json:"revision"`
	Command  string `json:"command"`
	Results  string `json:"results,omitempty"`
}

// Run does one run and prints the verdict.
func (c *runCmd) Run(ctx context.Context) error {
	v, err := c.once(ctx)
	if err != nil {
		v.Verdict, v.Why = "unknown", err.Error()
	}
	v.Sights, v.Summary.Pace = nil, nil // they are in results.json
	if err := printLast(v); err != nil {
		return err
	}
	if v.Verdict != "valid" {
		return errNotValid
	}
	return nil
}

// environment of servers and relays.
func (c *runCmd) environment() []string {
	if !c.Transactional {
		return c.Env
	}
	return append(c.Env[:len(c.Env):len(c.Env)], "OUTBOX_KAFKA_TRANSACTIONAL=true")
}

// once does one run. An error means that nothing can be said.
func (c *runCmd) once(ctx context.Context) (v verdict, err error) {
	begun := time.Now()
	// Nothing may keep a run for ever: then it says that it does not know.
	ctx, cancel := context.WithTimeout(ctx, c.Length+c.Patience+4*time.Minute)
	defer cancel()
	v = verdict{Verdict: "unknown", Seed: c.Seed, Violations: []check.Violation{}, Faults: map[string]int{}, Revision: revision, Command: c.command(), Broker: "kfake", Transactional: c.Transactional}
	if err := c.findPython(ctx); err != nil {
		return v, err
	}
	if c.Apache > 0 {
		v.Broker = fmt.Sprintf("apache kafka %s, %d nodes", kafka.ApacheVersion, c.Apache)
	}
	defer func() { v.Seconds = time.Since(begun).Seconds() }()
	if err := c.place(); err != nil {
		return v, err
	}
	dir, err := os.MkdirTemp("", "outbox-robustness-")
	if err != nil {
		return v, err
	}
	if err := os.Chmod(dir, 0o711); err != nil { //nolint:gosec // PostgreSQL's user passes through it
		return v, err
	}
	// Whoever wants to know why finds everything; a valid run leaves nothing but its results.
	defer func() {
		if (v.Verdict == "valid" || c.mutant != "") && !c.Keep {
			_ = os.RemoveAll(dir)
		} else {
			say("logs and journals are in %s", dir)
		}
	}()
	storeDir, unmount := c.smallDisk(dir)
	defer unmount()
	self, err := os.Executable()
	if err != nil {
		return v, err
	}
	config := cluster.Config{
		Dir: dir, StoreDir: storeDir, Program: absolute(c.Program), Self: self, Apache: c.Apache, Seed: c.Seed, Workers: c.Workers,
		PerSecond: c.Rate / 3, Aggregates: c.Aggregates, Hot: c.Hot, Clocks: c.clocks(), Profiles: c.profiles, Mutant: c.mutant, LaggingStandby: c.lagging, LogRetention: c.retention, Env: c.environment(),
	}
	if c.Old != "" {
		config.Old = absolute(c.Old)
	}
	if c.Python {
		config.Python = c.python
	}
	if c.small {
		config.Servers, config.Relays = 1, 2
	}
	started := time.Now()
	cl, err := cluster.Start(ctx, config)
	if err != nil {
		return v, err
	}
	defer cl.Stop(context.WithoutCancel(ctx))
	say("seed %d: deployed in %.1f s", c.Seed, time.Since(started).Seconds())
	for _, s := range cl.Sources {
		if slices.ContainsFunc(s.Drivers, func(d *cluster.Driver) bool { return d.Python != nil }) {
			v.Python = s.Name
		}
	}
	run, n, err := c.play(ctx, cl)
	if n != nil {
		v.Faults, v.Cannot = n.Hits(), n.Cannot()
	}
	if err != nil {
		return v, err
	}
	v.Decided = run.Settled.Decided.Seconds()
	v.Settled = run.Settled.Within.Seconds()
	v.Sights = run.Settled.Sights
	if v.Violations, v.Summary, err = check.Check(run); err != nil {
		return v, err
	}
	if v.Violations == nil {
		v.Violations = []check.Violation{}
	}
	v.Transactions = v.Summary.Transactions
	v.judge(c, n)
	v.Seconds = time.Since(begun).Seconds()
	v.Results, err = c.report(&v, run)
	return v, err
}

// findPython finds what a Python service needs, once.
func (c *runCmd) findPython(ctx context.Context) (err error) {
	if c.Python && c.python == nil {
		c.python, err = cluster.FindPython(ctx, absolute("."))
	}
	return err
}

// clocks reports whether a fault may set the clock of a database.
func (c *runCmd) clocks() bool {
	return c.Clocks || slices.ContainsFunc(c.Faults, func(name string) bool { return strings.Contains(name, "clock") })
}

// place lets this process and its children use what the flags say of the machine.
func (c *runCmd) place() error {
	var errs []error
	if c.Data != "" {
		errs = append(errs, os.Setenv("TMPDIR", absolute(c.Data)))
	}
	if c.Processors > 0 {
		runtime.GOMAXPROCS(c.Processors)
		errs = append(errs, os.Setenv("GOMAXPROCS", strconv.Itoa(c.Processors)))
	}
	return errors.Join(errs...)
}

func absolute(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}

// judge says what it all means.
func (v *verdict) judge(c *runCmd, n *nemesis.Nemesis) {
	strikes := 0
	for name, hits := range v.Faults {
		if !strings.Contains(name, ":") {
			strikes += hits
		}
	}
	none := slices.Equal(c.Faults, []string{"none"})
	switch {
	case len(v.Violations) > 0:
		v.Verdict = "invalid"
	case n.Err() != nil:
		v.Verdict, v.Why = "unknown", n.Err().Error()
	case strikes == 0 && !none:
		v.Verdict, v.Why = "unknown", "no fault hit anything"
	case v.Transactions < int(c.Length.Seconds())*10:
		v.Verdict, v.Why = "unknown", "hardly any transactions"
	case v.Python != "" && v.Summary.Sources[v.Python] < int(c.Length.Seconds())*3:
		v.Verdict, v.Why = "unknown", "hardly any transactions of the Python service"
	case v.Summary.Resolved == 0:
		v.Verdict, v.Why = "unknown", "no decision was ever found out"
	default:
		v.Verdict = "valid"
	}
}

// smallDisk mounts a small file system for every second seed.
func (c *runCmd) smallDisk(dir string) (string, func()) {
	nothing := func() {}
	if !c.Tmpfs || c.Seed%2 == 1 || os.Geteuid() != 0 {
		return "", nothing
	}
	at := filepath.Join(dir, "store")
	if os.Mkdir(at, 0o755) != nil { //nolint:gosec // PostgreSQL's user passes through it
		return "", nothing
	}
	if err := syscall.Mount("robustness", at, "tmpfs", 0, "size=2500m,mode=0755"); err != nil {
		say("no small disk for the store: %v", err)
		return "", nothing
	}
	return at, func() {
		if err := syscall.Unmount(at, syscall.MNT_DETACH); err != nil {
			say("unmount %s: %v", at, err)
		}
	}
}

// play works and breaks, heals, waits until it has come to rest, and reads everything.
func (c *runCmd) play(ctx context.Context, cl *cluster.Cluster) (*check.Run, *nemesis.Nemesis, error) {
	only := c.Faults
	n, err := nemesis.New(cl, c.Seed, only, func(format string, args ...any) {
		if !c.quiet {
			say("  "+format, args...)
		}
	})
	if err != nil {
		return nil, nil, err
	}
	o, err := observe(ctx, cl, c.Transactional)
	if err != nil {
		return nil, n, fmt.Errorf("observe: %w", err)
	}
	defer o.stop()
	if err := order(ctx, cl, driver.Work, false); err != nil {
		return nil, n, err
	}
	wait(ctx, c.calm())
	if slices.Equal(only, []string{"none"}) {
		wait(ctx, c.Length)
	} else {
		n.Run(ctx, c.Length)
	}
	wait(ctx, 2*time.Second) // under load, healed
	if ctx.Err() != nil {
		return nil, n, ctx.Err()
	}
	run, err := c.finish(ctx, cl, n, o)
	return run, n, err
}

// calm is how long there is no fault in the beginning: what the others are compared with.
func (c *runCmd) calm() time.Duration {
	if c.small {
		return time.Second
	}
	return 4 * time.Second
}

// order gives all drivers an order, and waits until they have obeyed.
func order(ctx context.Context, cl *cluster.Cluster, what string, obey bool) error {
	ctx, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	for _, d := range cl.Drivers() {
		if err := driver.Give(d.Control, what); err != nil {
			return err
		}
	}
	for _, d := range cl.Drivers() {
		for obey && !driver.Obeyed(d.Control) {
			wait(ctx, 20*time.Millisecond)
			if ctx.Err() != nil {
				return fmt.Errorf("%s does not obey: %w: %s", d.Name, ctx.Err(), d.Tail())
			}
		}
	}
	return nil
}

func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// finish ends the load, lets the platform come to rest, and reads everything there is.
func (c *runCmd) finish(ctx context.Context, cl *cluster.Cluster, n *nemesis.Nemesis, o *observer) (*check.Run, error) {
	if err := order(ctx, cl, driver.Quiet, true); err != nil {
		return nil, err
	}
	if err := cl.EndPrepared(ctx); err != nil {
		return nil, err
	}
	s := settler{transactional: c.Transactional, cl: cl, blocked: n.Blocked(), begun: time.Now(), limit: c.Patience}
	if err := s.settle(ctx); err != nil {
		return nil, err
	}
	x := s.settled
	seen, counters := o.rest(ctx, x.Undecided+x.Spilled+x.Blocked+x.Missing == 0)
	if err := cl.StopPlatform(); err != nil {
		say("stopping: %v", err)
	}
	run := &check.Run{
		Truth: s.truth, Settled: s.settled, Window: 3 * (c.Aggregates + 2*c.Workers), Crashes: cl.Crashes(), Transactional: c.Transactional,
		Partitions: map[string][]int{}, Seen: seen, Counters: counters, Disturbing: nemesis.Disturbing(), Blocked: s.blocked, Saturated: c.Rate == 0,
	}
	run.Disturbances, run.Jumps = n.Disturbances()
	for topic, count := range cluster.Topics {
		run.Partitions[topic] = []int{count}
	}
	for i := range cl.Grown() {
		g := cluster.GrowingTopic
		run.Partitions[g] = append(run.Partitions[g], cluster.Topics[g]+i+1)
	}
	return run, c.read(ctx, cl, run)
}

// read reads the end state of everything.
func (c *runCmd) read(ctx context.Context, cl *cluster.Cluster, run *check.Run) (err error) {
	if run.Stored, err = cl.Verify(ctx); err != nil {
		return err
	}
	readAll := kafka.ReadAll
	if c.Transactional {
		readAll = kafka.ReadCommitted
	}
	read, err := readAll(ctx, cl.Brokers.Bootstrap(), slices.Sorted(maps.Keys(cluster.Topics))...)
	if err != nil {
		return fmt.Errorf("read Kafka: %w", err)
	}
	if run.Records, err = history.FromKafka(read, cl.Brokers.KeepsTime()); err != nil {
		return err
	}
	if run.Entries, err = journal.Read(cl.Journals); err != nil {
		return err
	}
	run.Markers = map[uuid.UUID]bool{}
	for _, s := range cl.Sources {
		err := rows(ctx, s.Postgres.Server.DSN(s.Database), "SELECT id, 0::smallint, '' FROM outbox_marker", func(id uuid.UUID, _ int16, _ string) { run.Markers[id] = true })
		if err != nil {
			return err
		}
	}
	run.States, run.Resolutions = map[uuid.UUID]check.State{}, map[uuid.UUID]check.Resolution{}
	names := []check.State{check.Prepared, check.Committed, check.Aborted}
	err = rows(ctx, cl.StoreDSN(), "SELECT tx_id, state, '' FROM outbox.tx", func(id uuid.UUID, state int16, _ string) { run.States[id] = names[state] })
	if err != nil {
		return err
	}
	run.Decided = map[uuid.UUID]int64{}
	ahead := time.Now().UnixNano() - journal.Now()
	err = rows(ctx, cl.StoreDSN(), "SELECT tx_id, state, extract(epoch FROM decided_at)::text FROM outbox.tx WHERE state = 2", func(id uuid.UUID, _ int16, at string) {
		if s, err := strconv.ParseFloat(at, 64); err == nil {
			run.Decided[id] = int64(s*1e9) - ahead
		}
	})
	if err != nil {
		return err
	}
	return rows(ctx, cl.StoreDSN(), "SELECT tx_id, state, method FROM outbox.resolution WHERE method <> 'client'", func(id uuid.UUID, state int16, method string) {
		run.Resolutions[id] = check.Resolution{State: names[state], Method: method}
	})
}

func rows(ctx context.Context, dsn, sql string, each func(uuid.UUID, int16, string)) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	result, err := conn.Query(ctx, sql)
	if err != nil {
		return err
	}
	var (
		id     [16]byte
		state  int16
		method string
	)
	_, err = pgx.ForEachRow(result, []any{&id, &state, &method}, func() error { each(id, state, method); return nil })
	return err
}

// settler waits until everything is decided and published.
type settler struct {
	transactional bool
	cl            *cluster.Cluster
	blocked       map[string]bool // aggregates that had to wait for an operator
	begun         time.Time
	limit         time.Duration
	truth         map[uuid.UUID]bool
	settled       check.Settled
}

// note keeps what was seen, once a second.
func (s *settler) note() {
	at := time.Since(s.begun).Seconds()
	x := &s.settled
	if n := len(x.Sights); n == 0 || at-x.Sights[n-1].At >= 1 {
		x.Sights = append(x.Sights, check.Sight{At: at, Undecided: x.Undecided, Spilled: x.Spilled, Parked: x.Blocked})
	}
}

func (s *settler) settle(ctx context.Context) error {
	s.settled.Limit = s.limit
	deadline, cancel := context.WithTimeout(ctx, s.limit)
	defer cancel()
	for round := 0; ; round++ {
		if err := s.look(ctx, round); err != nil {
			return err
		}
		s.note()
		x := &s.settled
		if x.Undecided+x.Spilled+x.Blocked == 0 {
			break
		}
		wait(deadline, 100*time.Millisecond)
		if deadline.Err() != nil {
			break
		}
	}
	s.settled.Decided = time.Since(s.begun)
	if err := s.arrive(ctx, deadline); err != nil {
		return err
	}
	s.settled.Within = time.Since(s.begun)
	return ctx.Err()
}

// look counts what is not done yet; an operator helps where one is needed.
func (s *settler) look(ctx context.Context, round int) error {
	x := &s.settled
	x.Spilled = 0
	for _, src := range s.cl.Sources {
		n, err := cluster.Query1[int](ctx, src.Postgres, src.Database, "SELECT count(*) FROM outbox_marker WHERE spilled IS NOT NULL")
		if err != nil {
			return fmt.Errorf("count spilled requests: %w", err)
		}
		x.Spilled += n
		if src.Postgres.Timeline > 1 && round%10 == 0 {
			if err := nemesis.Fence(ctx, s.cl, src); err != nil {
				say("source failover: %v", err)
			}
		}
	}
	var err error
	x.Undecided, err = cluster.Query1[int](ctx, s.cl.Store, "outbox", "SELECT count(*) FROM outbox.tx WHERE state = 0")
	if err == nil {
		x.Blocked, err = cluster.Query1[int](ctx, s.cl.Store, "outbox", "SELECT count(*) FROM outbox.parked")
	}
	if err != nil {
		return fmt.Errorf("count what is undecided: %w", err)
	}
	if x.Blocked > 0 && round%10 == 9 {
		blocked, err := nemesis.Redrive(ctx, s.cl)
		if err != nil {
			say("redrive: %v", err)
		}
		for _, a := range blocked {
			s.blocked[a] = true
		}
	}
	return nil
}

// arrive waits until the events of every committed transaction are on Kafka.
func (s *settler) arrive(ctx, deadline context.Context) error {
	s.truth = map[uuid.UUID]bool{}
	for _, src := range s.cl.Sources {
		err := rows(ctx, src.Postgres.Server.DSN(src.Database), "SELECT DISTINCT tx, 0::smallint, '' FROM truth", func(id uuid.UUID, _ int16, _ string) { s.truth[id] = true })
		if err != nil {
			return fmt.Errorf("read the truth: %w", err)
		}
	}
	entries, err := journal.Read(s.cl.Journals)
	if err != nil {
		return err
	}
	missing := map[uuid.UUID]bool{}
	for _, e := range entries {
		if e.F == journal.Prepare && e.Type == journal.Invoke && e.Profile != driver.Race && s.truth[e.Tx] {
			for _, ev := range e.Events {
				missing[ev.ID] = true
			}
		}
	}
	next := 0
	readUntil := kafka.ReadUntil
	if s.transactional {
		readUntil = kafka.ReadCommittedUntil
	}
	_, err = readUntil(deadline, s.cl.Brokers.Bootstrap(), func(read []kafka.Record) bool {
		for ; next < len(read); next++ {
			if id, found := read[next].Header("ce_id"); found {
				if parsed, err := uuid.ParseBytes(id); err == nil {
					delete(missing, parsed)
				}
			}
			read[next] = kafka.Record{} // it may be large
		}
		return len(missing) == 0
	}, slices.Sorted(maps.Keys(cluster.Topics))...)
	s.settled.Missing = len(missing)
	if err != nil && deadline.Err() == nil && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("read Kafka: %w", err)
	}
	return nil
}

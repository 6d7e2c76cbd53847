package cluster

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/test/robustness/driver"
)

// Config says what to deploy.
type Config struct {
	// Dir holds logs, journals and control files. StoreDir, when set, holds the store's data: a small file system.
	Dir, StoreDir string
	// Program is the outbox binary, Old an earlier one that runs beside it; empty: none.
	Program, Old string
	// Self is the suite's own binary, for drivers and fake brokers.
	Self string
	// Apache is the number of real Kafka nodes; 0: fake ones.
	Apache int
	// Seed of the drivers.
	Seed uint64
	// Workers and PerSecond of each driver, 0 PerSecond: no limit.
	Workers    int
	PerSecond  float64
	Aggregates int
	// Hot is how many of a hundred draws of an aggregate prefer a few of them.
	Hot int
	// Clocks: those of the databases can be set.
	Clocks bool
	// Profiles of the drivers; nil: the usual mix.
	Profiles map[string]int
	// Python starts the driver of one source, another one from seed to seed; nil: all are Go's.
	Python *Python
	// Mutant to be.
	Mutant string
	// LaggingStandby lets the first source be asked at a standby that replays nothing.
	LaggingStandby bool
	// Env is added to that of servers and relays.
	Env []string
	// LogRetention of the store. 0: 30 s.
	LogRetention time.Duration
	// Servers and Relays: how many. 0: 2 and 3.
	Servers, Relays int
}

const (
	// LeaseTTL is shorter than the default, so that takeovers come quickly.
	LeaseTTL = 3 * time.Second
	// GrowingTopic gets more partitions during the run: no order is promised across that.
	GrowingTopic = "growing"
)

// Topics, with their partition counts in the beginning.
var Topics = map[string]int{"things": 6, "notes": 3, GrowingTopic: 2}

// Source is a service: its database and its drivers.
type Source struct {
	Name     string
	Database string
	Postgres *Postgres
	// DSN as drivers reach it.
	DSN     string
	Drivers []*Driver
}

// Driver is a process of a source.
type Driver struct {
	*Process
	// Python is how it is started when it is a Python one.
	Python   *Python
	config   driver.Config
	Control  string
	Instance int
}

// Cluster is everything.
type Cluster struct {
	Config
	Store    *Postgres
	Sources  []*Source
	Brokers  Broker
	Servers  []*Process
	Relays   []*Process
	Links    []*Link
	Journals string

	links   *links
	servers []string // as drivers reach them
	grown   int
}

const storeDatabase = "outbox"

// settings of all PostgreSQL servers: small ones, with what standbys and prepared transactions need.
func settings(more map[string]string) map[string]string {
	all := map[string]string{
		"shared_buffers": "64MB", "wal_keep_size": "512MB", "max_prepared_transactions": "50", "max_connections": "150",
		"idle_in_transaction_session_timeout": "30s", "tcp_keepalives_idle": "5", "log_min_messages": "fatal",
	}
	for k, v := range more {
		all[k] = v
	}
	return all
}

// Start deploys.
func Start(ctx context.Context, c Config) (_ *Cluster, err error) {
	cl := &Cluster{Config: c, links: newLinks(c.Dir, c.Clocks), Journals: filepath.Join(c.Dir, "journals")}
	if err := os.MkdirAll(cl.Journals, 0o755); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			cl.Stop(context.WithoutCancel(ctx))
		}
	}()
	for _, step := range []func(context.Context) error{cl.startDatabases, cl.startBrokers, cl.startPlatform, cl.startDrivers} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	cl.Links = cl.links.all
	return cl, nil
}

func (c *Cluster) startDatabases(ctx context.Context) error {
	var err error
	if c.Store, err = c.links.postgres(ctx, "store", c.StoreDir, settings(map[string]string{"max_wal_size": "512MB"})); err != nil {
		return err
	}
	if _, err := c.Store.Server.CreateDatabase(ctx, storeDatabase); err != nil {
		return err
	}
	first, err := c.links.postgres(ctx, "db0", "", settings(nil))
	if err != nil {
		return err
	}
	c.Sources = append(c.Sources, &Source{Name: "shop", Database: "shop", Postgres: first})
	// What nobody flushes stays unflushed for long, so that a crash gives transaction ids out again.
	second, err := c.links.postgres(ctx, "db1", "", settings(map[string]string{"wal_writer_delay": "10s", "bgwriter_delay": "10s"}))
	if err != nil {
		return err
	}
	c.Sources = append(c.Sources, &Source{Name: "bank", Database: "bank", Postgres: second}, &Source{Name: "mail", Database: "mail", Postgres: second})
	for _, s := range c.Sources {
		dsn, err := s.Postgres.Server.CreateDatabase(ctx, s.Database)
		if err != nil {
			return err
		}
		if err := driver.CreateSchema(ctx, dsn); err != nil {
			return err
		}
		if _, s.DSN, err = s.Postgres.link(s.Name, s.Database); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) startBrokers(ctx context.Context) error {
	var err error
	if c.Apache > 0 {
		c.Brokers, err = c.links.apacheBrokers(ctx, c.Dir, c.Apache)
	} else {
		c.Brokers, err = c.links.fakeBrokers(ctx, c.Dir, c.Self)
	}
	if err != nil {
		return err
	}
	for topic, partitions := range Topics {
		if err := kafka.CreateTopic(ctx, c.Brokers.Bootstrap(), topic, partitions, map[string]string{"message.timestamp.type": "LogAppendTime"}); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) startPlatform(ctx context.Context) error {
	if out, err := c.outbox(ctx, "", "migrate", "up", "--store-dsn", c.StoreDSN()); err != nil {
		return fmt.Errorf("migrate: %w: %s", err, out)
	}
	// The services' databases as servers reach them.
	env := []string{"OUTBOX_LOG_FORMAT=text", "OUTBOX_MUTANT=" + c.Mutant}
	env = append(env, c.Env...)
	for _, s := range c.Sources {
		_, dsn, err := s.Postgres.link("servers-"+s.Name, s.Database)
		if err != nil {
			return err
		}
		if c.LaggingStandby && s == c.Sources[0] {
			if dsn, err = c.laggingStandby(ctx, s); err != nil {
				return err
			}
		}
		env = append(env, strings.ToUpper(s.Name)+"_DSN="+dsn)
	}
	servers, relays := c.Config.Servers, c.Config.Relays
	if servers == 0 {
		servers, relays = 2, 3
	}
	for i := range servers {
		if err := c.addServer(i, env); err != nil {
			return err
		}
	}
	for i := range relays {
		if err := c.addRelay(i, env); err != nil {
			return err
		}
	}
	for _, p := range append(c.Servers, c.Relays...) {
		if err := p.Start(ctx); err != nil {
			return err
		}
	}
	for _, s := range c.Sources {
		if err := c.register(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) laggingStandby(ctx context.Context, s *Source) (string, error) {
	standby, err := s.Postgres.Standby(ctx, false)
	if err != nil {
		return "", err
	}
	s.Postgres.retired = append(s.Postgres.retired, standby)
	p := &Postgres{Server: standby}
	return standby.DSN(s.Database), p.Exec(ctx, "postgres", "SELECT pg_wal_replay_pause()")
}

func (c *Cluster) addServer(i int, env []string) error {
	ports, err := consecutivePorts(2)
	if err != nil {
		return err
	}
	name := fmt.Sprintf("server%d", i)
	_, store, err := c.Store.link(name, storeDatabase)
	if err != nil {
		return err
	}
	grpc, http := local(ports), local(ports+1)
	l, err := c.links.add("services-"+name, grpc)
	if err != nil {
		return err
	}
	c.servers = append(c.servers, l.Address())
	c.Servers = append(c.Servers, &Process{
		Name: name, Program: c.Program, Args: []string{"server"}, address: grpc, metrics: http, dir: c.Dir,
		env: append(env[:len(env):len(env)], "OUTBOX_STORE_DSN="+store, "OUTBOX_SERVER_GRPC_LISTEN="+grpc, "OUTBOX_SERVER_HTTP_LISTEN="+http,
			// The log's ring turns within a run, so that its clean-up is under test too.
			"OUTBOX_SERVER_GENERATION_BYTES=4000000", "OUTBOX_SERVER_LOG_RETENTION="+cmp.Or(c.LogRetention, 30*time.Second).String(), "OUTBOX_STORE_STATEMENT_TIMEOUT=2s",
			"OUTBOX_SERVER_TX_RETENTION=2h", // longer than any jump of the store's clock
			"OUTBOX_RESOLVER_RUNNING_BACKOFF=1s", "OUTBOX_RESOLVER_UNKNOWN_BACKOFF=1s"),
	})
	return nil
}

func (c *Cluster) addRelay(i int, env []string) error {
	port, err := consecutivePorts(1)
	if err != nil {
		return err
	}
	name := fmt.Sprintf("relay%d", i)
	_, store, err := c.Store.link(name, storeDatabase)
	if err != nil {
		return err
	}
	http := local(port)
	c.Relays = append(c.Relays, &Process{
		Name: name, Program: c.Program, Args: []string{"relay"}, address: http, dir: c.Dir,
		env: append(env[:len(env):len(env)], "OUTBOX_STORE_DSN="+store, "OUTBOX_RELAY_HTTP_LISTEN="+http, "OUTBOX_KAFKA_BROKERS="+c.Brokers.Bootstrap(),
			"OUTBOX_RELAY_LEASE_TTL="+LeaseTTL.String(), "OUTBOX_RELAY_RETRY_MAX=1s", "OUTBOX_STORE_STATEMENT_TIMEOUT=2s"),
	})
	return nil
}

// StoreDSN is the store's, without a proxy.
func (c *Cluster) StoreDSN() string { return c.Store.Server.DSN(storeDatabase) }

// register makes a source known. One has nobody to ask but its own sessions.
func (c *Cluster) register(ctx context.Context, s *Source) error {
	file := fmt.Sprintf("name: %s\ntopics: [\"*\"]\nrecord_profile: cloudevents\nfailure_policy: block\ndatabases:\n  - name: default\n    mode: marker\n", s.Name)
	if s.Name != "bank" {
		file += "    dsn_ref: env:" + strings.ToUpper(s.Name) + "_DSN\n"
	}
	if out, err := c.Operate(ctx, file, "source", "apply", "-"); err != nil {
		return fmt.Errorf("register %s: %w: %s", s.Name, err, out)
	}
	return nil
}

// Operate runs an operator's command against a server that is alive.
func (c *Cluster) Operate(ctx context.Context, stdin string, args ...string) (string, error) {
	err := errors.New("no server is alive")
	for _, s := range c.Servers {
		if !s.Alive() {
			continue
		}
		var out string
		if out, err = c.outbox(ctx, stdin, append(args, "--address", s.address)...); err == nil {
			return out, nil
		}
		err = fmt.Errorf("%w: %s", err, out)
	}
	return "", err
}

// outbox runs a command of the binary to its end.
func (c *Cluster) outbox(ctx context.Context, stdin string, args ...string) (string, error) {
	command := exec.CommandContext(ctx, c.Program, args...) //nolint:gosec // ours
	command.Stdin = strings.NewReader(stdin)
	out, err := command.CombinedOutput()
	return string(out), err
}

// Verify lets the platform check its own stored state, and returns what it finds.
func (c *Cluster) Verify(ctx context.Context) ([]string, error) {
	out, err := c.outbox(ctx, "", "verify", "--store-dsn", c.StoreDSN())
	if err == nil {
		return nil, nil
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && strings.Contains(out, "violations found") {
		return strings.Split(strings.TrimSpace(out), "\n"), nil
	}
	return nil, fmt.Errorf("outbox verify: %w: %s", err, out)
}

func (c *Cluster) startDrivers(ctx context.Context) error {
	for i, s := range c.Sources {
		d := &Driver{
			Process: &Process{Name: "driver-" + s.Name, Program: c.Self, dir: c.Dir, env: []string{"OUTBOX_MUTANT=" + c.Mutant}},
			Control: filepath.Join(c.Dir, "driver-"+s.Name+".orders"),
			config: driver.Config{
				Source: s.Name, DSN: s.DSN, Servers: c.servers, Seed: c.Seed*1000 + uint64(i), Workers: c.Workers, PerSecond: c.PerSecond, //nolint:gosec // small
				Aggregates: c.Aggregates, Hot: c.Hot, Topics: []string{"things", "notes", GrowingTopic}, Profiles: c.Profiles, Journals: c.Journals,
			},
		}
		d.config.Control = d.Control
		if c.Python != nil && i == int(c.Seed/3%uint64(len(c.Sources))) { //nolint:gosec // small
			d.usePython(c.Python)
		}
		s.Drivers = append(s.Drivers, d)
		if err := d.Begin(ctx); err != nil {
			return err
		}
	}
	for _, d := range c.Drivers() {
		if err := d.ready(ctx); err != nil {
			return err
		}
	}
	return nil
}

// ready waits until a driver takes orders: a Python one needs seconds to start where processors are few.
func (d *Driver) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	if err := driver.Give(d.Control, driver.Quiet); err != nil {
		return err
	}
	for !driver.Obeyed(d.Control) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("start %s: it takes no orders: %w; its log ends with:\n%s", d.Name, ctx.Err(), d.Tail())
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

// Begin starts a driver, again under another name after it died; it works when it is told to.
func (d *Driver) Begin(ctx context.Context) error {
	d.Instance++
	d.config.Process = fmt.Sprintf("%s-%d", d.Name, d.Instance)
	d.config.Seed += 100
	config, err := json.Marshal(d.config)
	if err != nil {
		return err
	}
	d.Args = []string{"driver", string(config)}
	if d.Python != nil {
		d.Args = []string{d.Python.Driver, string(config)}
	}
	return d.Start(ctx)
}

// Drivers are those of all sources.
func (c *Cluster) Drivers() []*Driver {
	var all []*Driver
	for _, s := range c.Sources {
		all = append(all, s.Drivers...)
	}
	return all
}

// Databases are all servers of PostgreSQL, the store first.
func (c *Cluster) Databases() []*Postgres {
	all := []*Postgres{c.Store}
	for _, s := range c.Sources {
		if !slices.Contains(all, s.Postgres) {
			all = append(all, s.Postgres)
		}
	}
	return all
}

// Grow adds a partition to the growing topic and returns how many it has.
func (c *Cluster) Grow(ctx context.Context) (int, error) {
	n := Topics[GrowingTopic] + c.grown + 1
	if err := addPartitions(ctx, c.Brokers.Bootstrap(), GrowingTopic, n); err != nil {
		return 0, err
	}
	c.grown++
	return n, nil
}

// Grown is how many partitions were added.
func (c *Cluster) Grown() int { return c.grown }

// EndPrepared ends transactions in two phases whose driver is gone. Half of them commit.
func (c *Cluster) EndPrepared(ctx context.Context) error {
	for _, s := range c.Sources {
		gids, err := Query1[[]string](ctx, s.Postgres, s.Database,
			"SELECT coalesce(array_agg(gid), '{}') FROM pg_prepared_xacts WHERE database = current_database()")
		if err != nil {
			return err
		}
		for _, gid := range gids {
			end := "COMMIT"
			if gid[len(gid)-1]%2 == 0 {
				end = "ROLLBACK"
			}
			if err := s.Postgres.Exec(ctx, s.Database, end+" PREPARED '"+gid+"'"); err != nil {
				return fmt.Errorf("end a prepared transaction: %w", err)
			}
		}
	}
	return nil
}

// StopPlatform ends servers and relays as an operator would, and then the drivers.
func (c *Cluster) StopPlatform() error {
	var errs []error
	for _, p := range append(c.Relays, c.Servers...) {
		errs = append(errs, p.Stop())
	}
	for _, d := range c.Drivers() {
		errs = append(errs, d.Stop())
	}
	return errors.Join(errs...)
}

// Crashes are panics and data races of all processes.
func (c *Cluster) Crashes() []string {
	var all []string
	for _, p := range append(c.Servers, c.Relays...) {
		if crash := p.Crash(); crash != "" {
			all = append(all, crash)
		}
	}
	for _, d := range c.Drivers() {
		if crash := d.Crash(); crash != "" {
			all = append(all, crash)
		}
	}
	return all
}

// Stop ends everything at once.
func (c *Cluster) Stop(ctx context.Context) {
	for _, d := range c.Drivers() {
		d.Thaw()
		d.Kill()
	}
	for _, p := range append(c.Relays, c.Servers...) {
		p.Thaw()
		p.Kill()
	}
	if c.Brokers != nil {
		c.Brokers.Stop(ctx)
	}
	for _, p := range c.Databases() {
		if p != nil {
			p.stop(ctx)
		}
	}
	sweepClocks()
}

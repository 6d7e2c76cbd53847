package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/embedded/postgres"
	"github.com/outbox-platform/outbox/examples/orders"
	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/migrations"
)

type devCmd struct {
	Dir        string  `default:".outbox" type:"path" help:"Where data and logs are kept between starts."`
	GRPCListen string  `name:"grpc-listen" default:"127.0.0.1:7070" help:"Address of the API; another port when it is taken."`
	HTTPListen string  `name:"http-listen" default:"127.0.0.1:7071" help:"Address of the HTTP port; another port when it is taken."`
	KafkaPort  int     `default:"9092" help:"Port of the Kafka broker; another one when it is taken."`
	Rate       float64 `default:"5" help:"Transactions per second of the demo source."`
	Rollback   float64 `default:"0.1" help:"Share of them that is rolled back."`
	NoDemo     bool    `help:"No demo source: only PostgreSQL, Kafka, server and relay."`
	StopAfter  int     `placeholder:"N" help:"End, with success, once N events of the demo source have arrived."`
}

// Help implements kong.HelpProvider.
func (*devCmd) Help() string {
	return `Starts a PostgreSQL (fetched once), a broker that speaks Kafka's protocol, a server and a relay, and a demo source: an order
service that does real transactions, some of which it rolls back. Prints what was committed and what arrived from Kafka. Ctrl-C
ends it; the next start finds its data again. Works as root and as an ordinary user. Not for production: one process, no TLS,
no authentication, a broker without replication.

Examples:
  outbox dev
  outbox dev --no-demo --dir /tmp/mine`
}

// Validate is called by kong.
func (c *devCmd) Validate() error {
	switch {
	case c.Rate <= 0 || c.Rate > 1000:
		return fmt.Errorf("--rate must be above 0 and at most 1000: %g", c.Rate)
	case c.Rollback < 0 || c.Rollback >= 1:
		return fmt.Errorf("--rollback must be at least 0 and less than 1: %g", c.Rollback)
	case c.StopAfter < 0:
		return fmt.Errorf("--stop-after must not be negative: %d", c.StopAfter)
	case c.NoDemo && c.StopAfter > 0:
		return errors.New("--stop-after counts events of the demo source: leave --no-demo out")
	}
	return nil
}

// Run starts everything, in the order in which the parts need each other, and ends it in the opposite one.
func (c *devCmd) Run(ctx context.Context, s streams) (err error) {
	var closers []func(context.Context) error
	defer func() {
		// What was started ends even if ctx has: that is the usual case.
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		for i := len(closers) - 1; i >= 0; i-- {
			err = errors.Join(err, closers[i](bounded))
		}
	}()
	later := func(f func(context.Context) error) { closers = append(closers, f) }

	unlock, err := lockDir(c.Dir)
	if err != nil {
		return err
	}
	later(func(context.Context) error { return unlock() })
	logFile, err := os.OpenFile(filepath.Join(c.Dir, "outbox.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	later(func(context.Context) error { return logFile.Close() })

	pg, err := postgres.Start(ctx, postgres.Config{
		Dir:      filepath.Join(c.Dir, "postgres"),
		Settings: map[string]string{"max_connections": "100"},
		Log:      func(line string) { fmt.Fprintln(s.out, line) },
	})
	if err != nil {
		return fmt.Errorf("starting PostgreSQL: %w", err)
	}
	later(pg.Stop)
	storeDSN, sourceDSN, err := devDatabases(ctx, pg)
	if err != nil {
		return err
	}
	broker, err := kafka.StartFake(kafka.FakeConfig{
		Dir: filepath.Join(c.Dir, "kafka"), Port: freePortOr(c.KafkaPort), Topics: map[string]int{orders.Topic: 0},
	})
	if err != nil {
		return fmt.Errorf("starting the Kafka broker: %w", err)
	}
	later(func(context.Context) error { broker.Close(); return nil })

	p, err := c.platform(ctx, storeDSN, broker.Bootstrap(), slog.New(slog.NewJSONHandler(logFile, nil)))
	if err != nil {
		return err
	}
	running := runInBackground(ctx, p)
	later(func(context.Context) error { defer p.close(); return running.stop() })

	fmt.Fprintf(s.out, "store        %s (PostgreSQL %s)\n", storeDSN, pg.Version())
	fmt.Fprintf(s.out, "Kafka        %s\n", broker.Bootstrap())
	fmt.Fprintf(s.out, "API          %s (gRPC), http://%s (JSON, /metrics, /healthz, /readyz)\n", p.server.GRPCAddr(), p.server.HTTPAddr())
	fmt.Fprintf(s.out, "data, logs   %s\n", c.Dir)
	if c.NoDemo {
		fmt.Fprintln(s.out, "ready; Ctrl-C ends it")
		return running.untilEnded(ctx)
	}
	fmt.Fprintf(s.out, "demo source  %s\n", sourceDSN)
	return c.demo(ctx, s.out, running, p.server.GRPCAddr(), sourceDSN, broker.Bootstrap())
}

// platform makes server and relay, not running yet.
func (c *devCmd) platform(ctx context.Context, dsn, brokers string, log *slog.Logger) (*platform, error) {
	if err := migrations.Up(ctx, dsn, nil); err != nil {
		return nil, err
	}
	// The defaults of the settings are those of the command line.
	var defaults struct {
		Store storeSettings `embed:"" prefix:"store-"`
		Kafka kafkaSettings `embed:"" prefix:"kafka-"`
		serverSettings
		relaySettings
	}
	if err := applyDefaults(&defaults); err != nil {
		return nil, err
	}
	defaults.Store.DSN = secret(dsn)
	defaults.Kafka.Brokers = []string{brokers}
	defaults.Server.GRPCListen, defaults.Server.HTTPListen = freeAddressOr(c.GRPCListen), freeAddressOr(c.HTTPListen)
	defaults.Server.DrainTimeout = 5 * time.Second
	p, err := newPlatform(ctx, defaults.Store, log)
	if err != nil {
		return nil, err
	}
	defaults.Relay.HTTPListen = "" // the server's port shows the same registry
	if err := errors.Join(p.addRelay(ctx, defaults.Kafka, defaults.relaySettings), p.addServer(defaults.serverSettings)); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// demo runs the order service against the platform and shows what becomes of its events.
func (c *devCmd) demo(ctx context.Context, out io.Writer, running *background, api, sourceDSN, brokers string) (err error) {
	if err := registerOrders(ctx, api); err != nil {
		return fmt.Errorf("registering the demo source: %w", err)
	}
	pool, err := pgxpool.New(ctx, sourceDSN)
	if err != nil {
		return fmt.Errorf("connecting to the demo source's database: %w", err)
	}
	defer pool.Close()
	if err := orders.Migrate(ctx, pool); err != nil {
		return err
	}
	outbox, err := client.New(client.Config{Target: api, Source: orders.Source, Plaintext: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, outbox.Close()) }()
	shop, err := orders.New(pool, outbox)
	if err != nil {
		return err
	}

	fmt.Fprintln(out, "ready; Ctrl-C ends it")
	r := newDevReport(out, c.StopAfter)
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	watched := make(chan error, 1)
	go func() { watched <- watchOrders(watching, brokers, r.arrived) }()
	defer func() {
		stopWatching()
		err = errors.Join(err, <-watched)
		r.summary()
	}()

	working, stopWorking := context.WithCancel(ctx)
	defer stopWorking()
	worked := make(chan error, 1)
	go func() { worked <- shop.Run(working, c.Rate, c.Rollback, r.outcome) }()
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			r.summary()
			continue
		case err = <-worked:
			if ctx.Err() == nil && err == nil {
				err = errors.New("the demo source ended by itself")
			}
			return errors.Join(err, r.awaitAll(ctx, 5*time.Second))
		case <-r.reached:
		case <-ctx.Done():
		case <-running.done:
			stopWorking()
			return errors.Join(running.err, <-worked)
		}
		stopWorking()
		return errors.Join(<-worked, r.awaitAll(ctx, 10*time.Second))
	}
}

// devDatabases makes the databases of the store and of the demo source unless they are there.
func devDatabases(ctx context.Context, pg *postgres.Server) (store, source string, err error) {
	conn, err := pgxpool.New(ctx, pg.DSN("postgres"))
	if err != nil {
		return "", "", fmt.Errorf("connecting to PostgreSQL: %w", err)
	}
	defer conn.Close()
	for _, name := range []string{"outbox", "orders"} {
		var there bool
		if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", name).Scan(&there); err != nil {
			return "", "", fmt.Errorf("looking for database %s: %w", name, err)
		}
		if there {
			continue
		}
		if _, err := pg.CreateDatabase(ctx, name); err != nil {
			return "", "", err
		}
	}
	return pg.DSN("outbox"), pg.DSN("orders"), nil
}

// registerOrders registers the demo source, over the API as an operator would.
func registerOrders(ctx context.Context, address string) error {
	api, err := apiSettings{Address: address, Timeout: 20 * time.Second}.dial()
	if err != nil {
		return err
	}
	defer api.close()
	ctx, cancel := api.call(ctx)
	defer cancel()
	_, err = api.admin.ApplySource(ctx, &outboxv1.ApplySourceRequest{
		Source: &outboxv1.Source{Name: orders.Source, Topics: []string{orders.Topic}}, Reason: "outbox dev",
	}, waitForReady)
	return err
}

// background is a platform that runs.
type background struct {
	cancel context.CancelFunc
	done   chan struct{}
	err    error // once done is closed
}

func runInBackground(ctx context.Context, p *platform) *background {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	b := &background{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(b.done)
		b.err = p.run(ctx)
	}()
	return b
}

// untilEnded waits for ctx, or for the platform to end by itself.
func (b *background) untilEnded(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-b.done:
		return b.err
	}
}

func (b *background) stop() error {
	b.cancel()
	<-b.done
	return b.err
}

// lockDir makes the directory and keeps others from working in it at the same time.
func lockDir(dir string) (unlock func() error, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, usagef("another 'outbox dev' works in %s: end it, or give another --dir", dir)
	}
	return f.Close, nil
}

// freePortOr returns the port on 127.0.0.1 if it is free, else 0: any.
func freePortOr(port int) int {
	if _, free := tryListen(net.JoinHostPort("127.0.0.1", fmt.Sprint(port))); free {
		return port
	}
	return 0
}

// freeAddressOr returns the address if its port is free, else one with any port.
func freeAddressOr(address string) string {
	if address, free := tryListen(address); free {
		return address
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return address // the server says what is wrong with it
	}
	return net.JoinHostPort(host, "0")
}

func tryListen(address string) (string, bool) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return address, false
	}
	_ = listener.Close()
	return address, true
}

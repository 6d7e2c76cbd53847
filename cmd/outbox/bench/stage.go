package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/embedded/postgres"
	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

const (
	sourceName = "bench"
	partitions = 8
)

// settings of the PostgreSQL servers that the bench starts: durable, and large enough that memory is not what is measured.
var serverSettings = map[string]string{
	"max_connections": "400", "shared_buffers": "1GB", "max_wal_size": "8GB", "checkpoint_timeout": "5min",
	"bgwriter_lru_maxpages": "1000", "bgwriter_delay": "20ms",
}

// stage is everything a run needs, started or given by address.
type stage struct {
	dir     string
	log     io.WriteCloser
	source  *postgres.Server // nil: given by --source-dsn
	store   *postgres.Server // nil: given by --dsn, or the target does not need it
	apache  *kafka.Apache    // nil: given by --brokers, or a fake is used
	broker  *process         // the fake broker's process
	relay   *process         // naive relay, or server and relay of the platform
	brokers string
	api     string // gRPC address of the platform

	sourcePool *pgxpool.Pool
	topics     int
}

// buildStage starts what the options do not give.
func buildStage(ctx context.Context, o *Cmd, say func(string, ...any)) (_ *stage, err error) {
	s := &stage{brokers: o.Brokers, api: o.Server}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close(context.WithoutCancel(ctx)))
		}
	}()
	if s.dir, err = os.MkdirTemp("", "outbox-bench-"); err != nil {
		return nil, fmt.Errorf("making a folder: %w", err)
	}
	logFile := o.Log
	if logFile == "" {
		logFile = filepath.Join(s.dir, "platform.log")
	}
	if s.log, err = os.Create(logFile); err != nil { //nolint:gosec // the caller's own choice
		return nil, fmt.Errorf("opening the log of the processes: %w", err)
	}
	if err := s.startSource(ctx, o, say); err != nil {
		return nil, err
	}
	if err := s.startKafka(ctx, o, say); err != nil {
		return nil, err
	}
	if o.Target == targetOutbox && s.api == "" {
		if err := s.startStore(ctx, o, say); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *stage) startSource(ctx context.Context, o *Cmd, say func(string, ...any)) error {
	dsn := o.SourceDSN
	if dsn == "" {
		say("starting the source's PostgreSQL %s", o.Postgres)
		server, err := postgres.Start(ctx, postgres.Config{Version: o.Postgres, Settings: serverSettings, Log: func(l string) { say("%s", l) }})
		if err != nil {
			return fmt.Errorf("starting the source's PostgreSQL: %w", err)
		}
		s.source = server
		if dsn, err = server.CreateDatabase(ctx, "source"); err != nil {
			return fmt.Errorf("creating the source database: %w", err)
		}
	}
	cfg, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return fmt.Errorf("reading the source's address: %w", err)
	}
	cfg.MaxConns = int32(min(slicesMax(o.Concurrency), o.SourceConns)) //nolint:gosec // small
	cfg.MinConns = cfg.MaxConns
	if s.sourcePool, err = pgxpool.NewWithConfig(ctx, cfg); err != nil {
		return fmt.Errorf("connecting to the source database: %w", err)
	}
	return nil
}

func (s *stage) startKafka(ctx context.Context, o *Cmd, say func(string, ...any)) error {
	if s.brokers != "" {
		return nil
	}
	if o.Broker == brokerFake {
		say("starting a Kafka-protocol broker (fake) as a process of its own")
		port, err := freePort()
		if err != nil {
			return err
		}
		s.brokers = fmt.Sprintf("127.0.0.1:%d", port)
		s.broker, err = startProcess("the broker", s.log, nil, "bench-broker", fmt.Sprintf("--port=%d", port))
		if err != nil {
			return err
		}
		return s.broker.awaitReady(ctx, 30*time.Second, func(ctx context.Context) error { return dialTCP(ctx, s.brokers) })
	}
	say("starting Apache Kafka")
	apache, err := kafka.StartApache(ctx, kafka.ApacheConfig{})
	if err != nil {
		return fmt.Errorf("starting Apache Kafka (use --broker fake to do without): %w", err)
	}
	s.apache, s.brokers = apache, apache.Bootstrap()
	return nil
}

func (s *stage) startStore(ctx context.Context, o *Cmd, say func(string, ...any)) error {
	dsn := o.DSN
	if dsn == "" {
		say("starting the store's PostgreSQL %s", o.Postgres)
		server, err := postgres.Start(ctx, postgres.Config{Version: o.Postgres, Settings: serverSettings, Log: func(l string) { say("%s", l) }})
		if err != nil {
			return fmt.Errorf("starting the store's PostgreSQL: %w", err)
		}
		s.store = server
		if dsn, err = server.CreateDatabase(ctx, "outbox"); err != nil {
			return fmt.Errorf("creating the store's database: %w", err)
		}
	}
	grpcPort, err := freePort()
	if err != nil {
		return err
	}
	httpPort, err := freePort()
	if err != nil {
		return err
	}
	s.api = fmt.Sprintf("127.0.0.1:%d", grpcPort)
	env := append(platformEnv(dsn, s.brokers, s.api, fmt.Sprintf("127.0.0.1:%d", httpPort)), killDSNVariable+"="+s.sourcePool.Config().ConnString())
	migrate, err := startProcess("outbox migrate", s.log, env, "migrate", "up")
	if err != nil {
		return err
	}
	if <-migrate.done; migrate.err != nil {
		return fmt.Errorf("migrating the store: %w (log: %s)", migrate.err, s.dir)
	}
	if o.History > 0 {
		say("filling the store with %d transactions of history", o.History)
		if err := fillHistory(ctx, dsn, o.History); err != nil {
			return err
		}
	}
	if s.relay, err = startProcess("the platform", s.log, env, platformArgs...); err != nil {
		return err
	}
	conn, err := grpc.NewClient(s.api, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("dialing the platform: %w", err)
	}
	defer conn.Close() //nolint:errcheck // only asked
	if err := s.relay.awaitReady(ctx, 60*time.Second, func(ctx context.Context) error {
		r, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
		if err == nil && r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			err = errors.New(r.GetStatus().String())
		}
		return err
	}); err != nil {
		return err
	}
	return registerSource(ctx, conn)
}

// registerSource makes the bench's source known, with every topic of the bench.
func registerSource(ctx context.Context, conn *grpc.ClientConn) error {
	_, err := outboxv1.NewAdminServiceClient(conn).ApplySource(ctx, &outboxv1.ApplySourceRequest{Reason: "bench", Source: &outboxv1.Source{
		Name: sourceName, Topics: []string{"bench.*"},
		Databases: []*outboxv1.SourceDatabase{{Name: "default", Mode: outboxv1.DatabaseMode_DATABASE_MODE_MARKER}},
	}})
	if err != nil {
		return fmt.Errorf("registering the source: %w", err)
	}
	return nil
}

// holdXID opens a transaction with an xid in another database of the store's cluster and returns how to end it: what a
// forgotten psql session does.
func (s *stage) holdXID(ctx context.Context) (release func(), err error) {
	if s.store == nil {
		return nil, errors.New("--hold-xid needs a store that the bench starts itself")
	}
	dsn, err := s.store.CreateDatabase(ctx, "neighbour")
	if err != nil {
		return nil, fmt.Errorf("creating a neighbour database: %w", err)
	}
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return nil, fmt.Errorf("connecting to the neighbour database: %w", err)
	}
	if _, err := conn.Exec(ctx, "BEGIN; SELECT pg_current_xact_id()"); err != nil {
		return nil, fmt.Errorf("opening a transaction: %w", err)
	}
	return func() { _ = conn.Close(context.WithoutCancel(ctx)) }, nil
}

// newTopic creates an empty topic for one run.
func (s *stage) newTopic(ctx context.Context) (string, error) {
	s.topics++
	name := fmt.Sprintf("bench.%d.%d", time.Now().UnixMilli(), s.topics)
	return name, kafka.CreateTopic(ctx, s.brokers, name, partitions, nil)
}

// usage is CPU time and WAL written so far.
type usage struct {
	service, platform, source, store, kafka time.Duration
	wal                                     int64
}

// close stops everything that was started.
func (s *stage) close(ctx context.Context) error {
	var errs []error
	for _, p := range []*process{s.relay, s.broker} {
		if p != nil {
			errs = append(errs, p.stop())
		}
	}
	if s.sourcePool != nil {
		s.sourcePool.Close()
	}
	if s.apache != nil {
		errs = append(errs, s.apache.Stop(ctx))
	}
	for _, server := range []*postgres.Server{s.source, s.store} {
		if server != nil {
			errs = append(errs, server.StopImmediate(ctx))
		}
	}
	if s.log != nil {
		errs = append(errs, s.log.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("stopping (logs are kept in %s): %w", s.dir, err)
	}
	if s.dir != "" {
		return os.RemoveAll(s.dir)
	}
	return nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("finding a free port: %w", err)
	}
	defer l.Close() //nolint:errcheck // only the number is wanted
	return l.Addr().(*net.TCPAddr).Port, nil
}

func dialTCP(ctx context.Context, address string) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}

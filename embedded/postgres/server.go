package postgres

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/embedded/process"
)

const (
	// superuser is the one role of a new cluster.
	superuser = "postgres"
	// readyTimeout bounds one start, crash recovery included, when the context sets no earlier end.
	readyTimeout = 60 * time.Second
	// pollInterval is the pause between two looks at something that offers no notification.
	pollInterval = 5 * time.Millisecond
)

// Config says which PostgreSQL to run and where its data lives.
type Config struct {
	// Dir holds the data directory ("data"), the server's log and its password, and is kept between starts.
	// Empty: a temporary directory, removed by Stop.
	//
	// When the process is root and the server's user cannot reach Dir (for instance below /root), the files are kept
	// in root's cache directory and Dir/postgres is a symbolic link to them.
	Dir string
	// Version is the major version: "15", "16", "17" or "18". Empty: the version of the data in Dir, else the version
	// in OUTBOX_POSTGRES_BIN, else DefaultVersion.
	Version string
	// Port on 127.0.0.1. 0: a free one, kept by Restart.
	Port int
	// Settings are server settings that win over this package's defaults, for instance "shared_buffers": "256MB".
	Settings map[string]string
	// Env is added to the environment of the server and all its processes, as "NAME=value".
	Env []string
	// Log receives a line when something takes long, such as the one download. Nil: silent.
	Log func(line string)
}

// Server is a running PostgreSQL. Its methods may be called from several goroutines, but Stop, StopImmediate, Kill and
// Restart exclude each other.
type Server struct {
	config   Config
	binaries binaries
	account  *account
	home     string // data directory, log, password
	password string
	port     int

	lifecycle sync.Mutex // one of Stop, StopImmediate, Kill, Restart at a time

	mu      sync.Mutex
	running *postmaster   // the last one started
	spent   time.Duration // CPU time of those that have ended
}

// Start starts a PostgreSQL server and returns when it answers queries. It creates the cluster when Dir holds none, and
// fetches the binaries when no suitable ones are installed. The context bounds only the start.
func Start(ctx context.Context, config Config) (*Server, error) {
	if config.Log == nil {
		config.Log = func(string) {}
	}
	s := &Server{config: config}
	var err error
	if s.account, err = serverAccount(); err != nil {
		return nil, err
	}
	if s.home, err = s.account.home(config.Dir, config.Log); err != nil {
		return nil, fmt.Errorf("prepare directory for PostgreSQL: %w", err)
	}
	if err = s.start(ctx); err != nil {
		s.removeTemporary()
		return nil, err
	}
	return s, nil
}

// start finds binaries, creates the cluster if there is none, and launches the first process.
func (s *Server) start(ctx context.Context) (err error) {
	existing, err := clusterVersion(s.DataDir())
	if err != nil {
		return err
	}
	want := s.config.Version
	switch {
	case want == "":
		want = existing
	case existing != "" && existing != want:
		return fmt.Errorf("%s holds data of PostgreSQL %s, asked for %s: use another directory or remove this one", s.home, existing, want)
	}
	if s.binaries, err = findBinaries(ctx, want, s.config.Log); err != nil {
		return err
	}
	if existing == "" {
		if err := s.initialize(ctx); err != nil {
			return fmt.Errorf("create PostgreSQL cluster in %s: %w", s.home, err)
		}
	}
	if s.password, err = readPassword(s.home); err != nil {
		return err
	}
	s.port = s.config.Port
	return s.launch(ctx)
}

// errShortLived is a start that failed for a reason which goes away by itself.
var errShortLived = errors.New("start can be repeated")

// launch starts the postmaster and waits until it answers. It repeats a start that fails because processes of a killed
// predecessor still hold its shared memory, or because a free port was taken by somebody else meanwhile.
func (s *Server) launch(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		err := s.launchOnce(ctx)
		if !errors.Is(err, errShortLived) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * pollInterval):
		}
	}
}

func (s *Server) launchOnce(ctx context.Context) error {
	if s.port == 0 {
		ports, err := process.FreePorts(1)
		if err != nil {
			return err
		}
		s.port = ports[0]
	}
	logStart := process.LogSize(s.LogFile())
	p, err := s.startPostmaster()
	if err != nil {
		return fmt.Errorf("start PostgreSQL: %w", err)
	}
	s.mu.Lock()
	s.running = p
	s.mu.Unlock()
	err = s.awaitReady(ctx, p)
	if err == nil {
		return nil
	}
	p.kill()
	s.retire(p)
	lines := process.Tail(process.LogSince(s.LogFile(), logStart))
	switch {
	case strings.Contains(lines, "pre-existing shared memory block"), strings.Contains(lines, "lock file \"postmaster.pid\" already exists"):
		err = fmt.Errorf("%w: %w", errShortLived, err)
	case strings.Contains(lines, "could not bind") && s.config.Port == 0:
		s.port = 0
		err = fmt.Errorf("%w: %w", errShortLived, err)
	}
	return fmt.Errorf("start PostgreSQL %s: %w; its log ends with:\n%s", s.binaries.version, err, lines)
}

// arguments are the command line of postgres. Everything is on it, nothing in postgresql.conf, so that a kept data
// directory follows the present Config.
func (s *Server) arguments() []string {
	settings := map[string]string{
		"listen_addresses": "127.0.0.1",
		"port":             strconv.Itoa(s.port),
		// No unix socket: nothing to clean up, and no path length limit.
		"unix_socket_directories": "",
		"max_connections":         "200",
		"fsync":                   "on",
		"synchronous_commit":      "on",
		"logging_collector":       "off",
		"log_destination":         "stderr",
	}
	maps.Copy(settings, s.config.Settings)
	args := []string{"-D", s.DataDir()}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		args = append(args, "-c", name+"="+settings[name])
	}
	return args
}

func (s *Server) awaitReady(ctx context.Context, p *postmaster) error {
	for {
		err := s.ping(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.Done():
			return fmt.Errorf("it ended at once: %s", p.Exit())
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w (last answer: %w)", context.Cause(ctx), err)
		case <-time.After(2 * pollInterval):
		}
	}
}

func (s *Server) ping(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, s.DSN("postgres"))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	return conn.Ping(ctx)
}

// DSN is the connection string of a database of this server, as superuser, without TLS.
func (s *Server) DSN(database string) string {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(superuser, s.password),
		Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)), Path: "/" + database, RawQuery: "sslmode=disable",
	}
	return u.String()
}

// CreateDatabase creates an empty database and returns its connection string. A database of that name is an error.
func (s *Server) CreateDatabase(ctx context.Context, name string) (dsn string, err error) {
	conn, err := pgx.Connect(ctx, s.DSN("postgres"))
	if err != nil {
		return "", fmt.Errorf("create database %q: %w", name, err)
	}
	defer func() { _ = conn.Close(ctx) }()
	// template0 may be copied while somebody is connected to template1.
	if _, err := conn.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{name}.Sanitize()+" TEMPLATE template0"); err != nil {
		return "", fmt.Errorf("create database %q: %w", name, err)
	}
	return s.DSN(name), nil
}

// Stop ends the server (fast shutdown: open transactions are rolled back) and removes a temporary directory.
// When the context ends first, the server is stopped by force and the context's error returned.
// Stopping a server that is not running only removes the temporary directory.
func (s *Server) Stop(ctx context.Context) error {
	s.lifecycle.Lock()
	defer s.lifecycle.Unlock()
	err := s.end(ctx, syscall.SIGINT)
	s.removeTemporary()
	return err
}

// StopImmediate ends the server at once, as a crash would (immediate shutdown): the next start runs recovery. The data
// directory stays, so that Restart can follow.
func (s *Server) StopImmediate(ctx context.Context) error {
	s.lifecycle.Lock()
	defer s.lifecycle.Unlock()
	return s.end(ctx, syscall.SIGQUIT)
}

// Kill ends the postmaster with SIGKILL and returns when all its backends are gone. The data directory stays, so that
// Restart can follow.
func (s *Server) Kill() {
	s.lifecycle.Lock()
	defer s.lifecycle.Unlock()
	p := s.current()
	p.kill()
	s.retire(p)
}

// Restart starts the server again on its data, port and settings, after stopping it (fast) if it runs.
func (s *Server) Restart(ctx context.Context) error {
	s.lifecycle.Lock()
	defer s.lifecycle.Unlock()
	if err := s.end(ctx, syscall.SIGINT); err != nil {
		return err
	}
	return s.launch(ctx)
}

// end asks the postmaster to stop and waits for it, by force when the context ends first.
func (s *Server) end(ctx context.Context, signal syscall.Signal) error {
	p := s.current()
	defer s.retire(p)
	if err := p.Signal(signal); err != nil {
		return nil // it has ended already
	}
	select {
	case <-p.Done():
		return nil
	case <-ctx.Done():
		p.kill()
		return fmt.Errorf("stop PostgreSQL: %w", context.Cause(ctx))
	}
}

// retire adds the CPU time of an ended process to the server's sum, once.
func (s *Server) retire(p *postmaster) {
	<-p.Done()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !p.counted {
		p.counted = true
		spent, _ := p.CPUTime() // of an ended process it is known
		s.spent += spent
	}
}

func (s *Server) current() *postmaster {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.running
}

func (s *Server) removeTemporary() {
	if s.config.Dir == "" {
		_ = os.RemoveAll(s.home)
	}
}

// PID is the process id of the postmaster, also after it ended.
func (s *Server) PID() int { return s.current().PID() }

// Done is closed when the running postmaster ends, for whatever reason. After Restart ask again.
func (s *Server) Done() <-chan struct{} { return s.current().Done() }

// Port is the TCP port on 127.0.0.1.
func (s *Server) Port() int { return s.port }

// DataDir is PGDATA.
func (s *Server) DataDir() string { return filepath.Join(s.home, "data") }

// LogFile is the path of the server's log.
func (s *Server) LogFile() string { return filepath.Join(s.home, "postgres.log") }

// Version is the full version of the running binaries, such as "18.6".
func (s *Server) Version() string { return s.binaries.version }

// CPUTime is the CPU time (user and system) that the postmaster and all its children have used since Start, ended
// children and earlier processes included. Its grain is the kernel's clock tick, 10 ms per process.
func (s *Server) CPUTime() (time.Duration, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running.counted {
		return s.spent, nil
	}
	running, err := s.running.CPUTime()
	if err != nil {
		return 0, fmt.Errorf("read CPU time of PostgreSQL: %w", err)
	}
	return s.spent + running, nil
}

package postgres

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// notCopied are parts of a data directory that a base backup leaves out: files of the running server as a whole, of
// directories what is in them.
var (
	notCopied      = []string{"postmaster.pid", "postmaster.opts", "standby.signal"}
	notCopiedBelow = []string{"pg_wal", "pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans"}
)

// StartStandby starts a standby of a running server and returns when it streams. It takes the base backup itself: the
// fetched binaries have no pg_basebackup. config.Version is ignored. The primary keeps WAL for it only as far as its
// setting wal_keep_size says. name is its application_name, for synchronous_standby_names.
func StartStandby(ctx context.Context, primary *Server, name string, config Config) (*Server, error) {
	if config.Log == nil {
		config.Log = func(string) {}
	}
	config.Settings = maps.Clone(config.Settings)
	if config.Settings == nil {
		config.Settings = map[string]string{}
	}
	config.Settings["primary_conninfo"] = fmt.Sprintf("host=127.0.0.1 port=%d user=%s password=%s application_name=%s",
		primary.port, superuser, primary.password, name)
	// The default, 5 s, is how long a promotion may take after the primary died.
	config.Settings["wal_retrieve_retry_interval"] = "200ms"
	config.Settings["hot_standby"] = "on"
	s := &Server{config: config, binaries: primary.binaries, account: primary.account, password: primary.password, port: config.Port}
	var err error
	if s.home, err = s.account.home(config.Dir, config.Log); err != nil {
		return nil, fmt.Errorf("prepare directory for a standby: %w", err)
	}
	err = s.copyFrom(ctx, primary)
	if err == nil {
		err = s.launch(ctx)
	}
	if err == nil {
		err = primary.awaitStreaming(ctx, name)
	}
	if err != nil {
		if s.running != nil {
			s.Kill()
		}
		s.removeTemporary()
		return nil, fmt.Errorf("start a standby: %w", err)
	}
	return s, nil
}

// copyFrom makes a base backup of a running server.
func (s *Server) copyFrom(ctx context.Context, primary *Server) error {
	conn, err := pgx.Connect(ctx, primary.DSN("postgres"))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	start, stop := "pg_backup_start", "pg_backup_stop"
	if major, err := strconv.Atoi(s.binaries.major()); err == nil && major < 15 {
		start, stop = "pg_start_backup", "pg_stop_backup"
	}
	if _, err := conn.Exec(ctx, "SELECT "+start+"('standby', true)"); err != nil {
		return fmt.Errorf("begin a base backup: %w", err)
	}
	if err := s.copyFiles(primary.DataDir()); err != nil {
		return fmt.Errorf("copy the data directory: %w", err)
	}
	var label string
	if err := conn.QueryRow(ctx, "SELECT labelfile FROM "+stop+"(false)").Scan(&label); err != nil {
		return fmt.Errorf("end a base backup: %w", err)
	}
	for name, content := range map[string]string{"backup_label": label, "standby.signal": ""} {
		path := filepath.Join(s.DataDir(), name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			return err
		}
		if err := s.account.own(path); err != nil {
			return err
		}
	}
	return writeFile(filepath.Join(s.home, passwordFile), s.password)
}

func (s *Server) copyFiles(from string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		rel, relErr := filepath.Rel(from, path)
		switch {
		case relErr != nil:
			return relErr
		case os.IsNotExist(err):
			return nil // a file may go while it is copied: recovery knows
		case err != nil:
			return err
		case slices.Contains(notCopied, rel), strings.HasPrefix(d.Name(), "pgsql_tmp"):
			return nil
		}
		to := filepath.Join(s.DataDir(), rel)
		if d.IsDir() {
			if err := os.MkdirAll(to, 0o700); err != nil {
				return err
			}
			return s.account.own(to)
		}
		if top := strings.Split(rel, string(filepath.Separator))[0]; slices.Contains(notCopiedBelow, top) {
			return nil
		}
		return s.copyFile(path, to)
	})
}

func (s *Server) copyFile(from, to string) error {
	in, err := os.Open(from)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		_ = out.Close()
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return s.account.own(to)
}

// awaitStreaming waits until a standby is connected and has caught up.
func (s *Server) awaitStreaming(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.DSN("postgres"))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	for {
		var streams bool
		err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_stat_replication WHERE application_name = $1 AND state = 'streaming')`, name).Scan(&streams)
		if err != nil {
			return fmt.Errorf("wait for the standby to stream: %w", err)
		}
		if streams {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the standby to stream: %w", context.Cause(ctx))
		case <-time.After(2 * pollInterval):
		}
	}
}

// Promote makes a primary of a standby and returns when it takes writes. It begins a new timeline. The old primary must be
// gone: nothing here fences it.
func (s *Server) Promote(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, s.DSN("postgres"))
	if err != nil {
		return fmt.Errorf("promote: %w", err)
	}
	defer func() { _ = conn.Close(ctx) }()
	var promoted bool
	if err := conn.QueryRow(ctx, "SELECT pg_promote(true, 60)").Scan(&promoted); err != nil {
		return fmt.Errorf("promote: %w", err)
	}
	if !promoted {
		return fmt.Errorf("promote: still a standby after a minute")
	}
	// What a restart would otherwise follow again.
	delete(s.config.Settings, "primary_conninfo")
	return nil
}

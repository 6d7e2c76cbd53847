package storetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Standby starts a standby of this server: a base backup of its data, taken while it runs, that follows it by streaming
// replication. It is asynchronous unless the server's synchronous_standby_names has its name. It returns once the standby
// follows, and ends with the test.
func (c *Cluster) Standby(t testing.TB, name string) *Cluster {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	dir := t.TempDir()
	if err := c.backUp(ctx, dir); err != nil {
		t.Fatal("storetest: taking a base backup:", err)
	}
	cc, err := pgx.ParseConfig(c.server.DSN("postgres"))
	if err != nil {
		t.Fatal("storetest:", err)
	}
	major, _, _ := strings.Cut(c.server.Version(), ".")
	standby, err := startCluster(major, dir, map[string]string{
		"primary_conninfo": fmt.Sprintf("host=%s port=%d user=%s password=%s application_name=%s", cc.Host, cc.Port, cc.User, cc.Password, name),
		"hot_standby":      "on",
		// A standby that is behind must show what it has, and not wait for more.
		"wal_retrieve_retry_interval": "100ms",
	})
	if err != nil {
		t.Fatal("storetest: starting a standby:", err)
	}
	standby.stopWith(t)
	c.Await(t, "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming' AND application_name = '"+name+"'")
	return standby
}

// Promote makes a standby a primary, on a timeline of its own.
func (c *Cluster) Promote(t testing.TB) {
	t.Helper()
	c.Await(t, "SELECT pg_promote()")
}

// Await waits until a statement answers true. The server may be starting, or be about to throw everybody out.
func (c *Cluster) Await(t testing.TB, sql string) {
	t.Helper()
	Eventually(t, startTimeout, func() bool {
		conn, err := pgx.Connect(t.Context(), c.server.DSN("postgres"))
		if err != nil {
			return false
		}
		defer conn.Close(context.WithoutCancel(t.Context())) //nolint:errcheck // nothing depends on it
		var yes bool
		err = conn.QueryRow(t.Context(), sql).Scan(&yes)
		var refused *pgconn.PgError
		if errors.As(err, &refused) && !strings.HasPrefix(refused.Code, "57P") {
			t.Fatalf("storetest: %s: %v", sql, err)
		}
		return err == nil && yes
	})
}

// backUp takes a base backup with the functions that pg_basebackup replaces, because not every installation has that program.
func (c *Cluster) backUp(ctx context.Context, dir string) error {
	conn, err := pgx.Connect(ctx, c.server.DSN("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(ctx) //nolint:errcheck // nothing depends on it
	if _, err := conn.Exec(ctx, "SELECT pg_backup_start('storetest', true)"); err != nil {
		return err
	}
	home := filepath.Dir(c.server.DataDir())
	if err := copyTree(home, dir); err != nil {
		return err
	}
	var label string
	if err := conn.QueryRow(ctx, "SELECT labelfile FROM pg_backup_stop(false)").Scan(&label); err != nil {
		return err
	}
	data := filepath.Join(dir, filepath.Base(c.server.DataDir()))
	like, err := os.Stat(c.server.DataDir())
	if err != nil {
		return err
	}
	for file, content := range map[string]string{"backup_label": label, "standby.signal": ""} {
		path := filepath.Join(data, file)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			return err
		}
		if err := chownLike(path, like); err != nil {
			return err
		}
	}
	return nil
}

// copyTree copies what a running server keeps, but not what belongs to its process. Files may go while it looks.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		at, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if at == "." || d.Name() == "postmaster.pid" || d.Name() == "postmaster.opts" || d.Name() == "postgres.log" {
			return nil
		}
		err = copyOne(path, filepath.Join(to, at), d)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
}

func copyOne(from, to string, d fs.DirEntry) error {
	info, err := d.Info()
	if err != nil {
		return err
	}
	if d.IsDir() {
		if err := os.Mkdir(to, info.Mode().Perm()); err != nil {
			return err
		}
		return chownLike(to, info)
	}
	source, err := os.Open(from) //nolint:gosec // a file of the server
	if err != nil {
		return err
	}
	defer source.Close()                                                                  //nolint:errcheck // it was only read
	target, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm()) //nolint:gosec // the same
	if err != nil {
		return err
	}
	_, err = io.Copy(target, source)
	return errors.Join(err, target.Close(), chownLike(to, info))
}

// chownLike gives a file to the owner of another one: the server refuses what is not its own.
func chownLike(path string, like fs.FileInfo) error {
	owner, ok := like.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s has no owner", like.Name())
	}
	return os.Chown(path, int(owner.Uid), int(owner.Gid))
}

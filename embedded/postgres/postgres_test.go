package postgres_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"github.com/outbox-platform/outbox/embedded/postgres"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, config postgres.Config) *postgres.Server {
	t.Helper()
	config.Log = func(line string) { t.Log(line) }
	server, err := postgres.Start(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return server
}

func query[T any](t *testing.T, dsn, sql string) (value T) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	if err := conn.QueryRow(t.Context(), sql).Scan(&value); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return value
}

func exec1(t *testing.T, dsn, sql string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func TestOldestAndNewestVersionKeepDataThroughKill(t *testing.T) {
	for _, version := range []string{"15", "18"} {
		t.Run(version, func(t *testing.T) {
			server := start(t, postgres.Config{Version: version, Settings: map[string]string{"work_mem": "5MB"}})
			if !strings.HasPrefix(server.Version(), version+".") {
				t.Errorf("Version() = %q, want %s.*", server.Version(), version)
			}
			dsn, err := server.CreateDatabase(t.Context(), "of \"mine\"")
			if err != nil {
				t.Fatal(err)
			}
			if got := query[string](t, dsn, "SHOW server_version"); !strings.HasPrefix(got, server.Version()) {
				t.Errorf("server_version %q, Version() %q", got, server.Version())
			}
			for setting, want := range map[string]string{
				"fsync": "on", "synchronous_commit": "on", "listen_addresses": "127.0.0.1", "work_mem": "5MB",
				"server_encoding": "UTF8", "lc_collate": "C",
			} {
				if version != "15" && setting == "lc_collate" {
					continue // no longer a setting
				}
				if got := query[string](t, dsn, "SHOW "+setting); got != want {
					t.Errorf("%s = %q, want %q", setting, got, want)
				}
			}
			exec1(t, dsn, "CREATE TABLE kept AS SELECT 42 AS n")

			server.Kill()
			if err := server.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			if n := query[int](t, dsn, "SELECT n FROM kept"); n != 42 {
				t.Errorf("after SIGKILL n = %d", n)
			}
			if err := server.StopImmediate(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := server.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			if n := query[int](t, dsn, "SELECT n FROM kept"); n != 42 {
				t.Errorf("after immediate stop n = %d", n)
			}
		})
	}
}

func TestKillLeavesNoBackend(t *testing.T) {
	server := start(t, postgres.Config{Version: "15"})
	conn, err := pgx.Connect(t.Context(), server.DSN("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	backend := conn.PgConn().PID()
	server.Kill()
	// A machine without a reaping init keeps it as a zombie, which holds nothing.
	if stat, err := os.ReadFile("/proc/" + itoa(int(backend)) + "/stat"); err == nil && strings.Contains(string(stat), "(postgres)") && !strings.Contains(string(stat), ") Z ") {
		t.Errorf("backend %d still there", backend)
	}
	select {
	case <-server.Done():
	default:
		t.Error("Done() is open after Kill")
	}
}

func TestDirectoryIsKeptAndTemporaryOneRemoved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cluster")
	first, err := postgres.Start(t.Context(), postgres.Config{Dir: dir, Version: "15"})
	if err != nil {
		t.Fatal(err)
	}
	exec1(t, first.DSN("postgres"), "CREATE TABLE kept AS SELECT 7 AS n")
	if err := first.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}

	second := start(t, postgres.Config{Dir: dir}) // the version follows the data
	if n := query[int](t, second.DSN("postgres"), "SELECT n FROM kept"); n != 7 {
		t.Errorf("n = %d", n)
	}
	if _, err := postgres.Start(t.Context(), postgres.Config{Dir: dir, Version: "18"}); err == nil || !strings.Contains(err.Error(), "holds data of PostgreSQL 15") {
		t.Errorf("other version on old data: %v", err)
	}

	temporary, err := postgres.Start(t.Context(), postgres.Config{Version: "15"})
	if err != nil {
		t.Fatal(err)
	}
	if err := temporary.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(temporary.DataDir()); !os.IsNotExist(err) {
		t.Errorf("temporary data directory: %v", err)
	}
}

func TestCPUTimeGrowsAndSurvivesRestart(t *testing.T) {
	server := start(t, postgres.Config{Version: "15"})
	spent := func() time.Duration {
		t.Helper()
		d, err := server.CPUTime()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	before := spent()
	query[int](t, server.DSN("postgres"), "SELECT count(*) FROM generate_series(1, 3000000)")
	after := spent()
	if after-before < 50*time.Millisecond {
		t.Errorf("CPU time grew from %v to %v only", before, after)
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if again := spent(); again < after-20*time.Millisecond {
		t.Errorf("CPU time fell from %v to %v by a restart", after, again)
	}
}

func TestStartFailureSaysWhy(t *testing.T) {
	_, err := postgres.Start(t.Context(), postgres.Config{Version: "15", Settings: map[string]string{"shared_buffers": "nonsense"}})
	if err == nil || !strings.Contains(err.Error(), "shared_buffers") {
		t.Errorf("error does not name the setting: %v", err)
	}
	if _, err := postgres.Start(t.Context(), postgres.Config{Version: "9"}); err == nil || !strings.Contains(err.Error(), "15, 16, 17, 18") {
		t.Errorf("unknown version: %v", err)
	}
	t.Setenv(postgres.BinEnv, t.TempDir())
	if _, err := postgres.Start(t.Context(), postgres.Config{}); err == nil || !strings.Contains(err.Error(), postgres.BinEnv) {
		t.Errorf("wrong directory: %v", err)
	}
}

// TestServerDiesWithItsParent runs this test binary as a parent that is then killed.
func TestServerDiesWithItsParent(t *testing.T) {
	const role = "OUTBOX_TEST_PARENT"
	if os.Getenv(role) != "" {
		server, err := postgres.Start(context.Background(), postgres.Config{Dir: os.Getenv(role), Version: "15"})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(os.Getenv(role), "pid"), []byte(itoa(server.PID())), 0o600); err != nil {
			t.Fatal(err)
		}
		select {} // until killed
	}
	dir := t.TempDir()
	parent := exec.Command(os.Args[0], "-test.run=^TestServerDiesWithItsParent$")
	parent.Env = append(os.Environ(), role+"="+dir)
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	var pid string
	eventually(t, func() bool {
		content, err := os.ReadFile(filepath.Join(dir, "pid"))
		pid = string(content)
		return err == nil && pid != ""
	})
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = parent.Wait()
	eventually(t, func() bool {
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		return err != nil || strings.Contains(string(stat), ") Z ")
	})
}

package postgres

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

const (
	// DefaultVersion is the major version that runs when nothing else is asked for.
	DefaultVersion = "18"
	// BinEnv names the environment variable with a directory of PostgreSQL programs that comes first.
	BinEnv = "OUTBOX_POSTGRES_BIN"
)

// binaries is a directory with initdb and postgres.
type binaries struct {
	dir     string
	version string // such as "18.6"
}

func (b binaries) major() string {
	major, _, _ := strings.Cut(b.version, ".")
	return major
}

// findBinaries returns programs of the wanted major version, or with an empty wish those that OUTBOX_POSTGRES_BIN
// names, else the default version. Programs that are installed come before a download.
func findBinaries(ctx context.Context, want string, log func(string)) (binaries, error) {
	if dir := os.Getenv(BinEnv); dir != "" {
		b, err := inspect(ctx, dir)
		if err != nil {
			return binaries{}, fmt.Errorf("%s: %w", BinEnv, err)
		}
		if want == "" || b.major() == want {
			return b, nil
		}
	}
	if want == "" {
		want = DefaultVersion
	}
	for _, dir := range installed(ctx, want) {
		if b, err := inspect(ctx, dir); err == nil && b.major() == want {
			return b, nil
		}
	}
	return fetched(ctx, want, log)
}

// installed lists the directories where distributions put the programs of a major version.
func installed(ctx context.Context, want string) []string {
	dirs := []string{
		filepath.Join("/usr/lib/postgresql", want, "bin"),
		filepath.Join("/usr/pgsql-"+want, "bin"),
	}
	if out, err := exec.CommandContext(ctx, "pg_config", "--bindir").Output(); err == nil {
		dirs = append(dirs, strings.TrimSpace(string(out)))
	}
	return dirs
}

// versionLine is what `postgres --version` prints: postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1), 19beta1.
var versionLine = regexp.MustCompile(`\(PostgreSQL\) ([0-9]+(?:\.[0-9]+)*)`)

// inspect checks that dir holds the programs we need and asks for their version.
func inspect(ctx context.Context, dir string) (binaries, error) {
	if _, err := os.Stat(filepath.Join(dir, "initdb")); err != nil {
		return binaries{}, err
	}
	out, err := exec.CommandContext(ctx, filepath.Join(dir, "postgres"), "--version").Output()
	if err != nil {
		return binaries{}, fmt.Errorf("run %s --version: %w", filepath.Join(dir, "postgres"), err)
	}
	match := versionLine.FindSubmatch(out)
	if match == nil {
		return binaries{}, fmt.Errorf("%s is no PostgreSQL: its --version says %q", filepath.Join(dir, "postgres"), out)
	}
	return binaries{dir: dir, version: string(match[1])}, nil
}

package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

// releases are the archives we fetch, by major version.
var releases = map[string]embeddedpostgres.PostgresVersion{
	"15": "15.19.0",
	"16": "16.15.0",
	"17": "17.11.0",
	"18": "18.6.0",
}

// fetched returns the programs of a major version from the cache, filling it first if need be. Any number of processes
// may call it together: one fetches, the others wait.
func fetched(ctx context.Context, major string, log func(string)) (binaries, error) {
	release, known := releases[major]
	if !known {
		return binaries{}, fmt.Errorf("PostgreSQL %s is not installed, and only %s can be fetched",
			major, strings.Join(slices.Sorted(maps.Keys(releases)), ", "))
	}
	cache, err := cacheDir()
	if err != nil {
		return binaries{}, err
	}
	parent := filepath.Join(cache, "postgres")
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return binaries{}, err
	}
	home := filepath.Join(parent, string(release))
	bin := filepath.Join(home, "bin")
	if _, err := os.Stat(home); err == nil {
		return inspect(ctx, bin)
	}
	// The library offers no context, so the work is left behind when ours ends first. It then still completes the
	// cache for the next start.
	result := make(chan error, 1)
	go func() { result <- fetch(parent, home, release, major, log) }()
	select {
	case err = <-result:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		return binaries{}, fmt.Errorf("fetch PostgreSQL %s: %w (or name a directory with its programs in %s)", major, err, BinEnv)
	}
	return inspect(ctx, bin)
}

// fetch downloads and unpacks a release beside its final place and moves it there when it is complete.
func fetch(parent, home string, release embeddedpostgres.PostgresVersion, major string, log func(string)) error {
	unlock, err := lock(home + ".lock")
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Stat(home); err == nil {
		return nil // somebody else did it while we waited
	}
	log(fmt.Sprintf("fetching PostgreSQL %s for %s/%s (once)", major, runtime.GOOS, runtime.GOARCH))
	work, err := os.MkdirTemp(parent, "unpack-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(work) }()
	unpacked := filepath.Join(work, "binaries")
	if err := download(work, unpacked, release); err != nil {
		return err
	}
	if err := readableForAll(unpacked); err != nil {
		return err
	}
	return os.Rename(unpacked, home)
}

// download lets the library fetch, check and unpack an archive into a directory, and nothing more.
//
// The library has no call for that: Start would go on to run initdb and pg_ctl, which refuse root. Between unpacking and
// initdb it removes an old data directory, and os.RemoveAll refuses a path that ends in a dot. So such a data directory
// makes Start end exactly there, before it runs anything.
func download(work, unpacked string, release embeddedpostgres.PostgresVersion) error {
	// The library downloads with the default client, which would keep its connection for a minute and a half.
	defer http.DefaultClient.CloseIdleConnections()
	err := embeddedpostgres.NewDatabase(embeddedpostgres.DefaultConfig().
		Version(release).
		Port(0). // any port passes its check that the port is free
		CachePath(filepath.Join(work, "archive")).
		RuntimePath(filepath.Join(work, "runtime")).
		BinariesPath(unpacked).
		DataPath(work + "/.").
		Logger(io.Discard)).Start()
	if err == nil {
		return errors.New("embedded-postgres started a server in a directory that cannot be one")
	}
	for _, program := range []string{"initdb", "postgres"} {
		if _, statErr := os.Stat(filepath.Join(unpacked, "bin", program)); statErr != nil {
			return err
		}
	}
	if !strings.Contains(err.Error(), "data directory") {
		return err // it ended while it was still unpacking
	}
	return nil
}

// readableForAll undoes a strict umask: the programs of root are run by another user.
func readableForAll(dir string) error {
	return filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.Type()&fs.ModeSymlink != 0 {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		mode := info.Mode().Perm() | 0o444
		if mode&0o100 != 0 {
			mode |= 0o111
		}
		return os.Chmod(path, mode)
	})
}

// lock takes an exclusive lock on a file, creating it, and waits for as long as that takes. The kernel releases it when
// the process dies.
func lock(path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { _ = file.Close() }, nil
}

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

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"

	"github.com/outbox-platform/outbox/embedded/cache"
)

// releases are the archives we fetch, by major version.
var releases = map[string]embeddedpostgres.PostgresVersion{
	"15": "15.19.0",
	"16": "16.15.0",
	"17": "17.11.0",
	"18": "18.6.0",
}

// fetched returns the programs of a major version from the cache, filling it first if need be.
func fetched(ctx context.Context, major string, log func(string)) (binaries, error) {
	release, known := releases[major]
	if !known {
		return binaries{}, fmt.Errorf("PostgreSQL %s is not installed, and only %s can be fetched",
			major, strings.Join(slices.Sorted(maps.Keys(releases)), ", "))
	}
	dir, err := cache.Fill(ctx, filepath.Join("postgres", string(release)), func(dir string) error {
		log(fmt.Sprintf("fetching PostgreSQL %s for %s/%s (once)", major, runtime.GOOS, runtime.GOARCH))
		if err := download(dir, release); err != nil {
			return err
		}
		return readableForAll(dir)
	})
	if err != nil {
		return binaries{}, fmt.Errorf("fetch PostgreSQL %s: %w (or name a directory with its programs in %s)", major, err, BinEnv)
	}
	return inspect(ctx, filepath.Join(dir, "bin"))
}

// download lets the library fetch, check and unpack an archive into a directory, and nothing more.
//
// The library has no call for that: Start would go on to run initdb and pg_ctl, which refuse root. Between unpacking and
// initdb it removes an old data directory, and os.RemoveAll refuses a path that ends in a dot. So such a data directory
// makes Start end exactly there, before it runs anything.
func download(unpacked string, release embeddedpostgres.PostgresVersion) error {
	// The library downloads with the default client, which would keep its connection for a minute and a half.
	defer http.DefaultClient.CloseIdleConnections()
	work := filepath.Dir(unpacked)
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

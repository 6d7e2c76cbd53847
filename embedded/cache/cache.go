// Package cache keeps downloads between runs, for any number of processes.
package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Dir is where downloads are kept: "outbox" in the user's cache directory, and for root a directory outside of /root,
// which no other user may enter.
func Dir() (string, error) {
	uid := os.Getuid()
	if uid != 0 {
		dir, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("find cache directory: %w", err)
		}
		dir = filepath.Join(dir, "outbox")
		return dir, os.MkdirAll(dir, 0o755)
	}
	dir := "/var/tmp/outbox-" + strconv.Itoa(uid)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	// /var/tmp is everybody's: never run programs out of a directory that somebody else put there.
	info, err := os.Lstat(dir)
	if err != nil {
		return "", err
	}
	if !info.IsDir() || info.Sys().(*syscall.Stat_t).Uid != uint32(uid) || info.Mode().Perm()&0o022 != 0 {
		return "", fmt.Errorf("%s is not a directory of uid %d that only it may write to: remove it", dir, uid)
	}
	return dir, os.Chmod(dir, 0o755)
}

// Fill returns a directory of the cache, filling it first when it does not exist. Of several processes one fills, the
// others wait. fill gets a directory to fill, on the same file system; it counts only when fill returns no error.
//
// A fill that is not done when ctx ends goes on in the background and completes the cache for the next caller.
func Fill(ctx context.Context, name string, fill func(dir string) error) (string, error) {
	parent, err := Dir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(parent, name)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	result := make(chan error, 1)
	go func() { result <- fillLocked(ctx, dir, fill) }()
	select {
	case err = <-result:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	return dir, err
}

func fillLocked(ctx context.Context, dir string, fill func(dir string) error) error {
	unlock, err := lock(ctx, dir+".lock")
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return nil // somebody else did it while we waited
	}
	work, err := os.MkdirTemp(filepath.Dir(dir), "filling-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(work) }()
	filled := filepath.Join(work, "filled")
	if err := fill(filled); err != nil {
		return err
	}
	return os.Rename(filled, dir)
}

// lock takes an exclusive lock on a file, creating it, and waits for it until ctx ends. The kernel releases the lock of
// a process that dies.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = file.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			_ = file.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			_ = file.Close()
			return nil, fmt.Errorf("wait for %s, which another process holds: %w", path, context.Cause(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/outbox-platform/outbox/test/robustness/driver"
)

// libraries are where Debian and others install libfaketime, which prerequisites.sh does.
const libraries = "/usr/lib*/*/faketime/libfaketime.so.1"

// clock is that of a database server, and can be put forward and back: a library between it and the kernel adds what a file
// says. Timers go by another clock there, as on a machine whose clock is set. A server of Go cannot be deceived in this way.
type clock struct{ file string }

// newClock returns a clock that goes right, and the environment of the server that is to have it.
func newClock(dir, name string) (*clock, []string, error) {
	found, err := filepath.Glob(libraries)
	if err != nil {
		return nil, nil, err
	}
	if len(found) == 0 {
		return nil, nil, fmt.Errorf("the clock of a database cannot be set without %s: run test/prerequisites.sh", libraries)
	}
	c := &clock{file: filepath.Join(dir, name+".clock")}
	if err := c.set(0); err != nil {
		return nil, nil, err
	}
	return c, []string{
		"LD_PRELOAD=" + found[0], "FAKETIME_TIMESTAMP_FILE=" + c.file, "FAKETIME_CACHE_DURATION=1", "FAKETIME_DONT_FAKE_MONOTONIC=1", "DONT_FAKE_MONOTONIC=1",
	}, nil
}

// set puts the clock so far from the true time. The server's processes notice within a second.
func (c *clock) set(offset time.Duration) error {
	if err := driver.Order(c.file, fmt.Sprintf("%+d\n", int(offset.Seconds()))); err != nil {
		return err
	}
	return os.Chmod(c.file, 0o644) //nolint:gosec // PostgreSQL's user reads it
}

// sweepClocks removes what the library leaves in shared memory when its process is killed.
func sweepClocks() {
	for _, pattern := range []string{"/dev/shm/faketime_shm_*", "/dev/shm/sem.faketime_sem_*"} {
		files, _ := filepath.Glob(pattern) // the pattern is well formed
		for _, file := range files {
			pid, err := strconv.Atoi(file[strings.LastIndex(file, "_")+1:])
			if err == nil && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
				_ = os.Remove(file) // they are a few bytes
			}
		}
	}
}

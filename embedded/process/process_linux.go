package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"
)

// clockTick is the unit of CPU times in /proc: USER_HZ is 100 on every Linux that Go supports.
const clockTick = time.Second / 100

func attributes(options Options) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: options.Credential, Setsid: true, Pdeathsig: options.DeathSignal}
}

// Child is a process as it was seen once. Its start time tells it from a later process with the same id.
type Child struct {
	pid     int
	started uint64
}

// Alive reports whether that very process still runs.
func (c Child) Alive() bool {
	stat, err := readStat(c.pid)
	return err == nil && stat.started == c.started && stat.state != 'Z'
}

// Signal sends it a signal; an error means that it is gone.
func (c Child) Signal(s syscall.Signal) error { return syscall.Kill(c.pid, s) }

// PID is its process id.
func (c Child) PID() int { return c.pid }

// Children lists the living children of a process. Elsewhere than on Linux it knows none.
func Children(parent int) []Child {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var children []Child
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if stat, err := readStat(pid); err == nil && stat.parent == parent {
			children = append(children, Child{pid: pid, started: stat.started})
		}
	}
	return children
}

// cpuTime is the CPU time of a running process, its living children and those that it reaped.
func cpuTime(pid int) (time.Duration, error) {
	var ticks uint64
	for _, c := range Children(pid) {
		if stat, err := readStat(c.pid); err == nil && stat.started == c.started {
			ticks += stat.own + stat.reaped
		}
	}
	stat, err := readStat(pid)
	if err != nil {
		return 0, err
	}
	return time.Duration(ticks+stat.own+stat.reaped) * clockTick, nil
}

// processStat is the part of /proc/PID/stat that we need.
type processStat struct {
	state       byte
	parent      int
	own, reaped uint64 // CPU ticks, user and system
	started     uint64 // ticks since boot
}

func readStat(pid int) (processStat, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return processStat{}, err
	}
	// The second field is the program's name in parentheses and may contain anything, also parentheses.
	_, rest, _ := bytes.Cut(content[bytes.LastIndexByte(content, ')')+1:], []byte{' '})
	fields := bytes.Fields(rest)
	const state, parent, utime, stime, cutime, cstime, starttime = 0, 1, 11, 12, 13, 14, 19
	if len(fields) <= starttime {
		return processStat{}, fmt.Errorf("unexpected /proc/%d/stat", pid)
	}
	var parseErrs []error
	number := func(field int) uint64 {
		n, err := strconv.ParseUint(string(fields[field]), 10, 64)
		parseErrs = append(parseErrs, err)
		return n
	}
	stat := processStat{
		state:   fields[state][0],
		parent:  int(number(parent)),
		own:     number(utime) + number(stime),
		reaped:  number(cutime) + number(cstime),
		started: number(starttime),
	}
	return stat, errors.Join(parseErrs...)
}

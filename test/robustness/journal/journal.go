// Package journal is the history of a run: one file of JSON lines per process, each line written before or after a step, so
// that it survives a kill -9 between the two.
package journal

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// Type says where in a step an entry stands.
type Type string

// The types.
const (
	Invoke Type = "invoke" // it is about to happen
	OK     Type = "ok"     // it took effect
	Fail   Type = "fail"   // it did not
	Info   Type = "info"   // nobody can say; or a remark
)

// The steps.
const (
	Prepare  = "prepare"  // events are prepared
	Again    = "again"    // … a second time, with the same id and content
	Other    = "other"    // … with the same id and other content: must be refused
	Publish  = "publish"  // events of no database transaction
	Local    = "local"    // COMMIT, or COMMIT PREPARED
	Rollback = "rollback" // ROLLBACK
	Commit   = "commit"   // the platform is told so
	Abort    = "abort"
	Get      = "get"    // the platform is asked for the state
	Misuse   = "misuse" // something that the SDK must refuse
	Die      = "die"    // the process kills itself here
	Fault    = "fault"  // of the nemesis: invoke when it strikes, ok when it is over
)

// Entry is one line.
type Entry struct {
	// At is the machine's monotonic clock, in ns: one clock for all processes.
	At      int64     `json:"at"`
	Process string    `json:"process"`
	Worker  int       `json:"worker,omitempty"`
	Type    Type      `json:"type"`
	F       string    `json:"f"`
	Source  string    `json:"source,omitempty"`
	Tx      uuid.UUID `json:"tx,omitzero"`
	// Profile is what kind of transaction it is: see package driver.
	Profile string  `json:"profile,omitempty"`
	Events  []Event `json:"events,omitempty"`
	// State is the platform's answer to get.
	State string `json:"state,omitempty"`
	Note  string `json:"note,omitempty"`
}

// Event is an event as it was prepared.
type Event struct {
	ID        uuid.UUID `json:"id"`
	Topic     string    `json:"topic"`
	Aggregate string    `json:"aggregate"` // type and id, separated by "/"
	// Version orders the aggregate's events. It has no gaps when Locked; else it only grows.
	Version int64    `json:"version"`
	Locked  bool     `json:"locked,omitempty"`
	Key     []byte   `json:"key"`  // as the record must have it
	Digest  []byte   `json:"hash"` // SHA-256 of the payload
	Headers []Header `json:"headers,omitempty"`
}

// Header is a header that the caller gave.
type Header struct {
	Name  string `json:"name"`
	Value []byte `json:"value"`
}

// Now is the machine's monotonic clock.
func Now() int64 {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t) // it cannot fail
	return t.Nano()
}

// Writer appends to the journal of one process. It is safe for concurrent use.
type Writer struct {
	process string
	mu      sync.Mutex
	file    *os.File
}

// Create opens the journal of a process in a directory.
func Create(dir, process string) (*Writer, error) {
	f, err := os.OpenFile(filepath.Join(dir, process+".jsonl"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	return &Writer{process: process, file: f}, nil
}

// Write writes one entry. The kernel has it when Write returns: it survives the death of the process.
func (w *Writer) Write(e Entry) {
	e.At, e.Process = Now(), w.process
	line, err := json.Marshal(e)
	if err != nil {
		panic(err) // a type of ours that cannot be encoded
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, err := w.file.Write(append(line, '\n')); err != nil {
		panic(err) // nothing that is not written down may happen
	}
}

// Close closes the file.
func (w *Writer) Close() error { return w.file.Close() }

// Read reads all journals of a directory, in the order of time. A last line that a death cut off is left out.
func Read(dir string) ([]Entry, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil {
		return nil, err
	}
	var all []Entry
	for _, name := range files {
		if all, err = readFile(all, name); err != nil {
			return nil, fmt.Errorf("read journal %s: %w", name, err)
		}
	}
	slices.SortStableFunc(all, func(a, b Entry) int { return cmp.Compare(a.At, b.At) })
	return all, nil
}

func readFile(all []Entry, name string) ([]Entry, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 1<<20)
	for {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		var e Entry
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, err
		}
		all = append(all, e)
	}
}

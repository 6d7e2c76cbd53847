package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// victim is a process that is started to die. Its start is not measured: it waits until it is doomed.
type victim struct {
	mu     sync.Mutex // guards cmd
	cmd    *exec.Cmd
	in     io.Closer
	write  io.Writer
	read   *json.Decoder
	cutter *cutter // nil: it talks to the database itself
	late   atomic.Bool
}

// startVictim starts one. Either doom or dismiss must follow.
func (s *stage) startVictim(ctx context.Context, topic string, step killStep, r killResolver) (*victim, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("finding this binary: %w", err)
	}
	dsn := s.sourcePool.Config().ConnString()
	v := &victim{}
	args := []string{"bench-victim", "--server=" + s.api, "--source=" + r.source(), "--topic=" + topic, "--step=" + string(step)}
	if step == killCommitCut {
		cfg, err := pgx.ParseConfig(dsn)
		if err != nil {
			return nil, fmt.Errorf("reading the source's address: %w", err)
		}
		if v.cutter, err = newCutter(cfg.Host, cfg.Port, v.kill); err != nil {
			return nil, err
		}
		args = append(args, fmt.Sprintf("--proxy=%d", v.cutter.port()))
	}
	if err := v.start(exec.CommandContext(ctx, self, args...), dsn, s.log); err != nil {
		if v.cutter != nil {
			err = errors.Join(err, v.cutter.close())
		}
		return nil, err
	}
	return v, nil
}

func (v *victim) start(cmd *exec.Cmd, dsn string, log io.Writer) error {
	cmd.Env = append(os.Environ(), "BENCH_VICTIM_DSN="+dsn)
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("making a pipe to a victim: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("making a pipe from a victim: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting a victim: %w", err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.cmd, v.in, v.write, v.read = cmd, in, in, json.NewDecoder(out)
	return nil
}

// kill kills it from outside.
func (v *victim) kill() {
	v.mu.Lock()
	defer v.mu.Unlock()
	_ = v.cmd.Process.Kill() // it may be gone already
}

// limit kills a victim that does not get on; end what it returns when it did.
func (v *victim) limit() (stop func() bool) {
	return time.AfterFunc(2*stuck, func() {
		v.late.Store(true)
		v.kill()
	}).Stop
}

// ready waits until it is connected.
func (v *victim) ready() error {
	defer v.limit()()
	var line victimLine
	if err := v.read.Decode(&line); err != nil {
		return fmt.Errorf("a victim did not get ready (see its log): %w", err)
	}
	return nil
}

// doom makes it die in the transaction of an order, and returns that transaction and the moment of its death: when its
// standard output, the first of its files, is closed by the kernel.
func (v *victim) doom(number uint64) (line victimLine, died time.Time, err error) {
	defer v.limit()()
	if _, err := fmt.Fprintln(v.write, number); err != nil {
		return line, died, fmt.Errorf("dooming a victim: %w", err)
	}
	if err := v.read.Decode(&line); err != nil {
		return line, died, fmt.Errorf("a victim did not begin its transaction (see its log): %w", err)
	}
	rest := v.read.Decode(&victimLine{})
	died = time.Now()
	if !errors.Is(rest, io.EOF) {
		return line, died, fmt.Errorf("a victim said more than it should: %w", rest)
	}
	err = v.cmd.Wait()
	if v.cutter != nil {
		err = errors.Join(err, v.cutter.close())
	}
	status, ok := v.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() || status.Signal() != syscall.SIGKILL || v.late.Load() {
		return line, died, fmt.Errorf("a victim did not die as it should (see its log): %w", err)
	}
	return line, died, nil
}

// dismiss lets one live that is not needed any more, or cleans up after an error.
func (v *victim) dismiss() {
	defer v.limit()()
	_ = v.in.Close() // it may be dead
	_ = v.cmd.Wait() // however it ends
	if v.cutter != nil {
		_ = v.cutter.close() // closed twice after doom
	}
}

package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/outbox-platform/outbox/test/robustness/driver"
)

// Python is how a service with the Python SDK is started: by its interpreter itself, so that signals reach it and nothing between.
type Python struct {
	// Interpreter of an environment that has what the SDK needs, Driver the program, SDK the folder of the SDK.
	Interpreter, Driver, SDK string
}

// FindPython finds it in a checkout of the repository, and makes the environment when there is none yet.
func FindPython(ctx context.Context, root string) (*Python, error) {
	p := &Python{Driver: filepath.Join(root, "test/robustness/driver/python/driver.py"), SDK: filepath.Join(root, "client/python/src")}
	if _, err := os.Stat(p.Driver); err != nil {
		return nil, fmt.Errorf("a Python service: run this in the root of the repository: %w", err)
	}
	command := exec.CommandContext(ctx, filepath.Join(root, "tools/python-sdk.sh"), "default", "python", "-c", //nolint:gosec // ours
		"import asyncpg, outbox_client.sqlalchemy, sys; print(sys.executable)")
	out, err := command.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
		}
		return nil, fmt.Errorf("a Python service: no environment for it: %w", err)
	}
	p.Interpreter = strings.TrimSpace(string(out))
	return p, nil
}

// usePython makes a driver a Python one.
func (d *Driver) usePython(p *Python) {
	d.Python = p
	d.Program, d.env = p.Interpreter, append(d.env, "PYTHONPATH="+p.SDK)
	if d.config.Profiles == nil {
		d.config.Profiles = driver.Mix // it has none of its own
	}
}

package postgres

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

const passwordFile = "password"

// clusterVersion is the major version of the cluster in a data directory, empty when there is none.
func clusterVersion(dataDir string) (string, error) {
	content, err := os.ReadFile(filepath.Join(dataDir, "PG_VERSION"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read version of data directory: %w", err)
	}
	return strings.TrimSpace(string(content)), nil
}

// initialize runs initdb beside the final place, so that an interrupted one leaves no half cluster behind.
func (s *Server) initialize(ctx context.Context) error {
	work, err := os.MkdirTemp(s.home, "initdb-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(work) }()
	if err := s.account.own(work); err != nil {
		return err
	}
	// Any local user can reach the port, and a superuser can run programs: so there is a password.
	password := rand.Text()
	passwordPath := filepath.Join(work, passwordFile)
	if err := os.WriteFile(passwordPath, []byte(password+"\n"), 0o600); err != nil {
		return err
	}
	if err := s.account.own(passwordPath); err != nil {
		return err
	}
	fresh := filepath.Join(work, "data")
	args := []string{
		"-D", fresh, "-U", superuser, "-A", "scram-sha-256", "--pwfile", passwordPath,
		"-E", "UTF8", "--no-locale", "--no-sync", "--no-instructions",
	}
	if major, err := strconv.Atoi(s.binaries.major()); err == nil && major >= 16 {
		// Stretching protects weak passwords; this one is random, and tests connect often.
		args = append(args, "-c", "scram_iterations=1")
	}
	initdb := exec.CommandContext(ctx, filepath.Join(s.binaries.dir, "initdb"), args...)
	initdb.Dir = work
	initdb.SysProcAttr = &syscall.SysProcAttr{Credential: s.account.credential()}
	if out, err := initdb.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w: %s", err, strings.TrimSpace(string(out)))
	}
	if err := writeFile(filepath.Join(s.home, passwordFile), password); err != nil {
		return err
	}
	return os.Rename(fresh, s.DataDir())
}

// writeFile replaces a file that only we may read.
func writeFile(path, content string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.WriteFile(path, []byte(content), 0o600)
}

func readPassword(home string) (string, error) {
	content, err := os.ReadFile(filepath.Join(home, passwordFile))
	if err != nil {
		return "", fmt.Errorf("read password of the existing cluster: %w", err)
	}
	return strings.TrimSpace(string(content)), nil
}

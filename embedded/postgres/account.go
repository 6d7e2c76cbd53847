package postgres

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/outbox-platform/outbox/embedded/cache"
)

// account is the operating-system user that the server runs as.
type account struct {
	name     string
	uid, gid uint32
	// foreign is true when the server's user is not the user of this process, which is then root.
	foreign bool
}

// serverAccount is the user of this process, or for root an unprivileged one. The user needs an entry in the user
// database: initdb refuses an unknown uid.
func serverAccount() (*account, error) {
	if os.Getuid() != 0 {
		return &account{uid: uint32(os.Getuid()), gid: uint32(os.Getgid())}, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("uid of user %s: %w", name, err)
		}
		gid, err := strconv.ParseUint(u.Gid, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("gid of user %s: %w", name, err)
		}
		return &account{name: name, uid: uint32(uid), gid: uint32(gid), foreign: true}, nil
	}
	return nil, errors.New("PostgreSQL does not run as root, and there is neither a user postgres nor a user nobody: add one (useradd --system postgres)")
}

// credential is how a child becomes the account's user; nil when it already is.
func (a *account) credential() *syscall.Credential {
	if !a.foreign {
		return nil
	}
	return &syscall.Credential{Uid: a.uid, Gid: a.gid}
}

// own gives a file or directory to the account.
func (a *account) own(path string) error {
	if !a.foreign {
		return nil
	}
	return os.Chown(path, int(a.uid), int(a.gid))
}

// home returns the directory that holds the server's files: dir itself, a temporary one when dir is empty, or a
// directory in root's cache when the account cannot reach dir.
func (a *account) home(dir string, log func(string)) (string, error) {
	if dir == "" {
		return a.temporaryHome()
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if !a.foreign || a.reaches(dir) {
		return dir, nil
	}
	kept, err := cache.Dir()
	if err != nil {
		return "", err
	}
	name := sha256.Sum256([]byte(dir))
	home := filepath.Join(kept, "data", hex.EncodeToString(name[:8]))
	if err := os.MkdirAll(home, 0o755); err != nil {
		return "", err
	}
	link := filepath.Join(dir, "postgres")
	if target, err := os.Readlink(link); err != nil || target != home {
		if err := os.Symlink(home, link); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", err
		}
		log(fmt.Sprintf("user %s, as whom PostgreSQL runs, cannot reach %s: its data is kept in %s", a.name, dir, home))
	}
	return home, nil
}

func (a *account) temporaryHome() (string, error) {
	parent := os.TempDir()
	if a.foreign && !a.reaches(parent) {
		parent = "/var/tmp"
	}
	home, err := os.MkdirTemp(parent, "outbox-pg-")
	if err != nil {
		return "", err
	}
	if a.foreign {
		// The server's user must pass through to its data directory, but list nothing.
		if err := os.Chmod(home, 0o711); err != nil {
			return "", err
		}
	}
	return home, nil
}

// reaches reports whether the account may pass through every directory down to dir. Directories below the system's
// temporary directory that belong to this process are opened for passing: testing.T.TempDir makes them 0700.
func (a *account) reaches(dir string) bool {
	temporary := os.TempDir() + string(filepath.Separator)
	for at := dir; ; at = filepath.Dir(at) {
		info, err := os.Stat(at)
		if err != nil {
			return false
		}
		if !a.passes(info) {
			ours := info.Sys().(*syscall.Stat_t).Uid == uint32(os.Getuid())
			if !ours || !strings.HasPrefix(at, temporary) || os.Chmod(at, info.Mode().Perm()|0o011) != nil {
				return false
			}
		}
		if at == filepath.Dir(at) {
			return true
		}
	}
}

func (a *account) passes(info fs.FileInfo) bool {
	stat := info.Sys().(*syscall.Stat_t)
	switch {
	case stat.Uid == a.uid:
		return info.Mode()&0o100 != 0
	case stat.Gid == a.gid:
		return info.Mode()&0o010 != 0
	default:
		return info.Mode()&0o001 != 0
	}
}

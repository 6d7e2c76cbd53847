//go:build failpoints

package fault

import (
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// FileEnv names the file that arms a point: its name, and after a blank which passing of it kills. The process that is
// killed leaves a file of the same name with ".hit" behind it.
const FileEnv = "OUTBOX_FAULT_FILE"

type order struct {
	name string
	left atomic.Int64
}

var (
	path  = os.Getenv(FileEnv)
	armed atomic.Pointer[order]
)

func init() {
	if path != "" {
		go watch()
	}
}

// watch looks for orders. It is nobody's business but the suite's, so that polling will do.
func watch() {
	last := ""
	for range time.Tick(10 * time.Millisecond) {
		content, err := os.ReadFile(path)
		if err != nil || string(content) == last {
			continue
		}
		last = string(content)
		name, count, _ := strings.Cut(strings.TrimSpace(last), " ")
		n, err := strconv.ParseInt(count, 10, 64)
		if err != nil || n < 1 {
			n = 1
		}
		if name == "" {
			armed.Store(nil)
			continue
		}
		o := &order{name: name}
		o.left.Store(n)
		armed.Store(o)
	}
}

// Point kills this process, as kill -9 would, when the point is armed and its turn has come.
func Point(name string) {
	o := armed.Load()
	if o == nil || o.name != name || o.left.Add(-1) != 0 {
		return
	}
	_ = os.WriteFile(path+".hit", []byte(name), 0o600)
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

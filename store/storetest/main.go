package storetest

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// stopTimeout bounds how long a server may take to stop. Then it is killed.
const stopTimeout = 20 * time.Second

// shared is the server of this test binary.
var shared struct {
	sync.Mutex
	mainRuns bool
	cluster  *Cluster
	err      error // of the start; it is not tried again
}

// Main runs the tests of a package, stops the shared server, and fails when goroutines are left over. Call it from
// TestMain; it does not return.
func Main(m *testing.M, ignore ...goleak.Option) { os.Exit(Run(m, ignore...)) }

// Run is Main for packages that have something to do afterwards. It returns the exit code.
func Run(m *testing.M, ignore ...goleak.Option) int {
	shared.Lock()
	shared.mainRuns = true
	shared.Unlock()

	code := m.Run()

	shared.Lock()
	defer shared.Unlock()
	if shared.cluster != nil {
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		defer cancel()
		if err := shared.cluster.stop(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "storetest: stopping the shared PostgreSQL:", err)
			code = max(code, 1)
		}
	}
	if err := goleak.Find(ignore...); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, "storetest: goroutines are left over:", err)
		return 1
	}
	return code
}

// sharedCluster starts the shared server if this is the first call.
func sharedCluster(t testing.TB) *Cluster {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if !shared.mainRuns {
		t.Fatal("storetest: the package needs: func TestMain(m *testing.M) { storetest.Main(m) }")
	}
	if shared.cluster == nil && shared.err == nil {
		shared.cluster, shared.err = startCluster("", "", nil)
	}
	if shared.err != nil {
		t.Fatal("storetest: no PostgreSQL, and tests of the store need one:", shared.err)
	}
	return shared.cluster
}

package simulation

import (
	"flag"
	"os"
	"testing"

	"github.com/outbox-platform/outbox/store/storetest"
)

// TestMain makes what rapid draws the same every time, so that a test that passes goes on passing. -rapid.seed (or
// RAPID_SEED) explores something else.
func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("rapid.seed"); f.Value.String() == "0" {
		if err := f.Value.Set("1"); err != nil {
			os.Exit(1)
		}
	}
	os.Exit(storetest.Run(m))
}

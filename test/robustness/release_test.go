package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// A release build has neither kill points nor mutants, whatever its environment says: what arms them is not in it.
func TestReleaseBuildsHaveNoFaults(t *testing.T) {
	signs := [][]byte{[]byte("OUTBOX_MUTANT"), []byte("OUTBOX_FAULT_FILE")}
	for _, build := range []struct {
		tags string
		want bool
	}{{"", false}, {"failpoints,mutant", true}} {
		program := filepath.Join(t.TempDir(), "outbox")
		if out, err := exec.Command("go", "build", "-tags", build.tags, "-o", program, "../../cmd/outbox").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		content, err := os.ReadFile(program)
		if err != nil {
			t.Fatal(err)
		}
		for _, sign := range signs {
			if bytes.Contains(content, sign) != build.want {
				t.Errorf("tags %q: %s in the binary: %v", build.tags, sign, !build.want)
			}
		}
	}
}

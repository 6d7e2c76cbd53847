package main

import (
	"io"
	"os"
	"strings"
	"testing"
	"testing/fstest"
)

// Every file and function that is named is there: who renames one renames it here, too.
func TestPathsAreThere(t *testing.T) {
	found, err := parsePaths(paths, os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range found {
		for _, g := range found[:i] {
			if f.file == g.file && f.body == g.body {
				t.Errorf("%s: %s is named twice", f.file, f.name)
			}
		}
	}
}

const source = `package p

func all(a bool) int {
	if a {
		return 1
	}
	if a && fault.Mutant("M1") {
		return 2
	}
	switch {
	case fault.Mutant("M2"):
		return 3
	}
	return 4
}

func (t *T) some() { all(true) }
`

const blocks = `mode: set
github.com/outbox-platform/outbox/p/p.go:3.22,4.7 1 1
github.com/outbox-platform/outbox/p/p.go:4.7,6.3 1 0
github.com/outbox-platform/outbox/p/p.go:7.2,7.29 1 1
github.com/outbox-platform/outbox/p/p.go:7.29,9.3 1 0
github.com/outbox-platform/outbox/p/p.go:10.2,11.25 1 1
github.com/outbox-platform/outbox/p/p.go:11.25,12.11 1 0
github.com/outbox-platform/outbox/p/p.go:14.2,14.10 1 1
github.com/outbox-platform/outbox/p/p.go:17.20,17.33 1 0
`

func TestWhatIsNotReachedFails(t *testing.T) {
	root := fstest.MapFS{"p/p.go": {Data: []byte(source)}}
	for _, tc := range []struct{ paths, profile, says string }{
		{"p/p.go", blocks, "all\n  p/p.go: T.some"},
		{"p/p.go: all # and not the other", blocks, "p/p.go: all"},
		{"p/p.go: all", blocks + "github.com/outbox-platform/outbox/p/p.go:4.7,6.3 1 1\n", ""}, // reached by another test binary; mutants do not count
		{"p/p.go: all", "mode: set\n", "not in the profile"},
	} {
		named, err := parsePaths(tc.paths, root)
		if err != nil {
			t.Fatal(err)
		}
		found := profile{}
		if err := found.read(strings.NewReader(tc.profile)); err != nil {
			t.Fatal(err)
		}
		err = printPaths(io.Discard, found, named, true)
		if (err == nil) != (tc.says == "") || err != nil && !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%q: %v", tc.paths, err)
		}
	}
	for _, wrong := range []string{"p/q.go", "p/p.go: none", "p/p.go: some"} {
		if _, err := parsePaths(wrong, root); err == nil {
			t.Errorf("%q is accepted", wrong)
		}
	}
}

func TestPackagesBelowTheThresholdFail(t *testing.T) {
	found := profile{}
	if err := found.read(strings.NewReader("mode: set\ngithub.com/outbox-platform/outbox/store/a.go:1.1,2.2 84 1\ngithub.com/outbox-platform/outbox/store/b.go:1.1,2.2 16 0\n")); err != nil {
		t.Fatal(err)
	}
	if err := printPackages(io.Discard, found); err == nil || !strings.Contains(err.Error(), "store") {
		t.Errorf("84 %% are enough: %v", err)
	}
	if err := found.read(strings.NewReader("one line\n")); err == nil {
		t.Error("read what is no profile")
	}
}

// Command coverage reads a coverage profile and fails if it falls short of what CONTRIBUTING.md promises: 85 % of the statements
// of store, relay, server and client, and every statement of the decision and ordering paths, which paths.txt names.
//
//	coverage PROFILE...    the table, and an error for what is missing
//	coverage -v PROFILE... and every statement of the paths that no test reached
//
// It runs in the root of the repository. A block that occurs in several profiles, or once per test binary, is covered if it
// is covered in one of them.
package main

import (
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
)

//go:embed paths.txt
var paths string

const (
	module    = "github.com/outbox-platform/outbox/"
	threshold = 85 // percent, of the packages below
)

// promised are the packages that the threshold is for.
var promised = []string{"store", "relay", "server", "client"}

func main() {
	verbose := flag.Bool("v", false, "name every statement of the paths that no test reached")
	flag.Parse()
	if err := run(os.Stdout, flag.Args(), *verbose); err != nil {
		fmt.Fprintln(os.Stderr, "coverage:", err)
		os.Exit(1)
	}
}

func run(out io.Writer, files []string, verbose bool) error {
	if len(files) == 0 {
		return errors.New("usage: coverage [-v] PROFILE [PROFILE …] (in the root of the repository)")
	}
	found := profile{}
	for _, file := range files {
		if err := found.readFile(file); err != nil {
			return err
		}
	}
	named, err := parsePaths(paths, os.DirFS("."))
	if err != nil {
		return err
	}
	return errors.Join(printPackages(out, found), printPaths(out, found, named, verbose))
}

// printPackages prints the statement coverage of every package, and returns which of the promised ones are too low.
func printPackages(out io.Writer, found profile) error {
	type count struct{ statements, covered int }
	packages := map[string]count{}
	for file, blocks := range found {
		c := packages[path.Dir(file)]
		for b, hit := range blocks {
			c.statements += b.statements
			if hit {
				c.covered += b.statements
			}
		}
		packages[path.Dir(file)] = c
	}
	var low []string
	for _, name := range slices.Sorted(maps.Keys(packages)) {
		c := packages[name]
		_, _ = fmt.Fprintf(out, "%-32s %6.1f %% of %5d statements\n", name, percent(c.covered, c.statements), c.statements)
		if slices.Contains(promised, name) && 100*c.covered < threshold*c.statements {
			low = append(low, name)
		}
	}
	if low != nil {
		return fmt.Errorf("below %d %%: %s", threshold, strings.Join(low, ", "))
	}
	return nil
}

// printPaths prints the coverage of the decision and ordering paths by file, and returns what was not reached.
func printPaths(out io.Writer, found profile, named []function, verbose bool) error {
	_, _ = fmt.Fprintln(out, "\nDecision and ordering paths:")
	var missed []string
	file, statements, covered := "", 0, 0
	flush := func() {
		if file != "" {
			_, _ = fmt.Fprintf(out, "%-32s %6.1f %% of %5d statements\n", file, percent(covered, statements), statements)
		}
	}
	for _, f := range named {
		if f.file != file {
			flush()
			file, statements, covered = f.file, 0, 0
		}
		all, open := found.of(f)
		if all == 0 && f.statements {
			missed = append(missed, f.file+": "+f.name+" is not in the profile")
		}
		statements, covered = statements+all, covered+all
		for _, b := range open {
			covered -= b.statements
			if verbose {
				_, _ = fmt.Fprintf(out, "  %s:%d.%d: %s: not reached\n", f.file, b.line, b.column, f.name)
			}
		}
		if len(open) > 0 {
			missed = append(missed, f.file+": "+f.name)
		}
	}
	flush()
	if missed != nil {
		return fmt.Errorf("decision and ordering paths that no test walks to the end (-v says where):\n  %s", strings.Join(missed, "\n  "))
	}
	return nil
}

func percent(part, of int) float64 { return 100 * float64(part) / float64(max(of, 1)) }

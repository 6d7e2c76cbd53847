// Package outbox_test checks what no single package can: which package imports which.
package outbox_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/outbox-platform/outbox"

// imports is the table of design.md §5: what each package may import of ours. A name that ends in "/…" is the folder and
// everything below it. A package without a row fails the test.
var imports = map[string][]string{
	"gen/…":            {"gen/…"},
	"migrations":       {},
	"internal/fault":   {},
	"embedded/…":       {"embedded/…"},
	"store":            {"internal/fault"},
	"store/storetest":  {"store", "migrations", "embedded/…"},
	"server":           {"store", "gen/…", "internal/fault"},
	"server/resolver":  {"store", "gen/…", "internal/fault"},
	"relay":            {"store", "internal/fault"},
	"relay/relaytest":  {"relay", "store"},
	"relay/kafka":      {"relay", "store", "internal/fault"},
	"client":           {"gen/…"},
	"client/pgxoutbox": {"client", "client/internal/sourcedb", "gen/…"},
	"client/sqloutbox": {"client", "client/internal/sourcedb", "gen/…"},

	"client/internal/sourcedb":     {"client", "gen/…", "internal/fault"},
	"client/internal/fakeplatform": {"gen/…"}, // for tests only

	"cmd/outbox":       {"…"},
	"cmd/outbox/bench": {"…"},
	"examples/…":       {"client/…", "client", "examples/…"},
	"test/…":           {"…"},
	".":                {},
}

// inTests is what the tests of any package may import beside the package's own row.
var inTests = []string{"store/storetest", "store", "embedded/…", "migrations", "relay/relaytest"}

// everythingInTests are the packages whose tests may import everything.
var everythingInTests = []string{"cmd/…", "test/…", "client/…"}

// Nobody imports these but what is below them, and tests.
var notImported = []string{"cmd/outbox", "test/…", "client/internal/fakeplatform"}

func TestImportTable(t *testing.T) {
	seen := map[string]bool{}
	// In process: a test that asks `go list` is answered from the test cache after a forbidden import was added.
	err := filepath.WalkDir(".", func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); file != "." && (strings.HasPrefix(name, ".") || name == "testdata" || name == "third_party" || name == "node_modules") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(file, ".go") {
			return nil
		}
		file = filepath.ToSlash(file)
		pkg := path.Dir(file)
		row, ok := rowOf(pkg)
		if !ok {
			if !seen[pkg] {
				t.Errorf("%s has no row in the import table: decide what it may import, and add it", pkg)
			}
			seen[pkg] = true
			return nil
		}
		seen[row] = true
		allowed := imports[row]
		if strings.HasSuffix(file, "_test.go") {
			allowed = slices.Concat(allowed, inTests, []string{pkg})
			if matches(pkg, everythingInTests) {
				allowed = []string{"…"}
			}
		}
		for _, imported := range ours(t, file) {
			if !matches(imported, allowed) {
				t.Errorf("%s imports %s; %s may import %v", file, imported, row, allowed)
			}
			if matches(imported, notImported) && !strings.HasSuffix(file, "_test.go") && !matches(pkg, []string{imported + "/…", "test/…"}) && imported != pkg {
				t.Errorf("%s imports %s, which nobody imports", file, imported)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, must := range []string{"store", "relay", "gen/…", "cmd/outbox"} {
		if !seen[must] {
			t.Errorf("no file of %s was seen: is the test run in the root of the repository?", must)
		}
	}
}

// rowOf finds a package's row: its own name, or that of a folder above it.
func rowOf(pkg string) (string, bool) {
	if _, ok := imports[pkg]; ok {
		return pkg, true
	}
	for at := pkg; at != "."; at = path.Dir(at) {
		if _, ok := imports[at+"/…"]; ok {
			return at + "/…", true
		}
	}
	return "", false
}

// matches reports whether a package is one of the patterns.
func matches(pkg string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		folder, below := strings.CutSuffix(p, "…")
		return p == pkg || below && (folder == "" || strings.HasPrefix(pkg+"/", folder))
	})
}

// ours returns the packages of this module that a file imports, relative to the module.
func ours(t *testing.T, file string) []string {
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
	if err != nil {
		t.Errorf("parsing %s: %v", file, err)
		return nil
	}
	var found []string
	for _, spec := range parsed.Imports {
		name, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			t.Errorf("%s: import %s: %v", file, spec.Path.Value, err)
			continue
		}
		if relative, ok := strings.CutPrefix(name, module+"/"); ok {
			found = append(found, relative)
		}
	}
	return found
}

// TestImportTableCatches shows that the check is not blind.
func TestImportTableCatches(t *testing.T) {
	for _, c := range []struct {
		importer, imported string
		allowed            bool
	}{
		{"store", "relay", false},
		{"relay", "store", true},
		{"relay", "relay/kafka", false},
		{"relay", "gen/go/outbox/v1", false},
		{"client/pgxoutbox", "store", false},
		{"client/pgxoutbox", "client", true},
		{"client", "client/pgxoutbox", false},
		{"server/resolver", "server", false},
		{"embedded/postgres", "store", false},
		{"examples/orders", "store", false},
		{"examples/orders", "client/pgxoutbox", true},
		{"cmd/outbox", "relay/kafka", true},
	} {
		row, ok := rowOf(c.importer)
		if !ok || matches(c.imported, imports[row]) != c.allowed {
			t.Errorf("%s imports %s: allowed %v, want %v (row %q)", c.importer, c.imported, !c.allowed, c.allowed, row)
		}
	}
	if _, ok := rowOf("manager"); ok {
		t.Error("a package without a row has one")
	}
}

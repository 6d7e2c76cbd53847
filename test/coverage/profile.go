package main

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// block is one line of a profile: so many statements from one place to another that run one after the other.
type block struct {
	line, column, endLine, endColumn int
	statements                       int
}

// profile says of every file, named from the root of the repository, which of its blocks were reached.
type profile map[string]map[block]bool

func (p profile) readFile(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read
	if err := p.read(f); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// read adds what a profile says. Helpers of tests count for nothing.
func (p profile) read(r io.Reader) error {
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		if n == 1 && strings.HasPrefix(lines.Text(), "mode: ") {
			continue
		}
		file, rest, ok := strings.Cut(strings.TrimPrefix(lines.Text(), module), ":")
		var b block
		var hits int
		_, err := fmt.Sscanf(rest, "%d.%d,%d.%d %d %d", &b.line, &b.column, &b.endLine, &b.endColumn, &b.statements, &hits)
		if !ok || err != nil {
			return fmt.Errorf("line %d is not one of a coverage profile: %q", n, lines.Text())
		}
		if strings.Contains(file, "/storetest/") || strings.Contains(file, "/relaytest/") || strings.Contains(file, "/fakeplatform/") {
			continue
		}
		if p[file] == nil {
			p[file] = map[block]bool{}
		}
		p[file][b] = p[file][b] || hits > 0
	}
	return lines.Err()
}

// of counts the statements of a function, and names those blocks that were not reached.
func (p profile) of(f function) (statements int, open []block) {
	for b, hit := range p[f.file] {
		if !f.contains(b) {
			continue
		}
		statements += b.statements
		if !hit && b.statements > 0 {
			open = append(open, b)
		}
	}
	slices.SortFunc(open, func(a, b block) int { return cmp.Or(a.line-b.line, a.column-b.column) })
	return statements, open
}

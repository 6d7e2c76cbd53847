package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"slices"
	"strings"
)

// function is one that has to be covered whole.
type function struct {
	file, name string // name: "f", or "T.f" of a method
	body       span
	statements bool   // it has some
	mutants    []span // what runs only in a build with the tag mutant
}

// span is from one place of a file to another.
type span struct{ from, to token.Position }

// contains reports whether a block is the function's, and not a mutant's.
func (f *function) contains(b block) bool {
	return f.body.contains(b) && !slices.ContainsFunc(f.mutants, func(m span) bool { return m.contains(b) })
}

func (s span) contains(b block) bool {
	after := b.line > s.from.Line || b.line == s.from.Line && b.column >= s.from.Column
	before := b.endLine < s.to.Line || b.endLine == s.to.Line && b.endColumn <= s.to.Column
	return after && before
}

// parsePaths reads paths.txt and finds what it names: a file, all of it or the functions after the colon.
func parsePaths(text string, root fs.FS) ([]function, error) {
	var all []function
	for n, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		file, names, some := strings.Cut(strings.TrimSpace(line), ":")
		if file == "" {
			continue
		}
		source, err := fs.ReadFile(root, file)
		if err != nil {
			return nil, fmt.Errorf("paths.txt:%d: %w", n+1, err)
		}
		found, err := functions(file, source)
		if err != nil {
			return nil, fmt.Errorf("paths.txt:%d: %w", n+1, err)
		}
		if some {
			wanted := strings.Fields(names)
			found = slices.DeleteFunc(found, func(f function) bool {
				at := slices.Index(wanted, f.name)
				if at >= 0 {
					wanted = slices.Delete(wanted, at, at+1)
				}
				return at < 0
			})
			if len(wanted) > 0 {
				return nil, fmt.Errorf("paths.txt:%d: %s has no function %s", n+1, file, strings.Join(wanted, ", "))
			}
		}
		if len(found) == 0 {
			return nil, fmt.Errorf("paths.txt:%d: %s names no function", n+1, file)
		}
		all = append(all, found...)
	}
	return all, nil
}

// functions returns those of a source file, in its order.
func functions(file string, source []byte) ([]function, error) {
	set := token.NewFileSet()
	parsed, err := parser.ParseFile(set, file, source, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var all []function
	for _, d := range parsed.Decls {
		decl, ok := d.(*ast.FuncDecl)
		if !ok || decl.Body == nil {
			continue
		}
		at := func(from, to token.Pos) span { return span{set.Position(from), set.Position(to)} }
		f := function{file: file, name: nameOf(decl), body: at(decl.Body.Pos(), decl.Body.End()), statements: len(decl.Body.List) > 0}
		ast.Inspect(decl.Body, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.IfStmt:
				if mutant(n.Cond) {
					f.mutants = append(f.mutants, at(n.Body.Pos(), n.Body.End()))
				}
			case *ast.CaseClause:
				if len(n.List) == 1 && mutant(n.List[0]) {
					f.mutants = append(f.mutants, at(n.Colon, n.End()))
				}
			}
			return true
		})
		all = append(all, f)
	}
	return all, nil
}

// nameOf is "f", or "T.f" of a method of T or *T.
func nameOf(f *ast.FuncDecl) string {
	if f.Recv == nil || len(f.Recv.List) == 0 {
		return f.Name.Name
	}
	t := f.Recv.List[0].Type
	if p, ok := t.(*ast.StarExpr); ok {
		t = p.X
	}
	if g, ok := t.(*ast.IndexExpr); ok {
		t = g.X
	}
	if id, ok := t.(*ast.Ident); ok {
		return id.Name + "." + f.Name.Name
	}
	return f.Name.Name
}

// mutant reports whether a condition holds in no build but those of mutants: it asks fault.Mutant, perhaps among other things
// that must hold too.
func mutant(e ast.Expr) bool {
	switch e := e.(type) {
	case *ast.ParenExpr:
		return mutant(e.X)
	case *ast.BinaryExpr:
		return e.Op == token.LAND && (mutant(e.X) || mutant(e.Y))
	case *ast.CallExpr:
		s, ok := e.Fun.(*ast.SelectorExpr)
		if !ok || s.Sel.Name != "Mutant" {
			return false
		}
		p, ok := s.X.(*ast.Ident)
		return ok && p.Name == "fault"
	}
	return false
}

//go:build !mutant

package fault

// Mutant is false in this build.
func Mutant(string) bool { return false }

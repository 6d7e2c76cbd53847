//go:build mutant

package fault

import "os"

// MutantEnv names the mutant to be.
const MutantEnv = "OUTBOX_MUTANT"

var chosen = os.Getenv(MutantEnv)

// Mutant reports whether this process is the named mutant.
func Mutant(name string) bool { return chosen == name }

// Choose makes this process the named mutant from now on; "": none. No other goroutine may be asking.
func Choose(name string) { chosen = name }

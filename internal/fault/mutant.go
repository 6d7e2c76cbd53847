//go:build mutant

package fault

import "os"

// MutantEnv names the mutant to be.
const MutantEnv = "OUTBOX_MUTANT"

var chosen = os.Getenv(MutantEnv)

// Mutant reports whether this process is the named mutant.
func Mutant(name string) bool { return chosen == name }

package fakeplatform

import (
	"fmt"
	"slices"
)

// Example is the TB of an example. Call End when it is over.
type Example struct{ cleanups []func() }

// Helper does nothing.
func (e *Example) Helper() {}

// Errorf prints, so that the example's output is wrong.
func (e *Example) Errorf(format string, args ...any) { fmt.Printf(format+"\n", args...) } //nolint:forbidigo // the output of an example

// Fatalf panics.
func (e *Example) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) } //nolint:forbidigo // ends an example

// Cleanup remembers f for End.
func (e *Example) Cleanup(f func()) { e.cleanups = append(e.cleanups, f) }

// End runs the clean-ups, last one first.
func (e *Example) End() {
	for _, f := range slices.Backward(e.cleanups) {
		f()
	}
}

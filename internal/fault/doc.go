// Package fault holds the two switches by which the robustness suite (test/robustness) breaks the product from within.
//
// Point marks a place where a process may be killed: between a durable step and what follows it. In a build with the tag
// failpoints the suite arms one point at a time; without the tag Point does nothing and is compiled away.
//
// Mutant asks whether a known fault was put in on purpose, to prove that the suite notices it. Only a build with the tag
// mutant can say yes, to the one that OUTBOX_MUTANT names; without the tag Mutant is the constant false, and the compiler
// leaves out what depends on it. TestReleaseBuildsHaveNoFaults in test/robustness proves both.
package fault

// Command robustness proves the promises of docs/guarantees.md, or finds the run that breaks one. It starts a whole
// deployment of real processes, works on it from services in processes of their own, breaks it in every way it knows, heals
// it, and judges what happened from the services' own databases, a foreign Kafka consumer and the journals that the services
// wrote before and after each step. README.md tells the story; `make robustness` runs it.
//
// Packages: journal (what the services write down), driver (the services), cluster (processes and the proxies between them),
// nemesis (the faults), check (the invariants).
package main

// Package resolver finds out what became of transactions whose decision nobody told.
//
// It learns of them from broken sessions, at once, and from the parked events of the store, when they are due. It asks in
// two ways at the same time: check-back asks live sessions of the source, direct reads the source's database itself. The
// first conclusive answer wins and is written through the writer like any other decision, with its evidence; a decision
// that came first stays.
//
// It never guesses. Only COMMITTED and ABORTED decide; everything else is asked again later, for ever, with a capped and
// jittered back-off that starts anew when a session of the source or its database comes back.
//
// Every source database has a lane of its own, with its own queue, connections and back-off: one that is away, or slow,
// costs the others nothing.
package resolver

package sourcedb

import (
	"context"
	"fmt"
	"sync/atomic"
)

// incarnation names a run of a server, and one of its databases: what a transaction can learn of where it is for nothing.
// Through a pooler two transactions of one connection may be in different ones.
type incarnation struct {
	started  int64 // of the postmaster, Unix microseconds
	database string
}

// identity tells a database from all others. It never changes during an incarnation.
type identity struct {
	at          incarnation
	system, oid int64
}

// identities remembers the last identity. A nil one remembers nothing. Safe for concurrent use.
type identities struct{ last atomic.Pointer[identity] }

// of returns the identity of the incarnation that q is in, asking for it when it is another one than the last time.
func (i *identities) of(ctx context.Context, q Queryer, at incarnation) (*identity, error) {
	if i != nil {
		if known := i.last.Load(); known != nil && known.at == at {
			return known, nil
		}
	}
	found := &identity{at: at}
	if err := q.QueryRow(ctx, identitySQL).Scan(&found.system, &found.oid); err != nil {
		return nil, fmt.Errorf("outbox: reading the database's identity: %w", err)
	}
	if i != nil {
		i.last.Store(found)
	}
	return found, nil
}

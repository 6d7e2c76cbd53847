package resolver

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/store"
)

// Queryer is plain connections to a source database, each statement in a transaction of its own.
type Queryer interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// Judge asks a source database about transactions, directly, and returns the requests that write down what is conclusive:
// all of what a resolver decides, without its lanes and back-off. It is what test/simulation drives.
func Judge(ctx context.Context, q Queryer, transactions []store.Parked, actor string) ([]*store.Request, error) {
	seen, err := judgeAll(ctx, q, transactions)
	if err != nil {
		return nil, err
	}
	var decisions []*store.Request
	for i := range transactions {
		k := transactions[i].Key
		f := seen[k]
		if conclusive(f.outcome) {
			decisions = append(decisions, decision(answer{key: k, method: methodDirect, outcome: f.outcome, evidence: f.evidence}, actor))
		}
	}
	return decisions, nil
}

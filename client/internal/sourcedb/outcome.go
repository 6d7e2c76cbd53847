package sourcedb

import (
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// certainlyRolledBack tells whether an error of COMMIT means that the transaction is rolled back. That is so only when
// PostgreSQL itself says, in answer to COMMIT, that a rule or another transaction stood in the way: a deferred constraint, a
// serialization failure, an earlier error. Everything else (a broken connection, a context that ended, a server that shuts
// down, an error a pooler may have made up) leaves the outcome unknown.
func certainlyRolledBack(err error) bool {
	if errors.Is(err, pgx.ErrTxCommitRollback) {
		return true // answered ROLLBACK: an earlier statement had failed
	}
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || len(pg.Code) != 5 {
		return false
	}
	severity := pg.SeverityUnlocalized
	if severity == "" {
		severity = pg.Severity
	}
	if severity != "ERROR" || pg.Code == "40003" { // statement_completion_unknown
		return false
	}
	switch pg.Code[:2] {
	case "22", "23", "25", "27", "40", "42", "44", "P0":
		return true
	default:
		return false
	}
}

package bench

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// fillHistory puts decided transactions into the store, as if the platform had run for long. They are young enough not to
// be purged during the run.
func fillHistory(ctx context.Context, dsn string, transactions int) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return fmt.Errorf("connecting to fill the history: %w", err)
	}
	defer conn.Close(ctx) //nolint:errcheck // done
	const chunk = 250_000
	for done := 0; done < transactions; done += chunk {
		if _, err := conn.Exec(ctx, `
			INSERT INTO outbox.tx (source_id, tx_id, state, shards, digest, log_xid, prepared_at, decided_at)
			SELECT 1000000, gen_random_uuid(), 1, 1, g, pg_current_xact_id(), now(), now() FROM generate_series(1, $1::int) g`,
			min(chunk, transactions-done)); err != nil {
			return fmt.Errorf("filling the history: %w", err)
		}
	}
	for _, sql := range []string{"VACUUM ANALYZE outbox.tx", "CHECKPOINT"} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("filling the history: %w", err)
		}
	}
	return nil
}

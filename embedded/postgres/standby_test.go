package postgres_test

import (
	"context"
	"testing"

	"github.com/outbox-platform/outbox/embedded/postgres"
)

// A synchronous standby has what its primary acknowledged before it was killed, and takes writes after its promotion.
func TestStandbyTakesOver(t *testing.T) {
	primary := start(t, postgres.Config{Settings: map[string]string{"wal_keep_size": "256MB"}})
	db := primary.DSN("postgres")
	exec1(t, db, "CREATE TABLE kept (n int)")
	standby, err := postgres.StartStandby(t.Context(), primary, "standby", postgres.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := standby.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	exec1(t, db, "ALTER SYSTEM SET synchronous_standby_names = 'standby'")
	exec1(t, db, "SELECT pg_reload_conf()")
	eventually(t, func() bool {
		return query[string](t, db, "SELECT coalesce(max(sync_state), '') FROM pg_stat_replication") == "sync"
	})
	exec1(t, db, "INSERT INTO kept SELECT generate_series(1, 100)")
	primary.Kill()
	if err := standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := query[int](t, standby.DSN("postgres"), "SELECT count(*) FROM kept"); n != 100 {
		t.Errorf("%d rows of 100 after the failover", n)
	}
	exec1(t, standby.DSN("postgres"), "INSERT INTO kept VALUES (0)")
}

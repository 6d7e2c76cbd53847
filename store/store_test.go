package store_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/migrations"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sql    string
		params string
		says   string
	}{
		"synchronous_commit=off":   {params: "&synchronous_commit=off", says: "synchronous_commit=off"},
		"no schema":                {sql: `DROP SCHEMA outbox CASCADE`, says: "outbox migrate up"},
		"an old schema":            {sql: `DELETE FROM outbox.schema_version WHERE version_id > 0`, says: "outbox migrate up"},
		"a newer schema":           {sql: `INSERT INTO outbox.schema_version (version_id, is_applied) VALUES (1000, true)`, says: "newer binary"},
		"a copy in other cluster":  {sql: `UPDATE outbox.control SET system_identifier = 42`, says: "system identifier 42"},
		"a broken schema":          {sql: `DROP TABLE outbox.control`, says: "outbox.control"},
		"a foreign revision table": {sql: `ALTER TABLE outbox.schema_version RENAME version_id TO v`, says: "schema revision"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := storetest.New(t)
			if c.sql != "" {
				db.Exec(t, c.sql)
			}
			st, err := store.Open(t.Context(), store.Config{DSN: db.DSN + c.params})
			if err == nil {
				st.Close()
				t.Fatal("opened")
			}
			if !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %q does not say %q", err, c.says)
			}
		})
	}
	t.Run("a DSN that is none", func(t *testing.T) {
		t.Parallel()
		if _, err := store.Open(t.Context(), store.Config{DSN: "://"}); err == nil {
			t.Error("opened")
		}
	})
	t.Run("a server that is not there", func(t *testing.T) {
		t.Parallel()
		if _, err := store.Open(t.Context(), store.Config{DSN: "postgres://u@127.0.0.1:1/x"}); !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("unsafe is allowed when asked for", func(t *testing.T) {
		t.Parallel()
		db := storetest.New(t)
		st, err := store.Open(t.Context(), store.Config{DSN: db.DSN + "&synchronous_commit=off", Unsafe: true})
		if err != nil {
			t.Fatal(err)
		}
		st.Close()
	})
	t.Run("fsync=off", func(t *testing.T) {
		t.Parallel()
		cluster := storetest.NewCluster(t, storetest.WithSettings(map[string]string{"fsync": "off"}))
		db := cluster.New(t, storetest.WithConfig(func(c *store.Config) { c.Unsafe = true }))
		if _, err := store.Open(t.Context(), store.Config{DSN: db.DSN}); err == nil || !strings.Contains(err.Error(), "fsync=off") {
			t.Errorf("error %v", err)
		}
	})
}

func TestRevisionsOfBinaryAndMigrationsAgree(t *testing.T) {
	t.Parallel()
	if migrations.Revision < store.OldestRevision || migrations.Revision > store.NewestRevision {
		t.Errorf("migrations lead to revision %d, the store accepts %d to %d", migrations.Revision, store.OldestRevision, store.NewestRevision)
	}
}

// The role's defaults must not change what the statements rely on.
func TestConnectionsDoNotInheritTheRolesDefaults(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(5))
	name := storetest.Query[string](t, db, `SELECT current_database()::text`)[0]
	for _, set := range []string{"default_transaction_isolation = 'serializable'", "default_transaction_read_only = on", "statement_timeout = 1", "search_path = outbox"} {
		db.Exec(t, fmt.Sprintf(`ALTER DATABASE %s SET %s`, name, set))
	}
	st := db.Open(t)
	if st.ShardCount() != 5 {
		t.Errorf("%d shards", st.ShardCount())
	}
	if err := st.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	w := runWriter(t, st, store.WriterConfig{MaxWait: within})
	k := storetest.Key(1)
	do(t, w, prepare(k, order("1")), nil)
	do(t, w, commit(k, 0), nil)
	for where, conn := range map[string]interface {
		QueryRow(context.Context, string, ...any) pgx.Row
	}{"pool": st.Pool(), "dialled": openReader(t, st).Conn()} {
		var level string
		if err := conn.QueryRow(t.Context(), `SHOW transaction_isolation`).Scan(&level); err != nil || level != "read committed" {
			t.Errorf("%s: isolation level %q, %v", where, level, err)
		}
	}
	if _, err := st.AcquireShards(t.Context(), "a", time.Second, 1); err != nil {
		t.Error(err)
	}
}

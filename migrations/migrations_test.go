package migrations_test

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/outbox-platform/outbox/migrations"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

// applied returns the revisions that are applied.
func applied(t *testing.T, dsn string) (revisions []int64) {
	t.Helper()
	steps, err := migrations.Status(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	if last := steps[len(steps)-1]; last.Revision != migrations.Revision {
		t.Errorf("the newest migration is %d, Revision is %d", last.Revision, migrations.Revision)
	}
	for _, s := range steps {
		if !s.AppliedAt.IsZero() {
			revisions = append(revisions, s.Revision)
		}
	}
	return revisions
}

func TestUpAndDown(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithoutSchema())
	if got := applied(t, db.DSN); len(got) != 0 {
		t.Errorf("applied to an empty database: %v", got)
	}
	var steps []migrations.Step
	note := func(s migrations.Step) { steps = append(steps, s) }
	if err := migrations.Up(t.Context(), db.DSN, note, migrations.WithShards(7)); err != nil {
		t.Fatal(err)
	}
	if err := migrations.Up(t.Context(), db.DSN, note, migrations.WithShards(9)); err != nil { // nothing left to do
		t.Fatal(err)
	}
	if len(steps) != migrations.Revision || !steps[0].Up || steps[0].Name != "00001_init.sql" || steps[0].Duration == 0 {
		t.Errorf("steps %+v", steps)
	}
	if got := applied(t, db.DSN); len(got) != migrations.Revision {
		t.Errorf("applied: %v", got)
	}
	st, err := store.Open(t.Context(), store.Config{DSN: db.DSN})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if st.ShardCount() != 7 {
		t.Errorf("%d shards, want 7", st.ShardCount())
	}

	steps = nil
	for range migrations.Revision + 1 { // once more than there is
		if err := migrations.Down(t.Context(), db.DSN, note); err != nil {
			t.Fatal(err)
		}
	}
	if len(steps) != migrations.Revision || steps[0].Up {
		t.Errorf("steps down %+v", steps)
	}
	if left := storetest.Query[string](t, db, `SELECT c.relname::text FROM pg_class c WHERE c.relnamespace = 'outbox'::regnamespace AND c.relkind IN ('r', 'p') AND c.relname <> 'schema_version'`); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
	if err := migrations.Up(t.Context(), db.DSN, nil); err != nil {
		t.Fatal(err)
	}
}

// TestKeptByCaller: revision 3 lets a resolution say that a caller keeps its request. What is there stays, and the way back
// removes what revision 2 does not allow.
func TestKeptByCaller(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithoutSchema())
	resolve := func(id int, method string) error {
		t.Helper()
		conn := db.Connect(t)
		defer conn.Close(context.WithoutCancel(t.Context())) //nolint:errcheck // nothing depends on it
		_, err := conn.Exec(t.Context(), `INSERT INTO outbox.resolution (source_id, tx_id, state, method, evidence, actor)
			VALUES (1, lpad($1::int::text, 32, '0')::uuid, 1, $2, '{}', '')`, id, method)
		return err
	}
	methods := func(want ...string) {
		t.Helper()
		if got := storetest.Query[string](t, db, `SELECT method FROM outbox.resolution ORDER BY tx_id`); !slices.Equal(got, want) {
			t.Errorf("resolutions by %q, want %q", got, want)
		}
	}
	migrate := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	refused := func(err error, code string) bool {
		var pg *pgconn.PgError
		return errors.As(err, &pg) && pg.Code == code
	}
	migrate(migrations.Up(t.Context(), db.DSN, nil))
	for got := applied(t, db.DSN); got[len(got)-1] > 2; got = applied(t, db.DSN) {
		migrate(migrations.Down(t.Context(), db.DSN, nil))
	}
	migrate(errors.Join(resolve(1, "check-back"), resolve(2, "direct"), resolve(3, "operator")))
	if err := resolve(4, "client"); !refused(err, "23514") {
		t.Errorf("revision 2: %v", err)
	}
	if _, err := store.Open(t.Context(), store.Config{DSN: db.DSN}); err == nil || !strings.Contains(err.Error(), "outbox migrate up") {
		t.Errorf("a binary that needs revision 3 opens revision 2: %v", err)
	}
	migrate(migrations.Up(t.Context(), db.DSN, nil))
	migrate(resolve(4, "client"))
	if err := resolve(5, "a guess"); !refused(err, "23514") {
		t.Errorf("revision 3: %v", err)
	}
	methods("check-back", "direct", "operator", "client")
	for got := applied(t, db.DSN); got[len(got)-1] > 2; got = applied(t, db.DSN) {
		migrate(migrations.Down(t.Context(), db.DSN, nil))
	}
	methods("check-back", "direct", "operator")
	migrate(migrations.Up(t.Context(), db.DSN, nil))
}

// Several processes of a deployment migrate at once: one does, the others find it done.
func TestConcurrentUp(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithoutSchema())
	var all sync.WaitGroup
	var mu sync.Mutex
	done := 0
	for range 4 {
		all.Go(func() {
			err := migrations.Up(t.Context(), db.DSN, func(migrations.Step) {
				mu.Lock()
				done++
				mu.Unlock()
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if done != migrations.Revision {
		t.Errorf("%d migrations were applied, want %d", done, migrations.Revision)
	}
}

func TestFailures(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithoutSchema())
	if err := migrations.Up(t.Context(), db.DSN, nil, migrations.WithShards(65)); err == nil || !strings.Contains(err.Error(), "between 1 and 64") {
		t.Errorf("65 shards: %v", err)
	}
	for _, dsn := range []string{"://", "postgres://nobody@127.0.0.1:1/x"} {
		if err := migrations.Up(t.Context(), dsn, nil); err == nil {
			t.Errorf("%s: no error", dsn)
		}
		if _, err := migrations.Status(t.Context(), dsn); err == nil {
			t.Errorf("%s: no error", dsn)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := migrations.Down(ctx, db.DSN, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	// A table in the way: the migration fails as a whole and says so.
	db.Exec(t, `CREATE SCHEMA outbox CREATE TABLE outbox.topic (x int)`)
	if err := migrations.Up(t.Context(), db.DSN, func(migrations.Step) { t.Error("applied") }); err == nil {
		t.Error("no error although a table is in the way")
	}
	if got := storetest.Query[int](t, db, `SELECT count(*)::int FROM pg_class WHERE relnamespace = 'outbox'::regnamespace AND relname = 'tx'`); got[0] != 0 {
		t.Error("half a migration is left")
	}
}

func TestFilesAreEmbedded(t *testing.T) {
	t.Parallel()
	names, err := fs.Glob(migrations.Files(), "*.sql")
	if err != nil || len(names) != migrations.Revision {
		t.Errorf("files %v, %v", names, err)
	}
}

package pgxoutbox_test

import (
	"context"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
	"github.com/outbox-platform/outbox/embedded/postgres"
)

// service starts what the examples need: a platform, and a database with a table of orders and the marker table.
func service() (target string, pool *pgxpool.Pool, platform *fakeplatform.Platform, stop func()) {
	ctx := context.Background()
	example := &fakeplatform.Example{}
	platform = fakeplatform.Start(example)
	server, err := postgres.Start(ctx, postgres.Config{})
	if err != nil {
		panic(err)
	}
	pool, err = pgxpool.New(ctx, server.DSN("postgres"))
	if err != nil {
		panic(err)
	}
	if _, err := pool.Exec(ctx, schema+client.MarkerDDL); err != nil {
		panic(err)
	}
	return platform.Addr(), pool, platform, func() {
		pool.Close()
		if err := server.Stop(ctx); err != nil {
			panic(err)
		}
		example.End()
	}
}

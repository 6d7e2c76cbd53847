package pgxoutbox_test

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
)

func Example() {
	ctx := context.Background()
	target, pool, platform, stop := service() // a platform and a database for this example
	defer stop()

	// Once, when the service starts.
	c, err := client.New(client.Config{Target: target, Source: "orders", Plaintext: true})
	if err != nil {
		panic(err)
	}
	defer c.Close()
	if err := pgxoutbox.Register(c, "", pool, pgxoutbox.Upkeep{}); err != nil {
		panic(err)
	}

	// For every business transaction.
	err = pgxoutbox.InTx(ctx, pool, c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
		if _, err := tx.Exec(ctx, "INSERT INTO orders (id, state) VALUES ('4711', 'placed')"); err != nil {
			return err
		}
		return tx.Publish(client.Event{
			Topic: "orders", AggregateType: "order", AggregateID: "4711", Type: "order.placed.v1", Payload: []byte("placed"),
		})
	})
	if err != nil {
		panic(err)
	}
	c.Close() // waits until the platform has acknowledged the commit
	fmt.Println(platform.Published("4711"))
	// Output: [placed]
}

// A retry loop around InTx: every attempt is prepared under an id of its own.
func ExampleInTx_retry() {
	ctx := context.Background()
	target, pool, _, stop := service() // a platform and a database for this example
	defer stop()
	c, err := client.New(client.Config{Target: target, Source: "orders", Plaintext: true})
	if err != nil {
		panic(err)
	}
	defer c.Close()
	if err := pgxoutbox.Register(c, "", pool, pgxoutbox.Upkeep{}); err != nil {
		panic(err)
	}

	serializable := pgxoutbox.Options{TxOptions: pgx.TxOptions{IsoLevel: pgx.Serializable}}
	for {
		err = pgxoutbox.InTx(ctx, pool, c, serializable, func(tx *pgxoutbox.Tx) error {
			_, err := tx.Exec(ctx, "INSERT INTO orders (id, state) VALUES ('4711', 'placed')")
			if err != nil {
				return err
			}
			return tx.Publish(client.Event{Topic: "orders", AggregateType: "order", AggregateID: "4711", Type: "order.placed.v1"})
		})
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || !slices.Contains([]string{"40001", "40P01"}, pg.Code) {
			break
		}
	}
	var unknown *client.OutcomeUnknownError
	switch {
	case err == nil:
		fmt.Println("committed")
	case errors.As(err, &unknown):
		fmt.Println("look before you try again:", unknown.TransactionID)
	default:
		fmt.Println("rolled back:", err)
	}
	// Output: committed
}

// The pieces, for code that begins and ends its transactions itself.
func ExampleMark() {
	ctx := context.Background()
	target, pool, platform, stop := service() // a platform and a database for this example
	defer stop()
	c, err := client.New(client.Config{Target: target, Source: "orders", Plaintext: true})
	if err != nil {
		panic(err)
	}
	defer c.Close()

	err = func() error {
		tx, err := pool.Begin(ctx)
		if err != nil {
			return err
		}
		defer tx.Rollback(ctx)
		if _, err := tx.Exec(ctx, "INSERT INTO orders (id, state) VALUES ('4711', 'placed')"); err != nil {
			return err
		}
		// After the row locks are taken, at the top level of the transaction:
		a, err := pgxoutbox.Mark(ctx, tx, c, pgxoutbox.Options{})
		if err != nil {
			return err
		}
		// Right before COMMIT:
		event := client.Event{Topic: "orders", AggregateType: "order", AggregateID: "4711", Type: "order.placed.v1", Payload: []byte("placed")}
		if err := a.Prepare(ctx, event); err != nil {
			if tx.Rollback(ctx) == nil {
				a.AfterRollback()
			}
			return err
		}
		if err := tx.Commit(ctx); err != nil {
			return err // its outcome may be unknown: neither AfterCommit nor AfterRollback
		}
		a.AfterCommit()
		return nil
	}()
	if err != nil {
		panic(err)
	}
	c.Close() // waits until the platform has acknowledged the commit
	fmt.Println(platform.Published("4711"))
	// Output: [placed]
}

package sqloutbox_test

import (
	"context"
	"database/sql"
	"fmt"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/sqloutbox"
)

func ExampleInTx() {
	ctx := context.Background()
	db, err := sql.Open("pgx", "postgres://orders@localhost/orders") // import _ "github.com/jackc/pgx/v5/stdlib"
	if err != nil {
		panic(err)
	}
	defer db.Close()
	c, err := client.New(client.Config{Target: "outbox.example.com:7070", Source: "orders", Token: client.StaticToken("secret")})
	if err != nil {
		panic(err)
	}
	defer c.Close()
	if err := sqloutbox.Register(c, "", db, sqloutbox.Upkeep{}); err != nil {
		panic(err)
	}
	err = sqloutbox.InTx(ctx, db, c, sqloutbox.Options{}, func(tx *sqloutbox.Tx) error {
		if _, err := tx.ExecContext(ctx, "UPDATE orders SET state = 'paid' WHERE id = $1", "4711"); err != nil {
			return err
		}
		return tx.Publish(client.Event{
			Topic: "orders", AggregateType: "order", AggregateID: "4711", Type: "order.paid.v1", Payload: []byte(`{"id": "4711"}`),
		})
	})
	if err != nil {
		fmt.Println(err)
	}
}

// Command service is the order service as a program of its own, against a platform that runs elsewhere:
//
//	outbox source apply examples/orders/source.yaml
//	go run ./examples/orders/service -dsn postgres://…/orders -server 127.0.0.1:7070
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/examples/orders"
)

func main() {
	dsn := flag.String("dsn", os.Getenv("ORDERS_DSN"), "the service's own database")
	server := flag.String("server", "127.0.0.1:7070", "gRPC address of the platform")
	rate := flag.Float64("rate", 5, "orders per second")
	declined := flag.Float64("declined", 0.1, "share of orders that are rolled back")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *dsn, *server, *rate, *declined)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "orders:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, dsn, server string, rate, declined float64) (err error) {
	pool, err := pgxpool.New(ctx, dsn)
	if err != nil {
		return err
	}
	defer pool.Close()
	if err := orders.Migrate(ctx, pool); err != nil {
		return err
	}
	outbox, err := client.New(client.Config{Target: server, Source: orders.Source, Plaintext: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, outbox.Close()) }()
	shop, err := orders.New(pool, outbox)
	if err != nil {
		return err
	}
	return shop.Run(ctx, rate, declined, func(o orders.Outcome) {
		if o.Err != nil {
			fmt.Fprintf(os.Stdout, "%s of %s: %v\n", o.Order.ID, o.Order.Customer, o.Err)
			return
		}
		fmt.Fprintf(os.Stdout, "%s of %s: committed as version %d\n", o.Order.ID, o.Order.Customer, o.Order.Version)
	})
}

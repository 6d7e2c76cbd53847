// Command service is the order service as a program of its own, against a platform that runs elsewhere:
//
//	outbox source apply examples/orders/source.yaml
//	go run ./examples/orders/service -dsn postgres://…/orders -server 127.0.0.1:7070
//
// With -die-at it places one order and kills itself on the way, to see what becomes of its event:
//
//	go run ./examples/orders/service -dsn postgres://…/orders -die-at committed
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/grpc"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/examples/orders"
)

// dieLimit bounds an order that was to be died in.
const dieLimit = 10 * time.Second

// settings are the flags.
type settings struct {
	dsn, server, dieAt string
	rate, declined     float64
}

func main() {
	var s settings
	flag.StringVar(&s.dsn, "dsn", os.Getenv("ORDERS_DSN"), "the service's own database")
	flag.StringVar(&s.server, "server", cmp.Or(os.Getenv("OUTBOX_ADDRESS"), "127.0.0.1:7070"), "gRPC address of the platform")
	flag.Float64Var(&s.rate, "rate", 5, "orders per second")
	flag.Float64Var(&s.declined, "declined", 0.1, "share of orders that are rolled back")
	flag.StringVar(&s.dieAt, "die-at", "", "place one order and die of SIGKILL at this step: "+strings.Join(orders.DieSteps, ", "))
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, s)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "orders:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, s settings) (err error) {
	database, err := pgxpool.ParseConfig(s.dsn)
	if err != nil {
		return err
	}
	var death *orders.Death
	var dial []grpc.DialOption
	if s.dieAt != "" {
		if death, err = orders.NewDeath(s.dieAt, func(text string) { fmt.Fprintln(os.Stdout, text) }); err != nil {
			return err
		}
		death.Watch(database)
		dial = append(dial, death.DialOption())
	}
	pool, err := pgxpool.NewWithConfig(ctx, database)
	if err != nil {
		return err
	}
	defer pool.Close()
	if err := orders.Migrate(ctx, pool); err != nil {
		return err
	}
	outbox, err := client.New(client.Config{Target: s.server, Source: orders.Source, Plaintext: true, DialOptions: dial})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, outbox.Close()) }()
	shop, err := orders.New(pool, outbox)
	if err != nil {
		return err
	}
	if death != nil {
		ctx, cancel := context.WithTimeout(ctx, dieLimit)
		defer cancel()
		return shop.PlaceAndDie(ctx, orders.NewOrder(), death)
	}
	return shop.Run(ctx, s.rate, s.declined, func(o orders.Outcome) {
		if o.Err != nil {
			fmt.Fprintf(os.Stdout, "%s of %s: %v\n", o.Order.ID, o.Order.Customer, o.Err)
			return
		}
		fmt.Fprintf(os.Stdout, "%s of %s: committed as version %d\n", o.Order.ID, o.Order.Customer, o.Order.Version)
	})
}

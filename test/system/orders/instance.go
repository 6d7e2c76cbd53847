package orders

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/grpc"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
)

// Instance is one running instance of the service: a pool of its database and an SDK client.
type Instance struct {
	pool   *pgxpool.Pool
	client *client.Client
}

// Config says how an instance reaches its database and the platform.
type Config struct {
	// DSN of the service's database.
	DSN string
	// Source is the service's name at the platform.
	Source string
	// Servers are addresses of the platform; the first that answers is used until it fails.
	Servers []string
	// Transport of the calls.
	Transport client.Transport
	// MaxConns of the pool; more than the callers, because upkeep needs connections too.
	MaxConns int32
	// Logger of the SDK.
	Logger *slog.Logger
	// OnAlarm gets what the SDK reports to people.
	OnAlarm func(client.Alarm)
}

// Start connects an instance and registers its database with the SDK.
func Start(ctx context.Context, config Config) (*Instance, error) {
	poolConfig, err := pgxpool.ParseConfig(config.DSN)
	if err != nil {
		return nil, fmt.Errorf("start an instance: %w", err)
	}
	poolConfig.MaxConns = config.MaxConns
	pool, err := pgxpool.NewWithConfig(ctx, poolConfig)
	if err != nil {
		return nil, fmt.Errorf("start an instance: %w", err)
	}
	servers := manual.NewBuilderWithScheme("servers")
	state := resolver.State{}
	for _, address := range config.Servers {
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: address}}})
		state.Addresses = append(state.Addresses, resolver.Address{Addr: address})
	}
	servers.InitialState(state)
	sdk, err := client.New(client.Config{
		Target: "servers:///outbox", Source: config.Source, Plaintext: true, Transport: config.Transport,
		DialOptions: []grpc.DialOption{grpc.WithResolvers(servers)},
		Logger:      config.Logger, OnAlarm: config.OnAlarm,
	})
	if err != nil {
		pool.Close()
		return nil, fmt.Errorf("start an instance: %w", err)
	}
	in := &Instance{pool: pool, client: sdk}
	if err := pgxoutbox.Register(sdk, "", pool, pgxoutbox.Upkeep{}); err != nil {
		in.Close()
		return nil, fmt.Errorf("start an instance: register its database: %w", err)
	}
	return in, nil
}

// Close waits for decisions that are not acknowledged, as long as the SDK does, and disconnects.
func (in *Instance) Close() {
	_ = in.client.Close() // always nil
	in.pool.Close()
}

// Client is the instance's SDK client.
func (in *Instance) Client() *client.Client { return in.client }

// Run does what the workload says until it ends.
func (in *Instance) Run(ctx context.Context, w Workload, tally *Tally) { w.run(ctx, in, tally) }

// transact runs a plan the simple way, or the way of people who end their transactions themselves, when the plan is to
// change one's mind after everything was prepared.
func (in *Instance) transact(ctx context.Context, p plan) error {
	if p.end == abort {
		return in.prepareAndAbort(ctx, p)
	}
	return pgxoutbox.InTx(ctx, in.pool, in.client, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
		events, err := p.do(ctx, tx)
		if err != nil {
			return err
		}
		if err := tx.Publish(events...); err != nil {
			return err
		}
		if p.end == rollback {
			return errChangedMind
		}
		return nil
	})
}

func (in *Instance) prepareAndAbort(ctx context.Context, p plan) error {
	tx, err := in.pool.BeginTx(ctx, pgx.TxOptions{})
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer tx.Rollback(ctx)
	events, err := p.do(ctx, tx)
	if err != nil {
		return err
	}
	attempt, err := pgxoutbox.Mark(ctx, tx, in.client, pgxoutbox.Options{})
	if err != nil {
		return err
	}
	prepareErr := attempt.Prepare(ctx, events...)
	if err := tx.Rollback(ctx); err != nil {
		return fmt.Errorf("roll back: %w", err)
	}
	attempt.AfterRollback()
	if prepareErr != nil {
		return prepareErr
	}
	return errChangedMind
}

package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
)

// orders is the workload of a real service: an order and its aggregate's row in one transaction, with one event.
type orders struct {
	ledger     *ledger
	topic      string
	payload    int
	aggregates int
	rollback   float64
	client     *client.Client // target outbox
	db         *pgxpool.Pool
	onClose    func() error
}

func (w *orders) createTables(ctx context.Context) error {
	for _, sql := range []string{
		`DROP TABLE IF EXISTS orders, aggregate, outbox_marker`, fmt.Sprintf(ordersDDL, w.aggregates-1), client.MarkerDDL,
		`VACUUM ANALYZE aggregate`,
	} {
		if _, err := w.db.Exec(ctx, sql); err != nil {
			return fmt.Errorf("creating the source's tables: %w", err)
		}
	}
	w.db.Reset() // statements prepared for the tables before
	return nil
}

func (w *orders) truth(ctx context.Context) ([]uint64, error) {
	return lastVersions(ctx, w.db, w.aggregates)
}

func (w *orders) close() error { return w.onClose() }

// errRollback is the business saying no.
var errRollback = errors.New("rolled back on purpose")

// buyer is one caller's state.
type buyer struct {
	w       *orders
	random  *rand.Rand
	count   int
	payload []byte
}

func (w *orders) caller(i int) caller {
	b := w.buyer(i)
	if w.client != nil {
		return b.withOutbox
	}
	return b.withNaive
}

func (w *orders) bare(i int) caller { return w.buyer(i).bare }

func (w *orders) buyer(i int) *buyer {
	return &buyer{w: w, random: rand.New(rand.NewPCG(1, uint64(i))), payload: make([]byte, w.payload)} //nolint:gosec // a load, not a secret
}

// next chooses the next transaction.
func (b *buyer) next() (number uint64, aggregate, amount int, rollback bool) {
	b.count++
	return b.w.ledger.open(), b.random.IntN(b.w.aggregates), b.random.IntN(100), isRollback(b.count, b.w.rollback)
}

// settle notes the transaction's fate.
func (b *buyer) settle(number uint64, err error, at time.Time) error {
	switch {
	case err == nil:
		b.w.ledger.committed(number, at)
	case errors.Is(err, errRollback):
		b.w.ledger.aborted(number)
	default:
		return err
	}
	return nil
}

func (b *buyer) withOutbox(ctx context.Context) (time.Duration, error) {
	number, aggregate, amount, rollback := b.next()
	begin := time.Now()
	if rollback && b.count%2 == 0 {
		err := b.rolledBackPrepared(ctx, number, aggregate, amount)
		end := time.Now()
		return end.Sub(begin), b.settle(number, err, end)
	}
	err := pgxoutbox.InTx(ctx, b.w.db, b.w.client, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
		version, err := placeOrder(ctx, tx, bumpAggregate, aggregate, amount)
		if err != nil {
			return err
		}
		fillPayload(b.payload, number, uint32(aggregate), version) //nolint:gosec // few aggregates
		if err := tx.Publish(event(b.w.topic, aggregate, b.payload)); err != nil {
			return err
		}
		if rollback {
			return errRollback
		}
		return nil
	})
	end := time.Now()
	return end.Sub(begin), b.settle(number, err, end)
}

// rolledBackPrepared rolls back after Prepare: the events are in the platform and must never arrive.
func (b *buyer) rolledBackPrepared(ctx context.Context, number uint64, aggregate, amount int) error {
	tx, err := b.w.db.Begin(ctx)
	if err != nil {
		return fmt.Errorf("beginning: %w", err)
	}
	defer tx.Rollback(ctx) //nolint:errcheck // after the explicit one a no-op
	version, err := placeOrder(ctx, tx, bumpAggregate, aggregate, amount)
	if err != nil {
		return err
	}
	fillPayload(b.payload, number, uint32(aggregate), version) //nolint:gosec // few aggregates
	attempt, err := pgxoutbox.Mark(ctx, tx, b.w.client, pgxoutbox.Options{})
	if err != nil {
		return err
	}
	if err := attempt.Prepare(ctx, event(b.w.topic, aggregate, b.payload)); err != nil {
		return err
	}
	if err := tx.Rollback(ctx); err != nil {
		return fmt.Errorf("rolling back: %w", err)
	}
	attempt.AfterRollback()
	return errRollback
}

func (b *buyer) withNaive(ctx context.Context) (time.Duration, error) {
	number, aggregate, amount, rollback := b.next()
	begin := time.Now()
	err := b.inTx(ctx, func(tx querier) error {
		version, err := placeOrder(ctx, tx, bumpAggregate, aggregate, amount)
		if err != nil {
			return err
		}
		fillPayload(b.payload, number, uint32(aggregate), version) //nolint:gosec // few aggregates
		if _, err := tx.Exec(ctx, naiveInsert, naiveRow(b.w.topic, aggregate, b.payload)...); err != nil {
			return fmt.Errorf("inserting the outbox row: %w", err)
		}
		if rollback {
			return errRollback
		}
		return nil
	})
	end := time.Now()
	return end.Sub(begin), b.settle(number, err, end)
}

// bare is the same business without an event. It rolls back as often.
func (b *buyer) bare(ctx context.Context) (time.Duration, error) {
	b.count++
	begin := time.Now()
	err := b.inTx(ctx, func(tx querier) error {
		if _, err := placeOrder(ctx, tx, bumpBare, b.random.IntN(b.w.aggregates), b.random.IntN(100)); err != nil {
			return err
		}
		if isRollback(b.count, b.w.rollback) {
			return errRollback
		}
		return nil
	})
	if errors.Is(err, errRollback) {
		err = nil
	}
	return time.Since(begin), err
}

// inTx runs fn in a plain transaction.
func (b *buyer) inTx(ctx context.Context, fn func(querier) error) error {
	tx, err := b.w.db.Begin(ctx)
	if err != nil {
		return fmt.Errorf("beginning: %w", err)
	}
	defer tx.Rollback(ctx) //nolint:errcheck // after Commit a no-op
	if err := fn(tx); err != nil {
		return err
	}
	if err := tx.Commit(ctx); err != nil {
		return fmt.Errorf("committing: %w", err)
	}
	return nil
}

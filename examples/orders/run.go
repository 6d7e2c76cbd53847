package orders

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/google/uuid"
)

// customers share the orders: orders of one customer are an aggregate, and keep their order.
const customers = 8

// Outcome is what became of one order.
type Outcome struct {
	Order Order
	Err   error     // nil: committed; ErrDeclined: rolled back
	Ended time.Time // when COMMIT or ROLLBACK had answered
}

// Run places so many orders a second, each in a goroutine of its own, until ctx ends, and returns once all have ended. A share
// of them is rolled back. report is told of each and may be called by several goroutines at a time.
func (s *Shop) Run(ctx context.Context, perSecond, declined float64, report func(Outcome)) error {
	tick := time.NewTicker(time.Duration(float64(time.Second) / perSecond))
	defer tick.Stop()
	var placing sync.WaitGroup
	defer placing.Wait()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		order := NewOrder()
		decline := rand.Float64() < declined
		placing.Go(func() {
			// An order that was begun is ended: the program does not stop in the middle of a transaction.
			bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			placed, err := s.Place(bounded, order, decline)
			report(Outcome{Order: placed, Err: err, Ended: time.Now()})
		})
	}
}

// NewOrder returns an order that somebody might place.
func NewOrder() Order {
	return Order{ID: uuid.New(), Customer: fmt.Sprintf("customer-%d", rand.IntN(customers)+1), Cents: 100 + rand.Int64N(20000)}
}

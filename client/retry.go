package client

import (
	"context"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// retryDelays is the back-off between two attempts of one call.
func (c *Client) retryDelays() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval = 20 * time.Millisecond
	b.MaxInterval = time.Second
	b.Multiplier = 2
	b.RandomizationFactor = 0.5
	b.Reset()
	return b
}

// retry makes attempts until one succeeds, fails for good, or the time is over. Every call of the platform is idempotent.
func (c *Client) retry(ctx context.Context, timeout time.Duration, attempt func(left time.Duration) *Error) error {
	left := timeout
	deadline := time.Time{}
	var delays *backoff.ExponentialBackOff
	for {
		err := attempt(left)
		if err == nil {
			return nil
		}
		if c.cfg.DisableRetries || !err.retryable() || err.local {
			return err
		}
		if delays == nil {
			delays = c.retryDelays()
			deadline = time.Now().Add(left)
		}
		wait := max(delays.NextBackOff(), err.RetryAfter)
		left = time.Until(deadline) - wait
		if left <= 0 {
			return err
		}
		c.stats.retries.Add(1)
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return contextError(ctx, "waiting to repeat the call")
		}
	}
}

package resolver

import (
	"errors"
	"fmt"
	"time"
)

// Config sets the resolver up. The default tags are the defaults; the zero value of a field means its default.
type Config struct {
	Interval        time.Duration `name:"interval" default:"50ms" help:"Pause between looks for parked transactions that are due."`
	ClaimLimit      int           `name:"claim-limit" default:"64" help:"Transactions claimed at a time."`
	AskTimeout      time.Duration `name:"ask-timeout" default:"2s" help:"How long sessions and databases may take to answer."`
	MaxQueued       int           `name:"max-queued" default:"20000" help:"Transactions of one source database that are remembered; the rest stays in the store."`
	RunningBackoff  time.Duration `name:"running-backoff" default:"5s" help:"Longest pause before a transaction that is still running is asked about again."`
	UnknownBackoff  time.Duration `name:"unknown-backoff" default:"30s" help:"Longest pause before one that nobody could answer for is."`
	MarkerRetention time.Duration `name:"marker-retention" default:"1h" help:"Shortest time for which SDKs keep the markers of acknowledged transactions. After a failover of the store a missing marker of one that was prepared half as long ago proves nothing."`
}

// withDefaults fills in what is not stated.
func (c Config) withDefaults() Config {
	d := func(v *time.Duration, def time.Duration) {
		if *v == 0 {
			*v = def
		}
	}
	n := func(v *int, def int) {
		if *v == 0 {
			*v = def
		}
	}
	d(&c.Interval, 50*time.Millisecond)
	n(&c.ClaimLimit, 64)
	d(&c.AskTimeout, 2*time.Second)
	n(&c.MaxQueued, 20000)
	d(&c.RunningBackoff, 5*time.Second)
	d(&c.UnknownBackoff, 30*time.Second)
	d(&c.MarkerRetention, time.Hour)
	return c
}

// Validate reports everything that is wrong, with the values.
func (c Config) Validate() error {
	var errs []error
	for name, v := range map[string]int64{
		"interval": int64(c.Interval), "claim-limit": int64(c.ClaimLimit), "ask-timeout": int64(c.AskTimeout),
		"max-queued": int64(c.MaxQueued), "running-backoff": int64(c.RunningBackoff), "unknown-backoff": int64(c.UnknownBackoff),
		"marker-retention": int64(c.MarkerRetention),
	} {
		if v < 0 {
			errs = append(errs, fmt.Errorf("%s must not be negative: %d", name, v))
		}
	}
	return errors.Join(errs...)
}

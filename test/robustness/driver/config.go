// Package driver is a service that works on the platform and writes down what it does. It runs in a process of its own, so
// that it can be killed, and is told what to do by a file that the suite writes.
package driver

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/client"
)

// Config says what a driver does.
type Config struct {
	// Process names it in the journal; unique among all that ever ran.
	Process string
	// Source is its name at the platform, DSN its database, Servers the platform's addresses.
	Source  string
	DSN     string
	Servers []string
	// Seed makes its choices repeatable, not their timing.
	Seed uint64
	// Workers is how many transactions run at a time, PerSecond bounds them all (0: as fast as it goes).
	Workers   int
	PerSecond float64
	// Aggregates that all drivers of the source share.
	Aggregates int
	// Hot is how many of a hundred draws prefer a few of them; the others are even.
	Hot    int
	Topics []string
	// Profiles are what it does, each with its weight. Nil: Mix.
	Profiles map[string]int
	// Journals is the directory for its journal; Control the file that it takes orders from.
	Journals string
	Control  string
}

// The profiles of transactions.
const (
	Plain     = "plain"     // everything as it should be
	GiveUp    = "give-up"   // rolled back before anything was prepared
	Undo      = "undo"      // rolled back after it was prepared
	Forget    = "forget"    // the platform is not told of the COMMIT
	Late      = "late"      // … is told late
	Savepoint = "savepoint" // parts of it are rolled back to savepoints before it is prepared
	TwoPhase  = "two-phase" // PREPARE TRANSACTION, and COMMIT PREPARED a while later
	Duplicate = "duplicate" // prepared twice, and once more with other content
	Sync      = "sync"      // every answer is waited for, and the state asked for in between
	Race      = "race"      // Commit and Abort at the same time
	Direct    = "direct"    // Publish, without a transaction
	Misused   = "misuse"    // what the SDK must refuse
	Long      = "long"      // open for seconds
	Probe     = "probe"     // left open until its database dies
)

// Mix is the usual mix.
var Mix = map[string]int{
	Plain: 660, GiveUp: 40, Undo: 40, Forget: 80, Late: 40, Savepoint: 30, TwoPhase: 10, Duplicate: 30, Sync: 20, Race: 20,
	Direct: 20, Misused: 10, Long: 2,
}

// Orders, written to Config.Control. The driver answers by writing the order to the same name with ".done".
const (
	Work  = "work"  // do transactions
	Quiet = "quiet" // finish what is under way and begin nothing; keep answering and draining
	Xid   = "probe" // as quiet, and then leave one prepared transaction open
)

// Give writes an order.
func Give(control, order string) error {
	// The same order may come twice: what is written must differ.
	return Order(control, fmt.Sprintf("%s %d", order, time.Now().UnixNano()))
}

// Order writes a file that another process watches: it sees all of it, or what was there before.
func Order(path, content string) error {
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// Obeyed reports whether the last order given was carried out.
func Obeyed(control string) bool {
	given, err1 := os.ReadFile(control)
	done, err2 := os.ReadFile(control + ".done")
	return err1 == nil && err2 == nil && string(given) == string(done)
}

// schema is the service's own: a row per aggregate, whose lock serialises its transactions, and the truth: what a transaction
// did to an aggregate, written by that transaction.
const schema = `
CREATE TABLE aggregate (id text PRIMARY KEY, version bigint NOT NULL);
CREATE TABLE truth (tx uuid NOT NULL, aggregate text NOT NULL, version bigint NOT NULL, events int NOT NULL, PRIMARY KEY (tx, aggregate));
`

// CreateSchema makes the tables in an empty database.
func CreateSchema(ctx context.Context, dsn string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return fmt.Errorf("create a service's schema: %w", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, schema+client.MarkerDDL); err != nil {
		return fmt.Errorf("create a service's schema: %w", err)
	}
	return nil
}

// Main runs a driver until the process is killed or ctx ends. config is JSON.
func Main(ctx context.Context, config string) error {
	var c Config
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return fmt.Errorf("a driver's config: %w", err)
	}
	d, err := start(ctx, c)
	if err != nil {
		return err
	}
	defer d.stop()
	return d.run(ctx)
}

// obey watches the control file and lets the workers do what it says.
func (d *driver) obey(ctx context.Context) {
	last := ""
	for ctx.Err() == nil {
		content, err := os.ReadFile(d.Control)
		if err == nil && len(content) > 0 && string(content) != last {
			last = string(content)
			order, _, _ := strings.Cut(last, " ")
			d.carryOut(ctx, order)
			_ = os.WriteFile(d.Control+".done", content, 0o600) // the suite waits for it, and says so when it is missing
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (d *driver) carryOut(ctx context.Context, order string) {
	switch order {
	case Work:
		d.gate.open()
	case Quiet, Xid:
		d.gate.close()
		d.open.Wait()
		if order == Xid {
			d.probe(ctx)
		}
	}
}

// gate lets workers through or not.
type gate struct {
	mu   sync.Mutex
	shut bool
	wait chan struct{} // closed when it opens
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut {
		g.shut = false
		close(g.wait)
	}
}

func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.shut {
		g.shut, g.wait = true, make(chan struct{})
	}
}

// enter waits until the gate is open and counts the caller in.
func (g *gate) enter(ctx context.Context, open *sync.WaitGroup) bool {
	for {
		g.mu.Lock()
		if !g.shut {
			open.Add(1)
			g.mu.Unlock()
			return true
		}
		wait := g.wait
		g.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return false
		}
	}
}

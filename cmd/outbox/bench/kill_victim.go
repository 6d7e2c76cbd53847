package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"google.golang.org/grpc"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
)

// VictimCmd is a service that dies in the middle of a transaction. The bench starts it.
//
// It connects, says so on its output, and waits for one line: the number of an order. Then it places that order with one
// event, tells the transaction's id, and kills itself at the step. It ends in peace when its input ends.
type VictimCmd struct {
	Server string `help:"Platform (gRPC host:port)." required:""`
	Source string `help:"Name of the source." required:""`
	Topic  string `help:"Topic of the event." required:""`
	Step   string `help:"Where to die." required:""`
	DSN    string `help:"Source database." required:"" name:"dsn" env:"BENCH_VICTIM_DSN"`
	Proxy  uint16 `help:"Port on 127.0.0.1 that stands for the database's."`
}

// killOrder is the business of a victim.
const (
	killDDL   = `DROP TABLE IF EXISTS kill_order; CREATE TABLE kill_order (number bigint PRIMARY KEY)`
	killOrder = `INSERT INTO kill_order (number) VALUES ($1)`
)

// victimLine is what a victim says: first an empty one, then which transaction it is about to die in.
type victimLine struct {
	Transaction uuid.UUID `json:"transaction"`
	Backend     uint32    `json:"backend"` // process id of its PostgreSQL backend
}

// stuck bounds a victim that nobody kills.
const stuck = 30 * time.Second

// Run lives until it dies.
func (c *VictimCmd) Run(ctx context.Context, in io.Reader, out io.Writer) error {
	w := &wire{}
	cl, err := client.New(client.Config{
		Target: c.Server, Source: c.Source, Plaintext: true, PrepareTimeout: stuck, CloseTimeout: time.Millisecond,
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(w.dial)},
	})
	if err != nil {
		return fmt.Errorf("making the client: %w", err)
	}
	defer cl.Close() //nolint:errcheck // it did not die, which is said
	if err := cl.Connect(ctx); err != nil {
		return fmt.Errorf("connecting to the platform: %w", err)
	}
	db, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer db.Close(context.WithoutCancel(ctx))
	say := json.NewEncoder(out)
	if err := say.Encode(victimLine{}); err != nil {
		return fmt.Errorf("saying that all is ready: %w", err)
	}
	line, err := bufio.NewReader(in).ReadString('\n')
	if errors.Is(err, io.EOF) {
		return nil
	}
	var number uint64
	if _, err := fmt.Sscan(line, &number); err != nil {
		return fmt.Errorf("reading the order's number: %w", err)
	}
	err = c.place(ctx, db, cl, w, number, func(id uuid.UUID) error {
		return say.Encode(victimLine{Transaction: id, Backend: db.PgConn().PID()})
	})
	if err == nil {
		err = errors.New("still alive")
	}
	return fmt.Errorf("dying at step %s: %w", c.Step, err)
}

func (c *VictimCmd) connect(ctx context.Context) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(c.DSN)
	if err != nil {
		return nil, fmt.Errorf("reading the source's address: %w", err)
	}
	if c.Proxy != 0 { // which reads along
		cfg.Host, cfg.Port, cfg.TLSConfig, cfg.Fallbacks = "127.0.0.1", c.Proxy, nil, nil
	}
	db, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connecting to the source database: %w", err)
	}
	return db, nil
}

// place runs the transaction, and returns only when it fails or nobody kills it.
func (c *VictimCmd) place(ctx context.Context, db *pgx.Conn, cl *client.Client, w *wire, number uint64, marked func(uuid.UUID) error) error {
	tx, err := db.Begin(ctx)
	if err != nil {
		return fmt.Errorf("beginning: %w", err)
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	if _, err := tx.Exec(ctx, killOrder, int64(number)); err != nil {
		return fmt.Errorf("inserting an order: %w", err)
	}
	attempt, err := pgxoutbox.Mark(ctx, tx, cl, pgxoutbox.Options{})
	if err != nil {
		return err
	}
	id := attempt.ID()
	if err := marked(id); err != nil {
		return fmt.Errorf("telling the transaction's id: %w", err)
	}
	step := killStep(c.Step)
	switch step {
	case killBeforePrepare:
		return die()
	case killPrepareSent:
		w.await(id[:], mustDie)
	case killPrepared, killCommitCut, killCommitted, killCommitSent:
	default:
		return errors.New("there is no such step")
	}
	payload := make([]byte, 256)
	fillPayload(payload, number, uint32(number), 1)
	if err := attempt.Prepare(ctx, event(c.Topic, int(number), payload)); err != nil {
		return err
	}
	if step == killPrepared {
		return die()
	}
	if err := tx.Commit(ctx); err != nil {
		return fmt.Errorf("committing: %w", err)
	}
	if step == killCommitted {
		return die()
	}
	w.await(id[:], mustDie)
	attempt.AfterCommit()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(stuck):
		return nil
	}
}

// die kills this very process with SIGKILL: nothing is closed or flushed in an orderly way.
func die() error {
	if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
		return fmt.Errorf("killing itself: %w", err)
	}
	select {} // the signal is on its way
}

func mustDie() { _ = die() }

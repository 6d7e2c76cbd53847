package main

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

type importCmd struct {
	Source       string            `arg:"" help:"The source that the rows belong to from now on."`
	DSN          secret            `name:"dsn" env:"OUTBOX_IMPORT_DSN" placeholder:"DSN" help:"The service's database, which has the table: postgres://files@db/files."`
	DSNFile      string            `name:"dsn-file" type:"path" placeholder:"FILE" help:"File that holds it."`
	Table        string            `default:"event_outbox" help:"The table, with its schema if it is not on the search path."`
	Column       map[string]string `placeholder:"ROLE=NAME;…" help:"Columns with other names than HuleEdu's. NAME may be empty for topic, key and retry-count."`
	Format       string            `default:"huleedu" enum:"huleedu,plain" help:"What the payload is: huleedu, an event envelope in JSON; plain, the record's value as it is."`
	GivenUpAfter int32             `default:"5" help:"Rows with so many attempts were given up by the old relay: they become dead letters. 0: publish them."`
	Batch        int               `default:"500" help:"Rows taken over at a time."`
	Concurrency  int               `default:"16" help:"Aggregates published at the same time."`
	Patience     time.Duration     `default:"1m" help:"How long to go on trying while the platform cannot be reached or is overloaded."`
	DryRun       bool              `help:"Read and check every row and say what would become of it, but change and publish nothing."`
	outputSettings
	API apiSettings `embed:"" group:"api"`
}

// Help implements kong.HelpProvider.
func (*importCmd) Help() string {
	return `Takes over, once, what a service's own outbox table holds unpublished. Stop the service's relay first: from then on the platform
publishes these rows, in the order of created_at and id for each aggregate. Rows that cannot be published (not JSON, no or no
valid topic, too large, given up by the old relay) become dead letters with the reason: see 'outbox deadletter list'.

A batch of rows is marked as published before it is handed to the platform, so that no relay of the service takes them as well; what
became of each row is then written to last_error. It may be interrupted and run again: the rows it had taken come first, and
ids of transactions are made from ids of rows, so nothing is published twice. Only if it was killed (or the table lost) before it could
write down what became of a batch, run it again within server.resolution-retention (7 days): the platform knows no longer what it had.

Roles for --column: id, aggregate-type, aggregate-id, event-type, payload, created-at, published-at, last-error, topic, key,
retry-count. --format plain: the event's id is the row's, and there are no headers but those of the source's record profile.

Examples:
  outbox import files --dsn "$FILES_DSN" --dry-run
  outbox import files --dsn-file /run/secrets/files-dsn -o json
  outbox import shop --dsn "$SHOP_DSN" --table shop.outbox --column 'payload=body;created-at=inserted_at' --format plain

Exit codes: 0 all rows are with the platform, 1 failed, 2 wrong usage, 3 no such table, 4 refused (the source or a topic is not
allowed: register it and run again), 5 database or platform cannot be reached (run again), 6 done, but there are rows that became dead
letters, had to be left, or were changed by somebody else meanwhile.`
}

// Validate is called by kong.
func (c *importCmd) Validate() error {
	if c.Batch < 1 || c.Concurrency < 1 || c.GivenUpAfter < 0 || c.Patience < 0 {
		return fmt.Errorf("--batch and --concurrency must be positive, --given-up-after and --patience not negative: %d, %d, %d, %s",
			c.Batch, c.Concurrency, c.GivenUpAfter, c.Patience)
	}
	return nil
}

// Run imports.
func (c *importCmd) Run(ctx context.Context, s streams) error {
	dsn, err := c.DSN.fromFile("dsn", c.DSNFile)
	if err == nil && dsn == "" {
		err = usagef("the database's address is missing: give --dsn, --dsn-file or OUTBOX_IMPORT_DSN")
	}
	if err != nil {
		return err
	}
	server, err := c.API.dial()
	if err != nil {
		return err
	}
	defer server.close()
	limits, err := limitsFor(ctx, server, c.Source)
	if err != nil {
		return err
	}
	table, err := openImportTable(ctx, dsn, c.Table, c.Column)
	if err != nil {
		return err
	}
	defer table.close(ctx)
	run := &importRun{
		cmd: c, server: server, table: table, limits: limits, progress: s.err,
		converter: rowConverter{source: c.Source, table: table.name, huleedu: c.Format == "huleedu", giveUpAfter: c.GivenUpAfter},
		report:    importReport{Source: c.Source, Table: table.name, DryRun: c.DryRun, Topics: map[string]int64{}},
	}
	if c.DryRun {
		err = run.look(ctx)
	} else {
		err = run.all(ctx)
	}
	if c.json() {
		err = errors.Join(err, writeJSON(s.out, &run.report))
	} else {
		run.report.write(s.out)
	}
	if err == nil && run.report.incomplete() {
		return codedError{exitViolation, errors.New("some rows need you")}
	}
	return err
}

// limitsFor opens a session to learn the platform's limits, and whether the caller may act for the source at all.
func limitsFor(ctx context.Context, server *api, source string) (*outboxv1.Limits, error) {
	ctx, cancel := server.call(ctx)
	defer cancel()
	session, err := server.data.Session(ctx, waitForReady)
	if err != nil {
		return nil, err
	}
	hello := &outboxv1.SessionRequest_Hello{Source: source, Sdk: "outbox-import/" + version}
	// An error of Send is told by Recv.
	_ = session.Send(&outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Hello_{Hello: hello}})
	first, err := session.Recv()
	if err != nil {
		return nil, err
	}
	return first.GetWelcome().GetLimits(), nil
}

// What became of a row.
type rowKind int

const (
	rowPublished rowKind = iota
	rowDead
	rowLeft
)

// importOutcome is what became of one row.
type importOutcome struct {
	Row           string `json:"row"`
	TransactionID string `json:"transaction_id"`
	AggregateType string `json:"aggregate_type"`
	AggregateID   string `json:"aggregate_id"`
	Topic         string `json:"topic"`
	Reason        string `json:"reason"`
	kind          rowKind
}

func (o *importOutcome) mark() string {
	switch o.kind {
	case rowDead:
		return markDead + o.TransactionID + ": " + o.Reason
	case rowLeft:
		return markLeft + o.Reason
	}
	return markPublished + o.TransactionID
}

// importReport is what an import did, or would do.
type importReport struct {
	Source      string           `json:"source"`
	Table       string           `json:"table"`
	DryRun      bool             `json:"dry_run"`
	Rows        int64            `json:"rows"`
	Published   int64            `json:"published"`
	Topics      map[string]int64 `json:"topics"` // published, by topic
	DeadLetters []importOutcome  `json:"dead_letters"`
	Left        []importOutcome  `json:"left"`
	Changed     []string         `json:"changed"` // by somebody else while they were taken over
	Seconds     float64          `json:"seconds"`
}

func (r *importReport) add(o importOutcome) {
	r.Rows++
	switch o.kind {
	case rowDead:
		r.DeadLetters = append(r.DeadLetters, o)
	case rowLeft:
		r.Left = append(r.Left, o)
	default:
		r.Published++
		r.Topics[o.Topic]++
	}
}

func (r *importReport) incomplete() bool {
	return len(r.DeadLetters)+len(r.Left)+len(r.Changed) > 0
}

func (r *importReport) write(w io.Writer) {
	verb := ""
	if r.DryRun {
		verb = "would be "
	}
	fmt.Fprintf(w, "%s: %d rows in %.1f s: %d %spublished, %d %sdead letters, %d %sleft\n",
		r.Table, r.Rows, r.Seconds, r.Published, verb, len(r.DeadLetters), verb, len(r.Left), verb)
	list := func(title string, rows []importOutcome) {
		const shown = 20
		for i, o := range rows {
			if i == shown {
				fmt.Fprintf(w, "  … and %d more (-o json lists all)\n", len(rows)-shown)
				return
			}
			fmt.Fprintf(w, "  %s: row %s of %s %s: %s\n", title, o.Row, o.AggregateType, o.AggregateID, o.Reason)
		}
	}
	list("dead letter", r.DeadLetters)
	list("left", r.Left)
	if len(r.Changed) > 0 {
		fmt.Fprintf(w, "  %d rows were published by somebody else too while they were taken over, the first is %s: a relay of the service is running. Stop it.\n",
			len(r.Changed), r.Changed[0])
	}
}

// importRun is one import under way.
type importRun struct {
	cmd       *importCmd
	server    *api
	table     *importTable
	limits    *outboxv1.Limits
	converter rowConverter
	report    importReport

	progress io.Writer
	total    int64
	told     time.Time
}

// look is a dry run.
func (r *importRun) look(ctx context.Context) error {
	started := time.Now()
	defer func() { r.report.Seconds = time.Since(started).Seconds() }()
	denied := map[string]int64{}
	allows, err := r.allowedTopics(ctx)
	if err != nil {
		return err
	}
	err = r.table.read(ctx, unpublished, nil, func(row *importRow) error {
		converted := r.converter.convert(row)
		reason := r.unfit(converted)
		r.report.add(converted.outcome(kindOf(reason), reason))
		if reason == "" && !allows(converted.event.GetTopic()) {
			denied[converted.event.GetTopic()]++
		}
		return nil
	})
	if err != nil {
		return err
	}
	if len(denied) > 0 {
		var topics []string
		for topic, rows := range denied {
			topics = append(topics, fmt.Sprintf("%s (%d rows)", topic, rows))
		}
		slices.Sort(topics)
		return codedError{exitRefused, fmt.Errorf("source %s may not use these topics: %s; see outbox source apply", r.cmd.Source, strings.Join(topics, ", "))}
	}
	return nil
}

func kindOf(reason string) rowKind {
	if reason == "" {
		return rowPublished
	}
	return rowDead
}

// unfit says why the platform would refuse a row; "": it would not. What only servers know, the limits of topics, is left out.
func (r *importRun) unfit(c *convertedRow) string {
	if c.poison != "" {
		return c.poison
	}
	if size, most := eventSize(c.event), int64(r.limits.GetMaxEventBytes()); most > 0 && size > most { //nolint:gosec // a limit
		return fmt.Sprintf("the event has %d bytes, allowed are %d", size, most)
	}
	return ""
}

// all takes over everything: first what an import before had taken, then page by page.
func (r *importRun) all(ctx context.Context) error {
	started := time.Now()
	defer func() { r.report.Seconds = time.Since(started).Seconds() }()
	r.told = started
	if err := r.table.lock(ctx); err != nil {
		return err
	}
	err := r.table.forgetLeft(ctx)
	if err == nil {
		r.total, err = r.table.count(ctx)
	}
	if err != nil {
		return err
	}
	taken, err := r.table.interrupted(ctx)
	for {
		if err == nil && len(taken) > 0 {
			err = r.page(ctx, taken)
		}
		if err != nil {
			return err
		}
		if taken, err = r.table.take(ctx, r.cmd.Batch); err == nil && len(taken) == 0 {
			return nil
		}
	}
}

// page hands rows that are taken to the platform and records what became of them, also of a part if it is interrupted.
func (r *importRun) page(ctx context.Context, taken takenRows) error {
	done, failed := r.deliver(ctx, taken)
	// What is done is recorded although the command is about to end.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.cmd.API.Timeout)
	defer cancel()
	for _, o := range done {
		r.report.add(o)
	}
	changed, err := r.table.finish(ctx, taken, done)
	r.report.Changed = append(r.report.Changed, changed...)
	if now := time.Now(); !r.cmd.json() && now.Sub(r.told) > 2*time.Second {
		r.told = now
		fmt.Fprintf(r.progress, "%d of %d rows, %d dead letters, %d left\n", r.report.Rows, r.total, len(r.report.DeadLetters), len(r.report.Left))
	}
	return errors.Join(failed, err)
}

// deliver publishes rows: those of one aggregate one after the other, those of others at the same time.
func (r *importRun) deliver(ctx context.Context, taken takenRows) (done []importOutcome, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var (
		lock    sync.Mutex
		working sync.WaitGroup
		lanes   = make([]chan *importRow, r.cmd.Concurrency)
	)
	for i := range lanes {
		lanes[i] = make(chan *importRow, 4)
		working.Go(func() {
			for row := range lanes[i] {
				if ctx.Err() != nil {
					continue
				}
				outcome, err := r.row(ctx, row)
				if err != nil {
					cancel(err)
					continue
				}
				lock.Lock()
				done = append(done, outcome)
				lock.Unlock()
			}
		})
	}
	// An interruption must not cost the connection, over which what is done is still to be recorded.
	err = r.table.read(context.WithoutCancel(ctx), `{id} = ANY($1::text[]::{id-type}[])`, taken.list(), func(row *importRow) error {
		h := fnv.New32a()
		_, _ = h.Write([]byte(row.aggregateType + "\x00" + row.aggregateID))
		select {
		case lanes[h.Sum32()%uint32(len(lanes))] <- row: //nolint:gosec // a small number
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	for _, lane := range lanes {
		close(lane)
	}
	working.Wait()
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return done, err
}

package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
)

// Result is one line of output: one workload against one target at one concurrency.
type Result struct {
	Workload    string `json:"workload"`
	Target      string `json:"target"`
	Transport   string `json:"transport"`
	Concurrency int    `json:"concurrency"`
	// TxPerSecond counts transactions with an event, rolled back ones included; PublishedPerSecond what a consumer read in
	// the same time; BareTxPerSecond the same business transactions without an event (orders only).
	TxPerSecond        float64 `json:"tx_per_s"`
	PublishedPerSecond float64 `json:"published_per_s"`
	BareTxPerSecond    float64 `json:"bare_tx_per_s"`
	// Overhead: latency with the event minus the same transaction bare, interleaved in the same run (orders only).
	OverheadP50 float64 `json:"overhead_p50_ms"`
	OverheadP99 float64 `json:"overhead_p99_ms"`
	// E2E: from the moment the caller knew of its commit until a consumer had the record.
	E2EP50 float64 `json:"e2e_p50_ms"`
	E2EP99 float64 `json:"e2e_p99_ms"`
	// CPU microseconds per event. Parts that run elsewhere (given by address) are null.
	CPU CPU `json:"cpu_us_per_event"`
	// WALBytes per event, of all PostgreSQL servers that were started.
	WALBytes *float64 `json:"wal_bytes_per_event"`
	Tally
}

// CPU is user and system time, in microseconds per event.
type CPU struct {
	Service  *float64 `json:"service"` // callers, SDK and the consumer
	Platform *float64 `json:"platform"`
	Postgres *float64 `json:"postgres"` // source and store together
	Kafka    *float64 `json:"kafka"`
	// SourcePostgres is the part of Postgres that the source's own database used.
	SourcePostgres *float64 `json:"source_postgres"`
}

// printer writes results as they come.
type printer struct {
	w    io.Writer
	json bool
	head bool
}

func (p *printer) print(r Result) error {
	if p.json {
		if err := json.NewEncoder(p.w).Encode(r); err != nil {
			return fmt.Errorf("writing result: %w", err)
		}
		return nil
	}
	t := tabwriter.NewWriter(p.w, 9, 0, 1, ' ', tabwriter.AlignRight)
	if !p.head {
		p.head = true
		fmt.Fprintln(t, "workload\ttarget\ttransport\tcallers\ttx/s\tpublished/s\tbare tx/s\toverhead p50/p99 ms\te2e p50/p99 ms\tcpu µs/event svc/plat/pg/kafka\tlost\tphantom\treordered\tduplicates\t")
	}
	fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%.0f\t%.0f\t%.0f\t%.2f/%.2f\t%.2f/%.2f\t%s/%s/%s/%s\t%d\t%d\t%d\t%d\t\n", r.Workload, r.Target, r.Transport, r.Concurrency,
		r.TxPerSecond, r.PublishedPerSecond, r.BareTxPerSecond, r.OverheadP50, r.OverheadP99, r.E2EP50, r.E2EP99,
		micros(r.CPU.Service), micros(r.CPU.Platform), micros(r.CPU.Postgres), micros(r.CPU.Kafka), r.Lost, r.Phantom, r.Reordered, r.Duplicates)
	if err := t.Flush(); err != nil {
		return fmt.Errorf("writing result: %w", err)
	}
	return nil
}

func micros(v *float64) string {
	if v == nil {
		return "–"
	}
	return fmt.Sprintf("%.0f", *v)
}

package cluster

import (
	"context"
	"strconv"
	"strings"
)

// Counters are the metrics of the process by name and labels, and which start of it they are of.
func (p *Process) Counters(ctx context.Context) (start int, counters map[string]float64, err error) {
	start = p.start()
	text, err := p.Metrics(ctx)
	if err != nil {
		return start, nil, err
	}
	counters = map[string]float64{}
	for line := range strings.SplitSeq(text, "\n") {
		at := strings.LastIndexByte(line, ' ')
		if at < 0 || line[0] == '#' {
			continue
		}
		if value, err := strconv.ParseFloat(line[at+1:], 64); err == nil {
			counters[line[:at]] = value
		}
	}
	if p.start() != start {
		return start, nil, errEnded // nobody knows which of the two answered
	}
	return start, counters, nil
}

// start is which one it is.
func (p *Process) start() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.Starts
}

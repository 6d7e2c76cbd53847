package kafka

import (
	"context"
	"log/slog"
	"time"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"
)

// logEvery is how often lines of one facility are logged; a broker that is away would fill the log otherwise.
const logEvery = 10 * time.Second

// logs takes what one librdkafka instance logs to slog; left alone, it would write to stderr.
type logs struct {
	ch   chan ck.LogEvent
	done chan struct{}
}

// newLogs logs to a logger. onLine, which may be nil, is told the facility of every line.
func newLogs(to *slog.Logger, onLine func(facility string)) *logs {
	l := &logs{ch: make(chan ck.LogEvent, 100), done: make(chan struct{})}
	go func() {
		defer close(l.done)
		rates := make(map[string]*rate)
		for ev := range l.ch {
			if onLine != nil {
				onLine(ev.Tag)
			}
			r := rates[ev.Tag]
			if r == nil {
				r = &rate{}
				rates[ev.Tag] = r
			}
			level := levelOf(ev.Level)
			if level == slog.LevelDebug || r.allows(time.Now()) {
				to.Log(context.Background(), level, "librdkafka: "+ev.Message, //nolint:forbidigo // log lines belong to no call
					"client", ev.Name, "facility", ev.Tag, "suppressed", r.taken())
			}
		}
	}()
	return l
}

// rate lets one line through per logEvery, and counts the others.
type rate struct {
	last       time.Time
	suppressed int
}

func (r *rate) allows(now time.Time) bool {
	if now.Sub(r.last) < logEvery {
		r.suppressed++
		return false
	}
	r.last = now
	return true
}

// taken returns how many lines were held back since the last time.
func (r *rate) taken() int {
	n := r.suppressed
	r.suppressed = 0
	return n
}

// close ends it. The instance must be closed, or never have been made.
func (l *logs) close() {
	close(l.ch)
	<-l.done
}

// levelOf translates a syslog level.
func levelOf(syslog int) slog.Level {
	switch {
	case syslog <= 3:
		return slog.LevelError
	case syslog == 4:
		return slog.LevelWarn
	case syslog <= 6:
		return slog.LevelInfo
	default:
		return slog.LevelDebug
	}
}

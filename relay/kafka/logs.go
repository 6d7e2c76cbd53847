package kafka

import (
	"context"
	"log/slog"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"
)

// logs takes what one librdkafka instance logs to slog; left alone, it would write to stderr.
type logs struct {
	ch   chan ck.LogEvent
	done chan struct{}
}

func newLogs(to *slog.Logger) *logs {
	l := &logs{ch: make(chan ck.LogEvent, 100), done: make(chan struct{})}
	go func() {
		defer close(l.done)
		for ev := range l.ch {
			to.Log(context.Background(), levelOf(ev.Level), "librdkafka: "+ev.Message, "client", ev.Name, "facility", ev.Tag) //nolint:forbidigo // log lines belong to no call
		}
	}()
	return l
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

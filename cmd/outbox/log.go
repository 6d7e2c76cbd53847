package main

import (
	"io"
	"log/slog"
)

// logSettings say what is logged, and how.
type logSettings struct {
	Level  slog.Level `name:"level" default:"info" help:"debug, info, warn or error."`
	Format string     `name:"format" default:"json" enum:"json,text" help:"json or text."`
}

// logger writes to w. No log line ever carries a payload.
func (l logSettings) logger(w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: l.Level}
	if l.Format == "text" {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

package main

import (
	"context"

	"github.com/outbox-platform/outbox/store"
)

type relaySettings struct {
	Relay struct {
		HTTPListen string `name:"http-listen" default:"127.0.0.1:7072" help:"Address of the HTTP port."`
	} `embed:"" prefix:"relay-" group:"relay"`
}

type relayCmd struct{ relaySettings }

func (c *relayCmd) Run() error { return nil }

type runningRelay struct {
	relay interface{ Hint(store.ShardSet) }
}

func (r *runningRelay) start(*group)                                                     {}
func (r *runningRelay) close()                                                           {}
func (p *platform) addRelay(context.Context, kafkaSettings, relaySettings, string) error { return nil }

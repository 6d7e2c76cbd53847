package storetest

import "github.com/outbox-platform/outbox/store"

// Option changes what New, Cluster.New or NewCluster make.
type Option func(*options)

type options struct {
	shards   int
	empty    bool
	settings map[string]string
	version  string
	config   func(*store.Config)
}

// WithShards sets the number of shards. Default 16.
func WithShards(n int) Option { return func(o *options) { o.shards = n } }

// WithoutSchema leaves the database empty and does not open a store.
func WithoutSchema() Option { return func(o *options) { o.empty = true } }

// WithSettings sets server settings. For NewCluster only: the shared server has its own.
func WithSettings(settings map[string]string) Option {
	return func(o *options) { o.settings = settings }
}

// WithVersion sets the major version of PostgreSQL. For NewCluster only.
func WithVersion(version string) Option { return func(o *options) { o.version = version } }

// WithConfig changes how the store is opened. The DSN is set already.
func WithConfig(change func(*store.Config)) Option { return func(o *options) { o.config = change } }

func collect(opts []Option) options {
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	return o
}

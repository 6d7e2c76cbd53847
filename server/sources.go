package server

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outbox-platform/outbox/store"
)

// source is a registered source, ready for the hot path.
type source struct {
	store.Source
	exact    map[string]struct{}
	prefixes []string
	open     *atomic.Int64 // calls under way; the same counter over all snapshots
}

// allows reports whether the source may use a topic.
func (s *source) allows(topic string) bool {
	if _, ok := s.exact[topic]; ok {
		return true
	}
	return slices.ContainsFunc(s.prefixes, func(p string) bool { return strings.HasPrefix(topic, p) })
}

// database returns one of the source's databases, or nil. A source that names none has one, "default".
func (s *source) database(name string) *store.SourceDatabase {
	for i := range s.Databases {
		if s.Databases[i].Name == name {
			return &s.Databases[i]
		}
	}
	if len(s.Databases) == 0 && name == defaultDatabase {
		return &store.SourceDatabase{Name: defaultDatabase, Mode: store.ModeMarker}
	}
	return nil
}

// catalogue is what relays know about topics: bytes of the largest message by name.
type catalogue struct{ largest map[string]int64 }

func (c *catalogue) maxBytes(topic string) (int64, bool) {
	n, ok := c.largest[topic]
	return n, ok && n > 0
}

// snapshot is what the store said at one time. It is never changed.
type snapshot struct {
	byName map[string]*source
	byID   map[int32]*source
	topics catalogue
	asked  time.Time // before the store was asked
}

const (
	// sourceRefresh is how old the snapshot gets before it is read anew.
	sourceRefresh = time.Second
	// sourceMinAge bounds how often unknown names can make a server read it before that.
	sourceMinAge = 100 * time.Millisecond
)

// sources answers from memory, also while the store is away. A name that it does not know makes it ask the store, at
// most once in sourceMinAge however many names there are: nothing is remembered of unknown names.
type sources struct {
	loadSources func(context.Context) ([]store.Source, error)
	loadTopics  func(context.Context) ([]store.Topic, error)
	log         *slog.Logger

	current atomic.Pointer[snapshot]

	mu   sync.Mutex
	load *load // the one under way or due, if any
}

// load is one reading of the store that several callers may wait for.
type load struct {
	done chan struct{}
	err  error
}

func newSources(st *store.Store, log *slog.Logger) *sources {
	return &sources{
		loadSources: func(ctx context.Context) ([]store.Source, error) { return st.Sources(ctx, "", 0) },
		loadTopics:  st.Topics,
		log:         log,
	}
}

// known returns a source from memory; nil: not known.
func (s *sources) known(name string) *source {
	if snap := s.current.Load(); snap != nil {
		return snap.byName[name]
	}
	return nil
}

// byID returns a source by its id in the store from memory; nil: not known.
func (s *sources) byID(id int32) *source {
	if snap := s.current.Load(); snap != nil {
		return snap.byID[id]
	}
	return nil
}

// topics returns the catalogue from memory.
func (s *sources) topics() *catalogue {
	if snap := s.current.Load(); snap != nil {
		return &snap.topics
	}
	return &catalogue{}
}

// find returns a source, asking the store about a name it does not know. nil without an error: not registered.
func (s *sources) find(ctx context.Context, name string) (*source, error) {
	if src := s.known(name); src != nil {
		return src, nil
	}
	if err := s.refresh(ctx); err != nil {
		return nil, err
	}
	return s.known(name), nil
}

// refresh waits for a reading of the store that starts after now.
func (s *sources) refresh(ctx context.Context) error {
	s.mu.Lock()
	l := s.load
	if l == nil {
		l = &load{done: make(chan struct{})}
		s.load = l
		var wait time.Duration
		if snap := s.current.Load(); snap != nil {
			wait = max(0, sourceMinAge-time.Since(snap.asked))
		}
		// The reading outlives the caller that asked for it first: others wait for it too.
		go s.read(context.WithoutCancel(ctx), l, wait)
	}
	s.mu.Unlock()
	select {
	case <-l.done:
		return l.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// read reads the store after wait. Callers that arrive once it has begun get a reading of their own.
func (s *sources) read(ctx context.Context, l *load, wait time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, wait+5*time.Second)
	defer cancel()
	if wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		<-t.C
	}
	s.mu.Lock()
	s.load = nil
	s.mu.Unlock()
	defer close(l.done)
	asked := time.Now()
	registered, err := s.loadSources(ctx)
	if err != nil {
		l.err = err
		return
	}
	topics, err := s.loadTopics(ctx)
	if err != nil {
		l.err = err
		return
	}
	s.put(registered, topics, asked)
}

// put makes a new snapshot current, unless a later one already is.
func (s *sources) put(registered []store.Source, topics []store.Topic, asked time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.current.Load()
	if old != nil && old.asked.After(asked) {
		return
	}
	snap := &snapshot{
		byName: make(map[string]*source, len(registered)),
		byID:   make(map[int32]*source, len(registered)),
		topics: catalogue{largest: make(map[string]int64, len(topics))},
		asked:  asked,
	}
	for _, t := range topics {
		snap.topics.largest[t.Name] = int64(t.MaxMessageBytes)
	}
	for i := range registered {
		src := prepareSource(registered[i])
		if old != nil && old.byID[src.ID] != nil {
			src.open = old.byID[src.ID].open
		}
		snap.byName[src.Name] = src
		snap.byID[src.ID] = src
	}
	s.current.Store(snap)
}

func prepareSource(registered store.Source) *source {
	src := &source{Source: registered, exact: make(map[string]struct{}), open: new(atomic.Int64)}
	for _, t := range registered.Topics {
		if prefix, ok := strings.CutSuffix(t, "*"); ok {
			src.prefixes = append(src.prefixes, prefix)
		} else {
			src.exact[t] = struct{}{}
		}
	}
	return src
}

// run keeps the snapshot young until ctx ends. While the store is away it serves the last one.
func (s *sources) run(ctx context.Context) {
	tick := time.NewTicker(sourceRefresh)
	defer tick.Stop()
	away := false
	for {
		err := s.refresh(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil && !away:
			s.log.Warn("reading sources and topics; the last known ones stay in force", "error", err)
		case err == nil && away:
			s.log.Info("sources and topics can be read again")
		}
		away = err != nil
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

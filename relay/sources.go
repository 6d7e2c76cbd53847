package relay

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/outbox-platform/outbox/store"
)

// wantSourcesEvery bounds how often the sources are read because of an unknown one.
const wantSourcesEvery = 250 * time.Millisecond

// startSources reads the sources when it is time, or when an event names one that is not known. A source that was known
// stays known after it was deleted: what it prepared before is still to be published.
func (r *Relay) startSources(now time.Time) {
	l := &r.sources
	if r.core.wantSources && l.at.Sub(now) > wantSourcesEvery {
		l.at = now.Add(wantSourcesEvery)
	}
	if !l.due(now) {
		return
	}
	l.running = true
	r.access(func(ctx context.Context) func() {
		ctx, cancel := context.WithTimeout(ctx, ioTimeout)
		defer cancel()
		all, err := r.st.Sources(ctx, "", 0)
		return func() {
			l.running = false
			l.at = r.now().Add(r.cfg.SourcesEvery)
			if err != nil {
				l.at = r.now().Add(wantSourcesEvery)
				r.metrics.storeErrors.WithLabelValues("sources").Inc()
				return
			}
			r.takeSources(all)
		}
	})
}

func (r *Relay) takeSources(all []store.Source) {
	c := r.core
	c.wantSources = false
	if !c.sourcesRead {
		c.sourcesRead = true
		r.lease.beat.at = time.Time{} // shards may be acquired now
	}
	changed := false
	for i := range all {
		src := all[i]
		known := c.sources[src.ID]
		changed = changed || known == nil || !slices.Equal(known.Topics, src.Topics)
		c.sources[src.ID] = &src
	}
	if changed {
		r.catalogue.at = time.Time{}
	}
}

// catalogue writes what the cluster says about the topics that sources may use, for the servers.
type catalogue struct {
	every
	written   []store.Topic
	writtenAt time.Time
	failing   bool
}

// rewriteTopics is how often an unchanged catalogue is written all the same.
const rewriteTopics = 10 * time.Minute

// startCatalogue asks the cluster for the topics when it is time.
func (r *Relay) startCatalogue(now time.Time) {
	l := &r.catalogue
	if len(r.core.sources) == 0 || !l.due(now) {
		return
	}
	var names, prefixes []string
	for _, src := range r.core.sources {
		for _, t := range src.Topics {
			if prefix, found := strings.CutSuffix(t, "*"); found {
				prefixes = append(prefixes, prefix)
			} else {
				names = append(names, t)
			}
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	l.at = now.Add(r.cfg.TopicsEvery)
	if len(names)+len(prefixes) == 0 {
		return
	}
	ask := names
	if len(prefixes) > 0 {
		ask = nil
	}
	l.running = true
	written, fresh := l.written, now.Sub(l.writtenAt) < rewriteTopics
	r.access(func(ctx context.Context) func() {
		ctx, cancel := context.WithTimeout(ctx, ioTimeout)
		defer cancel()
		topics, err := r.sink.Topics(ctx, ask)
		topics = slices.DeleteFunc(topics, func(t store.Topic) bool { return !allowedBy(t.Name, names, prefixes) })
		slices.SortFunc(topics, func(a, b store.Topic) int { return strings.Compare(a.Name, b.Name) })
		same := fresh && slices.Equal(topics, written)
		if err == nil && len(topics) > 0 && !same {
			err = r.st.PutTopics(ctx, topics)
		}
		return func() {
			l.running = false
			switch {
			case err != nil && !l.failing:
				l.failing = true
				r.log.Warn("writing the topic catalogue", "error", err)
			case err == nil:
				l.failing = false
				if !same {
					l.written, l.writtenAt = topics, now
				}
			}
		}
	})
}

// allowedBy reports whether a topic is one of names (sorted) or begins with one of prefixes. Kafka's own are not.
func allowedBy(topic string, names, prefixes []string) bool {
	if strings.HasPrefix(topic, "__") {
		return false
	}
	if _, found := slices.BinarySearch(names, topic); found {
		return true
	}
	return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(topic, p) })
}

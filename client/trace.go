package client

import (
	"context"
	"strings"
)

// Headers of the W3C trace context.
const (
	traceParent = "traceparent"
	traceState  = "tracestate"
)

// traceHeaders is a propagation.TextMapCarrier that collects headers.
type traceHeaders []Header

func (t *traceHeaders) Get(key string) string {
	for _, h := range *t {
		if h.Name == key {
			return string(h.Value)
		}
	}
	return ""
}

func (t *traceHeaders) Set(key, value string) {
	*t = append(*t, Header{Name: key, Value: []byte(value)})
}

func (t *traceHeaders) Keys() []string {
	keys := make([]string, 0, len(*t))
	for _, h := range *t {
		keys = append(keys, h.Name)
	}
	return keys
}

// traceOf returns the trace context of ctx as event headers; none when ctx carries none.
func (c *Client) traceOf(ctx context.Context) []Header {
	var t traceHeaders
	c.cfg.Propagator.Inject(ctx, &t)
	return t
}

// hasTrace tells whether the caller has put a trace context of its own into the headers. It is passed on untouched then.
func hasTrace(headers []Header) bool {
	for _, h := range headers {
		if strings.EqualFold(h.Name, traceParent) || strings.EqualFold(h.Name, traceState) {
			return true
		}
	}
	return false
}

// roomFor tells whether the extra headers fit beside the caller's. A trace context never makes an event too large.
func roomFor(headers, extra []Header) bool {
	if len(extra) == 0 {
		return true
	}
	n := len(headers) + len(extra)
	size := headerBytes(headers) + headerBytes(extra)
	return n <= maxHeaders && size <= maxHeaderBytes
}

func headerBytes(headers []Header) int {
	n := 0
	for _, h := range headers {
		n += len(h.Name) + len(h.Value)
	}
	return n
}

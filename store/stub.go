package store

import (
	"context"
	"errors"
	"time"
)

// Contract stub: replaced by the implementation.
var errStub = errors.New("store: contract stub")

type store struct{ shardCount int }
type reader struct{}
type writer struct{}
type encoded struct{}

// ErrStoreChanged: the store is another server than before, or on another timeline.
var ErrStoreChanged = errors.New("the store's server or timeline changed")

func open(context.Context, Config) (*Store, error) { return nil, errStub }
func (s *store) close()                            {}
func (s *store) ping(context.Context) error        { return errStub }
func (s *store) maintainOnce(context.Context, MaintenanceConfig) (r MaintenanceReport, err error) {
	return r, errStub
}
func newWriter(*Store, WriterConfig) *Writer                                   { return &Writer{} }
func (w *writer) run(context.Context) error                                    { return errStub }
func (w *writer) submit(*Request) error                                        { return errStub }
func (w *writer) do(context.Context, *Request) (Answer, error)                 { return Answer{}, errStub }
func (s *Segment) records(func(*Record) bool) error                            { return errStub }
func encodeEvent(b []byte, r *Record) []byte                                   { return b }
func decodeEvent([]byte) (*Record, error)                                      { return nil, errStub }
func (s *store) heartbeat(context.Context, string, time.Duration) (int, error) { return 0, errStub }
func (s *store) acquireShards(context.Context, string, time.Duration, int) ([]Lease, error) {
	return nil, errStub
}
func (s *store) releaseShards(context.Context, []int16, []int64) error         { return errStub }
func (s *store) steps(context.Context, time.Duration, []Step) ([]int16, error) { return nil, errStub }
func (s *store) loadParked(context.Context, int16) ([]Parked, error)           { return nil, errStub }
func (s *store) loadParkedOf(context.Context, int16, Aggregate, EventPosition, int) ([]Parked, error) {
	return nil, errStub
}
func (s *store) loadDeadQueues(context.Context, int16) ([]Aggregate, error) { return nil, errStub }
func (s *store) loadDeadLettersOf(context.Context, int16, Aggregate, EventPosition, int) ([]DeadLetter, error) {
	return nil, errStub
}
func (s *store) states(context.Context, []Key) (map[Key]State, error)            { return nil, errStub }
func (s *store) pendingOperations(context.Context, []int16) ([]Operation, error) { return nil, errStub }
func (s *store) openReader(context.Context) (*Reader, error)                     { return nil, errStub }
func (r *reader) read(context.Context, []Cursor, int) ([]Segment, error)         { return nil, errStub }
func (r *reader) readAt(context.Context, int16, []Position) ([]Segment, error)   { return nil, errStub }
func (r *reader) horizon() Horizon                                               { return Horizon{} }
func (r *reader) close(context.Context) error                                    { return nil }
func (s *store) sources(context.Context, string, int) ([]Source, error)          { return nil, errStub }
func (s *store) source(context.Context, string) (*Source, error)                 { return nil, errStub }
func (s *store) applySource(context.Context, Source, string, string) (*Source, *Source, error) {
	return nil, nil, errStub
}
func (s *store) deleteSource(context.Context, string, string, string) error { return errStub }
func (s *store) putTopics(context.Context, []Topic) error                   { return errStub }
func (s *store) topics(context.Context) ([]Topic, error)                    { return nil, errStub }
func (s *store) transaction(context.Context, Key) (*Transaction, error)     { return nil, errStub }
func (s *store) retentionHorizon(context.Context) (time.Time, error)        { return time.Time{}, errStub }
func (s *store) shards(context.Context) ([]ShardStatus, error)              { return nil, errStub }
func (s *store) blockedAggregates(context.Context, string, string, int) ([]BlockedAggregate, string, error) {
	return nil, "", errStub
}
func (s *store) deadLetters(context.Context, string, string, int) ([]DeadLetter, string, error) {
	return nil, "", errStub
}
func (s *store) requestOperation(context.Context, Aggregate, Action, string, string) (*Operation, error) {
	return nil, errStub
}
func (s *store) operationByID(context.Context, int64) (*Operation, error) { return nil, errStub }
func (s *store) verify(context.Context) ([]Violation, error)              { return nil, errStub }

package store

import (
	"context"
	"errors"
	"time"
)

// Contract stub: replaced by the implementation.
var errStub = errors.New("store: contract stub")

func (s *Store) heartbeat(context.Context, string, time.Duration) (int, error) { return 0, errStub }
func (s *Store) acquireShards(context.Context, string, time.Duration, int) ([]Lease, error) {
	return nil, errStub
}
func (s *Store) releaseShards(context.Context, []int16, []int64) error         { return errStub }
func (s *Store) steps(context.Context, time.Duration, []Step) ([]int16, error) { return nil, errStub }
func (s *Store) loadParked(context.Context, int16) ([]Parked, error)           { return nil, errStub }
func (s *Store) loadParkedOf(context.Context, int16, Aggregate, EventPosition, int) ([]Parked, error) {
	return nil, errStub
}
func (s *Store) loadDeadQueues(context.Context, int16) ([]Aggregate, error) { return nil, errStub }
func (s *Store) loadDeadLettersOf(context.Context, int16, Aggregate, EventPosition, int) ([]DeadLetter, error) {
	return nil, errStub
}
func (s *Store) states(context.Context, []Key) (map[Key]State, error)            { return nil, errStub }
func (s *Store) pendingOperations(context.Context, []int16) ([]Operation, error) { return nil, errStub }

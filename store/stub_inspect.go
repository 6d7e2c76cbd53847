package store

import (
	"context"
	"time"
)

// Contract stubs of sources, topics, inspection, maintenance and verification.

func (s *Store) maintainOnce(context.Context, MaintenanceConfig) (r MaintenanceReport, err error) {
	return r, errStub
}
func (s *Store) sources(context.Context, string, int) ([]Source, error)          { return nil, errStub }
func (s *Store) source(context.Context, string) (*Source, error)                 { return nil, errStub }
func (s *Store) applySource(context.Context, Source, string, string) (*Source, *Source, error) {
	return nil, nil, errStub
}
func (s *Store) deleteSource(context.Context, string, string, string) error { return errStub }
func (s *Store) putTopics(context.Context, []Topic) error                   { return errStub }
func (s *Store) topics(context.Context) ([]Topic, error)                    { return nil, errStub }
func (s *Store) transaction(context.Context, Key) (*Transaction, error)     { return nil, errStub }
func (s *Store) retentionHorizon(context.Context) (time.Time, error)        { return time.Time{}, errStub }
func (s *Store) shards(context.Context) ([]ShardStatus, error)              { return nil, errStub }
func (s *Store) blockedAggregates(context.Context, string, string, int) ([]BlockedAggregate, string, error) {
	return nil, "", errStub
}
func (s *Store) deadLetters(context.Context, string, string, int) ([]DeadLetter, string, error) {
	return nil, "", errStub
}
func (s *Store) requestOperation(context.Context, Aggregate, Action, string, string) (*Operation, error) {
	return nil, errStub
}
func (s *Store) operationByID(context.Context, int64) (*Operation, error) { return nil, errStub }
func (s *Store) verify(context.Context) ([]Violation, error)              { return nil, errStub }

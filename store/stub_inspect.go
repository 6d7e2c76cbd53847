package store

import "context"

// Contract stubs of maintenance and verification.

func (s *Store) maintainOnce(context.Context, MaintenanceConfig) (r MaintenanceReport, err error) {
	return r, errStub
}
func (s *Store) verify(context.Context) ([]Violation, error) { return nil, errStub }

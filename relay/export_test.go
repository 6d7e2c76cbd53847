package relay

import "github.com/outbox-platform/outbox/store"

// StoreChanged makes a running relay believe that a read found another server.
func (r *Relay) StoreChanged() {
	r.results <- func() {
		r.inProgress++ // this was no access
		r.storeChanged(store.ErrStoreChanged)
	}
}

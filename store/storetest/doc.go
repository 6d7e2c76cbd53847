// Package storetest gives tests a real store: one PostgreSQL server per test binary, started when the first test asks for
// it, and for each test a database of its own with the schema in it.
//
//	func TestMain(m *testing.M) { storetest.Main(m) }
//
//	func TestSomething(t *testing.T) {
//		db := storetest.New(t)
//		db.Store.Shards(t.Context())
//	}
//
// The environment variable OUTBOX_TEST_POSTGRES names the major version, such as 15; without it the newest supported one
// runs. Missing PostgreSQL fails the test: nothing is ever skipped.
package storetest

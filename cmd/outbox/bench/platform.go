package bench

// platformArgs run server and relay in one process, as a small deployment does.
var platformArgs = []string{"server", "--with-relay"}

// platformEnv configures that process.
func platformEnv(dsn, brokers, grpcListen, httpListen string) []string {
	return []string{
		"OUTBOX_STORE_DSN=" + dsn, "OUTBOX_KAFKA_BROKERS=" + brokers,
		"OUTBOX_SERVER_GRPC_LISTEN=" + grpcListen, "OUTBOX_SERVER_HTTP_LISTEN=" + httpListen,
	}
}

package store

import (
	"context"
	"math"
	"time"

	"github.com/jackc/pgx/v5"
)

// VerifyIn is Verify in a transaction of the test, so that a corruption can be rolled back.
func VerifyIn(ctx context.Context, s *Store, tx pgx.Tx) ([]Violation, error) {
	return s.verifyIn(ctx, tx)
}

// MaintenanceLock is the advisory lock of the process that does maintenance.
const MaintenanceLock = maintenanceLock

// ForgedPageTokens are tokens with a valid checksum and unlikely contents.
func ForgedPageTokens(list, filter string) []string {
	at := EventPosition{Position: Position{XID: math.MaxUint64, Seq: math.MinInt32}, Record: math.MaxInt32}
	return []string{
		pageToken{since: time.UnixMicro(1_700_000_000_000_000), shard: 3, at: at}.encode(list, filter),
		pageToken{since: time.UnixMicro(0), shard: math.MinInt16, at: at}.encode(list, filter),
		pageToken{since: time.UnixMicro(math.MaxInt64), shard: 3}.encode(list, filter),
		pageToken{since: time.UnixMicro(math.MinInt64), shard: 3}.encode(list, filter),
		pageToken{since: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)}.encode(list, filter),
	}
}

// RecodePageToken decodes a token and encodes it again.
func RecodePageToken(token, list, filter string) (string, error) {
	p, err := decodePageToken(token, list, filter)
	if p == nil || err != nil {
		return "", err
	}
	return p.encode(list, filter), nil
}

package store

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/cespare/xxhash/v2"
)

// pageToken says after which row the next page of a list begins. It is opaque to callers; the checksum, which covers the
// list and its filter too, is there to refuse what was not returned for this very list, not to keep a secret.
type pageToken struct {
	since time.Time // microseconds, as the database keeps it
	shard int16
	at    EventPosition
}

const (
	pageTokenFormat = 1
	pageTokenLen    = 1 + 8 + 2 + 8 + 4 + 4 + 8
)

// pageLimits of every paged list: 0 or less means the default.
const (
	defaultPage = 100
	maxPage     = 1000
)

func pageLimit(limit int) int {
	if limit <= 0 {
		return defaultPage
	}
	return min(limit, maxPage)
}

// encode returns the token for one list and its filter.
func (p pageToken) encode(list, filter string) string {
	b := make([]byte, 0, pageTokenLen)
	b = append(b, pageTokenFormat)
	b = binary.BigEndian.AppendUint64(b, uint64(p.since.UnixMicro())) //nolint:gosec // bytes of an int64
	b = binary.BigEndian.AppendUint16(b, uint16(p.shard))             //nolint:gosec // bytes of an int16
	b = binary.BigEndian.AppendUint64(b, p.at.XID)
	b = binary.BigEndian.AppendUint32(b, uint32(p.at.Seq))    //nolint:gosec // bytes of an int32
	b = binary.BigEndian.AppendUint32(b, uint32(p.at.Record)) //nolint:gosec // bytes of an int32
	b = binary.BigEndian.AppendUint64(b, pageChecksum(b, list, filter))
	return base64.RawURLEncoding.EncodeToString(b)
}

// decodePageToken is the inverse of encode. An empty token is the first page: nil. Anything else that encode did not
// return for this list and filter is ErrInvalid.
func decodePageToken(token, list, filter string) (*pageToken, error) {
	if token == "" {
		return nil, nil
	}
	invalid := fmt.Errorf("page token of %s: %w", list, ErrInvalid)
	b, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || len(b) != pageTokenLen || b[0] != pageTokenFormat {
		return nil, invalid
	}
	content := b[:pageTokenLen-8]
	if binary.BigEndian.Uint64(b[len(content):]) != pageChecksum(content, list, filter) {
		return nil, invalid
	}
	p := &pageToken{
		since: time.UnixMicro(int64(binary.BigEndian.Uint64(b[1:]))).UTC(), //nolint:gosec // bytes of an int64
		shard: int16(binary.BigEndian.Uint16(b[9:])),                       //nolint:gosec // bytes of an int16
		at: EventPosition{
			Position: Position{XID: binary.BigEndian.Uint64(b[11:]), Seq: int32(binary.BigEndian.Uint32(b[19:]))}, //nolint:gosec // bytes of an int32
			Record:   int32(binary.BigEndian.Uint32(b[23:])),                                                      //nolint:gosec // bytes of an int32
		},
	}
	// A forged checksum must not reach the database with a time that it refuses with an error of another class.
	if year := p.since.Year(); year < 1970 || year > 9999 {
		return nil, invalid
	}
	return p, nil
}

func pageChecksum(content []byte, list, filter string) uint64 {
	d := xxhash.New()
	_, _ = d.Write(content)
	_, _ = d.WriteString(list)
	_, _ = d.Write([]byte{0})
	_, _ = d.WriteString(filter)
	return d.Sum64()
}

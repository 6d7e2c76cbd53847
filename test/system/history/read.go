package history

import (
	"fmt"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/embedded/kafka"
)

// The headers by which a record is recognised; see docs on record profiles. The names are written out here, not taken
// from the relay, so that a change there is noticed.
const (
	idHeader    = "ce_id"
	epochHeader = "outbox-epoch"
)

// FromKafka turns what the foreign client read into records. appended says that the topics keep the broker's time.
func FromKafka(read []kafka.Record, appended bool) ([]Record, error) {
	records := make([]Record, len(read))
	for i, r := range read {
		out := &records[i]
		*out = Record{Topic: r.Topic, Partition: r.Partition, Offset: r.Offset, Key: r.Key, Payload: DigestOf(r.Value)}
		if appended {
			out.AppendedAt = r.Timestamp
		}
		for _, h := range r.Headers {
			switch h.Key {
			case epochHeader:
				if _, err := fmt.Sscanf(string(h.Value), "%d:%d", &out.Shard, &out.Epoch); err != nil {
					return nil, fmt.Errorf("%s: header %s is %q: %w", at(out), epochHeader, h.Value, err)
				}
				continue
			case idHeader:
				id, err := uuid.ParseBytes(h.Value)
				if err != nil {
					return nil, fmt.Errorf("%s: header %s is %q: %w", at(out), idHeader, h.Value, err)
				}
				out.ID = id
			}
			out.Headers = append(out.Headers, Header{Name: h.Key, Value: string(h.Value)})
		}
	}
	return records, nil
}

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// outputSettings choose between text for people and JSON for programs.
type outputSettings struct {
	Output string `short:"o" default:"text" enum:"text,json" help:"text or json."`
}

func (o outputSettings) json() bool { return o.Output == "json" }

// writeJSON writes v as indented JSON.
func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// jsonOf converts an API message to what writeJSON writes: proto3 JSON with the proto's field names, every field present,
// 64-bit numbers as strings, ids as UUIDs rather than base64.
func jsonOf(m proto.Message) (any, error) {
	b, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	var v any
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, err
	}
	idsAsUUIDs(v)
	return v, nil
}

// writeMessage writes an API message as JSON.
func writeMessage(w io.Writer, m proto.Message) error {
	v, err := jsonOf(m)
	if err != nil {
		return fmt.Errorf("writing JSON: %w", err)
	}
	return writeJSON(w, v)
}

// idsAsUUIDs rewrites the 16-byte ids, which proto3 JSON shows in base64.
func idsAsUUIDs(v any) {
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			idsAsUUIDs(e)
		}
	case map[string]any:
		for key, e := range v {
			if s, ok := e.(string); ok && (key == "transaction_id" || key == "event_id") {
				var id [16]byte
				var raw []byte
				if json.Unmarshal([]byte(`"`+s+`"`), &raw) == nil && len(raw) == len(id) {
					v[key] = uuid.UUID(raw).String()
				}
				continue
			}
			idsAsUUIDs(e)
		}
	}
}

// table writes rows in columns.
func table(w io.Writer, header string, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, strings.ReplaceAll(header, " | ", "\t"))
	for _, row := range rows {
		fmt.Fprintln(t, strings.Join(row, "\t"))
	}
	return t.Flush()
}

// enumName is the name of an enum value without its type's prefix, in lower case: RECORD_PROFILE_PLAIN is "plain".
func enumName(value fmt.Stringer, prefix string) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(value.String(), prefix)), "_", "-")
}

// idText is an id as a UUID.
func idText(id []byte) string {
	u, err := uuid.FromBytes(id)
	if err != nil {
		return fmt.Sprintf("%x", id)
	}
	return u.String()
}

// timeText is a time in UTC to the millisecond; "-" when absent.
func timeText(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return t.AsTime().UTC().Format("2006-01-02T15:04:05.000Z")
}

// ageText is how long ago a time was, roughly.
func ageText(d time.Duration) string {
	switch {
	case d < time.Minute:
		return d.Round(time.Millisecond * 100).String()
	case d < time.Hour:
		return d.Round(time.Second).String()
	default:
		return d.Round(time.Minute).String()
	}
}

// dash shows an empty text.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

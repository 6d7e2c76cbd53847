package client

import (
	"fmt"

	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// kind is one of the calls that travel on a session.
type kind uint8

const (
	kindPrepare kind = iota
	kindCommit
	kindAbort
	kindPublish
)

// Field numbers of outbox.v1 that are written or read by hand; a test compares them with the generated descriptors.
const (
	fieldRequestCalls  = 2 // SessionRequest.calls
	fieldCallsCalls    = 1 // Calls.calls
	fieldCallID        = 1 // Call.call_id; Call.prepare … Call.publish follow in the order of the kinds
	fieldCallFirst     = 2
	fieldResponse      = 2 // SessionResponse.results
	fieldResultsResult = 1 // Results.results
	fieldResultID      = 1 // Result.call_id
	fieldResultStatus  = 2 // Result.status
	fieldResultToken   = 3 // Result.token
)

var kinds = [...]struct{ name, method string }{
	kindPrepare: {"prepare", outboxv1.OutboxService_Prepare_FullMethodName},
	kindCommit:  {"commit", outboxv1.OutboxService_Commit_FullMethodName},
	kindAbort:   {"abort", outboxv1.OutboxService_Abort_FullMethodName},
	kindPublish: {"publish", outboxv1.OutboxService_Publish_FullMethodName},
}

func (k kind) String() string { return kinds[k].name }

// callHeader is what stands before a call's own message on a session: the tags and lengths of Calls.calls, Call.call_id and
// the call's field. The message behind it was encoded once, by the caller's goroutine, and is never copied by us.
type callHeader struct {
	bytes [48]byte
	n     int
}

func (h *callHeader) set(k kind, id uint64, body int) {
	field := protowire.Number(fieldCallFirst + int(k))
	inner := protowire.SizeTag(fieldCallID) + protowire.SizeVarint(id) + protowire.SizeTag(field) + protowire.SizeBytes(body)
	b := h.bytes[:0]
	b = protowire.AppendTag(b, fieldCallsCalls, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(inner))
	b = protowire.AppendTag(b, fieldCallID, protowire.VarintType)
	b = protowire.AppendVarint(b, id)
	b = protowire.AppendTag(b, field, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(body))
	h.n = len(b)
}

// callsPrefix is the start of a SessionRequest that carries calls of that many bytes.
func callsPrefix(size int) []byte {
	b := protowire.AppendTag(make([]byte, 0, 16), fieldRequestCalls, protowire.BytesType)
	return protowire.AppendVarint(b, uint64(size))
}

// encoded is a request in its wire form.
type encoded []byte

// frame is a SessionRequest in its wire form, in pieces.
type frame = mem.BufferSlice

// response is a SessionResponse: results decoded by hand, everything else by the generated code.
type response struct {
	results []result
	other   *outboxv1.SessionResponse
}

// result answers one call.
type result struct {
	id     uint64
	status *spb.Status // nil: OK
	token  []byte
}

// codec is the protobuf codec, extended by the forms above.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2("proto")} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	switch v := v.(type) {
	case frame:
		return v, nil
	case encoded:
		return mem.BufferSlice{mem.SliceBuffer(v)}, nil
	default:
		return c.CodecV2.Marshal(v)
	}
}

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	r, ok := v.(*response)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	return r.unmarshal(buf.ReadOnlyData())
}

// unmarshal replaces r by the message in b. Nothing of b is kept.
func (r *response) unmarshal(b []byte) error {
	r.results, r.other = r.results[:0], nil
	num, typ, n := protowire.ConsumeTag(b)
	if n > 0 && num == fieldResponse && typ == protowire.BytesType {
		body, m := protowire.ConsumeBytes(b[n:])
		if m == len(b)-n {
			return r.unmarshalResults(body)
		}
	}
	r.other = new(outboxv1.SessionResponse)
	return proto.Unmarshal(b, r.other)
}

func (r *response) unmarshalResults(b []byte) error {
	return eachField(b, func(num protowire.Number, _ uint64, value []byte) error {
		if num != fieldResultsResult {
			return nil
		}
		var res result
		err := eachField(value, func(num protowire.Number, v uint64, value []byte) error {
			switch num {
			case fieldResultID:
				res.id = v
			case fieldResultStatus:
				res.status = new(spb.Status)
				return proto.Unmarshal(value, res.status)
			case fieldResultToken:
				res.token = append([]byte(nil), value...)
			}
			return nil
		})
		r.results = append(r.results, res)
		return err
	})
}

// eachField calls f for every varint and every length-delimited field of a message and steps over all others.
func eachField(b []byte, f func(num protowire.Number, v uint64, value []byte) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return fmt.Errorf("reading a result: %w", protowire.ParseError(n))
		}
		b = b[n:]
		var (
			v     uint64
			value []byte
		)
		switch typ {
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			value, n = protowire.ConsumeBytes(b)
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return fmt.Errorf("reading a result: %w", protowire.ParseError(n))
		}
		b = b[n:]
		if typ != protowire.VarintType && typ != protowire.BytesType {
			continue
		}
		if err := f(num, v, value); err != nil {
			return err
		}
	}
	return nil
}

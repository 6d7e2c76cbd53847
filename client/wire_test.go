package client

import (
	"bytes"
	"errors"
	"testing"

	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// TestFieldNumbers compares what is written by hand with the generated descriptors.
func TestFieldNumbers(t *testing.T) {
	for _, tc := range []struct {
		m    proto.Message
		name string
		want int
	}{
		{&outboxv1.SessionRequest{}, "calls", fieldRequestCalls},
		{&outboxv1.SessionRequest_Calls{}, "calls", fieldCallsCalls},
		{&outboxv1.SessionRequest_Call{}, "call_id", fieldCallID},
		{&outboxv1.SessionRequest_Call{}, "prepare", fieldCallFirst + int(kindPrepare)},
		{&outboxv1.SessionRequest_Call{}, "commit", fieldCallFirst + int(kindCommit)},
		{&outboxv1.SessionRequest_Call{}, "abort", fieldCallFirst + int(kindAbort)},
		{&outboxv1.SessionRequest_Call{}, "publish", fieldCallFirst + int(kindPublish)},
		{&outboxv1.SessionResponse{}, "results", fieldResponse},
		{&outboxv1.SessionResponse_Results{}, "results", fieldResultsResult},
		{&outboxv1.SessionResponse_Result{}, "call_id", fieldResultID},
		{&outboxv1.SessionResponse_Result{}, "status", fieldResultStatus},
		{&outboxv1.SessionResponse_Result{}, "token", fieldResultToken},
	} {
		f := tc.m.ProtoReflect().Descriptor().Fields().ByName(protoreflect.Name(tc.name))
		if f == nil || int(f.Number()) != tc.want {
			t.Errorf("%T.%s is not %d", tc.m, tc.name, tc.want)
		}
	}
}

// TestReasonsAreThoseOfTheProto: a reason that the proto does not know would never match.
func TestReasonsAreThoseOfTheProto(t *testing.T) {
	for _, r := range []Reason{
		ReasonFieldInvalid, ReasonEventTooLarge, ReasonSourceDenied, ReasonTopicDenied, ReasonIDReused, ReasonTransactionUnknown,
		ReasonAlreadyDecided, ReasonQuotaExceeded, ReasonBacklogFull, ReasonStoreUnavailable, ReasonContention,
		ReasonIdentityUnknown, ReasonMethodDenied, ReasonInternal,
	} {
		if _, ok := outboxv1.ErrorReason_value["ERROR_REASON_"+string(r)]; !ok {
			t.Errorf("%s", r)
		}
	}
}

func TestCallsAreEncodedAsTheGeneratedCodeWould(t *testing.T) {
	id := bytes.Repeat([]byte{1}, 16)
	var msg frame
	want := &outboxv1.SessionRequest_Calls{}
	size := 0
	for i, callID := range []uint64{1, 127, 128, 1 << 40} {
		var body encoded
		msgCall := &outboxv1.SessionRequest_Call{CallId: callID}
		switch kind(i) {
		case kindPrepare:
			r := &outboxv1.PrepareRequest{Source: "s", TransactionId: id, Events: []*outboxv1.Event{{Payload: make([]byte, 1000)}}}
			msgCall.Call, body = &outboxv1.SessionRequest_Call_Prepare{Prepare: r}, marshal(t, r)
		case kindCommit:
			r := &outboxv1.CommitRequest{Source: "s", TransactionId: id}
			msgCall.Call, body = &outboxv1.SessionRequest_Call_Commit{Commit: r}, marshal(t, r)
		case kindAbort:
			r := &outboxv1.AbortRequest{}
			msgCall.Call, body = &outboxv1.SessionRequest_Call_Abort{Abort: r}, marshal(t, r)
		case kindPublish:
			r := &outboxv1.PublishRequest{Source: "s"}
			msgCall.Call, body = &outboxv1.SessionRequest_Call_Publish{Publish: r}, marshal(t, r)
		}
		c := &call{}
		c.head.set(kind(i), callID, len(body))
		c.body = body
		size += c.size()
		msg = append(msg, mem.SliceBuffer(c.head.bytes[:c.head.n]), mem.SliceBuffer(body))
		want.Calls = append(want.Calls, msgCall)
	}
	msg = append(frame{mem.SliceBuffer(callsPrefix(size))}, msg...)
	out, err := newCodec().Marshal(msg)
	if err != nil {
		t.Fatal(err)
	}
	var got outboxv1.SessionRequest
	if err := proto.Unmarshal(out.Materialize(), &got); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(got.GetCalls(), want) {
		t.Errorf("got %v\nwant %v", &got, want)
	}
}

func marshal(t *testing.T, m proto.Message) encoded {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func decode(t testing.TB, b []byte) (*response, error) {
	t.Helper()
	var r response
	err := newCodec().Unmarshal(mem.BufferSlice{mem.SliceBuffer(b)}, &r)
	return &r, err
}

func TestResultsAreDecodedAsTheGeneratedCodeWould(t *testing.T) {
	m := &outboxv1.SessionResponse{Response: &outboxv1.SessionResponse_Results_{Results: &outboxv1.SessionResponse_Results{
		Results: []*outboxv1.SessionResponse_Result{
			{CallId: 1, Token: []byte("t")}, {CallId: 1 << 50, Status: &spb.Status{Code: 5, Message: "m"}}, {CallId: 3},
		},
	}}}
	r, err := decode(t, marshal(t, m))
	if err != nil || r.other != nil || len(r.results) != 3 {
		t.Fatalf("%+v %v", r, err)
	}
	if r.results[0].id != 1 || string(r.results[0].token) != "t" || r.results[1].id != 1<<50 || r.results[1].status.GetCode() != 5 || r.results[2].status != nil {
		t.Errorf("%+v", r.results)
	}
	w := &outboxv1.SessionResponse{Response: &outboxv1.SessionResponse_Welcome_{Welcome: &outboxv1.SessionResponse_Welcome{Server: "x"}}}
	if r, err = decode(t, marshal(t, w)); err != nil || !proto.Equal(r.other, w) {
		t.Errorf("%+v %v", r, err)
	}
}

// FuzzResults: whatever arrives, decoding by hand finds what the generated code finds, and never panics.
func FuzzResults(f *testing.F) {
	seed := &outboxv1.SessionResponse{Response: &outboxv1.SessionResponse_Results_{Results: &outboxv1.SessionResponse_Results{
		Results: []*outboxv1.SessionResponse_Result{{CallId: 1, Token: []byte("t")}, {CallId: 2, Status: &spb.Status{Code: 5}}},
	}}}
	b, err := proto.Marshal(seed)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)-1])
	f.Add([]byte{0x12, 0x03, 0x0a, 0x01, 0x0d})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decode(t, b)
		var m outboxv1.SessionResponse
		if wantErr := proto.Unmarshal(b, &m); wantErr != nil {
			return // by hand less is looked at: unknown fields, field types
		}
		if err != nil {
			t.Fatalf("the generated code reads it: %v", err)
		}
		if r.other != nil {
			return
		}
		for i, res := range m.GetResults().GetResults() {
			if i < len(r.results) && res.GetCallId() != r.results[i].id {
				t.Fatalf("result %d: %d, want %d", i, r.results[i].id, res.GetCallId())
			}
		}
	})
}

func TestErrorsOfTheWay(t *testing.T) {
	e := errorOf(errors.New("odd"))
	if e.Code != codes.Unknown || e.Error() != "UNKNOWN: odd" {
		t.Errorf("%v", e)
	}
	if got := errorOf(errClosed); got != errClosed {
		t.Errorf("%v", got)
	}
	s := status.New(codes.InvalidArgument, "x").Proto()
	s.Details = append(s.Details, nil) // a detail that nobody understands
	if e := errorOfStatus(s); e.Code != codes.InvalidArgument {
		t.Errorf("%v", e)
	}
	if HasReason(errors.New("x"), ReasonInternal) || IsInvalid(errors.New("x")) {
		t.Error("foreign errors have no reason")
	}
	for c := codes.Canceled; c <= codes.Unauthenticated; c++ {
		if name := codeName(c); name == "" || bytes.ContainsAny([]byte(name), "abcdefghijklmnopqrstuvwxyz") {
			t.Errorf("%s", name)
		}
	}
	if codeName(codes.DeadlineExceeded) != "DEADLINE_EXCEEDED" {
		t.Error(codeName(codes.DeadlineExceeded))
	}
}

func TestQueueKeepsOrder(t *testing.T) {
	var q queue
	calls := make([]*call, 6)
	for i := range calls {
		calls[i] = &call{id: uint64(i)}
	}
	for _, i := range []int{2, 4} {
		q.push(calls[i])
	}
	for _, i := range []int{3, 1, 0, 5} {
		q.insert(calls[i])
	}
	check := func(want ...uint64) {
		t.Helper()
		i := 0
		for c := q.head; c != nil; c = c.next {
			if i >= len(want) || c.id != want[i] || !c.queued {
				t.Fatalf("at %d: %d", i, c.id)
			}
			i++
		}
		if i != len(want) || q.len != i {
			t.Fatalf("%d calls, len %d", i, q.len)
		}
	}
	check(0, 1, 2, 3, 4, 5)
	q.remove(calls[0])
	q.remove(calls[5])
	q.remove(calls[3])
	check(1, 2, 4)
}

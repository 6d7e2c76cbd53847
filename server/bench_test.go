package server

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// benchPrepare is a Prepare of one event of 1 KiB.
func benchPrepare() *outboxv1.PrepareRequest {
	req := newPrepare("orders")
	req.Events[0].Payload = make([]byte, 1024)
	return req
}

// BenchmarkSession is the cost of a Prepare and its Commit on one session with 256 transactions in flight, over loopback,
// client included, without a store.
func BenchmarkSession(b *testing.B) {
	r := startWithout(b, newMemoryWriter(b))
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	s := openSession(b, ctx, r.client, hello("orders"))
	const flight = 256
	slots := make(chan struct{}, flight)
	calls := make(chan *outboxv1.SessionRequest_Call, 4*flight)
	var sending sync.WaitGroup
	sending.Go(func() { // one sender, which sends what has gathered
		for first := range calls {
			m := &outboxv1.SessionRequest_Calls{Calls: []*outboxv1.SessionRequest_Call{first}}
			for more := true; more && len(m.Calls) < 128; {
				select {
				case c, ok := <-calls:
					if !ok {
						more = false
						break
					}
					m.Calls = append(m.Calls, c)
				default:
					more = false
				}
			}
			if s.Send(&outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Calls_{Calls: m}}) != nil {
				return
			}
		}
	})
	var ids sync.Map
	payload := make([]byte, 1024)
	var messages atomic.Int64
	var receiving sync.WaitGroup
	done := make(chan struct{})
	n := b.N
	receiving.Go(func() {
		left := n
		for left > 0 {
			resp, err := s.Recv()
			if err != nil {
				b.Error(err)
				break
			}
			messages.Add(1)
			for _, res := range resp.GetResults().GetResults() {
				if res.GetStatus() != nil {
					b.Error(res)
				}
				if len(res.GetToken()) > 0 { // prepared: commit it
					id, _ := ids.LoadAndDelete(res.GetCallId())
					calls <- callCommitOf(res.GetCallId(), &outboxv1.CommitRequest{Source: "orders", TransactionId: id.([]byte), Token: res.GetToken()})
					continue
				}
				<-slots
				left--
			}
		}
		close(done)
	})
	b.ReportAllocs()
	b.ResetTimer()
	for i := range n {
		slots <- struct{}{}
		id := uuid.Must(uuid.NewV7())
		ids.Store(uint64(i), id[:])
		req := newPrepare("orders")
		req.TransactionId, req.Events[0].Payload = id[:], payload
		calls <- callPrepareOf(uint64(i), req)
	}
	<-done
	b.StopTimer()
	b.ReportMetric(float64(2*n)/float64(messages.Load()), "results/message")
	close(calls)
	sending.Wait()
	receiving.Wait()
}

// BenchmarkUnary is the same with unary calls.
func BenchmarkUnary(b *testing.B) {
	r := startWithout(b, newMemoryWriter(b))
	payload := make([]byte, 1024)
	b.SetParallelism(128) // × GOMAXPROCS
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			req := newPrepare("orders")
			req.Events[0].Payload = payload
			resp, err := r.client.Prepare(b.Context(), req)
			if err != nil {
				b.Error(err)
				return
			}
			if _, err := r.client.Commit(b.Context(), &outboxv1.CommitRequest{Source: "orders", TransactionId: req.GetTransactionId(), Token: resp.GetToken()}); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// BenchmarkValidate is the cost of the one validation path for a Prepare of one event.
func BenchmarkValidate(b *testing.B) {
	v, src, req := testValidator(b), testSource(), benchPrepare()
	b.ReportAllocs()
	for b.Loop() {
		if e := v.prepare(&call{}, req, src, &catalogue{}); e != nil {
			b.Fatal(e)
		}
	}
}

// BenchmarkDecode is the cost of decoding the same Prepare.
func BenchmarkDecode(b *testing.B) {
	body, err := proto.Marshal(benchPrepare())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := proto.Unmarshal(body, &outboxv1.PrepareRequest{}); err != nil {
			b.Fatal(err)
		}
	}
}

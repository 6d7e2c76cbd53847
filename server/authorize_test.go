package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// services are the descriptors of our services.
func services() (all []protoreflect.ServiceDescriptor) {
	for _, f := range []protoreflect.FileDescriptor{outboxv1.File_outbox_v1_outbox_service_proto, outboxv1.File_outbox_v1_admin_service_proto} {
		for i := range f.Services().Len() {
			all = append(all, f.Services().Get(i))
		}
	}
	return all
}

func fullMethod(m protoreflect.MethodDescriptor) string {
	return fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
}

// A new RPC without a rule fails here, and so does a rule without an RPC.
func TestEveryMethodHasARule(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t))
	served := make(map[string]bool)
	for name, info := range r.grpc.GetServiceInfo() {
		for _, m := range info.Methods {
			method := "/" + name + "/" + m.Name
			served[method] = true
			if rules[method] == accessNobody {
				t.Errorf("%s has no rule in authorize.go", method)
			}
		}
	}
	for _, s := range services() {
		for i := range s.Methods().Len() {
			if m := fullMethod(s.Methods().Get(i)); !served[m] {
				t.Errorf("%s is not served", m)
			}
		}
	}
	for m := range rules {
		if !served[m] {
			t.Errorf("the rule for %s is about nothing", m)
		}
	}
}

func TestUnknownMethodIsDenied(t *testing.T) {
	err := authorize("/outbox.v1.AdminService/Invented", &principal{name: "p", admin: true, all: true}, "")
	wantError(t, err, codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_METHOD_DENIED)
	wantError(t, authorize("/outbox.v1.AdminService/ListShards", nil, ""), codes.Unauthenticated, outboxv1.ErrorReason_ERROR_REASON_IDENTITY_UNKNOWN)
}

func hashOf(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

// withPrincipals writes a tokens file: orders and payments may act for themselves, ops is the platform team.
func withPrincipals(t testing.TB) func(*Config) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tokens.yaml")
	text := fmt.Sprintf(`principals:
  - {name: orders, sources: [orders], token_sha256: [%s]}
  - {name: payments, sources: [payments], token_sha256: [%s]}
  - {name: ops, admin: true, token_sha256: [%s]}
  - {name: gateway, sources: ["*"], token_sha256: [%s]}
`, hashOf("orders-secret"), hashOf("payments-secret"), hashOf("ops-secret"), hashOf("gateway-secret"))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return func(c *Config) { c.TokensFile = path }
}

// The matrix is made from the descriptors: every method, with every kind of caller, about a source that is the caller's,
// another's, or nobody's.
func TestAccessMatrix(t *testing.T) {
	r := start(t, withPrincipals(t))
	ops := withToken(t.Context(), "ops-secret")
	for _, name := range []string{"orders", "payments"} {
		if _, err := r.admin.ApplySource(ops, &outboxv1.ApplySourceRequest{Source: &outboxv1.Source{Name: name, Topics: []string{"t-*"}}}); err != nil {
			t.Fatal(err)
		}
	}
	// A transaction of payments, which the others try to touch.
	prepared := newPrepare("payments")
	if _, err := r.client.Prepare(withToken(t.Context(), "payments-secret"), prepared); err != nil {
		t.Fatal(err)
	}
	for _, s := range services() {
		for i := range s.Methods().Len() {
			m := s.Methods().Get(i)
			if m.IsStreamingClient() {
				continue // TestSessionIdentity
			}
			t.Run(string(m.Name()), func(t *testing.T) { accessRow(t, r, m, prepared) })
		}
	}
	get, err := r.client.GetTransaction(ops, &outboxv1.GetTransactionRequest{Source: "payments", TransactionId: prepared.GetTransactionId()})
	if err != nil || get.GetTransaction().GetState() != outboxv1.Transaction_STATE_PREPARED {
		t.Fatalf("after everybody tried: %v, %v", get, err)
	}
}

// accessRow calls one method as everybody.
func accessRow(t *testing.T, r *running, m protoreflect.MethodDescriptor, prepared *outboxv1.PrepareRequest) {
	t.Helper()
	method := fullMethod(m)
	about := func(source string) proto.Message {
		req, err := newMessage(m.Input())
		if err != nil {
			t.Fatal(err)
		}
		set := func(name string, v protoreflect.Value) {
			if f := m.Input().Fields().ByName(protoreflect.Name(name)); f != nil && f.Kind() == protoreflect.StringKind && !f.IsList() {
				req.ProtoReflect().Set(f, v)
			}
		}
		set("source", protoreflect.ValueOfString(source))
		if f := m.Input().Fields().ByName("transaction_id"); f != nil {
			req.ProtoReflect().Set(f, protoreflect.ValueOfBytes(prepared.GetTransactionId()))
		}
		return req
	}
	invoke := func(token, source string) error {
		resp, err := newMessage(m.Output())
		if err != nil {
			t.Fatal(err)
		}
		ctx := t.Context()
		if token != "" {
			ctx = withToken(ctx, token)
		}
		return r.conn.Invoke(ctx, method, about(source), resp)
	}
	for _, token := range []string{"", "wrong"} {
		wantError(t, invoke(token, "payments"), codes.Unauthenticated, outboxv1.ErrorReason_ERROR_REASON_IDENTITY_UNKNOWN)
	}
	if rules[method] == accessAdmin {
		for _, token := range []string{"orders-secret", "gateway-secret"} {
			wantError(t, invoke(token, "payments"), codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_METHOD_DENIED)
		}
		return
	}
	// Another's, nobody's and an empty name look the same.
	for _, source := range []string{"payments", "nobody", ""} {
		md, _ := wantError(t, invoke("orders-secret", source), codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DENIED)
		if md["source"] != source {
			t.Errorf("metadata %v", md)
		}
	}
	switch err := invoke("ops-secret", "payments"); rules[method] {
	case accessSourceOrAdmin:
		// A request that lacks the rest of its fields got past the door, too.
		if code := status.Code(err); code != codes.OK && code != codes.InvalidArgument {
			t.Errorf("the platform team: %v", err)
		}
	default:
		wantError(t, err, codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DENIED)
	}
}

func TestSessionIdentity(t *testing.T) {
	r := start(t, withPrincipals(t))
	ops := withToken(t.Context(), "ops-secret")
	for _, name := range []string{"orders", "payments"} {
		if _, err := r.admin.ApplySource(ops, &outboxv1.ApplySourceRequest{Source: &outboxv1.Source{Name: name, Topics: []string{"t-*"}}}); err != nil {
			t.Fatal(err)
		}
	}
	ending := func(ctx context.Context, source string) error {
		s, err := r.client.Session(ctx)
		if err != nil {
			t.Fatal(err)
		}
		_ = s.Send(&outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Hello_{Hello: hello(source)}})
		for err == nil {
			_, err = s.Recv()
		}
		return err
	}
	wantError(t, ending(t.Context(), "orders"), codes.Unauthenticated, outboxv1.ErrorReason_ERROR_REASON_IDENTITY_UNKNOWN)
	for _, source := range []string{"payments", "nobody"} {
		wantError(t, ending(withToken(t.Context(), "orders-secret"), source), codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DENIED)
	}
	wantError(t, ending(ops, "orders"), codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DENIED)
	// A session is for its own source, even for a caller that may act for all.
	s := openSession(t, withToken(t.Context(), "gateway-secret"), r.client, hello("orders"))
	sendCalls(t, s, callPrepareOf(1, newPrepare("payments")), callPrepareOf(2, newPrepare("orders")))
	got := receiveResults(t, s, 2)
	wantError(t, resultError(got[1]), codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DENIED)
	if got[2].GetStatus() != nil {
		t.Fatal(got[2])
	}
}

// A credential that is taken away ends the sessions it opened.
func TestRevokedSession(t *testing.T) {
	var path string
	with := withPrincipals(t)
	r := startWithout(t, newMemoryWriter(t), func(c *Config) { with(c); path = c.TokensFile })
	s := openSession(t, withToken(t.Context(), "orders-secret"), r.client, hello("orders"))
	sendCalls(t, s, callPrepareOf(1, newPrepare("orders")))
	receiveResults(t, s, 1)
	replace := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if changed, err := r.identities.check(); !changed || err != nil {
			t.Fatalf("%v, %v", changed, err)
		}
	}
	replace(fmt.Sprintf("principals: [{name: renamed, sources: [orders], token_sha256: [%s]}]", hashOf("orders-secret")))
	sendCalls(t, s, callPrepareOf(2, newPrepare("orders")))
	receiveResults(t, s, 1)
	replace(fmt.Sprintf("principals: [{name: renamed, sources: [payments], token_sha256: [%s]}]", hashOf("orders-secret")))
	sendCalls(t, s, callPrepareOf(3, newPrepare("orders")))
	_, err := s.Recv()
	wantError(t, err, codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DENIED)
}

// Credentials that are not exactly a known bearer token are nobody's.
func TestCredentials(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t), withPrincipals(t))
	for name, c := range map[string]struct {
		values []string
		ok     bool
	}{
		"good":              {[]string{"Bearer orders-secret"}, true},
		"lower case scheme": {[]string{"bearer orders-secret"}, true},
		"basic":             {[]string{"Basic orders-secret"}, false},
		"no scheme":         {[]string{"orders-secret"}, false},
		"empty":             {[]string{""}, false},
		"empty token":       {[]string{"Bearer "}, false},
		"the hash":          {[]string{"Bearer " + hashOf("orders-secret")}, false},
		"alg none":          {[]string{"Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJvcHMifQ."}, false},
		"two":               {[]string{"Bearer orders-secret", "Bearer ops-secret"}, false},
		"two words":         {[]string{"Bearer orders-secret x"}, false},
	} {
		ctx := t.Context()
		for _, v := range c.values {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", v)
		}
		_, err := r.client.Prepare(ctx, newPrepare("orders"))
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
		if !c.ok {
			wantError(t, err, codes.Unauthenticated, outboxv1.ErrorReason_ERROR_REASON_IDENTITY_UNKNOWN)
		}
	}
	// Health is for everybody, reflection is not.
	if _, err := grpc_health_v1.NewHealthClient(r.conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Error("health:", err)
	}
	s, err := reflectionv1.NewServerReflectionClient(r.conn).ServerReflectionInfo(t.Context())
	if err == nil {
		_, err = s.Recv()
	}
	if grpcCode(err) != codes.Unauthenticated {
		t.Errorf("reflection: %v", err)
	}
}

func TestReflectionOnAndOff(t *testing.T) {
	ask := func(conn *grpc.ClientConn) error {
		s, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
		if err != nil {
			return err
		}
		if err := s.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}); err != nil {
			return err
		}
		_, err = s.Recv()
		return err
	}
	on := startWithout(t, newMemoryWriter(t))
	if err := ask(on.conn); err != nil {
		t.Error("on:", err)
	}
	off := startWithout(t, newMemoryWriter(t), func(c *Config) { c.Reflection = false })
	if err := ask(off.conn); grpcCode(err) != codes.Unimplemented {
		t.Errorf("off: %v", err)
	}
}

func TestTokensFile(t *testing.T) {
	write := func(text string) string {
		path := filepath.Join(t.TempDir(), "tokens.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	h := hashOf("x")
	for name, text := range map[string]string{
		"unknown key":      "principals: [{name: a, token: secret}]",
		"no name":          "principals: [{token_sha256: [" + h + "]}]",
		"nothing to prove": "principals: [{name: a, admin: true}]",
		"short hash":       "principals: [{name: a, token_sha256: [abcd]}]",
		"not hexadecimal":  "principals: [{name: a, token_sha256: [" + "zz" + h[2:] + "]}]",
		"same token twice": "principals: [{name: a, token_sha256: [" + h + "]}, {name: b, token_sha256: [" + h + "]}]",
		"same certificate": "principals: [{name: a, certificates: [x]}, {name: b, certificates: [x]}]",
		"not YAML":         "{{{{",
	} {
		if _, err := readIdentities(write(text)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	ids, err := readIdentities(write(""))
	if err != nil {
		t.Fatal("an empty file knows nobody:", err)
	}
	if _, err := ids.identify(t.Context()); err == nil {
		t.Error("an empty file believes somebody")
	}
	if _, err := readIdentities(filepath.Join(t.TempDir(), "missing")); err == nil {
		t.Error("a missing file is accepted")
	}
}

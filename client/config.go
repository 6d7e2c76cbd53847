package client

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"time"

	"go.opentelemetry.io/otel/propagation"
	"google.golang.org/grpc"
)

// Version names this SDK towards the platform.
const Version = "outbox-go/0.1.0"

// Transport says how calls travel.
type Transport int

// The transports.
const (
	// TransportSession carries calls on a bidirectional stream: the cheapest way, and the only one on which the platform can
	// ask check-back questions. The client uses unary calls by itself while the platform does not serve sessions.
	TransportSession Transport = iota
	// TransportUnary makes one gRPC call per call.
	TransportUnary
)

// Config configures a [Client]. Target and Source are required; the zero value of everything else is usable.
type Config struct {
	// Target is the platform's address in gRPC's syntax, for example "outbox.example.com:7000" or "dns:///outbox:7000".
	Target string
	// Source is the name under which the service is registered.
	Source string
	// Instance names this process in the platform's logs. Default: the host name and the process id.
	Instance string

	// TLS configures transport security. Default: TLS 1.2 or newer with the system's roots.
	TLS *tls.Config
	// Plaintext switches transport security off. TLS must be nil then.
	Plaintext bool
	// Token, when set, is called for every stream and unary call and gives the bearer token to send.
	Token TokenFunc
	// DialOptions are added to the client's own, for example a stats handler of OpenTelemetry.
	DialOptions []grpc.DialOption

	// Transport says how calls travel. Default: TransportSession.
	Transport Transport
	// Sessions is the number of streams. One is enough for some ten thousand calls a second. Default 1, at most 16.
	Sessions int
	// MaxInFlight bounds the calls that wait for an answer, Commits in the background not counted. Default 1024.
	MaxInFlight int
	// FailWhenFull makes calls beyond MaxInFlight fail at once with RESOURCE_EXHAUSTED. Default: they wait for their turn
	// until their deadline.
	FailWhenFull bool
	// MaxPendingCommits bounds the Commits and Aborts that were not yet acknowledged. What comes beyond it is not sent, only
	// counted; the platform finds these decisions out by asking. Default 16384.
	MaxPendingCommits int

	// CallTimeout bounds every call that has no limit of its own. Default 5 s.
	CallTimeout time.Duration
	// PrepareTimeout bounds Prepare, which holds the row locks of the caller's transaction. Default 1 s.
	PrepareTimeout time.Duration
	// ConnectTimeout bounds one attempt to open a session. Default 3 s.
	ConnectTimeout time.Duration
	// MaxReconnectDelay bounds the back-off between two attempts to open a session. Default 2 s.
	MaxReconnectDelay time.Duration
	// CheckTimeout bounds the work for one check-back question. Default 3 s.
	CheckTimeout time.Duration
	// CloseTimeout bounds how long Close waits for answers that are still due. Default 2 s.
	CloseTimeout time.Duration
	// DisableRetries makes every call a single attempt. Commits in the background are not affected.
	DisableRetries bool

	// Logger gets what an operator should know. Default: nothing is logged.
	Logger *slog.Logger
	// OnAlarm, when set, is called for what a person should look at. It must not block.
	OnAlarm func(Alarm)
	// Propagator writes the trace context of the call's context into the headers of events that do not bring one of their
	// own. Default: W3C trace context. propagation.NewCompositeTextMapPropagator() switches it off.
	Propagator propagation.TextMapPropagator
}

// Alarm tells of something that needs a person.
type Alarm struct {
	// Kind is one of the Alarm constants.
	Kind AlarmKind
	// TransactionID is the transaction concerned, in its usual text form.
	TransactionID string
	// Database is the source database concerned; empty when it is not known.
	Database string
	// Err says what happened.
	Err error
}

// AlarmKind tells alarms apart.
type AlarmKind string

// The alarms.
const (
	// AlarmContradiction: the local transaction committed, and the platform holds it for aborted.
	AlarmContradiction AlarmKind = "contradiction"
	// AlarmRefused: the platform refused a spilled request for good; its row is kept with the reason.
	AlarmRefused AlarmKind = "refused"
	// AlarmLost: the platform does not know a transaction that it should know.
	AlarmLost AlarmKind = "lost"
	// AlarmBug: a fault of the SDK itself. The local transaction is not affected; the platform finds its outcome out by asking.
	AlarmBug AlarmKind = "bug"
)

// withDefaults returns the configuration as it will be used, or what is wrong with it.
func (c Config) withDefaults() (Config, error) {
	switch {
	case c.Target == "":
		return c, errors.New("client: Target is empty")
	case c.Source == "":
		return c, errors.New("client: Source is empty")
	case len(c.Source) > maxName:
		return c, fmt.Errorf("client: Source has %d bytes, more than %d", len(c.Source), maxName)
	case c.Plaintext && c.TLS != nil:
		return c, errors.New("client: Plaintext and TLS are both set")
	case c.Transport != TransportSession && c.Transport != TransportUnary:
		return c, fmt.Errorf("client: unknown Transport %d", c.Transport)
	case c.Sessions < 0 || c.Sessions > 16:
		return c, fmt.Errorf("client: Sessions is %d, not between 1 and 16", c.Sessions)
	case c.MaxInFlight < 0 || c.MaxPendingCommits < 0:
		return c, errors.New("client: MaxInFlight or MaxPendingCommits is negative")
	}
	for name, d := range map[string]time.Duration{
		"CallTimeout": c.CallTimeout, "PrepareTimeout": c.PrepareTimeout, "ConnectTimeout": c.ConnectTimeout,
		"MaxReconnectDelay": c.MaxReconnectDelay, "CheckTimeout": c.CheckTimeout, "CloseTimeout": c.CloseTimeout,
	} {
		if d < 0 {
			return c, fmt.Errorf("client: %s is negative: %v", name, d)
		}
	}
	if c.Instance == "" {
		host, err := os.Hostname()
		if err != nil {
			host = "unknown-host"
		}
		c.Instance = host + "/" + strconv.Itoa(os.Getpid())
	}
	c.Sessions = cmp.Or(c.Sessions, 1)
	c.MaxInFlight = cmp.Or(c.MaxInFlight, 1024)
	c.MaxPendingCommits = cmp.Or(c.MaxPendingCommits, 16384)
	c.CallTimeout = cmp.Or(c.CallTimeout, 5*time.Second)
	c.PrepareTimeout = cmp.Or(c.PrepareTimeout, time.Second)
	c.ConnectTimeout = cmp.Or(c.ConnectTimeout, 3*time.Second)
	c.MaxReconnectDelay = cmp.Or(c.MaxReconnectDelay, 2*time.Second)
	c.CheckTimeout = cmp.Or(c.CheckTimeout, 3*time.Second)
	c.CloseTimeout = cmp.Or(c.CloseTimeout, 2*time.Second)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Propagator == nil {
		c.Propagator = propagation.TraceContext{}
	}
	return c, nil
}

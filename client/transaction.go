package client

import (
	"time"

	"github.com/google/uuid"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// DefaultDatabase is the name of a source's database when it has only one.
const DefaultDatabase = "default"

// Mode says how the decision of a transaction can be found out.
type Mode int32

// The modes.
const (
	// ModeMarker: the marker row decides. The default.
	ModeMarker = Mode(outboxv1.DatabaseMode_DATABASE_MODE_MARKER)
	// ModeXIDFenced: the transaction id decides; it was made durable before Prepare (PostgreSQL 17 and newer).
	ModeXIDFenced = Mode(outboxv1.DatabaseMode_DATABASE_MODE_XID_FENCED)
	// ModeClientOnly: nobody can be asked.
	ModeClientOnly = Mode(outboxv1.DatabaseMode_DATABASE_MODE_CLIENT_ONLY)
)

// DatabaseTransaction ties prepared events to the database transaction that decides about them. pgxoutbox and sqloutbox
// read it inside that transaction, in the marker statement.
type DatabaseTransaction struct {
	// Database names the source database. Empty: "default".
	Database string
	// XID is pg_current_xact_id(), the top-level transaction id.
	XID uint64
	// SystemIdentifier is pg_control_system().system_identifier.
	SystemIdentifier uint64
	// Timeline is the timeline the server wrote to.
	Timeline uint32
	// DatabaseOID is the oid of the database.
	DatabaseOID uint32
	// MarkerOID is the oid of the marker table as the search_path found it.
	MarkerOID uint32
	// Mode says how to find out the decision. Zero: ModeMarker.
	Mode Mode
}

func (d *DatabaseTransaction) proto() *outboxv1.DatabaseTransaction {
	mode := d.Mode
	if mode == 0 {
		mode = ModeMarker
	}
	return &outboxv1.DatabaseTransaction{
		Database: d.Database, Xid: d.XID, SystemIdentifier: d.SystemIdentifier, Timeline: d.Timeline,
		DatabaseOid: d.DatabaseOID, MarkerOid: d.MarkerOID, Mode: outboxv1.DatabaseMode(mode),
	}
}

func databaseTransactionOf(p *outboxv1.DatabaseTransaction) DatabaseTransaction {
	d := DatabaseTransaction{
		Database: p.GetDatabase(), XID: p.GetXid(), SystemIdentifier: p.GetSystemIdentifier(), Timeline: p.GetTimeline(),
		DatabaseOID: p.GetDatabaseOid(), MarkerOID: p.GetMarkerOid(), Mode: Mode(p.GetMode()),
	}
	if d.Mode == 0 {
		d.Mode = ModeMarker
	}
	return d
}

// State is what the platform knows about a transaction's outcome.
type State int32

// The states.
const (
	// StatePrepared: stored, invisible, undecided.
	StatePrepared = State(outboxv1.Transaction_STATE_PREPARED)
	// StateCommitted: its events are or will be published. Final.
	StateCommitted = State(outboxv1.Transaction_STATE_COMMITTED)
	// StateAborted: its events will never be published. Final.
	StateAborted = State(outboxv1.Transaction_STATE_ABORTED)
)

// String returns the state's name in the API, for example "COMMITTED".
func (s State) String() string {
	switch s {
	case StatePrepared:
		return "PREPARED"
	case StateCommitted:
		return "COMMITTED"
	case StateAborted:
		return "ABORTED"
	}
	return "UNSPECIFIED"
}

// Transaction is what the platform knows about one transaction.
type Transaction struct {
	// ID is the transaction's id.
	ID uuid.UUID
	// State is PREPARED, COMMITTED or ABORTED. Other values may come with newer platforms: treat them as undecided.
	State State
	// PreparedAt is when the platform stored it.
	PreparedAt time.Time
	// DecidedAt is when the decision was stored. Zero while PREPARED.
	DecidedAt time.Time
	// DecidedBy is "client", "check-back", "direct" or "operator". Empty while PREPARED.
	DecidedBy string
	// Evidence is what the decision rests on, a JSON object; empty when it came from the client's own Commit or Abort.
	Evidence string
	// Events says where each event is now.
	Events []EventStatus
}

// EventStatus says where one event is now.
type EventStatus struct {
	// ID is the event's id.
	ID uuid.UUID
	// Topic is its topic.
	Topic string
	// AggregateType and AggregateID name its aggregate.
	AggregateType, AggregateID string
	// Shard is the shard whose holder publishes it.
	Shard int
	// Place is where it is, as in the API without its prefix: IN_DOUBT, QUEUED, WAITING, BLOCKED, PUBLISHED, DEAD_LETTER or
	// DROPPED.
	Place string
	// Explanation says in words why it is not out yet. Empty when it is.
	Explanation string
}

func transactionOf(p *outboxv1.Transaction) *Transaction {
	t := &Transaction{
		State: State(p.GetState()), DecidedBy: p.GetDecidedBy(), Evidence: p.GetEvidence(),
		Events: make([]EventStatus, 0, len(p.GetEvents())),
	}
	t.ID, _ = uuid.FromBytes(p.GetTransactionId())
	if p.GetPrepareTime() != nil {
		t.PreparedAt = p.GetPrepareTime().AsTime()
	}
	if p.GetDecideTime() != nil {
		t.DecidedAt = p.GetDecideTime().AsTime()
	}
	for _, e := range p.GetEvents() {
		id, _ := uuid.FromBytes(e.GetEventId())
		t.Events = append(t.Events, EventStatus{
			ID: id, Topic: e.GetTopic(), AggregateType: e.GetAggregateType(), AggregateID: e.GetAggregateId(),
			Shard: int(e.GetShard()), Place: placeName(e.GetPlace()), Explanation: e.GetExplanation(),
		})
	}
	return t
}

func placeName(p outboxv1.EventStatus_Place) string {
	const prefix = "PLACE_"
	s := p.String()
	if len(s) > len(prefix) && s[:len(prefix)] == prefix {
		return s[len(prefix):]
	}
	return s
}

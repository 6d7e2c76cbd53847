package kafka

import (
	"errors"
	"strconv"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"

	"github.com/outbox-platform/outbox/relay"
)

// codeTooLarge is the code of a record or batch that is larger than its topic allows.
const codeTooLarge = "MESSAGE_TOO_LARGE"

// verdict says what an error code means for the record that was answered with it.
type verdict struct {
	name  string // as in the Kafka protocol; librdkafka's own begin with "_"
	class relay.Class
}

// verdicts is the whole table. Most codes never reach it: librdkafka retries what passes by itself, and those are here only
// because a retry across a change of the producer id is refused and then shows the code of the first try.
var verdicts = map[ck.ErrorCode]verdict{
	// This record, and no other, will never be accepted.
	ck.ErrMsgSizeTooLarge:             {codeTooLarge, relay.ClassRecord},
	ck.ErrInvalidRecord:               {"INVALID_RECORD", relay.ClassRecord},
	ck.ErrInvalidMsg:                  {"CORRUPT_MESSAGE", relay.ClassRecord},
	ck.ErrInvalidMsgSize:              {"INVALID_FETCH_SIZE", relay.ClassRecord},
	ck.ErrInvalidTimestamp:            {"INVALID_TIMESTAMP", relay.ClassRecord},
	ck.ErrRecordListTooLarge:          {"RECORD_LIST_TOO_LARGE", relay.ClassRecord},
	ck.ErrUnsupportedForMessageFormat: {"UNSUPPORTED_FOR_MESSAGE_FORMAT", relay.ClassRecord},
	ck.ErrBadMsg:                      {"_BAD_MSG", relay.ClassRecord},
	ck.ErrInvalidArg:                  {"_INVALID_ARG", relay.ClassRecord},
	// Refused only because of a neighbour in its batch; the solo lane finds out.
	ck.ErrInvalidDifferentRecord: {"_INVALID_DIFFERENT_RECORD", relay.ClassRecord},

	// Its topic is not there, or not for us.
	ck.ErrUnknownTopicOrPart:       {"UNKNOWN_TOPIC_OR_PARTITION", relay.ClassTopic},
	ck.ErrUnknownTopic:             {"_UNKNOWN_TOPIC", relay.ClassTopic},
	ck.ErrUnknownTopicID:           {"UNKNOWN_TOPIC_ID", relay.ClassTopic},
	ck.ErrUnknownPartition:         {"_UNKNOWN_PARTITION", relay.ClassTopic},
	ck.ErrTopicException:           {"INVALID_TOPIC_EXCEPTION", relay.ClassTopic},
	ck.ErrTopicAuthorizationFailed: {"TOPIC_AUTHORIZATION_FAILED", relay.ClassTopic},
	ck.ErrPolicyViolation:          {"POLICY_VIOLATION", relay.ClassTopic},
	ck.ErrInvalidRequiredAcks:      {"INVALID_REQUIRED_ACKS", relay.ClassTopic},

	// The cluster is away, or refuses us altogether.
	ck.ErrAllBrokersDown:                     {"_ALL_BROKERS_DOWN", relay.ClassCluster},
	ck.ErrTransport:                          {"_TRANSPORT", relay.ClassCluster},
	ck.ErrTimedOut:                           {"_TIMED_OUT", relay.ClassCluster},
	ck.ErrTimedOutQueue:                      {"_TIMED_OUT_QUEUE", relay.ClassCluster},
	ck.ErrMsgTimedOut:                        {"_MSG_TIMED_OUT", relay.ClassCluster},
	ck.ErrResolve:                            {"_RESOLVE", relay.ClassCluster},
	ck.ErrSsl:                                {"_SSL", relay.ClassCluster},
	ck.ErrAuthentication:                     {"_AUTHENTICATION", relay.ClassCluster},
	ck.ErrSaslAuthenticationFailed:           {"SASL_AUTHENTICATION_FAILED", relay.ClassCluster},
	ck.ErrUnsupportedSaslMechanism:           {"UNSUPPORTED_SASL_MECHANISM", relay.ClassCluster},
	ck.ErrIllegalSaslState:                   {"ILLEGAL_SASL_STATE", relay.ClassCluster},
	ck.ErrClusterAuthorizationFailed:         {"CLUSTER_AUTHORIZATION_FAILED", relay.ClassCluster},
	ck.ErrTransactionalIDAuthorizationFailed: {"TRANSACTIONAL_ID_AUTHORIZATION_FAILED", relay.ClassCluster},
	ck.ErrUnsupportedFeature:                 {"_UNSUPPORTED_FEATURE", relay.ClassCluster},
	ck.ErrUnsupportedVersion:                 {"UNSUPPORTED_VERSION", relay.ClassCluster},
	ck.ErrUnsupportedCompressionType:         {"UNSUPPORTED_COMPRESSION_TYPE", relay.ClassCluster},
	ck.ErrLeaderNotAvailable:                 {"LEADER_NOT_AVAILABLE", relay.ClassCluster},
	ck.ErrNotLeaderForPartition:              {"NOT_LEADER_OR_FOLLOWER", relay.ClassCluster},
	ck.ErrBrokerNotAvailable:                 {"BROKER_NOT_AVAILABLE", relay.ClassCluster},
	ck.ErrReplicaNotAvailable:                {"REPLICA_NOT_AVAILABLE", relay.ClassCluster},
	ck.ErrNetworkException:                   {"NETWORK_EXCEPTION", relay.ClassCluster},
	ck.ErrRequestTimedOut:                    {"REQUEST_TIMED_OUT", relay.ClassCluster},
	ck.ErrNotEnoughReplicas:                  {"NOT_ENOUGH_REPLICAS", relay.ClassCluster},
	ck.ErrNotEnoughReplicasAfterAppend:       {"NOT_ENOUGH_REPLICAS_AFTER_APPEND", relay.ClassCluster},
	ck.ErrKafkaStorageError:                  {"KAFKA_STORAGE_ERROR", relay.ClassCluster},
	ck.ErrThrottlingQuotaExceeded:            {"THROTTLING_QUOTA_EXCEEDED", relay.ClassCluster},
	ck.ErrState:                              {"_STATE", relay.ClassCluster},
	ck.ErrInvalidTransactionTimeout:          {"INVALID_TRANSACTION_TIMEOUT", relay.ClassCluster},
	// Of the transaction, not of the record that was answered with it: the transaction is aborted and its wave tried again. If the
	// cluster has ended it itself, because its time was up, the producer is found fenced then.
	ck.ErrInvalidTxnState:        {"INVALID_TXN_STATE", relay.ClassCluster},
	ck.ErrTransactionAbortable:   {"TRANSACTION_ABORTABLE", relay.ClassCluster},
	ck.ErrConcurrentTransactions: {"CONCURRENT_TRANSACTIONS", relay.ClassCluster},
	ck.ErrDestroy:                {"_DESTROY", relay.ClassCluster},

	// The producer's session with the cluster is broken: a new one is needed. Written or not, nobody knows.
	ck.ErrFatal:                    {"_FATAL", relay.ClassFatal},
	ck.ErrFenced:                   {"_FENCED", relay.ClassFatal},
	ck.ErrRetry:                    {"_RETRY", relay.ClassFatal},
	ck.ErrOutOfOrderSequenceNumber: {"OUT_OF_ORDER_SEQUENCE_NUMBER", relay.ClassFatal},
	ck.ErrDuplicateSequenceNumber:  {"DUPLICATE_SEQUENCE_NUMBER", relay.ClassFatal},
	ck.ErrInvalidProducerEpoch:     {"INVALID_PRODUCER_EPOCH", relay.ClassFatal},
	ck.ErrProducerFenced:           {"PRODUCER_FENCED", relay.ClassFatal},
	ck.ErrUnknownProducerID:        {"UNKNOWN_PRODUCER_ID", relay.ClassFatal},
	ck.ErrInvalidProducerIDMapping: {"INVALID_PRODUCER_ID_MAPPING", relay.ClassFatal},
	ck.ErrGaplessGuarantee:         {"_GAPLESS_GUARANTEE", relay.ClassFatal},
	ck.ErrInconsistent:             {"_INCONSISTENT", relay.ClassFatal},

	// Dropped on our own request.
	ck.ErrPurgeQueue:    {"_PURGE_QUEUE", relay.ClassPurged},
	ck.ErrPurgeInflight: {"_PURGE_INFLIGHT", relay.ClassPurged},
}

// judge classifies an error of librdkafka. A code that the table does not know is the topic's fault when a broker said it
// (that pauses the least without giving a record up) and the cluster's when librdkafka did.
func judge(err error) *relay.SinkError {
	var e ck.Error
	if !errors.As(err, &e) {
		return &relay.SinkError{Class: relay.ClassCluster, Code: "_UNKNOWN", Detail: err.Error()}
	}
	v := verdictOf(e.Code())
	return &relay.SinkError{Class: v.class, Code: v.name, Detail: e.Error()}
}

func verdictOf(code ck.ErrorCode) verdict {
	v, ok := verdicts[code]
	switch {
	case ok:
		return v
	case code >= 0 || code == ck.ErrUnknown:
		return verdict{"ERROR_" + strconv.Itoa(int(code)), relay.ClassTopic}
	default:
		return verdict{"_ERROR" + strconv.Itoa(int(code)), relay.ClassCluster}
	}
}

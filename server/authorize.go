package server

import (
	"google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// access says who may call a method.
type access int

const (
	// accessNobody is the zero value: a method without a rule.
	accessNobody access = iota
	// accessPublic: everybody, known or not.
	accessPublic
	// accessKnown: every principal.
	accessKnown
	// accessSource: principals that may act for the source that the request names.
	accessSource
	// accessSourceOrAdmin: as accessSource, and the platform team.
	accessSourceOrAdmin
	// accessAdmin: the platform team.
	accessAdmin
)

// rules is the whole authorisation: exact full method names. A method that is not here is refused, and a test fails for
// a method of our services that is not here.
var rules = map[string]access{
	outboxv1.OutboxService_Prepare_FullMethodName:        accessSource,
	outboxv1.OutboxService_Commit_FullMethodName:         accessSource,
	outboxv1.OutboxService_Abort_FullMethodName:          accessSource,
	outboxv1.OutboxService_Publish_FullMethodName:        accessSource,
	outboxv1.OutboxService_GetTransaction_FullMethodName: accessSourceOrAdmin,
	outboxv1.OutboxService_Session_FullMethodName:        accessKnown, // its Hello names the source, and is checked there

	outboxv1.AdminService_ListSources_FullMethodName:             accessAdmin,
	outboxv1.AdminService_GetSource_FullMethodName:               accessAdmin,
	outboxv1.AdminService_ApplySource_FullMethodName:             accessAdmin,
	outboxv1.AdminService_DeleteSource_FullMethodName:            accessAdmin,
	outboxv1.AdminService_ListShards_FullMethodName:              accessAdmin,
	outboxv1.AdminService_ListBlockedAggregates_FullMethodName:   accessAdmin,
	outboxv1.AdminService_ListDeadLetters_FullMethodName:         accessAdmin,
	outboxv1.AdminService_AddDeadLetter_FullMethodName:           accessSourceOrAdmin,
	outboxv1.AdminService_OperateAggregate_FullMethodName:        accessAdmin,
	outboxv1.AdminService_ListInDoubtTransactions_FullMethodName: accessAdmin,
	outboxv1.AdminService_DecideTransaction_FullMethodName:       accessAdmin,
	outboxv1.AdminService_CheckTransaction_FullMethodName:        accessAdmin,
	outboxv1.AdminService_ConfirmFailover_FullMethodName:         accessAdmin,

	grpc_health_v1.Health_Check_FullMethodName: accessPublic,
	grpc_health_v1.Health_List_FullMethodName:  accessPublic,
	grpc_health_v1.Health_Watch_FullMethodName: accessPublic,

	reflectionv1.ServerReflection_ServerReflectionInfo_FullMethodName:      accessKnown,
	reflectionv1alpha.ServerReflection_ServerReflectionInfo_FullMethodName: accessKnown,
}

// authorize decides whether p (nil: not known) may call a method about a source ("" when the request names none).
func authorize(method string, p *principal, source string) error {
	rule := rules[method]
	if rule == accessPublic {
		return nil
	}
	if p == nil {
		return errUnauthenticated
	}
	switch rule {
	case accessKnown:
		return nil
	case accessSource, accessSourceOrAdmin:
		if p.actsFor(source) || rule == accessSourceOrAdmin && p.admin {
			return nil
		}
		return sourceDenied(source)
	case accessAdmin:
		if p.admin {
			return nil
		}
	}
	return methodDenied(method)
}

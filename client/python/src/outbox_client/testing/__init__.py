"""For the tests of services: a platform in memory that speaks the real API, and assertions. Fixtures: testing/plugin.py."""

from outbox_client.testing.assertions import assert_not_published, assert_published
from outbox_client.testing.ledger import StoredTransaction
from outbox_client.testing.platform import Call, FakePlatform, Fault, fault_error

__all__ = [
    "Call",
    "FakePlatform",
    "Fault",
    "StoredTransaction",
    "assert_not_published",
    "assert_published",
    "fault_error",
]

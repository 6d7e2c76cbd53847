"""Stands in for huleedu_service_libs.outbox: the same names and behaviour, with the outbox platform behind them.

A service changes its import, or nothing at all (see install), and has no relay of its own any more: what it adds is
published if and only if its transaction commits. docs/migrating-from-a-library.md says how to move a service.
"""

from outbox_client.compat.huleedu.binding import bind
from outbox_client.compat.huleedu.di import OutboxProvider, OutboxSettingsProvider
from outbox_client.compat.huleedu.install import install
from outbox_client.compat.huleedu.models import EventOutbox
from outbox_client.compat.huleedu.platform import close, configure
from outbox_client.compat.huleedu.protocols import EventTypeMapperProtocol, OutboxEvent, OutboxRepositoryProtocol
from outbox_client.compat.huleedu.relay import EventRelayWorker, OutboxSettings
from outbox_client.compat.huleedu.repository import PostgreSQLOutboxRepository

__all__ = [
    "EventOutbox",
    "EventRelayWorker",
    "EventTypeMapperProtocol",
    "OutboxEvent",
    "OutboxProvider",
    "OutboxRepositoryProtocol",
    "OutboxSettings",
    "OutboxSettingsProvider",
    "PostgreSQLOutboxRepository",
    "bind",
    "close",
    "configure",
    "install",
]

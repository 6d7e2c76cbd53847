"""What the service consists of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from dishka import AsyncContainer, Provider, Scope, make_async_container, provide
from outbox_client.compat.huleedu import OutboxProvider, OutboxRepositoryProtocol
from outbox_client.compat.huleedu.manager import OutboxManager
from outbox_client.compat.huleedu.protocols import AtomicRedisClientProtocol, KafkaPublisherProtocol
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from file_service.config import SERVICE, Settings
from file_service.publisher import EventPublisher, NotifierProtocol
from file_service.uploads import UploadService


class NoKafka:
    """The service needs no Kafka of its own any more; the provider of the outbox still asks for one."""

    async def start(self) -> None:
        """Does nothing."""

    async def stop(self) -> None:
        """Does nothing."""

    async def publish(
        self, topic: str, envelope: Any, key: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        """Refuses: events go through the outbox."""
        raise RuntimeError("events go through the outbox")


class NoRedis:
    """Stands in when no Redis is configured."""

    async def publish(self, channel: str, message: str) -> int:
        """Tells nobody."""
        return 0

    async def lpush(self, key: str, *values: str) -> int:
        """Keeps nothing."""
        return 0

    async def blpop(self, keys: list[str], timeout: float) -> tuple[str, str] | None:
        """Finds nothing."""
        return None


class CoreProvider(Provider):
    """What is outside of the service: database, Redis, Kafka. Tests inherit from it and replace what they like."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings

    @provide(scope=Scope.APP)
    def provide_settings(self) -> Settings:
        """The settings."""
        return self._settings

    @provide(scope=Scope.APP)
    def provide_name(self) -> str:
        """The service's name."""
        return SERVICE

    @provide(scope=Scope.APP)
    async def provide_engine(self) -> AsyncIterator[AsyncEngine]:
        """The database."""
        engine = create_async_engine(
            self._settings.database_url, pool_size=10, hide_parameters=True
        )  # no essays in logs
        yield engine
        await engine.dispose()

    @provide(scope=Scope.APP)
    def provide_kafka(self) -> KafkaPublisherProtocol:
        """Kafka."""
        return NoKafka()

    @provide(scope=Scope.APP)
    async def provide_notifier(self) -> AsyncIterator[NotifierProtocol]:
        """Redis, as far as users are notified."""
        if not self._settings.redis_url:
            yield NoRedis()
            return
        redis: Any = Redis.from_url(self._settings.redis_url)
        yield redis
        await redis.aclose()

    @provide(scope=Scope.APP)
    async def provide_redis(self) -> AsyncIterator[AtomicRedisClientProtocol]:
        """Redis, as far as the outbox is concerned."""
        if not self._settings.redis_url:
            yield NoRedis()
            return
        redis: Any = Redis.from_url(self._settings.redis_url, decode_responses=True)
        yield redis
        await redis.aclose()


class ServiceProvider(Provider):
    """The service itself."""

    @provide(scope=Scope.APP)
    def provide_sessions(self, engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        """Sessions."""
        return async_sessionmaker(engine, expire_on_commit=False)

    @provide(scope=Scope.APP)
    def provide_manager(
        self, repository: OutboxRepositoryProtocol, redis: AtomicRedisClientProtocol, name: str
    ) -> OutboxManager:
        """The outbox."""
        return OutboxManager(repository, redis, name)

    @provide(scope=Scope.APP)
    def provide_publisher(self, outbox: OutboxManager, notifier: NotifierProtocol) -> EventPublisher:
        """Events."""
        return EventPublisher(outbox, notifier)

    @provide(scope=Scope.APP)
    def provide_uploads(
        self, sessions: async_sessionmaker[AsyncSession], publisher: EventPublisher, settings: Settings
    ) -> UploadService:
        """Uploads."""
        return UploadService(sessions, publisher, settings)


def make_container(settings: Settings, *others: Provider) -> AsyncContainer:
    """Puts the service together. Providers that are given go before its own."""
    return make_async_container(CoreProvider(settings), OutboxProvider(), ServiceProvider(), *others)

"""What the service does: it takes files into batches, and out of them."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID, uuid4

from sqlalchemy import delete, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from file_service.config import Settings
from file_service.database import File
from file_service.events import (
    BatchFileAddedV1,
    BatchFileRemovedV1,
    EssayContentProvisionedV1,
    EssayValidationFailedV1,
)
from file_service.publisher import EventPublisher


@dataclass(frozen=True)
class Upload:
    """A file as it came."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Outcome:
    """What became of an upload."""

    file_upload_id: str
    name: str
    error_code: str = ""


class InvalidEssayError(Exception):
    """The file is no essay."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class UploadService:
    """Files, and the events about them, in one transaction for each call."""

    def __init__(
        self, sessions: async_sessionmaker[AsyncSession], publisher: EventPublisher, settings: Settings
    ) -> None:
        self._sessions, self._publisher, self._settings = sessions, publisher, settings

    async def add(self, batch_id: str, user_id: str, uploads: list[Upload], correlation_id: UUID) -> list[Outcome]:
        """Stores all files of an upload and their events, or nothing."""
        outcomes, added = [], []
        async with self._sessions() as session, session.begin():
            await self._lock(session, batch_id)
            for upload in uploads:
                id = str(uuid4())
                try:
                    content = self._essay(upload)
                except InvalidEssayError as e:
                    failed = EssayValidationFailedV1(
                        batch_id=batch_id,
                        file_upload_id=id,
                        original_file_name=upload.name,
                        error_code=e.code,
                        detail=str(e),
                    )
                    await self._publisher.validation_failed(failed, correlation_id, session)
                    outcomes.append(Outcome(id, upload.name, e.code))
                    continue
                session.add(File(id=id, batch_id=batch_id, user_id=user_id, name=upload.name, content=content))
                provisioned = EssayContentProvisionedV1(
                    batch_id=batch_id, file_upload_id=id, original_file_name=upload.name, size_bytes=len(upload.content)
                )
                event = BatchFileAddedV1(batch_id=batch_id, file_upload_id=id, filename=upload.name, user_id=user_id)
                await self._publisher.essay_provisioned(provisioned, correlation_id, session)
                await self._publisher.batch_changed(event, correlation_id, session)
                added.append(event)
                outcomes.append(Outcome(id, upload.name))
        for event in added:
            await self._publisher.notify(event)
        return outcomes

    async def remove(self, batch_id: str, file_id: str, correlation_id: UUID) -> bool:
        """Takes a file out of a batch. False: it is not there."""
        async with self._sessions() as session, session.begin():
            await self._lock(session, batch_id)
            found = await session.execute(
                delete(File)
                .where(File.id == file_id, File.batch_id == batch_id)
                .returning(File.name, File.user_id)
                .execution_options(synchronize_session=False)
            )
            row = found.one_or_none()
            if row is None:
                return False
            event = BatchFileRemovedV1(batch_id=batch_id, file_upload_id=file_id, filename=row[0], user_id=row[1])
            await self._publisher.batch_changed(event, correlation_id, session)
        await self._publisher.notify(event)
        return True

    async def count(self, batch_id: str) -> int:
        """The number of files of a batch."""
        async with self._sessions() as session:
            query = select(func.count()).select_from(File).where(File.batch_id == batch_id)
            return int((await session.execute(query)).scalar_one())

    async def ready(self) -> None:
        """Raises if the database cannot be used."""
        async with self._sessions() as session:
            await session.execute(text("SELECT 1"))

    @staticmethod
    async def _lock(session: AsyncSession, batch_id: str) -> None:
        """Who changes a batch waits for who changes it now: so its events are published in the order of the changes."""
        await session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:id, 0))"), {"id": batch_id})

    def _essay(self, upload: Upload) -> str:
        if not upload.content:
            raise InvalidEssayError("EMPTY_CONTENT", "the file is empty")
        if len(upload.content) > self._settings.max_bytes:
            size, most = len(upload.content), self._settings.max_bytes
            raise InvalidEssayError("CONTENT_TOO_LONG", f"the file has {size} bytes, more than {most}")
        try:
            content = upload.content.decode()
        except UnicodeDecodeError:
            raise InvalidEssayError("NOT_TEXT", "the file is not UTF-8 text") from None
        if "\x00" in content:
            raise InvalidEssayError("NOT_TEXT", "the file has NUL bytes")
        if len(content.split()) < self._settings.min_words:
            raise InvalidEssayError("CONTENT_TOO_SHORT", f"the file has fewer than {self._settings.min_words} words")
        return content

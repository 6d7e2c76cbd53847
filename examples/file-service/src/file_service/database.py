"""The service's own table. Beside it there is only the marker table of the outbox platform."""

from __future__ import annotations

from datetime import datetime

from outbox_client import MARKER_DDL
from sqlalchemy import DateTime, String, Text, func, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """All tables."""


class File(Base):
    """An uploaded essay."""

    __tablename__ = "file"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    batch_id: Mapped[str] = mapped_column(String(255), index=True)
    user_id: Mapped[str] = mapped_column(String(255))
    name: Mapped[str] = mapped_column(String(255))
    content: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


async def create_tables(engine: AsyncEngine) -> None:
    """Creates what is missing. A real service has migrations for that."""
    async with engine.begin() as c:
        await c.run_sync(Base.metadata.create_all)
        if (await c.execute(text("SELECT to_regclass('outbox_marker')"))).scalar() is None:
            for statement in filter(str.strip, MARKER_DDL.split(";")):
                await c.execute(text(statement))

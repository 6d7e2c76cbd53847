"""The settings of the service. Those of the outbox platform (OUTBOX_…) are read by the layer itself."""

from __future__ import annotations

import os
from dataclasses import dataclass

SERVICE = "file_service"


@dataclass(frozen=True)
class Settings:
    """What configures the service."""

    database_url: str
    """SQLAlchemy's URL of its PostgreSQL, with asyncpg."""
    redis_url: str = ""
    """Where the users' browsers are notified. Empty: nobody is."""
    max_bytes: int = 200_000
    """The largest essay."""
    min_words: int = 3
    """The shortest essay."""

    @classmethod
    def from_env(cls) -> Settings:
        """Reads FILE_SERVICE_DATABASE_URL and FILE_SERVICE_REDIS_URL."""
        return cls(os.environ["FILE_SERVICE_DATABASE_URL"], os.environ.get("FILE_SERVICE_REDIS_URL", ""))

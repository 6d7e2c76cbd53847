"""What happens in the background for a registered database."""

from __future__ import annotations

from dataclasses import dataclass

from outbox_client.config import ConfigError
from outbox_client.transaction import Mode


@dataclass(frozen=True)
class Upkeep:
    """Configures the upkeep of a source database. Times are seconds."""

    marker_retention: float = 3600.0
    """How long a marker stays after its Commit was acknowledged. It must not be less than the platform's."""
    spill_retention: float = 7 * 86400.0
    """The age at which a spilled request is refused instead of published: the platform may have forgotten that it had it already.

    It must not be more than the platform's resolution retention."""
    drain_interval: float = 1.0
    """How often spilled requests are looked for, when nothing has said that there are any."""
    janitor_interval: float = 600.0
    """How often markers that nobody has deleted are looked through."""
    max_acknowledged: int = 1_000_000
    """Markers that this process remembers to delete, 16 bytes each; the janitor finds the others."""
    mode: Mode = Mode.MARKER
    """How the decision of this database's transactions is found out.

    XID_FENCED needs PostgreSQL 17 and no table: there is nowhere to spill to, so transactions fail while the platform is away, and
    nothing to clean up."""

    def __post_init__(self) -> None:
        for name in ("marker_retention", "spill_retention", "drain_interval", "janitor_interval", "max_acknowledged"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, not more than 0")
        if self.mode is Mode.CLIENT_ONLY:
            raise ConfigError("mode is CLIENT_ONLY: a registered database has MARKER or XID_FENCED")

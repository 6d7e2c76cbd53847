"""Counters of a client, for the metrics of the service."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """Counters of a client in this process since it was made. Plain integers: read them, do not set them."""

    calls: int = 0
    """Calls sent, repetitions included."""
    messages: int = 0
    """Messages in which they were sent."""
    resent: int = 0
    """Calls that went out again because a session ended before it answered them."""
    retries: int = 0
    """Repetitions after a failure."""
    sessions: int = 0
    """Sessions opened."""
    connect_failures: int = 0
    """Attempts to open one that failed."""
    drains: int = 0
    """Times that the platform asked for another session."""
    acknowledged: int = 0
    """Commits and Aborts in the background that the platform confirmed."""
    dropped_commits: int = 0
    """Those that were not sent because too many were pending."""
    pending_commits: int = 0
    """Commits and Aborts that are not acknowledged now."""
    checked: int = 0
    """Check-back answers given."""
    alarms: int = 0
    """Alarms raised."""
    spilled: int = 0
    """Requests stored in the source's database because the platform was away."""
    drained: int = 0
    """Those published from there."""
    refused: int = 0
    """Those refused for good by the platform."""
    markers_deleted: int = 0
    """Marker rows removed."""

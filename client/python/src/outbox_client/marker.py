"""The marker table."""

from importlib import resources

MARKER_DDL: str = resources.files("outbox_client").joinpath("marker.sql").read_text(encoding="utf-8")
"""Creates the marker table, in plain SQL for PostgreSQL 13 and newer: the output of `outbox marker-ddl`.

Run it in the schema that the service's search_path finds first. The service's role needs SELECT, INSERT, UPDATE and DELETE on it; row
security must be off.
"""


def marker_statements() -> list[str]:
    """Returns the statements of MARKER_DDL, for drivers that run one at a time."""
    return [s.strip() for s in MARKER_DDL.split(";\n") if s.strip()]

"""The marker table for Alembic (the extra "alembic"). A migration of the service:

    from outbox_client.alembic import create_marker_table, drop_marker_table

    def upgrade() -> None:
        create_marker_table()

    def downgrade() -> None:
        drop_marker_table()

The table is in no metadata of the service, so autogenerate would propose to drop it: pass include_name to context.configure() in
env.py, or declare the table with outbox_client.sqlalchemy.marker_table(metadata).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alembic import op

from outbox_client.marker import marker_statements


def create_marker_table() -> None:
    """Creates the marker table, in the schema that the search_path finds first."""
    for statement in marker_statements():
        op.execute(statement)


def drop_marker_table() -> None:
    """Drops the marker table. Spilled requests that wait in it are lost."""
    op.execute("DROP TABLE outbox_marker")


def include_name(name: str | None, kind: str, parents: Mapping[str, Any]) -> bool:
    """For context.configure(include_name=…): leaves the marker table to these functions."""
    return not (kind == "table" and name == "outbox_marker")

"""The marker table by Alembic and by SQLAlchemy's metadata: the same as by plain SQL."""

from __future__ import annotations

from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from conftest import SourceDatabase
from sqlalchemy import MetaData, create_engine

from outbox_client import alembic
from outbox_client.sqlalchemy import marker_table

COLUMNS = """
SELECT column_name, data_type, is_nullable, column_default, is_identity
FROM information_schema.columns WHERE table_name = 'outbox_marker' ORDER BY 1"""
INDEXES = "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'outbox_marker' ORDER BY 1"


def shape(db: SourceDatabase) -> tuple[list[Any], list[Any]]:
    return db.rows(COLUMNS), db.rows(INDEXES)


def test_alembic(db: SourceDatabase) -> None:
    wanted = shape(db)
    engine = create_engine(db.psycopg_url)
    with engine.begin() as connection:
        context = MigrationContext.configure(connection)
        with Operations.context(context):
            alembic.drop_marker_table()
            alembic.create_marker_table()
    assert shape(db) == wanted
    metadata = MetaData()
    with engine.connect() as connection:
        ours = {"include_name": alembic.include_name, "compare_type": False}
        found = compare_metadata(MigrationContext.configure(connection, opts=ours), metadata)
        assert not [d for d in found if "outbox_marker" in str(d)]
        # A service may declare it instead.
        marker_table(metadata)
        found = compare_metadata(MigrationContext.configure(connection), metadata)
        assert not [d for d in found if "outbox_marker" in str(d)]
    engine.dispose()


def test_metadata(db: SourceDatabase) -> None:
    wanted = shape(db)
    engine = create_engine(db.psycopg_url)
    metadata = MetaData()
    marker_table(metadata)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE outbox_marker")
        metadata.create_all(connection)
    assert shape(db) == wanted
    engine.dispose()

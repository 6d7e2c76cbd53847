"""The marker table: the same as outbox_client.MARKER_DDL."""

from typing import ClassVar

from django.db import migrations

from outbox_client.marker import marker_statements


class Migration(migrations.Migration):
    """Creates it."""

    initial = True
    dependencies: ClassVar[list[tuple[str, str]]] = []
    operations: ClassVar[list[migrations.RunSQL]] = [
        migrations.RunSQL(marker_statements(), "DROP TABLE outbox_marker"),
    ]

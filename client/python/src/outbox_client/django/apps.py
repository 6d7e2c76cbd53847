"""The Django app: it brings the migration of the marker table."""

from django.apps import AppConfig


class OutboxConfig(AppConfig):
    """The app."""

    name = "outbox_client.django"
    label = "outbox_client"
    verbose_name = "Outbox"

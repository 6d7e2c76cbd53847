"""A Django project for the tests: settings, one model, views."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlparse

import django
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.urls import path


def configure(dsn: str, **outbox: Any) -> None:
    """Sets Django up for a database."""
    url = urlparse(dsn)
    settings.configure(
        SECRET_KEY="test",
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["*"],
        USE_TZ=True,
        INSTALLED_APPS=["outbox_client.django"],
        MIDDLEWARE=["outbox_client.django.middleware.AtomicRequestsMiddleware"],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": url.path.lstrip("/"),
                "USER": url.username,
                "PASSWORD": url.password,
                "HOST": url.hostname,
                "PORT": url.port,
                "OPTIONS": {"sslmode": "disable"},
            }
        },
        OUTBOX=outbox,
    )
    django.setup()


def insert(id: str) -> None:
    """Does the business part."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO orders (id) VALUES (%s)", [id])


def place(request: HttpRequest, id: str) -> HttpResponse:
    from events import order

    from outbox_client import django as outbox

    insert(id)
    outbox.publish(order(id))
    if request.GET.get("fail"):
        raise ValueError("the view failed")
    return HttpResponse("placed")


def plain(request: HttpRequest) -> HttpResponse:
    from django.db import connection

    return HttpResponse(str(connection.in_atomic_block))


def inside(request: HttpRequest) -> HttpResponse:
    return plain(request)


def _routes() -> list[Any]:
    from django.db.transaction import non_atomic_requests

    return [path("place/<id>", place), path("plain", non_atomic_requests(plain)), path("atomic", inside)]


urlpatterns = _routes()

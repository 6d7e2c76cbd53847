"""The web service."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

from dishka import AsyncContainer
from opentelemetry import propagate, trace
from outbox_client.compat.huleedu import EventRelayWorker, close
from outbox_client.compat.huleedu.errors import HuleEduError
from outbox_client.compat.huleedu.platform import opened
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from quart import Quart, Response, jsonify, request
from sqlalchemy.ext.asyncio import AsyncEngine

from file_service.config import SERVICE, Settings
from file_service.database import create_tables
from file_service.di import make_container
from file_service.uploads import Upload, UploadService

tracer = trace.get_tracer(SERVICE)


def create_app(container: AsyncContainer) -> Quart:
    """Makes the service of what is in a container. The container is closed when the service ends."""
    app = Quart(SERVICE)

    @app.before_serving
    async def start() -> None:
        await create_tables(await container.get(AsyncEngine))
        await (await container.get(EventRelayWorker)).start()

    @app.after_serving
    async def stop() -> None:
        await (await container.get(EventRelayWorker)).stop()
        await close()
        await container.close()

    @app.post("/batches/<batch_id>/files")
    async def add(batch_id: str) -> tuple[Response, int]:
        with tracer.start_as_current_span("add files", context=propagate.extract(dict(request.headers))):
            correlation_id = correlation()
            files = (await request.files).items(multi=True)  # whatever the form calls them
            uploads = [Upload(f.filename or "", f.read()) for _, f in files]
            if not uploads:
                return jsonify(error="no files"), 400
            service = await container.get(UploadService)
            outcomes = await service.add(
                batch_id, request.headers.get("X-User-ID", "anonymous"), uploads, correlation_id
            )
            answer = [{"id": o.file_upload_id, "name": o.name, "error": o.error_code or None} for o in outcomes]
            return jsonify(correlation_id=str(correlation_id), files=answer), 202

    @app.delete("/batches/<batch_id>/files/<file_id>")
    async def remove(batch_id: str, file_id: str) -> tuple[Response, int]:
        with tracer.start_as_current_span("remove file", context=propagate.extract(dict(request.headers))):
            correlation_id = correlation()
            if not await (await container.get(UploadService)).remove(batch_id, file_id, correlation_id):
                return jsonify(error="there is no such file"), 404
            return jsonify(correlation_id=str(correlation_id)), 200

    @app.get("/batches/<batch_id>")
    async def batch(batch_id: str) -> Response:
        return jsonify(files=await (await container.get(UploadService)).count(batch_id))

    @app.get("/healthz")
    async def healthz() -> Response:
        return jsonify(status="ok")

    @app.get("/readyz")
    async def readyz() -> tuple[Response, int]:
        try:
            await (await container.get(UploadService)).ready()
        except Exception as e:
            return jsonify(status="unavailable", database=str(e)), 503
        # The platform being away fails no upload, so the service is ready without it; it is told all the same.
        platform = opened(SERVICE)
        outbox = (
            "not used yet" if platform is None else "breaker open" if platform.breaker.is_open else platform.client.link
        )
        return jsonify(status="ok", outbox=outbox), 200

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(), content_type=CONTENT_TYPE_LATEST)

    @app.errorhandler(HuleEduError)
    async def refused(error: HuleEduError) -> tuple[Response, int]:
        detail = error.error_detail
        return jsonify(error=detail.message, correlation_id=str(detail.correlation_id), details=detail.details), 502

    return app


def correlation() -> UUID:
    """The caller's correlation id, or a new one."""
    try:
        return UUID(request.headers.get("X-Correlation-ID", ""))
    except ValueError:
        return uuid4()


def main() -> Any:
    """For hypercorn: hypercorn 'file_service.app:main()'."""
    return create_app(make_container(Settings.from_env()))

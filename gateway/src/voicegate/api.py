"""The application: its routes, and what they have in common."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from voicegate import __version__, errors, formats, jobs_api
from voicegate.engine import Engine, Info, Segment, Task
from voicegate.errors import ApiError
from voicegate.http import (
    KEEP_ALIVE,
    EventStream,
    Gate,
    add_error_handlers,
    chunks,
    unless_disconnected,
    with_pauses,
)
from voicegate.jobs import Jobs
from voicegate.logs import event
from voicegate.models import ModelName
from voicegate.proxy import METHODS, Proxy
from voicegate.settings import Settings
from voicegate.transcription import Asked, answer, parse, parse_subtitles
from voicegate.uploads import Form, read_form

# With an upstream: its models, what it speaks, and its own API, as far as there is nothing of ours.
PASSED_ON = ("/v1/{path:path}", "/api/{path:path}")


def create_app(settings: Settings, model: ModelName, engine: Engine, jobs: Jobs | None = None) -> ASGIApp:
    started = int(time.time())
    app = FastAPI(title="voicegate", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    async def transcriptions(request: Request) -> Response:
        return await speech(request, "transcribe")

    async def translations(request: Request) -> Response:
        return await speech(request, "translate")

    async def captions(request: Request) -> Response:
        return await speech(request, "transcribe", parse_subtitles)

    async def speech(
        request: Request, task: Task, read: Callable[[Form, Task, ModelName, Settings], Asked] = parse
    ) -> Response:
        engine.check_room()
        form = await read_form(
            request.headers.get("content-type", ""),
            request.headers.get("content-length", ""),
            chunks(request),
            limit_mib=settings.max_upload_mib,
            folder=settings.upload_dir,
        )
        handed_over = False
        try:
            asked = read(form, task, model, settings)
            items = engine.transcribe(
                asked.upload, asked.options, client=request.client.host if request.client else ""
            )
            if asked.stream:
                response = await _stream(request, items, form)
                handed_over = True
                return response
            return await unless_disconnected(request, _whole(items, asked))
        finally:
            if not handed_over:
                form.close()

    async def health() -> Response:
        status = engine.status()
        ready = status.state not in ("loading", "failed")
        words = {"loaded": "ok", "unloaded": "ok", "reloading": "ok", "loading": "loading", "failed": "error"}
        body = {
            "status": words[status.state],
            "model": model.id,
            "engine": status.engine,
            "version": __version__,
            "device": status.device,
            "compute_type": status.compute_type,
            "compute_type_requested": settings.compute_type,
            "load_state": status.state,
            "queue": {"waiting": status.waiting, "running": status.running, "limit": status.queue_limit},
            "language": settings.language or None,
            "ttl": settings.ttl,
        }
        if status.error:
            body["error"] = status.error
        return JSONResponse(body, 200 if ready else 503)

    def described() -> dict[str, Any]:
        owner = model.repository.partition("/")[0] if model.repository else "local"
        return {"id": model.id, "object": "model", "created": started, "owned_by": owner}

    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [described()]})

    async def get_model(name: str) -> Response:
        if not model.matches(name):
            raise errors.unknown_model(name, [model.id])
        return JSONResponse(described())

    app.add_api_route("/v1/audio/transcriptions", transcriptions, methods=["POST"])
    app.add_api_route("/v1/audio/translations", translations, methods=["POST"])
    app.add_api_route("/v1/audio/subtitles", captions, methods=["POST"])
    app.add_api_route("/health", health, methods=["GET"])
    jobs_api.add_routes(app, settings, model, jobs)
    if settings.upstream:
        proxy = Proxy(settings)
        for path in PASSED_ON:
            app.add_api_route(path, proxy.pass_on, methods=list(METHODS), include_in_schema=False)
    else:
        app.add_api_route("/v1/models", list_models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", get_model, methods=["GET"])
    add_error_handlers(app)
    return Gate(app, settings.api_key)


async def _whole(items: AsyncGenerator[Info | Segment, None], asked: Asked) -> Response:
    info: Info | None = None
    segments: list[Segment] = []
    async with contextlib.aclosing(items):
        async for item in items:
            if isinstance(item, Info):
                info = item
            else:
                segments.append(item)
    if info is None:
        raise errors.internal()
    note(info, len(segments))
    return answer(asked, info, segments)


async def _stream(request: Request, items: AsyncGenerator[Info | Segment, None], form: Form) -> Response:
    """Answer 200 only once the audio is known to be good; everything before that has a status of its own."""
    try:
        info = await unless_disconnected(request, anext(items))
    except BaseException:
        await items.aclose()
        raise
    if not isinstance(info, Info):  # an engine that does not keep to the interface
        raise errors.internal()

    async def events() -> AsyncIterator[bytes]:
        segments: list[Segment] = []
        text = ""
        try:
            async for item in with_pauses(items, KEEP_ALIVE):
                if not isinstance(item, Segment):
                    yield b": waiting\n\n"
                    continue
                segments.append(item)
                delta = item.text if text else item.text.lstrip()
                text += delta
                if delta:
                    yield formats.sse(formats.delta_event(delta))
        except ApiError as error:
            yield formats.sse(error.body())
            return
        note(info, len(segments))
        yield formats.sse(formats.done_event(text.rstrip(), info, segments))

    async def close() -> None:
        await items.aclose()
        form.close()

    return EventStream(request, events(), close)


def note(info: Info, segments: int) -> None:
    event(
        "transcribed", task=info.task, language=info.language, audio_seconds=info.duration,
        speech_seconds=info.duration_after_vad, segments=segments,
    )  # fmt: skip

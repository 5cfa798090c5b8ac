"""The application: its routes, and what they have in common."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from voicegate import (
    __version__,
    errors,
    formats,
    jobs_api,
    keys,
    live_api,
    openapi,
    page_api,
    realtime_api,
    status_api,
)
from voicegate.diarizer import Diarizer, with_turns
from voicegate.engine import Engine, Info, Segment, Task
from voicegate.errors import ApiError
from voicegate.http import (
    ERROR_CODE,
    KEEP_ALIVE,
    EventStream,
    Gate,
    add_error_handlers,
    chunks,
    client_of,
    unless_disconnected,
    with_pauses,
)
from voicegate.jobs import Jobs
from voicegate.live_sessions import LiveSessions
from voicegate.logs import event
from voicegate.metrics import GpuReader, MeasuredEngine, Metrics, TurnsReader
from voicegate.models import ModelName
from voicegate.proxy import METHODS, Proxy
from voicegate.settings import Settings
from voicegate.transcription import Asked, answer, parse, parse_subtitles
from voicegate.uploads import Form, read_form

# With an upstream: its models, what it speaks, and its own API, as far as there is nothing of ours.
PASSED_ON = ("/v1/{path:path}", "/api/{path:path}")
OPEN_PATHS = page_api.PATHS | {"/health", "/ready", "/openapi.json"}


def create_app(
    settings: Settings,
    model: ModelName,
    engine: Engine,
    jobs: Jobs | None = None,
    metrics: Metrics | None = None,
    gpu: GpuReader | None = None,
    turns: TurnsReader | None = None,
    sessions: LiveSessions | None = None,
    diarizer: Diarizer | None = None,
) -> ASGIApp:
    """`gpu` reads the card's memory and `turns` who made room on it, for /status and /metrics.

    With `metrics` the engine is one that is measured by them already.
    """
    started = int(time.time())
    app = FastAPI(title="voicegate", version=__version__, docs_url=None, redoc_url=None)
    if metrics is None:
        metrics = Metrics()
        engine = MeasuredEngine(engine, metrics)
    metrics.watch(engine, gpu, turns)
    if sessions is None:
        sessions = LiveSessions(settings, engine)
    metrics.gauge(
        "live_sessions", "Live sessions, those that wait for their client included", lambda: sessions.count
    )

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
            if asked.diarized and diarizer is not None:
                diarizer.check_room()
            client = client_of(request)
            items = engine.transcribe(asked.upload, asked.options, client=client)
            if asked.stream:
                response = await _stream(request, items, form, asked.options.words, settings.log_text)
                handed_over = True
                return response
            return await unless_disconnected(
                request, _whole(items, asked, settings.log_text, diarizer, client)
            )
        finally:
            if not handed_over:
                form.close()

    def described() -> dict[str, Any]:
        owner = model.repository.partition("/")[0] if model.repository else "local"
        return {"id": model.id, "object": "model", "created": started, "owned_by": owner}

    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [described()]})

    async def get_model(name: str) -> Response:
        if not model.matches(name):
            raise errors.unknown_model(name, [model.id])
        return JSONResponse(described())

    def post(path: str, route: Any, described: dict[str, Any]) -> None:
        app.add_api_route(path, route, methods=["POST"], **described)

    post("/v1/audio/transcriptions", transcriptions, openapi.TRANSCRIPTIONS)
    post("/v1/audio/translations", translations, openapi.TRANSLATIONS)
    post("/v1/audio/subtitles", captions, openapi.SUBTITLES)
    status_api.add_routes(app, settings, model, engine, metrics, gpu)
    page_api.add_routes(app)
    jobs_api.add_routes(app, settings, model, jobs)
    live_api.add_routes(app, settings, model, sessions)
    realtime_api.add_routes(app, settings, model, sessions)
    if settings.upstream:
        proxy = Proxy(settings)
        for path in PASSED_ON:
            app.add_api_route(path, proxy.pass_on, methods=list(METHODS), include_in_schema=False)
    else:
        app.add_api_route("/v1/models", list_models, methods=["GET"], **openapi.MODELS)
        app.add_api_route("/v1/models/{name:path}", get_model, methods=["GET"], **openapi.MODEL)
    add_error_handlers(app)
    known = keys.from_settings(settings)
    openapi.describe(app, known.needed, OPEN_PATHS)
    origins = [item.strip() for item in settings.cors_origins.split(",") if item.strip()]
    gate = Gate(app, known, metrics, OPEN_PATHS, origins)
    if not origins:
        return gate
    # Outside the gate: a browser asks first, without the key, whether it may ask.
    return CORSMiddleware(
        gate,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Request-ID", "Retry-After"],
    )


async def _whole(
    items: AsyncGenerator[Info | Segment, None],
    asked: Asked,
    log_text: bool,
    diarizer: Diarizer | None,
    client: str,
) -> Response:
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
    note(info, segments, log_text)
    if asked.diarized:
        info = await with_turns(diarizer, info, segments, asked.upload, client=client)
    return answer(asked, info, segments)


async def _stream(
    request: Request, items: AsyncGenerator[Info | Segment, None], form: Form, words: bool, log_text: bool
) -> Response:
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
                    yield formats.sse(formats.delta_event(delta, item if words else None))
        except ApiError as error:
            request.scope[ERROR_CODE] = error.code
            yield formats.sse(error.body())
            return
        note(info, segments, log_text)
        yield formats.sse(formats.done_event(text.rstrip(), info, segments))

    async def close() -> None:
        await items.aclose()
        form.close()

    return EventStream(request, events(), close)


def note(info: Info, segments: list[Segment], log_text: bool) -> None:
    event(
        "transcribed", task=info.task, language=info.language, audio_seconds=info.duration,
        speech_seconds=info.duration_after_vad, segments=len(segments),
        text=formats.full_text(segments) if log_text else None,
    )  # fmt: skip

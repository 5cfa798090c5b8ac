"""The routes, and everything HTTP: forms, keys, request ids, disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voicegate import __version__, errors, formats, languages, subtitles
from voicegate.engine import Engine, Info, Options, Segment, Task
from voicegate.errors import ApiError
from voicegate.logs import event, logger, request_id
from voicegate.models import ModelName
from voicegate.settings import Settings
from voicegate.uploads import Form, Upload, read_form

T = TypeVar("T")

RECEIVE_TIMEOUT = 60.0  # seconds without a byte of an upload
KEEP_ALIVE = 15.0  # seconds between signs of life in a stream
GRANULARITIES = ("segment", "word")
SUBTITLES = ("srt", "vtt")


@dataclass(frozen=True)
class Asked:
    """A transcription request, checked."""

    upload: Upload
    options: Options
    response_format: str
    granularities: tuple[str, ...]
    stream: bool
    layout: subtitles.Layout | None = None


def create_app(settings: Settings, model: ModelName, engine: Engine) -> ASGIApp:
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
            _chunks(request),
            limit_mib=settings.max_upload_mib,
            folder=settings.upload_dir,
        )
        handed_over = False
        try:
            asked = read(form, task, model, settings)
            items = engine.transcribe(asked.upload, asked.options)
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
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", get_model, methods=["GET"])
    app.add_api_route("/health", health, methods=["GET"])
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(Exception, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    return Gate(app, settings.api_key)


def parse_subtitles(form: Form, task: Task, model: ModelName, settings: Settings) -> Asked:
    """The request for subtitles in `form`: srt (default) or vtt, and how they are laid out."""
    task = "translate" if form.get("task") == "translate" else task
    if form.get("task") not in ("", "transcribe", "translate"):
        raise errors.invalid(
            f"Invalid value for task: '{form.get('task')}'. Supported values are: 'transcribe', 'translate'.",
            "task",
            "invalid_value",
        )
    asked = parse(form, task, model, settings, SUBTITLES)
    default = subtitles.Layout()
    layout = subtitles.Layout(
        int(_number(form, "max_line_chars", default.line_chars, 10, 200)),
        int(_number(form, "max_lines", default.lines, 1, 4)),
        _number(form, "max_chars_per_second", default.cps, 0, 100),
    )
    return replace(asked, stream=False, layout=layout, options=replace(asked.options, words=True))


def _number(form: Form, param: str, default: float, low: int, high: int) -> float:
    text = form.get(param)
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not low <= value <= high:
        raise errors.invalid(
            f"Invalid value for {param}: '{text}'. It must be a number from {low} to {high}.",
            param,
            "invalid_value",
        )
    return value


def parse(
    form: Form,
    task: Task,
    model: ModelName,
    settings: Settings,
    kinds: tuple[str, ...] = formats.FORMATS,
) -> Asked:
    """The request in `form`; ApiError names what is wrong. The first of `kinds` is the default format."""
    requested = form.get("model")
    if not model.matches(requested):
        raise errors.unknown_model(requested, [model.id])
    if form.upload is None:
        raise errors.missing("file")
    if form.upload.size == 0:
        raise errors.bad_audio("it is empty")
    response_format = form.get("response_format") or kinds[0]
    if response_format not in kinds:
        raise errors.invalid(
            f"Invalid value for response_format: '{response_format}'."
            f" Supported values are: {_quoted(kinds)}.",
            "response_format",
            "invalid_value",
        )
    granularities = tuple(form.list("timestamp_granularities")) or ("segment",)
    for value in granularities:
        if value not in GRANULARITIES:
            raise errors.invalid(
                f"Invalid value for timestamp_granularities: '{value}'."
                f" Supported values are: {_quoted(GRANULARITIES)}.",
                "timestamp_granularities",
                "invalid_value",
            )
    stream = task == "transcribe" and _boolean(form.get("stream"), "stream")
    if stream and response_format not in ("json", "text"):
        raise errors.invalid(
            f"A stream of events cannot carry response_format '{response_format}'; use 'json'.",
            "response_format",
            "invalid_value",
        )
    words = "word" in granularities and response_format == "verbose_json"
    options = Options(
        task=task,
        language=_language(form, settings),
        prompt=form.get("prompt") or None,
        temperature=_temperature(form.get("temperature")),
        words=words,
    )
    return Asked(form.upload, options, response_format, granularities, stream)


def _language(form: Form, settings: Settings) -> str | None:
    given = form.get("language")
    if not given:
        return settings.language or None
    if given.casefold() == "auto":
        return None
    code = languages.code_of(given)
    if code is None:
        raise errors.invalid(
            f"Language '{given}' is not supported. Give an ISO-639-1 code such as 'en' or 'de'.",
            "language",
            "unsupported_language",
        )
    return code


def _temperature(text: str) -> float:
    if not text:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise errors.invalid(
            f"Invalid value for temperature: '{text}'. It must be a number between 0 and 1.",
            "temperature",
            "invalid_value",
        )
    return value


def _boolean(text: str, param: str) -> bool:
    if text.lower() in ("", "false", "0", "null", "none"):
        return False
    if text.lower() in ("true", "1"):
        return True
    raise errors.invalid(
        f"Invalid value for {param}: '{text}'. It must be true or false.", param, "invalid_value"
    )


def _quoted(values: tuple[str, ...]) -> str:
    return ", ".join(f"'{value}'" for value in values)


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
    _note(info, len(segments))
    match asked.response_format:
        case "text":
            return PlainTextResponse(formats.as_text(segments))
        case "srt":
            text = subtitles.as_srt(segments, asked.layout) if asked.layout else formats.as_srt(segments)
            return PlainTextResponse(text, media_type="application/x-subrip; charset=utf-8")
        case "vtt":
            text = subtitles.as_vtt(segments, asked.layout) if asked.layout else formats.as_vtt(segments)
            return PlainTextResponse(text, media_type="text/vtt; charset=utf-8")
        case "verbose_json":
            return JSONResponse(
                formats.as_verbose_json(
                    segments,
                    info,
                    with_segments="segment" in asked.granularities,
                    with_words="word" in asked.granularities,
                )
            )
        case _:
            body = formats.as_json(segments, info)
            if info.task == "translate":
                del body["usage"]
            return JSONResponse(body)


class EventStream(Response):
    """Server-sent events until the source ends or the client goes away."""

    media_type = "text/event-stream"

    def __init__(
        self, request: Request, events: AsyncIterator[bytes], close: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(media_type=self.media_type)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._request = request
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_disconnected(self._request, write())
        finally:
            await self._close()


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
            async for item in _with_pauses(items, KEEP_ALIVE):
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
        _note(info, len(segments))
        yield formats.sse(formats.done_event(text.rstrip(), info, segments))

    async def close() -> None:
        await items.aclose()
        form.close()

    return EventStream(request, events(), close)


async def _with_pauses(items: AsyncGenerator[T, None], seconds: float) -> AsyncIterator[T | None]:
    """The items, and None whenever `seconds` pass without one."""
    pending: asyncio.Future[T] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(anext(items))
            while not (await asyncio.wait({pending}, timeout=seconds))[0]:
                yield None
            try:
                item = pending.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if pending is not None and not pending.done():
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pending


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    while True:
        try:
            async with asyncio.timeout(RECEIVE_TIMEOUT):
                message = await request.receive()
        except TimeoutError:
            raise ApiError(408, "The upload stopped arriving.", code="upload_timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        if body := message.get("body", b""):
            yield body
        if not message.get("more_body", False):
            return


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task: asyncio.Future[T] = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(gone())
    both: set[asyncio.Future[Any]] = {task, watch}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        if left := {item for item in both if not item.done()}:
            for item in left:
                item.cancel()
            await asyncio.wait(left)


def _note(info: Info, segments: int) -> None:
    event(
        "transcribed", task=info.task, language=info.language, audio_seconds=info.duration,
        speech_seconds=info.duration_after_vad, segments=segments,
    )  # fmt: skip


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    return error_response(error if isinstance(error, ApiError) else errors.internal())


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return error_response(errors.internal())
    where = f"{request.method} {request.url.path}"
    message = {404: f"Invalid URL ({where}).", 405: f"Method not allowed ({where})."}.get(
        error.status_code, str(error.detail)
    )
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return error_response(ApiError(error.status_code, message, code=code, headers=dict(error.headers or {})))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    place = first.get("loc", ())
    return error_response(errors.invalid(str(first.get("msg", error)), str(place[-1]) if place else None))


_REQUEST_ID = re.compile(r"^[\w.:/+=-]{1,128}$", re.ASCII)


class Gate:
    """Around every request: its id, the key, one line in the log, every failure in OpenAI's shape."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name: value for name, value in scope["headers"] if name in (b"x-request-id", b"authorization")
        }
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        current = given if _REQUEST_ID.match(given) else f"req_{uuid.uuid4().hex}"
        token = request_id.set(current)
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", current.encode())]
            await send(message)

        try:
            if (refusal := self._refusal(scope, headers.get(b"authorization", b""))) is not None:
                await error_response(refusal)(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = 499  # nobody is there to read it; the number is nginx's, for the log
        except Exception:
            logger.exception("request_failed")
            if status == 0:
                await error_response(errors.internal())(scope, receive, send_with_id)
            status = 500
        finally:
            quiet = scope["path"] == "/health" and status < 400
            event(
                "request", level=logging.DEBUG if quiet else logging.INFO, method=scope["method"],
                path=scope["path"], status=status, seconds=time.perf_counter() - started,
            )  # fmt: skip
            request_id.reset(token)

    def _refusal(self, scope: Scope, authorization: bytes) -> ApiError | None:
        if not self._key or scope["path"] == "/health":
            return None
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key):
            return None
        return errors.unauthorized(given=bool(authorization))

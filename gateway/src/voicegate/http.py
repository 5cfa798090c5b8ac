"""Everything HTTP around the routes: keys, request ids, disconnects, streams of events, failures."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from voicegate import errors
from voicegate.errors import ApiError
from voicegate.keys import Key, Keys
from voicegate.logs import event, logger, request_id
from voicegate.metrics import Metrics

T = TypeVar("T")

ERROR_CODE = "voicegate.error_code"  # where a request's scope holds why it failed
KEY_NAME = "voicegate.key"
SOCKET_KEY = "openai-insecure-api-key."  # before the key, in the header where a browser can put one

RECEIVE_TIMEOUT = 60.0  # seconds without a byte of an upload
KEEP_ALIVE = 15.0  # seconds between signs of life in a stream


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


async def with_pauses(items: AsyncGenerator[T, None], seconds: float) -> AsyncIterator[T | None]:
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


async def chunks(request: Request) -> AsyncIterator[bytes]:
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


async def refuse_socket(socket: WebSocket, error: ApiError) -> None:
    """A status of its own in place of the connection."""
    await socket.send_denial_response(error_response(error, socket.scope))


def subprotocol(socket: WebSocket) -> str | None:
    """The one that a client offered beside its key: browsers want one of theirs to be taken."""
    offered: list[str] = socket.scope.get("subprotocols", [])
    return next((name for name in offered if not name.startswith(SOCKET_KEY)), None)


def error_response(error: ApiError, scope: Scope) -> JSONResponse:
    scope[ERROR_CODE] = error.code
    return JSONResponse(error.body(), error.status, headers=error.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Every failure in OpenAI's shape."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(Exception, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)


async def _on_api_error(request: Request, error: Exception) -> Response:
    return error_response(error if isinstance(error, ApiError) else errors.internal(), request.scope)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return error_response(errors.internal(), request.scope)
    where = f"{request.method} {request.url.path}"
    message = {404: f"Invalid URL ({where}).", 405: f"Method not allowed ({where})."}.get(
        error.status_code, str(error.detail)
    )
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    found = ApiError(error.status_code, message, code=code, headers=dict(error.headers or {}))
    return error_response(found, request.scope)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    place = first.get("loc", ())
    found = errors.invalid(str(first.get("msg", error)), str(place[-1]) if place else None)
    return error_response(found, request.scope)


_REQUEST_ID = re.compile(r"^[\w.:/+=-]{1,128}$", re.ASCII)


# Where an answer's status is, or that of a WebSocket that was refused, or that it was accepted.
_ANSWERS = ("http.response.start", "websocket.http.response.start", "websocket.accept")
_READ = (b"x-request-id", b"authorization", b"origin", b"host")


def _method(scope: Scope) -> str:
    return str(scope.get("method", "WEBSOCKET"))


def _credentials(scope: Scope, headers: Mapping[bytes, bytes]) -> bytes:
    """A browser can put no header on a WebSocket, but it can offer protocols."""
    offered = (name for name in scope.get("subprotocols", ()) if name.startswith(SOCKET_KEY))
    if (name := next(offered, None)) is not None and b"authorization" not in headers:
        return b"Bearer " + str(name).removeprefix(SOCKET_KEY).encode()
    return bytes(headers.get(b"authorization", b""))


def client_of(request: HTTPConnection) -> str:
    """Who asks, for a fair order: the name of the key, without one the address."""
    return str(request.scope.get(KEY_NAME) or (request.client.host if request.client else ""))


class Gate:
    """Around every request: its id, the key, one line in the log, metrics, failures in OpenAI's shape."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        metrics: Metrics,
        open_paths: frozenset[str],
        origins: Sequence[str] = (),
    ) -> None:
        """`origins`: pages of which other sites may open a WebSocket."""
        self._app = app
        self._origins = origins
        self._keys = keys
        self._metrics = metrics
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"] if name in _READ}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        current = given if _REQUEST_ID.match(given) else f"req_{uuid.uuid4().hex}"
        token = request_id.set(current)
        started = time.perf_counter()
        status = 0
        key: Key | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] in _ANSWERS:
                status = message.get("status", 101)
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", current.encode())]
            await send(message)

        try:
            if scope["type"] == "websocket":
                self._check_origin(headers)
            if scope["path"] not in self._open_paths:
                key = self._keys.find(_credentials(scope, headers))
            scope[KEY_NAME] = key.name if key else ""
            # Looking is free, work is counted.
            with self._keys.work(key if scope.get("method", "POST") == "POST" else None):
                await self._app(scope, receive, send_with_id)
        except ApiError as error:  # of the key, or the origin
            await self._refuse(error, scope, receive, send_with_id)
        except ClientDisconnect:
            status = 499  # nobody is there to read it; the number is nginx's, for the log
        except Exception:
            logger.exception("request_failed")
            if status == 0:
                await self._refuse(errors.internal(), scope, receive, send_with_id)
            status = 500
        finally:
            seconds = time.perf_counter() - started
            self._count(scope, status, seconds, key)
            quiet = scope["path"] in ("/health", "/ready", "/metrics") and status < 400
            event(
                "request", level=logging.DEBUG if quiet else logging.INFO, method=_method(scope),
                path=scope["path"], status=status, seconds=seconds,
                code=scope.get(ERROR_CODE), key=key.name if key else None,
            )  # fmt: skip
            request_id.reset(token)

    def _check_origin(self, headers: Mapping[bytes, bytes]) -> None:
        """A browser lets any page open a WebSocket to anywhere, and leaves the judgement to the server."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or "*" in self._origins or origin in self._origins:
            return
        if origin.partition("://")[2] != headers.get(b"host", b"").decode("latin-1"):
            raise errors.foreign_origin(origin)

    @staticmethod
    async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await refuse_socket(WebSocket(scope, receive, send), error)
        else:
            await error_response(error, scope)(scope, receive, send)

    def _count(self, scope: Scope, status: int, seconds: float, key: Key | None) -> None:
        # The pattern of the route, not the path: a client must not be able to make new series.
        route = getattr(scope.get("route"), "path_format", "unknown")
        method = _method(scope)
        if method not in ("GET", "POST", "DELETE", "WEBSOCKET"):
            method = "other"
        self._metrics.requests.labels(method, route, str(status)).inc()
        if scope["type"] == "http":
            self._metrics.request_seconds.labels(route).observe(seconds)
        if key is not None:
            self._metrics.by_key.labels(key.name).inc()
        if (code := scope.get(ERROR_CODE)) is not None:
            self._metrics.errors.labels(code).inc()

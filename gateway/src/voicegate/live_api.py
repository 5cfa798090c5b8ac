"""`/ws/transcribe`: audio comes as binary messages, text goes as JSON; a session outlives a connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections import deque
from typing import Any

from fastapi import FastAPI
from starlette.websockets import WebSocket, WebSocketDisconnect

from voicegate import errors, live
from voicegate.errors import ApiError
from voicegate.formats import as_words
from voicegate.http import client_of, refuse_socket, subprotocol
from voicegate.live_sessions import LiveSessions
from voicegate.logs import event
from voicegate.models import ModelName
from voicegate.settings import Settings
from voicegate.transcription import LiveAsked, parse_live
from voicegate.uploads import Form

PATH = "/ws/transcribe"
IDLE = 120.0  # seconds without a message, after which nobody speaks any more
KEPT = 1000  # messages that a client can have again
UNSENT = 200  # messages that a client may not have taken yet, before no more audio is taken from it
# Closing codes, as RFC 6455 and its registry name them.
NORMAL, POLICY, INTERNAL, AGAIN = 1000, 1008, 1011, 1012


def add_routes(app: FastAPI, settings: Settings, model: ModelName, sessions: LiveSessions) -> None:
    known: dict[str, Session] = {}

    async def transcribe(socket: WebSocket) -> None:
        client = client_of(socket)
        query = Form({name: socket.query_params.getlist(name) for name in socket.query_params})
        name = query.get("session")
        try:
            after = _after(query)
            if name:
                session = known.get(name)
                # Another's session is none.
                if session is None or session.client != client:
                    raise errors.unknown_session(name)
            else:
                session = Session(model.id, client, parse_live(query, model, settings))
                await session.start(sessions)
                known[session.name] = session
                session.when_over(lambda: known.pop(session.name, None))
        except ApiError as error:
            await refuse_socket(socket, error)
            return
        await socket.accept(subprotocol(socket))
        await session.serve(socket, after, resumed=bool(name), patience=settings.live_resume_seconds)

    app.add_api_websocket_route(PATH, transcribe)


def _after(query: Form) -> int:
    text = query.get("after") or "0"
    if not text.isdecimal():
        raise errors.invalid(
            f"Invalid value for after: '{text}'. It must be a number.", "after", "invalid_value"
        )
    return int(text)


def message_of(happened: live.Happened, words: bool) -> dict[str, Any]:
    """What happened, as the client is told."""
    match happened:
        case live.SpeechStarted():
            return {"type": "speech_started", "utterance": happened.utterance, "start": _time(happened.start)}
        case live.SpeechStopped():
            return {"type": "speech_stopped", "utterance": happened.utterance, "end": _time(happened.end)}
        case live.Partial():
            return {
                "type": "partial", "utterance": happened.utterance, "text": happened.text,
                "stable": happened.stable, "start": _time(happened.start), "end": _time(happened.end),
            }  # fmt: skip
        case live.Final():
            return {
                "type": "final", "utterance": happened.utterance, "text": happened.text,
                "language": happened.language, "start": _time(happened.start), "end": _time(happened.end),
                **({"words": as_words(happened.segments)} if words else {}),
            }  # fmt: skip
        case live.Failed():
            return {"type": "error", "utterance": happened.utterance, **happened.error.body()}
        case live.Dropped():
            return {"type": "dropped", "utterance": happened.utterance}
        case live.Flushed():
            return {"type": "flushed", "utterances": happened.utterances}
        case live.Ended():
            return {"type": "ended", "seconds": _time(happened.seconds)}


def _time(seconds: float) -> float:
    return round(seconds, 3)


class Session:
    """One that may be continued over another connection."""

    def __init__(self, model: str, client: str, asked: LiveAsked) -> None:
        self.name = secrets.token_urlsafe(16)
        self.client = client
        self._model = model
        self._asked = asked
        self._received = 0  # bytes of audio
        self._all = False  # no more of it comes
        self._left = False
        self._messages: deque[tuple[int, str]] = deque(maxlen=KEPT)
        self._number = 0  # of the last message
        self._sent = 0
        self._partial = ""
        self._partials = 0
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()
        self._close: int | None = None  # with which code, once it is over
        self._live: live.Live
        self._stack = contextlib.AsyncExitStack()
        self._connection: asyncio.Task[Any] | None = None
        self._waiting: asyncio.Task[None] | None = None

    async def start(self, sessions: LiveSessions) -> None:
        asked = self._asked
        opening = sessions.open(self.client, asked.asked, asked.format, asked.rate, asked.turn, self._tell)
        self._live = await self._stack.enter_async_context(opening)

    def when_over(self, forget: Any) -> None:
        self._stack.callback(forget)

    # -- what happens, for whoever is connected

    def _tell(self, happened: live.Happened) -> None:
        message = message_of(happened, self._asked.asked.options.words)
        if isinstance(happened, live.Partial):  # only the newest is of interest
            self._partial = json.dumps(message, ensure_ascii=False)
            self._partials += 1
            self._changed.set()
        else:
            self._partial = ""
            self._add(message)
        if isinstance(happened, live.Ended):
            self._close = NORMAL
        elif isinstance(happened, live.Failed) and happened.utterance is None:
            self._close = INTERNAL if happened.error.status >= 500 else POLICY

    def _add(self, message: dict[str, Any]) -> None:
        self._number += 1
        self._messages.append(
            (self._number, json.dumps({"seq": self._number, **message}, ensure_ascii=False))
        )
        self._changed.set()

    def _fail(self, error: ApiError) -> None:
        self._add({"type": "error", "utterance": None, **error.body()})

    # -- one connection

    async def serve(self, socket: WebSocket, after: int, resumed: bool, patience: float) -> None:
        """Until the session or the connection ends; then the session waits `patience` seconds for another."""
        await self._take_over()
        self._connection = asyncio.current_task()
        hello = {
            "type": "session", "session": self.name, "resumed": resumed, "received": self._received,
            "model": self._model, "format": self._asked.format, "rate": self._asked.rate,
        }  # fmt: skip
        over = False
        try:
            await socket.send_text(json.dumps(hello, ensure_ascii=False))
            reading = asyncio.create_task(self._read(socket))
            writing = asyncio.create_task(self._write(socket, after))
            try:
                done, _pending = await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in (reading, writing):
                    task.cancel()
                await asyncio.gather(reading, writing, return_exceptions=True)
            over = self._left or (self._close is not None and self._sent >= self._number)
            if over and not self._left:
                await socket.close(self._close or NORMAL)
        except (WebSocketDisconnect, OSError):
            pass  # it went away while it was told something
        except asyncio.CancelledError:
            if self._connection is asyncio.current_task():
                over = True  # the server ends
                raise
            with contextlib.suppress(WebSocketDisconnect, OSError):
                await socket.close(POLICY, "This session goes on over another connection.")
            return
        finally:
            if self._connection is asyncio.current_task():
                self._connection = None
                if over:
                    await self._stack.aclose()
                else:
                    self._waiting = asyncio.create_task(self._wait(patience))

    async def _take_over(self) -> None:
        """There is one connection at a time, and the newest is right."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        before, self._connection = self._connection, None
        if before is not None:
            before.cancel()
            await asyncio.wait({before}, timeout=5)

    async def _wait(self, patience: float) -> None:
        await asyncio.sleep(patience)
        event("live_session_given_up", received_bytes=self._received)
        await self._stack.aclose()

    async def _read(self, socket: WebSocket) -> None:
        while True:
            while self._number - self._sent > UNSENT:
                self._taken.clear()
                await self._taken.wait()
            try:
                async with asyncio.timeout(None if self._all else IDLE):
                    message = await socket.receive()
            except TimeoutError:
                self._fail(errors.idle(IDLE))
                self._close = POLICY
                await asyncio.Event().wait()  # until that was told
            if message["type"] == "websocket.disconnect":
                self._left = message.get("code") == NORMAL  # said goodbye: it does not come back
                return
            if (data := message.get("bytes")) is not None:
                self._received += len(data)
                await self._live.audio(data)
            else:
                await self._obey(message.get("text") or "")

    async def _obey(self, text: str) -> None:
        try:
            asked = json.loads(text)
            kind = asked.get("type")
        except (ValueError, AttributeError):
            kind = None
        match kind:
            case "flush":
                await self._live.flush()
            case "clear":
                await self._live.clear()
            case "end":
                self._all = True
                await self._live.end()
            case _:
                self._fail(
                    errors.invalid(
                        "A text message must be JSON with the type 'flush', 'clear' or 'end';"
                        " audio comes in binary messages.",
                        "type",
                        "invalid_message",
                    )
                )

    async def _write(self, socket: WebSocket, after: int) -> None:
        self._sent = after
        told = 0  # partials
        while True:
            self._changed.clear()
            for number, text in [item for item in self._messages if item[0] > self._sent]:
                await socket.send_text(text)
                self._sent = number
            self._taken.set()
            if self._close is not None and self._sent >= self._number:
                return
            if self._partial and self._partials != told:
                told = self._partials
                await socket.send_text(self._partial)
            await self._changed.wait()

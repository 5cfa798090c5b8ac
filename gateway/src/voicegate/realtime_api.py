"""`/v1/realtime`: OpenAI's realtime protocol, as far as it is about transcription."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI
from starlette.websockets import WebSocket, WebSocketDisconnect

from voicegate import errors, languages, live
from voicegate.ears_wire import Turn
from voicegate.engine import Options
from voicegate.errors import ApiError
from voicegate.http import client_of, refuse_socket, subprotocol
from voicegate.live_sessions import LiveSessions
from voicegate.models import ModelName
from voicegate.settings import Settings

PATH = "/v1/realtime"
IDLE = 1800.0  # seconds without a message
UNSENT = 500  # messages that a client may leave unread before no more audio is taken from it
# What the protocol calls them, and what the ears do. OpenAI's PCM is at 24 kHz.
_FORMATS = {
    "audio/pcm": ("pcm16", 24000),
    "audio/pcmu": ("g711_ulaw", 8000),
    "audio/pcma": ("g711_alaw", 8000),
}
_BETA_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
# Seconds of silence after which semantic VAD would give up waiting; there is no such model here, so
# eagerness decides how long a pause may be.
_EAGERNESS = {"low": 1500, "medium": 800, "auto": 800, "high": 400}


@dataclass(frozen=True)
class Config:
    """What a session is set to."""

    format: str = "audio/pcm"
    rate: int = 24000
    model: str = "whisper-1"
    language: str | None = None  # as the client gave it
    prompt: str = ""
    turn: Turn | None = field(default_factory=Turn)
    semantic: str = ""  # its eagerness, if that is what the client asked for

    def described(self, beta: bool) -> dict[str, Any]:
        transcription = {"model": self.model, "language": self.language, "prompt": self.prompt}
        turn: dict[str, Any] | None = None
        if self.semantic:
            turn = {"type": "semantic_vad", "eagerness": self.semantic}
        elif self.turn is not None:
            turn = {
                "type": "server_vad", "threshold": self.turn.threshold,
                "prefix_padding_ms": self.turn.prefix, "silence_duration_ms": self.turn.silence,
            }  # fmt: skip
        if beta:
            names = {value: name for name, value in _BETA_FORMATS.items()}
            return {
                "input_audio_format": names[self.format], "input_audio_transcription": transcription,
                "turn_detection": turn,
            }  # fmt: skip
        form: dict[str, Any] = {"type": self.format}
        if self.format == "audio/pcm":
            form["rate"] = self.rate
        audio = {
            "format": form,
            "transcription": transcription,
            "noise_reduction": None,
            "turn_detection": turn,
        }
        return {"type": "transcription", "audio": {"input": audio}}


def configured(before: Config, session: Mapping[str, Any], model: ModelName, settings: Settings) -> Config:
    """`before` with what a `session.update` says. ApiError names what is wrong with it.

    Both shapes are taken: that of the interface now (`audio.input`), and the flat one of its beta.
    """
    kind = session.get("type", "transcription")
    if kind != "transcription":
        raise errors.invalid(
            f"This server transcribes; it has no sessions of type '{kind}'.", "session.type", "invalid_value"
        )
    inner = _object(
        _object(session.get("audio", {}), "session.audio").get("input", {}), "session.audio.input"
    )
    result = before
    if "format" in inner:
        form = _object(inner["format"], "session.audio.input.format")
        result = _with_format(result, form.get("type", "audio/pcm"), form.get("rate", 24000))
    elif "input_audio_format" in session:
        given = session["input_audio_format"]
        result = _with_format(result, _BETA_FORMATS.get(str(given), str(given)), 24000)
    where = "transcription" if "transcription" in inner else "input_audio_transcription"
    if (asked := inner.get("transcription", session.get("input_audio_transcription"))) is not None:
        result = _with_transcription(result, _object(asked, where), model, settings)
    for part in (inner, session):
        if "turn_detection" in part:
            return _with_turn(result, part["turn_detection"])
    return result


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise errors.invalid(f"{where} must be an object.", where, "invalid_type")
    return value


def _with_format(before: Config, name: Any, rate: Any) -> Config:
    if name not in _FORMATS:
        raise errors.invalid(
            f"Unknown audio format '{name}'. Supported are {', '.join(_FORMATS)}.",
            "session.audio.input.format",
            "invalid_value",
        )
    if name == "audio/pcm" and rate not in (8000, 16000, 24000, 48000):
        raise errors.invalid(
            f"The rate of audio/pcm is 8000, 16000, 24000 or 48000, not {rate}.",
            "session.audio.input.format.rate",
            "invalid_value",
        )
    return replace(before, format=name, rate=rate if name == "audio/pcm" else 8000)


def _with_transcription(
    before: Config, asked: Mapping[str, Any], model: ModelName, settings: Settings
) -> Config:
    name = asked.get("model") or before.model
    if not isinstance(name, str) or not (model.matches(name) or settings.upstream):
        raise errors.unknown_model(str(name), [model.id])
    language = asked.get("language", before.language) or None
    if language is not None and languages.code_of(str(language)) is None:
        raise errors.invalid(
            f"Language '{language}' is not supported. Give an ISO-639-1 code such as 'en' or 'de'.",
            "session.audio.input.transcription.language",
            "unsupported_language",
        )
    prompt = asked.get("prompt", before.prompt)
    return replace(before, model=name, language=language, prompt=str(prompt or ""))


def _with_turn(before: Config, asked: Any) -> Config:
    where = "session.audio.input.turn_detection"
    if asked is None:
        return replace(before, turn=None, semantic="")
    asked = _object(asked, where)
    kind = asked.get("type", "server_vad")
    if kind == "semantic_vad":
        eagerness = asked.get("eagerness", "auto")
        if eagerness not in _EAGERNESS:
            raise errors.invalid(
                f"eagerness is one of {', '.join(_EAGERNESS)}, not '{eagerness}'.", where, "invalid_value"
            )
        return replace(before, turn=Turn(silence=_EAGERNESS[eagerness]), semantic=eagerness)
    if kind != "server_vad":
        raise errors.invalid(f"Unknown turn detection '{kind}'.", where, "invalid_value")
    turn = Turn(
        threshold=_between(asked, "threshold", Turn.threshold, 0.05, 1.0),
        silence=int(_between(asked, "silence_duration_ms", Turn.silence, 100, 10_000)),
        prefix=int(_between(asked, "prefix_padding_ms", Turn.prefix, 0, 2000)),
    )
    return replace(before, turn=turn, semantic="")


def _between(asked: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = asked.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise errors.invalid(
            f"{name} must be a number from {low:g} to {high:g}.",
            f"session.audio.input.turn_detection.{name}",
            "invalid_value",
        )
    return value


def add_routes(app: FastAPI, settings: Settings, model: ModelName, sessions: LiveSessions) -> None:
    async def realtime(socket: WebSocket) -> None:
        try:
            config = Config(language=settings.language or None)
            if name := socket.query_params.get("model"):
                config = _with_transcription(config, {"model": name}, model, settings)
            async with Conversation(socket, config, model, settings, sessions) as talk:
                await socket.accept(subprotocol(socket))
                await talk.serve()
        except ApiError as error:
            await refuse_socket(socket, error)

    app.add_api_websocket_route(PATH, realtime)


class Conversation:
    """One connection, which is one session."""

    def __init__(
        self,
        socket: WebSocket,
        config: Config,
        model: ModelName,
        settings: Settings,
        sessions: LiveSessions,
    ) -> None:
        self._socket = socket
        self._config = config
        self._model = model
        self._settings = settings
        self._sessions = sessions
        self._beta = "realtime=v1" in socket.headers.get("openai-beta", "")
        self._name = f"sess_{uuid.uuid4().hex}"
        self._out: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._taken = asyncio.Event()
        self._live: live.Live
        self._stack = contextlib.AsyncExitStack()
        self._heard = False  # audio came: its format stays
        self._items: dict[int, str] = {}  # by utterance
        self._said: dict[int, str] = {}  # of an utterance, what went out in deltas
        self._last: str | None = None  # item

    async def __aenter__(self) -> Conversation:
        await self._open()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._stack.aclose()

    async def _open(self) -> None:
        form, _rate = _FORMATS[self._config.format]
        opening = self._sessions.open(
            client_of(self._socket), self._asked(), form, self._config.rate, self._config.turn, self._tell
        )
        self._live = await self._stack.enter_async_context(opening)

    def _asked(self) -> live.Asked:
        config = self._config
        options = Options(
            language=languages.code_of(config.language) if config.language else None,
            prompt=config.prompt or None,
            model="" if self._model.matches(config.model) else config.model,
        )
        # What the client cuts itself may be silence: that is told when it has all been heard.
        return live.Asked(options) if config.turn is not None else live.Asked(options, partials=0.0)

    async def serve(self) -> None:
        self._send(
            "transcription_session.created" if self._beta else "session.created", session=self._session()
        )
        reading = asyncio.create_task(self._read())
        writing = asyncio.create_task(self._write())
        try:
            done, _pending = await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except (WebSocketDisconnect, OSError):
            pass  # it went away while it was told something
        finally:
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)

    def _session(self) -> dict[str, Any]:
        kind = "realtime.transcription_session"
        return {"id": self._name, "object": kind, **self._config.described(self._beta)}

    # -- to the client

    def _send(self, kind: str, **more: Any) -> None:
        self._out.put_nowait({"type": kind, "event_id": f"event_{uuid.uuid4().hex}", **more})

    def _fail(self, error: ApiError, event_id: str | None = None) -> None:
        self._send("error", error={**error.body()["error"], "event_id": event_id})

    async def _write(self) -> None:
        while (message := await self._out.get()) is not None:
            await self._socket.send_text(json.dumps(message, ensure_ascii=False))
            self._taken.set()
        await self._socket.close(1011)

    def _tell(self, happened: live.Happened) -> None:
        manual = self._config.turn is None
        match happened:
            case live.SpeechStarted():
                item = self._items[happened.utterance] = f"item_{uuid.uuid4().hex}"
                self._said[happened.utterance] = ""
                if not manual:
                    self._send(
                        "input_audio_buffer.speech_started", item_id=item, audio_start_ms=_ms(happened.start)
                    )
            case live.SpeechStopped():
                item = self._items[happened.utterance]
                if not manual:
                    self._send(
                        "input_audio_buffer.speech_stopped", item_id=item, audio_end_ms=_ms(happened.end)
                    )
                self._commit(item)
            case live.Partial():
                self._delta(happened.utterance, happened.text[: happened.stable])
            case live.Final():
                self._delta(happened.utterance, happened.text)
                self._said.pop(happened.utterance)
                self._transcription(
                    "completed", happened.utterance, transcript=happened.text,
                    usage={"type": "duration", "seconds": math.ceil(happened.end - happened.start)},
                )  # fmt: skip
                del self._items[happened.utterance]
            case live.Failed(utterance=int(number)):
                self._said.pop(number)
                self._transcription("failed", number, error=happened.error.body()["error"])
                del self._items[number]
            case live.Failed():
                self._fail(happened.error)
                self._out.put_nowait(None)
            case live.Dropped():
                del self._items[happened.utterance], self._said[happened.utterance]
            case live.Flushed():
                if not happened.utterances:
                    self._fail(
                        errors.invalid(
                            "Error committing input audio buffer: the buffer holds no speech.",
                            code="input_audio_buffer_commit_empty",
                        )
                    )
            case live.Ended():
                pass

    def _commit(self, item: str) -> None:
        before, self._last = self._last, item
        self._send("input_audio_buffer.committed", item_id=item, previous_item_id=before)
        content = [{"type": "input_audio", "transcript": None}]
        made = {
            "id": item, "object": "realtime.item", "type": "message", "status": "completed", "role": "user",
            "content": content,
        }  # fmt: skip
        names = ("created",) if self._beta else ("added", "done")
        for name in names:
            self._send(f"conversation.item.{name}", previous_item_id=before, item=made)

    def _delta(self, utterance: int, text: str) -> None:
        """What is new in `text`, if it goes on from what was said: a delta cannot be taken back."""
        said = self._said[utterance]
        if len(text) > len(said) and text.startswith(said):
            self._said[utterance] = text
            self._transcription("delta", utterance, delta=text[len(said) :])

    def _transcription(self, kind: str, utterance: int, **more: Any) -> None:
        self._send(
            f"conversation.item.input_audio_transcription.{kind}", item_id=self._items[utterance],
            content_index=0, **more,
        )  # fmt: skip

    # -- from the client

    async def _read(self) -> None:
        while True:
            while self._out.qsize() > UNSENT:
                self._taken.clear()
                await self._taken.wait()
            try:
                async with asyncio.timeout(IDLE):
                    message = await self._socket.receive()
            except TimeoutError:
                self._fail(errors.idle(IDLE))
                self._out.put_nowait(None)
                await asyncio.Event().wait()  # until that was told
            if message["type"] == "websocket.disconnect":
                return
            event_id: str | None = None
            try:
                try:
                    asked = json.loads(message.get("text") or "")
                except ValueError as error:
                    raise errors.invalid("A message must be a JSON object.", code="invalid_json") from error
                asked = _object(asked, "message")
                event_id = asked.get("event_id")
                await self._obey(asked)
            except ApiError as error:
                self._fail(error, event_id)

    async def _obey(self, asked: Mapping[str, Any]) -> None:
        match asked.get("type"):
            case "input_audio_buffer.append":
                try:
                    data = base64.b64decode(asked.get("audio", ""), validate=True)
                except (binascii.Error, TypeError, ValueError) as error:
                    raise errors.invalid("audio is not base64.", "audio", "invalid_value") from error
                self._heard = True
                await self._live.audio(data)
            case "input_audio_buffer.commit":
                await self._live.flush()
            case "input_audio_buffer.clear":
                await self._live.clear()
                self._send("input_audio_buffer.cleared")
            case "session.update" | "transcription_session.update" as kind:
                await self._update(_object(asked.get("session", {}), "session"))
                self._send(f"{kind}d", session=self._session())
            case kind:
                raise errors.invalid(
                    f"This server does not know events of type '{kind}'; it transcribes.",
                    "type",
                    "invalid_value",
                )

    async def _update(self, session: Mapping[str, Any]) -> None:
        before, config = self._config, configured(self._config, session, self._model, self._settings)
        if (config.format, config.rate) != (before.format, before.rate):
            if self._heard:
                raise errors.invalid(
                    "The audio's format cannot be changed once there was audio.",
                    "session.audio.input.format",
                    "cannot_update_format",
                )
            self._config = config
            await self._stack.aclose()
            await self._open()
            return
        self._config = config
        self._live.asked = self._asked()
        if config.turn != before.turn:
            await self._live.turn(config.turn)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)

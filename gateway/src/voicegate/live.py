"""A live session: audio goes in as it is spoken, what was said comes out. Knows nothing of any protocol.

The ears find the utterances. Each is transcribed when it has ended (`Final`), in order. While somebody
speaks, what was heard so far is transcribed now and then (`Partial`), by the small model if there is one, and
never more than half of the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from voicegate import errors, wire
from voicegate.ears import Ear, Ears, Recording
from voicegate.ears_wire import Turn
from voicegate.engine import Engine, Info, Options, Rank, Segment
from voicegate.errors import ApiError
from voicegate.logs import event, logger

BACKLOG = 30.0  # seconds of speech that may wait to be transcribed; then no more audio is taken


@dataclass(frozen=True)
class SpeechStarted:
    utterance: int
    start: float  # seconds from the beginning of the session, as all times here


@dataclass(frozen=True)
class Partial:
    """What was heard so far; its first `stable` characters did not change since the one before."""

    utterance: int
    start: float
    end: float
    text: str
    stable: int


@dataclass(frozen=True)
class SpeechStopped:
    utterance: int
    end: float


@dataclass(frozen=True)
class Final:
    utterance: int
    start: float
    end: float
    text: str
    language: str | None
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Failed:
    """An utterance that could not be transcribed; without one the session has ended."""

    utterance: int | None
    error: ApiError


@dataclass(frozen=True)
class Dropped:
    utterance: int


@dataclass(frozen=True)
class Flushed:
    """The answer to `flush`, after the utterance that it ended, if there was one."""

    utterances: int


@dataclass(frozen=True)
class Ended:
    seconds: float


Happened = SpeechStarted | Partial | SpeechStopped | Final | Failed | Dropped | Flushed | Ended


@dataclass(frozen=True)
class Asked:
    """What a session wants. `partials`: seconds between two of them, 0 for none."""

    options: Options = field(default_factory=Options)
    partials: float = 1.0


@dataclass(frozen=True)
class _Utterance:
    number: int
    value: dict[str, Any]
    data: bytes
    heard: float  # on the clock

    @property
    def seconds(self) -> float:
        return float(self.value["end"] - self.value["start"])


class Agreement:
    """How much of a growing text has come to stay: the words on which two in a row agree."""

    def __init__(self) -> None:
        self._words: list[str] = []

    def update(self, text: str) -> int:
        """How many characters of `text` are those of the text before."""
        words = text.split()
        same = 0
        for ours, theirs in zip(words, self._words, strict=False):
            if ours != theirs:
                break
            same += 1
        self._words = words
        position = 0
        for word in words[:same]:
            position = text.index(word, position) + len(word)
        return position


class Live:
    """One session. What happens is handed to `tell`, in order."""

    def __init__(
        self, engine: Engine, ears: Ears, client: str, asked: Asked, tell: Callable[[Happened], None]
    ) -> None:
        self._engine = engine
        self._ears = ears
        self._client = client
        self._tell = tell
        self.asked = asked  # may be replaced, for utterances that end from then on
        self._ear: Ear
        self._number = 0
        self._speaking = False
        self._start = 0.0
        self._pending: deque[_Utterance] = deque()
        self._ended: float | None = None
        self._agreement = Agreement()
        self._partial_at = 0.0
        self._drafting: asyncio.Task[None] | None = None
        self._snapshot: asyncio.Future[tuple[dict[str, Any], bytes] | None] | None = None
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, form: str, rate: int, turn: Turn | None) -> None:
        self._ear = await self._ears.open(form, rate, turn)
        self._tasks = [
            asyncio.create_task(self._guard(self._listen())),
            asyncio.create_task(self._guard(self._work())),
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._drafting is not None:
            self._drafting.cancel()
            await asyncio.wait({self._drafting})
        await self._ears.let_go(self._ear)

    async def audio(self, data: bytes) -> None:
        """Waits while too much is left to do."""
        await self._room.wait()
        await self._ear.send("audio", data=data)

    async def flush(self) -> None:
        """End the utterance now; `Flushed` follows."""
        await self._ear.send("flush")

    async def clear(self) -> None:
        """Forget what is being said."""
        await self._ear.send("clear")

    async def turn(self, turn: Turn | None) -> None:
        await self._ear.send("turn", turn)

    async def end(self) -> None:
        """No more audio comes; `Ended` follows when everything was transcribed."""
        await self._ear.send("end")

    async def _guard(self, work: Any) -> None:
        try:
            await work
        except ApiError as error:
            self._tell(Failed(None, error))
        except Exception:
            logger.exception("live_failed")
            self._tell(Failed(None, errors.internal()))

    # -- what the ears say

    async def _listen(self) -> None:
        try:
            while self._ended is None:
                self._hear(*await self._ear.receive())
                self._wake.set()
        finally:
            self._answer_snapshot(None)

    def _hear(self, kind: str, value: Any, data: bytes) -> None:
        match kind:
            case "started":
                self._number += 1
                self._speaking = True
                self._start = value["start"]
                self._agreement = Agreement()
                self._partial_at = time.monotonic() + self.asked.partials
                self._tell(SpeechStarted(self._number, value["start"]))
            case "utterance":
                self._stop_speaking()
                self._pending.append(_Utterance(self._number, value, data, time.monotonic()))
                self._measure_room()
                self._tell(SpeechStopped(self._number, value["end"]))
            case "dropped":
                self._stop_speaking()
                self._tell(Dropped(self._number))
            case "snapshot":
                self._answer_snapshot(None if value is None else (value, data))
            case "flushed":
                self._tell(Flushed(value))
            case "ended":
                self._ended = value["seconds"]
            case _:  # error
                raise wire.error_from(value)

    def _stop_speaking(self) -> None:
        self._speaking = False
        if self._drafting is not None:  # the final one says more
            self._drafting.cancel()

    def _answer_snapshot(self, answer: tuple[dict[str, Any], bytes] | None) -> None:
        if self._snapshot is not None and not self._snapshot.done():
            self._snapshot.set_result(answer)

    def _measure_room(self) -> None:
        if sum(item.seconds for item in self._pending) > BACKLOG:
            self._room.clear()
        else:
            self._room.set()

    # -- what the engine says

    async def _work(self) -> None:
        while True:
            if self._pending:
                await self._transcribe(self._pending[0])
                self._pending.popleft()
                self._measure_room()
                continue
            if self._ended is not None:
                self._tell(Ended(self._ended))
                return
            wait: float | None = None
            if self._speaking and self.asked.partials:
                wait = self._partial_at - time.monotonic()
                if wait <= 0:
                    self._drafting = asyncio.create_task(self._draft(self._number))
                    await asyncio.wait({self._drafting})
                    continue
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    async def _transcribe(self, item: _Utterance) -> None:
        value = item.value
        cut = value["reason"] == "cut"
        options = self.asked.options
        options = replace(options, words=options.words or cut or value["after_cut"])
        try:
            info, segments = await self._ask_twice(item.data, options, Rank.LIVE)
        except ApiError as error:
            self._tell(Failed(item.number, error))
            return
        segments = [shifted(segment, value["begin"]) for segment in segments]
        segments = part(
            segments, value["start"] if value["after_cut"] else None, value["end"] if cut else None
        )
        text = "".join(segment.text for segment in segments).strip()
        event(
            "live_utterance", utterance=item.number, language=info.language, audio_seconds=item.seconds,
            after_seconds=time.monotonic() - item.heard,
        )  # fmt: skip
        self._tell(Final(item.number, value["start"], value["end"], text, info.language, tuple(segments)))

    async def _draft(self, number: int) -> None:
        started = time.monotonic()
        self._snapshot = asyncio.get_running_loop().create_future()
        await self._ear.send("snapshot")
        answer = await self._snapshot
        # The answer may be one to an earlier question that was given up.
        if answer is None or not self._is_current(number) or answer[0]["start"] != self._start:
            return
        value, data = answer
        options = replace(self.asked.options, words=value["after_cut"], draft=True)
        try:
            _info, segments = await self._ask(data, options, Rank.DRAFT)
        except ApiError as error:  # the final one will tell
            event("draft_failed", code=error.code)
            segments = []
        now = time.monotonic()
        self._partial_at = now + max(self.asked.partials, now - started)
        segments = [shifted(segment, value["begin"]) for segment in segments]
        segments = part(segments, value["start"] if value["after_cut"] else None, None)
        text = "".join(segment.text for segment in segments).strip()
        if text and self._is_current(number):
            stable = self._agreement.update(text)
            self._tell(Partial(number, value["start"], value["end"], text, stable))

    def _is_current(self, number: int) -> bool:
        return self._speaking and self._number == number

    async def _ask_twice(self, data: bytes, options: Options, rank: Rank) -> tuple[Info, list[Segment]]:
        """The engine's process may end through no fault of this utterance, and the audio is still here."""
        try:
            return await self._ask(data, options, rank)
        except ApiError as error:
            if error.code != "engine_down":
                raise
        return await self._ask(data, options, rank)

    async def _ask(self, data: bytes, options: Options, rank: Rank) -> tuple[Info, list[Segment]]:
        info: Info | None = None
        segments: list[Segment] = []
        with contextlib.closing(Recording(data)) as recording:
            items = self._engine.transcribe(recording, options, rank, self._client)
            async with contextlib.aclosing(items):
                async for item in items:
                    if isinstance(item, Info):
                        info = item
                    else:
                        segments.append(item)
        if info is None:
            raise errors.internal()
        return info, segments


def shifted(segment: Segment, seconds: float) -> Segment:
    words = tuple(replace(word, start=word.start + seconds, end=word.end + seconds) for word in segment.words)
    return replace(segment, start=segment.start + seconds, end=segment.end + seconds, words=words)


def part(segments: list[Segment], first: float | None, last: float | None) -> list[Segment]:
    """Only the words whose middle lies from `first` to `last`: what else was heard belongs to the other part.

    A segment without times of words is taken whole, or not at all.
    """
    if first is None and last is None:
        return segments

    def inside(start: float, end: float) -> bool:
        middle = (start + end) / 2
        return (first is None or middle >= first) and (last is None or middle < last)

    result: list[Segment] = []
    for segment in segments:
        if not segment.words:
            if inside(segment.start, segment.end):
                result.append(segment)
            continue
        words = tuple(word for word in segment.words if inside(word.start, word.end))
        if words:
            text = "".join(word.word for word in words)
            result.append(replace(segment, start=words[0].start, end=words[-1].end, text=text, words=words))
    return result

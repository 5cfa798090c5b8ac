"""What an engine is: something that turns audio into an asynchronous stream of segments."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol

Task = Literal["transcribe", "translate"]
# unloaded: after idling, the next request loads it again. failed: the last attempt to load did not work.
LoadState = Literal["loading", "loaded", "unloaded", "reloading", "failed"]


@dataclass(frozen=True)
class Options:
    """What a request asks of an engine."""

    task: Task = "transcribe"
    language: str | None = None  # None: detect it
    prompt: str | None = None
    temperature: float = 0.0
    words: bool = False


@dataclass(frozen=True)
class Word:
    start: float
    end: float
    word: str
    probability: float


@dataclass(frozen=True)
class Segment:
    start: float
    end: float
    text: str
    seek: int = 0
    tokens: tuple[int, ...] = ()
    temperature: float = 0.0
    avg_logprob: float = 0.0
    compression_ratio: float = 0.0
    no_speech_prob: float = 0.0
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Info:
    """Known before the first segment."""

    task: Task
    language: str | None  # None: nothing was said, and no language was given
    duration: float
    duration_after_vad: float


class Source(Protocol):
    """Audio that can be opened once, in the engine's thread."""

    def open(self) -> BinaryIO: ...


@dataclass(frozen=True)
class Status:
    engine: str
    state: LoadState
    device: str
    compute_type: str
    waiting: int
    running: int
    queue_limit: int
    error: str | None = None


class Engine(Protocol):
    async def start(self) -> None:
        """Load and warm up; ModelUnavailable if that cannot work."""

    async def stop(self) -> None: ...

    def status(self) -> Status: ...

    def check_room(self) -> None:
        """ApiError (429) if a request would be refused now."""

    def transcribe(self, source: Source, options: Options) -> AsyncGenerator[Info | Segment, None]:
        """One Info, then segments as they are decoded. Closing it cancels the work."""

"""What an engine is: something that turns audio into an asynchronous stream of segments."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, Protocol

Task = Literal["transcribe", "translate"]
# unloaded: after idling, the next request loads it again. failed: the last attempt to load did not work.
LoadState = Literal["loading", "loaded", "unloaded", "reloading", "failed"]


class Rank(IntEnum):
    """Who goes first where several wait (see `worker.choose`)."""

    SERVER = 0  # the server's own: loading, unloading
    LIVE = 1  # somebody speaks and waits for the words
    DRAFT = 2  # what is being said, so far: nothing is lost without it
    INTERACTIVE = 3  # somebody waits for the answer
    JOB = 4  # stored; the result is fetched later


@dataclass(frozen=True)
class Options:
    """What a request asks of an engine."""

    task: Task = "transcribe"
    language: str | None = None  # None: detect it
    prompt: str | None = None
    temperature: float = 0.0
    words: bool = False
    hotwords: str | None = None  # words to expect, given to the decoder in every window
    draft: bool = False  # fast rather than right, by the small model if there is one
    model: str = ""  # another than the server's own; only an upstream may have one


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
class Turn:
    """One speaker speaks, from start to end in seconds. Turns of several may overlap."""

    start: float
    end: float
    speaker: str


@dataclass(frozen=True)
class Info:
    """Known before the first segment, but for the turns."""

    task: Task
    language: str | None  # None: nothing was said, and no language was given
    duration: float
    duration_after_vad: float
    turns: tuple[Turn, ...] | None = None  # who spoke when, where that was asked for


class Source(Protocol):
    """Audio in an open file."""

    def descriptor(self) -> int:
        """The file's descriptor, at its beginning. It stays the source's own."""


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


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do with the model it serves; known once the model was loaded."""

    tasks: tuple[Task, ...]
    languages: tuple[str, ...]
    words: bool  # times of single words


class Engine(Protocol):
    async def start(self) -> None:
        """Load and warm up; ModelUnavailable if that cannot work."""

    async def stop(self) -> None: ...

    def status(self) -> Status: ...

    def capabilities(self) -> Capabilities | None:
        """None as long as the model was never loaded."""

    def check_room(self) -> None:
        """ApiError (429) if a request would be refused now."""

    def transcribe(
        self, source: Source, options: Options, rank: Rank = Rank.INTERACTIVE, client: str = ""
    ) -> AsyncGenerator[Info | Segment, None]:
        """One Info, then segments as they are decoded. Closing it cancels the work.

        `client`: whose request it is; within a rank the clients share the engine's time fairly.
        ApiError: 503 `model_load_failed`, `engine_down` (its process ended), `out_of_memory`; 400 for audio.
        """

"""What a live session hears: samples in, utterances out, with a bounded memory of what was said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from voicegate.ears_wire import RATE, Turn
from voicegate.vad import WINDOW, Listening, Mark, Samples, Segmenter

OVERLAP = RATE  # samples on both sides of a cut in the middle of speech
TAIL = RATE // 5  # samples kept of the silence after speech
LONGEST_BY_HAND = 300 * RATE  # samples that are kept for a client that decides itself what an utterance is
PIECE = 16 * WINDOW  # samples looked at in one go

Reason = Literal["silence", "cut", "flush"]


@dataclass(frozen=True)
class Started:
    start: float  # seconds from the beginning of the session, as all times here


@dataclass(frozen=True)
class Utterance:
    """`samples` begin at `begin`; of a part only the words from `start` to `end` belong to it."""

    start: float
    end: float
    begin: float
    reason: Reason
    after_cut: bool
    samples: Samples


@dataclass(frozen=True)
class Dropped:
    """What was being said is not wanted."""


Heard = Started | Utterance | Dropped


class Hearing:
    """One session's ear. Without a `turn` the client alone says where utterances end (`flush`)."""

    def __init__(self, turn: Turn | None, listening: Listening | None) -> None:
        self._kept = np.zeros(0, np.int16)
        self._offset = 0  # of its first sample
        self._looked = 0  # samples the model has seen
        self._start: int | None = None
        self._after_cut = False
        self._set(turn, listening)

    def _set(self, turn: Turn | None, listening: Listening | None) -> None:
        self._listening = listening
        self._segmenter = Segmenter(turn) if turn is not None else None
        self._base = self._looked  # where the segmenter's windows begin
        self._prefix = turn.prefix * RATE // 1000 if turn is not None else 0

    def change(self, turn: Turn | None, listening: Listening | None) -> Iterator[Heard]:
        """From now on utterances are found by `turn`; what was being said is not wanted."""
        yield from self.clear()
        self._set(turn, listening)

    @property
    def seconds(self) -> float:
        return self._total / RATE

    @property
    def _total(self) -> int:
        return self._offset + self._kept.shape[0]

    def feed(self, samples: Samples) -> Iterator[Heard]:
        for first in range(0, samples.shape[0], PIECE):
            self._kept = np.concatenate([self._kept, samples[first : first + PIECE]])
            yield from self._look()
            self._forget()

    def snapshot(self) -> Utterance | None:
        """What is being said now, as far as it has been heard; None while nobody speaks."""
        return None if self._start is None else self._utterance(self._total, self._total, "flush")

    def flush(self) -> Iterator[Heard]:
        """Whatever is being said has ended now."""
        if self._segmenter is None:
            if self._start is not None:
                yield self._end(self._total, "flush")
        elif (mark := self._segmenter.flush()) is not None:
            yield self._end(self._at(mark), "flush")
        self._forget()

    def clear(self) -> Iterator[Heard]:
        if self._segmenter is not None:
            self._segmenter.reset()
        if self._start is not None:
            yield Dropped()
        self._start = None
        self._after_cut = False
        self._drop(self._looked)

    def _at(self, mark: Mark) -> int:
        return self._base + mark.window * WINDOW

    def _drop(self, until: int) -> None:
        """Let go of the samples before that one."""
        self._kept = self._kept[until - self._offset :]
        self._offset = until

    def _look(self) -> Iterator[Heard]:
        if self._segmenter is None or self._listening is None:
            yield from self._by_hand()
            return
        count = (self._total - self._looked) // WINDOW * WINDOW
        found = self._listening.probabilities(self._slice(self._looked, self._looked + count))
        self._looked += count
        for mark in self._segmenter.feed(found):
            at = self._at(mark)
            if mark.kind == "start":
                self._start = at
                yield Started(at / RATE)
            elif mark.kind == "end":
                yield self._end(at, "silence")
            else:
                yield self._utterance(at, at + OVERLAP, "cut")
                self._start, self._after_cut = at, True
                yield Started(at / RATE)

    def _by_hand(self) -> Iterator[Heard]:
        self._looked = self._total
        if self._start is None:
            self._start = self._offset
            yield Started(self._start / RATE)
        elif self._total - self._start >= LONGEST_BY_HAND:
            yield self._end(self._total, "cut")

    def _end(self, at: int, reason: Reason) -> Utterance:
        found = self._utterance(at, at + TAIL, reason)
        self._start, self._after_cut = None, False
        if self._segmenter is None:
            self._drop(self._total)
        return found

    def _utterance(self, end: int, until: int, reason: Reason) -> Utterance:
        start = self._start or 0
        before = OVERLAP if self._after_cut else self._prefix
        begin = max(self._offset, start - before)
        samples = self._slice(begin, min(until, self._total))
        return Utterance(start / RATE, end / RATE, begin / RATE, reason, self._after_cut, samples)

    def _slice(self, first: int, last: int) -> Samples:
        return self._kept[first - self._offset : last - self._offset]

    def _forget(self) -> None:
        """Let go of what no utterance can need any more."""
        if self._segmenter is None:
            return
        # What is put before speech, and the windows that it takes to find it.
        before = self._prefix + Segmenter.BEGIN * 4 * WINDOW
        if self._start is None:
            wanted = self._looked - before
        else:
            wanted = self._start - max(before, OVERLAP if self._after_cut else 0)
        if wanted - self._offset > PIECE:
            self._drop(wanted)

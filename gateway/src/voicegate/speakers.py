"""Who said what: segments with the times of their words, merged with turns of speakers. Pure functions."""

from __future__ import annotations

import bisect
import itertools
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from voicegate.engine import Segment, Turn


@dataclass(frozen=True)
class Piece:
    """Text that is never split, with the times of its word, in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Utterance:
    """What one speaker says until another one speaks. Seconds; `speaker` as OpenAI names them: A, B, …"""

    start: float
    end: float
    text: str
    speaker: str


def merge(segments: Sequence[Segment], turns: Sequence[Turn]) -> list[Utterance]:
    """Every word to the turn that it overlaps most, else to the nearest; without turns all to one speaker.

    Speakers are named in the order in which they first say something.
    """
    among = TurnIndex(turns)
    said = (
        (among.speaker(piece), piece)
        for segment in segments
        if segment.text.strip()
        for piece in pieces(segment)
    )
    names: dict[str, str] = {}
    merged = []
    for speaker, group in itertools.groupby(said, key=lambda item: item[0]):
        mine = [piece for _unused, piece in group]
        merged.append(
            Utterance(
                min(piece.start for piece in mine),
                max(piece.end for piece in mine),
                "".join(piece.text for piece in mine).strip(),
                names.setdefault(speaker, label(len(names))),
            )
        )
    return merged


def label(number: int) -> str:
    """A to Z, then AA, AB, …"""
    letters = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        letters = string.ascii_uppercase[rest] + letters
    return letters


def pieces(segment: Segment) -> Iterator[Piece]:
    """The segment's text cut between its words; together they are all of it.

    Engines give words with or without the spaces and the punctuation around them, so each is looked for in
    the text. One that is not there, written otherwise, stays with the word before it.
    """
    text = segment.text
    begun: list[tuple[int, float, float]] = []
    end = 0  # of the word before
    for word in segment.words:
        written = word.word.strip()
        found = text.find(written, end)
        if not written or found < 0:
            continue
        # From the first space on, what stands between two words belongs to the second: an opening quote.
        space = next((at for at in range(end, found) if text[at].isspace()), found)
        begun.append((space, word.start, word.end))
        end = found + len(written)
    if not begun:
        yield Piece(segment.start, segment.end, text)
        return
    cuts = [0, *(at for at, _start, _end in begun[1:]), len(text)]
    for (_at, start, until), (begin, stop) in zip(begun, itertools.pairwise(cuts), strict=True):
        yield Piece(start, until, text[begin:stop])


class TurnIndex:
    def __init__(self, turns: Sequence[Turn]) -> None:
        self._turns = sorted(turns, key=lambda turn: (turn.start, turn.end))
        self._starts = [turn.start for turn in self._turns]
        # The latest end of a turn and of all before it: where looking back is of no more use.
        self._reach = list(itertools.accumulate((turn.end for turn in self._turns), max))

    def speaker(self, piece: Piece) -> str:
        """Of the turn that overlaps it most, or is nearest; empty where there are no turns."""
        behind = bisect.bisect_left(self._starts, piece.end)  # the first that begins when it has ended
        best, speaker = -float("inf"), ""
        for turn in self._turns[behind : behind + 1]:
            best, speaker = overlap(piece, turn), turn.speaker
        for index in range(behind - 1, -1, -1):
            if self._reach[index] - piece.start <= best:
                break
            if (seconds := overlap(piece, self._turns[index])) > best:
                best, speaker = seconds, self._turns[index].speaker
        return speaker


def overlap(piece: Piece, turn: Turn) -> float:
    """Seconds; below zero, how far they are apart."""
    return min(piece.end, turn.end) - max(piece.start, turn.start)

"""Subtitles: segments with word times to cues that people can read. Pure functions.

Limits are those of common style guides: two lines of 42 columns, 17 characters a second, one to seven
seconds for a cue. A full-width character (Chinese, Japanese, Korean) takes two columns. Words are never
split; between full-width characters a line may break, but not before closing or after opening punctuation.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from voicegate import formats
from voicegate.engine import Segment

SHORTEST, LONGEST = 1.0, 7.0  # seconds of a cue, where its neighbours allow it
PAUSE = 1.5  # seconds of silence after which a new cue begins
# Ends of sentences; the escapes are the full-width ones, Arabic's question mark and the ellipsis.
_SENTENCE = frozenset(".!?\u3002\uff01\uff1f\u061f\u2026")
# Long vowel and repetition marks of Japanese begin no line either.
_FOLLOWING = frozenset("\u30fc\u3005")
_LEADING = frozenset("\u00bf\u00a1")  # of Spanish


@dataclass(frozen=True)
class Layout:
    """What a cue may be: columns of a line, lines, characters that are read in a second (0: as they come)."""

    line_chars: int = 42
    lines: int = 2
    cps: float = 17.0


@dataclass(frozen=True)
class Cue:
    """Seconds, and the lines that are shown."""

    start: float
    end: float
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _Atom:
    """What is never split: a word, or a full-width character with the punctuation that belongs to it."""

    text: str
    start: float
    end: float
    space: bool  # one stands before it, if it does not begin a line


def width(text: str) -> int:
    """Columns: two for a full-width character, none for a mark that combines or a sign without shape."""
    columns = 0
    for character in text:
        if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
            continue
        columns += 2 if unicodedata.east_asian_width(character) in "WF" else 1
    return columns


def _closes(character: str) -> bool:
    """Punctuation that belongs to what stands before it."""
    if character in _LEADING:
        return False
    return character in _FOLLOWING or unicodedata.category(character) in ("Pe", "Pf", "Po")


def _opens(character: str) -> bool:
    """Punctuation that belongs to what comes after it."""
    return character in _LEADING or unicodedata.category(character) in ("Ps", "Pi")


def _full_width(character: str) -> bool:
    # Korean has full-width characters too, and spaces between its words: those are not split.
    wide = unicodedata.east_asian_width(character) in "WF"
    return wide and not unicodedata.name(character, "").startswith("HANGUL")


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Parts between which a line may break, each with whether a space stands before it."""
    for number, word in enumerate(text.split()):
        spaced, piece = number > 0 or text[:1].isspace(), ""
        for character in word:
            joins = (
                not piece
                or _closes(character)
                or _opens(piece[-1])
                or unicodedata.combining(character) > 0
                or not (_full_width(character) or _full_width(piece[-1]))
            )
            if not joins:
                yield piece, spaced
                piece, spaced = "", False
            piece += character
        if piece:
            yield piece, spaced


def _atoms(segments: Sequence[Segment]) -> list[_Atom]:
    atoms: list[_Atom] = []
    for segment in segments:
        timed = [(word.word, word.start, word.end) for word in segment.words]
        if not timed:
            timed = [(segment.text, segment.start, segment.end)]
        for number, (text, start, end) in enumerate(timed):
            pieces = list(_pieces(text))
            total = sum(width(piece) for piece, _spaced in pieces) or 1
            at = start
            for index, (piece, spaced) in enumerate(pieces):
                # Without times of its own a piece gets its share by its width.
                until = end if index == len(pieces) - 1 else at + (end - start) * width(piece) / total
                # Segments are sentences or parts of them: what begins one is a word of its own.
                new = spaced or (number == 0 and index == 0 and not _full_width(piece[0]))
                glued = atoms and not new and not _may_break(atoms[-1].text, piece)
                if glued:
                    atoms[-1] = replace(atoms[-1], text=atoms[-1].text + piece, end=max(atoms[-1].end, until))
                else:
                    atoms.append(_Atom(piece, at, max(at, until), bool(atoms) and new))
                at = until
    return atoms


def _may_break(before: str, after: str) -> bool:
    if _closes(after[0]) or _opens(before[-1]):
        return False
    return _full_width(before[-1]) or _full_width(after[0])


def _join(atoms: Sequence[_Atom]) -> str:
    return "".join((" " if atom.space and number else "") + atom.text for number, atom in enumerate(atoms))


def _wrap(atoms: Sequence[_Atom], layout: Layout) -> list[str] | None:
    """Lines as even as they can be; None if they would be too many. Too long a word has a line alone."""
    lines = _greedy(atoms, layout.line_chars)
    if len(lines) > layout.lines:
        return None
    # The narrowest column that needs no more lines.
    low, high = max(width(atom.text) for atom in atoms), layout.line_chars
    while low < high:
        middle = (low + high) // 2
        narrow = _greedy(atoms, middle)
        if len(narrow) <= len(lines):
            lines, high = narrow, middle
        else:
            low = middle + 1
    return [_join(line) for line in lines]


def _greedy(atoms: Sequence[_Atom], columns: int) -> list[list[_Atom]]:
    lines: list[list[_Atom]] = []
    room = 0
    for atom in atoms:
        needed = width(atom.text) + atom.space
        if not lines or needed > room:
            lines.append([])
            needed, room = width(atom.text), columns
        lines[-1].append(atom)
        room -= needed
    return lines


def cues(segments: Sequence[Segment], layout: Layout = Layout()) -> list[Cue]:
    """Cues in order of time, none over the next; every word of the segments is in exactly one of them."""
    groups: list[list[_Atom]] = []
    for atom in _atoms(segments):
        group = groups[-1] if groups else []
        if not group or _ends(group, atom, layout):
            groups.append([atom])
        else:
            group.append(atom)
    found: list[Cue] = []
    for number, group in enumerate(groups):
        lines = _wrap(group, layout) or [_join(group)]
        start = max(group[0].start, found[-1].end if found else 0.0)
        end = max(group[-1].end, start)
        seconds = max(SHORTEST, sum(map(width, lines)) / layout.cps if layout.cps else 0.0)
        if end - start < seconds:
            # It may stay until the next one comes.
            limit = groups[number + 1][0].start if number + 1 < len(groups) else start + seconds
            end = max(end, min(start + seconds, limit))
        found.append(Cue(start, end, tuple(lines)))
    return found


def _ends(group: Sequence[_Atom], atom: _Atom, layout: Layout) -> bool:
    """Whether a cue ends before this atom."""
    if atom.start - group[-1].end > PAUSE or atom.end - group[0].start > LONGEST:
        return True
    if _wrap([*group, atom], layout) is None:
        return True
    # A sentence that fills a line is a cue of its own.
    return group[-1].text[-1] in _SENTENCE and width(_join(group)) >= layout.line_chars * 2 // 3


def as_srt(segments: Sequence[Segment], layout: Layout = Layout()) -> str:
    return "".join(
        f"{number}\n{_times(cue, ',')}\n" + "".join(f"{formats.cue(line)}\n" for line in cue.lines) + "\n"
        for number, cue in enumerate(cues(segments, layout), start=1)
    )


def as_vtt(segments: Sequence[Segment], layout: Layout = Layout()) -> str:
    return "WEBVTT\n\n" + "".join(
        f"{_times(cue, '.')}\n" + "".join(f"{formats.vtt_cue(line)}\n" for line in cue.lines) + "\n"
        for cue in cues(segments, layout)
    )


def _times(cue: Cue, mark: str) -> str:
    return f"{formats.timestamp(cue.start, mark)} --> {formats.timestamp(cue.end, mark)}"

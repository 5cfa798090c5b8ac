"""Subtitles: what people can read, in any script, and what players can parse."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from voicegate import subtitles
from voicegate.engine import Segment, Word
from voicegate.subtitles import Cue, Layout, width
from voicegate_support import Clip, Server, clips

TIME = r"\d\d:\d\d:\d\d[,.]\d\d\d"


def said(text: str, *, at: float = 0.0, pace: float = 0.3, words: bool = True) -> Segment:
    """A segment whose words come one after the other; as Whisper has them, with the space before."""
    parts = re.findall(r"\s*\S+", text)
    times = [Word(at + n * pace, at + (n + 1) * pace, part, 1.0) for n, part in enumerate(parts)]
    return Segment(at, at + pace * len(parts), text, words=tuple(times) if words else ())


def plain(found: list[Cue]) -> str:
    return re.sub(r"\s", "", "".join("".join(cue.lines) for cue in found))


def parsed(text: str, mark: str) -> list[tuple[str, str, list[str]]]:
    """A strict reader of SRT (`,`) and VTT (`.`): start, end, lines of each cue."""
    if mark == ".":
        assert text.startswith("WEBVTT\n\n")
        text = text.removeprefix("WEBVTT\n\n")
    found = []
    for number, block in enumerate(re.split(r"\n\n", text)[:-1], start=1):
        lines = block.split("\n")
        if mark == ",":
            assert lines.pop(0) == str(number)
        times = re.fullmatch(f"({TIME}) --> ({TIME})", lines.pop(0))
        assert times
        assert lines
        assert all(lines)
        found.append((times[1], times[2], lines))
    assert text.endswith("\n\n") or not found
    return found


def test_a_long_sentence_is_cut_between_words_and_set_in_even_lines() -> None:
    text = (
        " When the lights in the kitchen go out after midnight, the heating in the bathroom is to be turned"
        " down to eighteen degrees."
    )
    found = subtitles.cues([said(text)])
    assert [cue.lines for cue in found] == [
        ("When the lights in the kitchen go out", "after midnight, the heating in the"),
        ("bathroom is to be turned", "down to eighteen degrees."),
    ]


def test_cuts_are_at_the_times_of_words() -> None:
    found = subtitles.cues([said(" one two three four five six", pace=0.5)], Layout(line_chars=10, lines=1))
    assert [(cue.start, cue.lines) for cue in found] == [
        (0.0, ("one two",)),
        (1.0, ("three four",)),
        (2.0, ("five six",)),
    ]


def test_silence_begins_a_new_cue_and_a_short_one_stays_to_be_read() -> None:
    found = subtitles.cues([said(" Yes.", pace=0.2), said(" Turn it off.", at=5.0, pace=0.2)])
    assert [(cue.start, cue.end) for cue in found] == [(0.0, 1.0), (5.0, 6.0)]


def test_a_cue_ends_where_the_next_begins() -> None:
    layout = Layout(line_chars=12, lines=1)
    first, second = subtitles.cues([said(" abcdefghijk lmnopqrstuv", pace=0.2)], layout)
    assert first.end == second.start == 0.2


def test_chinese_breaks_between_characters_but_not_before_punctuation() -> None:
    text = "\u5f00\u706f\u3002" * 12
    found = subtitles.cues([Segment(0, 20, text)], Layout(line_chars=10, lines=2))
    assert plain(found) == text
    for cue in found:
        for line in cue.lines:
            assert width(line) <= 10
            assert line[0] != "\u3002"
            assert " " not in line


def test_korean_and_arabic_words_stay_whole() -> None:
    for text in (
        " \uc8fc\ubc29\uc758 \ubd88\uc744 \ucf1c \uc8fc\uc138\uc694",
        " \u0623\u0634\u0639\u0644 \u0627\u0644\u0636\u0648\u0621 \u0641\u064a",
    ):
        found = subtitles.cues([said(text)], Layout(line_chars=10, lines=1))
        assert " ".join(" ".join(cue.lines) for cue in found).split() == text.split()


WORDS = st.lists(
    st.text("ab\u4e2d\u6587\u3002\uff08.,-\u0627\u0644\u0301\uac00", min_size=1, max_size=12), max_size=40
)
LAYOUTS = st.builds(Layout, st.integers(10, 60), st.integers(1, 3), st.sampled_from([0.0, 10.0, 17.0]))


@given(st.lists(WORDS, max_size=4), LAYOUTS, st.floats(0.01, 2.0), st.booleans())
def test_nothing_is_lost_split_or_over_the_limits(
    sentences: list[list[str]], layout: Layout, pace: float, times: bool
) -> None:
    segments = []
    at = 0.0
    for sentence in sentences:
        segments.append(said("".join(f" {word}" for word in sentence), at=at, pace=pace, words=times))
        at += pace * len(sentence) + 0.1
    found = subtitles.cues(segments, layout)
    assert plain(found) == "".join("".join(sentence) for sentence in sentences)
    before = 0.0
    for cue in found:
        assert before <= cue.start <= cue.end
        before = cue.end
        assert 1 <= len(cue.lines) <= layout.lines
        for line in cue.lines:
            assert line == line.strip() != ""
            # Wider than allowed is only what has no place to break.
            assert width(line) <= layout.line_chars or " " not in line
    # A word without full-width characters is never divided.
    shown = " ".join(" ".join(cue.lines) for cue in found).split()
    for sentence in sentences:
        for word in sentence:
            if word.isascii():
                assert any(word in piece for piece in shown)
    assert len(parsed(subtitles.as_srt(segments, layout), ",")) == len(found)
    assert len(parsed(subtitles.as_vtt(segments, layout), ".")) == len(found)


# The route


def post(server: Server, clip: Clip, **fields: str) -> tuple[int, dict[str, str], str]:
    parts = {"model": "whisper-1", "language": "en", **fields}
    form = [(f'name="{name}"', text.encode()) for name, text in parts.items()]
    form.append((f'name="file"; filename="{clip.file}"\r\nContent-Type: audio/wav', clip.path.read_bytes()))
    status, headers, body = server.post("/v1/audio/subtitles", form)
    return status, headers, body.decode()


def test_the_route_gives_srt_and_vtt(server: Server) -> None:
    clip = next(clip for clip in clips("A") if clip.file == "A026.wav")
    status, headers, text = post(server, clip)
    assert (status, headers["content-type"]) == (200, "application/x-subrip; charset=utf-8")
    ((start, _end, lines),) = parsed(text, ",")
    assert start.startswith("00:00:0")
    assert " ".join(lines) == clip.text
    narrow = {"response_format": "vtt", "max_line_chars": "12", "max_lines": "1"}
    _status, headers, text = post(server, clip, **narrow)
    assert headers["content-type"] == "text/vtt; charset=utf-8"
    cues = parsed(text, ".")
    assert len(cues) > 1
    assert all(len(line) <= 12 for _start, _end, (line,) in cues)
    assert " ".join(line for _start, _end, (line,) in cues) == clip.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_line_chars": "5"}, "max_line_chars"),
        ({"max_lines": "many"}, "max_lines"),
        ({"max_chars_per_second": "-1"}, "max_chars_per_second"),
        ({"response_format": "json"}, "response_format"),
        ({"task": "sing"}, "task"),
    ],
)
def test_the_route_names_what_is_wrong(server: Server, fields: dict[str, str], param: str) -> None:
    status, _headers, text = post(server, clips("A")[0], **fields)
    assert status == 400
    assert json.loads(text)["error"]["param"] == param

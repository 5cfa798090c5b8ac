"""What live sessions hear: utterances found in probabilities, samples kept and let go, streams decoded."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from voicegate import streams
from voicegate.ears_wire import FORMATS, RATE, Turn, pack
from voicegate.engine import Segment, Word
from voicegate.errors import ApiError
from voicegate.hearing import LONGEST_BY_HAND, OVERLAP, PIECE, Dropped, Heard, Hearing, Started, Utterance
from voicegate.live import Agreement, part, shifted
from voicegate.vad import WINDOW, Listening, Mark, Samples, Segmenter, Silero
from voicegate_support import CLIPS, encoded, samples_of

TURN = Turn()
SECOND = RATE // WINDOW  # windows


class LoudnessStandIn(Listening):
    """A stand-in for the VAD model: what is loud is speech. So a test can draw what it wants to be heard."""

    def __init__(self) -> None:
        self.windows = 0

    def probabilities(self, samples: Samples) -> list[float]:
        found = np.abs(samples.reshape(-1, WINDOW)).max(axis=1) if samples.shape[0] else np.zeros(0)
        self.windows += found.shape[0]
        return [0.99 if item > 1000 else 0.01 for item in found]


def marks(*runs: tuple[float, int], turn: Turn = TURN) -> list[Mark]:
    """The marks for runs of (probability, windows)."""
    segmenter = Segmenter(turn)
    return list(segmenter.feed([probability for probability, count in runs for _window in range(count)]))


def test_an_utterance_begins_and_ends() -> None:
    found = marks((0.0, 10), (0.9, 20), (0.0, 40))
    assert found == [Mark("start", 10), Mark("end", 30)]


def test_a_click_is_no_speech() -> None:
    assert marks((0.0, 10), (0.99, 2), (0.0, 60), (0.99, 1), (0.0, 60)) == []


def test_a_short_pause_ends_nothing_and_a_longer_one_does() -> None:
    silence = round(TURN.silence * RATE / 1000 / WINDOW)
    assert marks((0.9, 20), (0.0, silence - 1), (0.9, 20), (0.0, 60)) == [
        Mark("start", 0),
        Mark("end", 40 + silence - 1),
    ]
    assert len(marks((0.9, 20), (0.0, silence), (0.9, 20), (0.0, 60))) == 4


def test_between_the_thresholds_it_goes_on_as_it_was() -> None:
    middle = (TURN.threshold + TURN.release) / 2
    assert marks((middle, 100)) == []
    assert marks((0.9, 10), (middle, 200)) == [Mark("start", 0)]
    # Once there was silence, it takes clear speech to end that.
    assert marks((0.9, 10), (0.0, 2), (middle, 60)) == [Mark("start", 0), Mark("end", 10)]


def test_long_speech_is_cut_where_it_is_quietest() -> None:
    turn = Turn(longest=10.0)
    quiet = 8 * SECOND
    runs = [(0.99, quiet), (0.6, 5), (0.99, 10 * SECOND)]
    cut = next(mark for mark in marks(*runs, turn=turn) if mark.kind == "cut")
    assert quiet <= cut.window <= quiet + 5


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 400)), max_size=12), st.integers(2, 10))
@settings(max_examples=200, deadline=None)
def test_marks_make_sense(runs: list[tuple[float, int]], longest: int) -> None:
    """Started before ended, in order, never longer than allowed, and the pieces do not matter."""
    turn = Turn(longest=float(longest))
    segmenter = Segmenter(turn)
    probabilities = [probability for probability, count in runs for _window in range(count)]
    found: list[Mark] = []
    position = 0
    pieces = random.Random(len(probabilities))  # noqa: S311
    while position < len(probabilities):
        size = pieces.randint(1, 50)
        found += segmenter.feed(probabilities[position : position + size])
        position += size
    if (last := segmenter.flush()) is not None:
        found.append(last)
    assert [mark for mark in found if mark.kind != "end"] == [
        mark for mark in marks(*runs, turn=turn) if mark.kind != "end"
    ]
    begin: int | None = None
    for mark in found:
        if mark.kind == "start":
            assert begin is None
        else:
            assert begin is not None
            assert begin < mark.window <= begin + longest * SECOND + 1
        begin = None if mark.kind == "end" else mark.window
    assert begin is None


def drawn(*parts: tuple[bool, float]) -> Samples:
    """Noise and silence of so many seconds."""
    noise = np.random.default_rng(0)
    return np.concatenate(
        [
            (
                noise.integers(-8000, 8000, int(seconds * RATE)) if loud else np.zeros(int(seconds * RATE))
            ).astype(np.int16)
            for loud, seconds in parts
        ]
    )


def heard(hearing: Hearing, samples: Samples, size: int = 1600) -> list[Heard]:
    found: list[Heard] = []
    for first in range(0, samples.shape[0], size):
        found += hearing.feed(samples[first : first + size])
    return found


@pytest.mark.parametrize("size", [1, 333, 1600, 16_000, 10_000_000])
def test_all_of_an_utterance_is_kept_however_it_arrives(size: int) -> None:
    audio = drawn((False, 2.0), (True, 1.5), (False, 1.0))
    if size == 1:
        audio = audio[: 3 * RATE + RATE // 2 + RATE]
    started, said = heard(Hearing(TURN, LoudnessStandIn()), audio, size)
    assert isinstance(started, Started)
    assert isinstance(said, Utterance)
    assert said.reason == "silence"
    assert started.start == said.start == pytest.approx(2.0, abs=0.033)
    assert said.end == pytest.approx(3.5, abs=0.033)
    assert said.begin == pytest.approx(said.start - 0.3, abs=0.001)
    first = round(said.begin * RATE)
    np.testing.assert_array_equal(said.samples, audio[first : first + said.samples.shape[0]])
    assert first + said.samples.shape[0] >= 3.5 * RATE


def test_silence_is_let_go_and_speech_is_bounded() -> None:
    hearing = Hearing(TURN, LoudnessStandIn())
    most = 0
    for _minute in range(5):
        list(hearing.feed(drawn((False, 60.0))))
        most = max(most, hearing._kept.shape[0])
    assert most < 2 * PIECE + RATE
    for _minute in range(3):
        list(hearing.feed(drawn((True, 60.0))))
        most = max(most, hearing._kept.shape[0])
    assert most < (TURN.longest + 3) * RATE
    assert hearing.seconds == 8 * 60


def test_parts_of_long_speech_overlap_and_leave_nothing_out() -> None:
    hearing = Hearing(Turn(longest=6.0), LoudnessStandIn())
    found = [
        item
        for item in heard(hearing, drawn((False, 1), (True, 20), (False, 1)))
        if isinstance(item, Utterance)
    ]
    assert len(found) >= 4
    assert [item.after_cut for item in found] == [False] + [True] * (len(found) - 1)
    assert [item.reason for item in found] == ["cut"] * (len(found) - 1) + ["silence"]
    for before, after in itertools.pairwise(found):
        assert before.end == after.start
        assert after.begin == pytest.approx(after.start - OVERLAP / RATE)
        assert before.begin + before.samples.shape[0] / RATE == pytest.approx(before.end + OVERLAP / RATE)


def test_flush_and_clear() -> None:
    hearing = Hearing(TURN, LoudnessStandIn())
    assert list(hearing.flush()) == []
    heard(hearing, drawn((False, 1), (True, 1)))
    now = hearing.snapshot()
    assert now is not None
    assert now.end == pytest.approx(2.0)
    (said,) = hearing.flush()
    assert isinstance(said, Utterance)
    assert said.reason == "flush"
    assert (said.start, said.end) == pytest.approx((1.0, 2.0), abs=0.033)
    assert hearing.snapshot() is None
    assert [type(item) for item in heard(hearing, drawn((True, 1)))] == [Started]
    assert list(hearing.clear()) == [Dropped()]
    assert list(hearing.clear()) == []
    # Times go on.
    started, _said = heard(hearing, drawn((False, 1), (True, 1), (False, 1)))
    assert isinstance(started, Started)
    assert started.start == pytest.approx(4.0, abs=0.033)


def test_by_hand_only_the_client_ends_an_utterance() -> None:
    hearing = Hearing(None, None)
    audio = drawn((False, 1), (True, 1), (False, 5))
    assert [type(item) for item in heard(hearing, audio)] == [Started]
    (said,) = hearing.flush()
    assert isinstance(said, Utterance)
    np.testing.assert_array_equal(said.samples, audio)
    assert list(hearing.flush()) == []
    found = heard(hearing, np.zeros(LONGEST_BY_HAND + RATE, np.int16), RATE)
    assert [type(item) for item in found] == [Started, Utterance, Started]


def test_turns_can_be_changed() -> None:
    hearing = Hearing(None, None)
    assert [type(item) for item in heard(hearing, drawn((True, 1.01)))] == [Started]
    assert list(hearing.change(TURN, LoudnessStandIn())) == [Dropped()]
    started, said = heard(hearing, drawn((False, 1), (True, 1), (False, 1)))
    assert isinstance(started, Started)
    assert isinstance(said, Utterance)
    assert started.start == pytest.approx(2.01, abs=0.033)
    assert said.end == pytest.approx(3.01, abs=0.033)


def test_the_real_model_hears_the_clip_and_not_the_noise() -> None:
    silero = Silero()
    quiet = np.zeros(2 * RATE, np.int16)
    hiss = np.random.default_rng(1).normal(0, 300, 5 * RATE).astype(np.int16)
    assert heard(Hearing(TURN, silero.listen()), np.concatenate([quiet, hiss, quiet])) == []
    clip = samples_of(CLIPS / "D011.wav")
    found = heard(Hearing(TURN, silero.listen()), np.concatenate([quiet, clip, quiet]))
    assert [type(item) for item in found] == [Started, Utterance]
    # Two sessions share the model and nothing else.
    one, two = Hearing(TURN, silero.listen()), Hearing(TURN, silero.listen())
    mixed: list[Heard] = []
    for piece in np.array_split(np.concatenate([quiet, clip, quiet]), 50):
        mixed += one.feed(piece)
        list(two.feed(np.resize(hiss, piece.shape[0])))
    assert [vars(item) for item in mixed if isinstance(item, Started)] == [vars(found[0])]


# -- streams


def pieces_of(pieces: list[bytes]) -> Callable[[], bytes]:
    left: Iterator[bytes] = iter([*pieces, b""])
    return lambda: next(left)  # nobody asks after the end


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_samples(form: str) -> None:
    clip = samples_of(CLIPS / "D011.wav")
    found = np.concatenate(list(streams.samples(form, RATE, pieces_of(encoded(clip, form)))))
    # Codecs and resamplers add or hold back some milliseconds.
    assert abs(found.shape[0] - clip.shape[0]) < 0.05 * RATE
    assert np.abs(found).max() > 3000
    assert np.corrcoef(envelope(found), envelope(clip))[0, 1] > 0.95


def envelope(samples: Samples) -> np.ndarray:
    """How loud it is in every 50 ms."""
    count = int(1.8 * RATE) // 800 * 800
    found: np.ndarray = np.abs(samples[:count].astype(float)).reshape(-1, 800).mean(axis=1)
    return found


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_pcm_of_other_rates_in_odd_pieces(rate: int) -> None:
    clip = samples_of(CLIPS / "D011.wav", rate)
    data = clip.astype("<i2").tobytes()
    pieces = [data[first : first + 777] for first in range(0, len(data), 777)]
    found = np.concatenate(list(streams.samples("pcm16", rate, pieces_of(pieces))))
    assert abs(found.shape[0] - clip.shape[0] * RATE / rate) < 0.05 * RATE


@pytest.mark.parametrize("form", ["webm", "ogg"])
def test_a_recorders_stream_is_heard_while_it_comes(form: str) -> None:
    """Not only when the file ends: what was sent half a second ago has come out."""
    pieces = encoded(samples_of(CLIPS / "D011.wav"), form)
    given = 0

    def following() -> bytes:
        nonlocal given
        given += 1
        return pieces[given - 1] if given <= len(pieces) else b""

    first = next(streams.samples(form, RATE, following))
    assert first.shape[0] > 0
    assert sum(map(len, pieces[:given])) < 4096


@pytest.mark.parametrize("form", ["webm", "ogg"])
def test_what_is_no_such_stream_is_refused(form: str) -> None:
    noise = random.Random(0)  # noqa: S311
    pieces = [noise.randbytes(300) for _piece in range(200)]
    with pytest.raises(ApiError) as refused:
        list(streams.samples(form, RATE, pieces_of(pieces)))
    assert (refused.value.status, refused.value.code) == (400, "invalid_audio")


def test_a_damaged_packet_is_left_out() -> None:
    packets = encoded(samples_of(CLIPS / "D011.wav"), "opus")
    whole = np.concatenate(list(streams.samples("opus", RATE, pieces_of(packets)))).shape[0]
    packets[10] = b"\xff\x00garbage" * 20
    damaged = np.concatenate(list(streams.samples("opus", RATE, pieces_of(packets)))).shape[0]
    assert 0 <= whole - damaged <= 0.1 * RATE


# -- texts


def test_what_two_drafts_agree_on_has_come_to_stay() -> None:
    agreement = Agreement()
    assert agreement.update("Set a timer.") == 0
    assert agreement.update("Set a timer for eight.") == len("Set a")
    assert agreement.update("Set a timer for eight seconds.") == len("Set a timer for")
    assert agreement.update("Something else.") == 0
    assert agreement.update("  Something  else.") == len("  Something  else.")


def segment(*words: tuple[str, float, float]) -> Segment:
    made = tuple(Word(start, end, f" {text}", 1.0) for text, start, end in words)
    return Segment(made[0].start, made[-1].end, "".join(word.word for word in made), words=made)


def test_a_word_belongs_to_one_part() -> None:
    whole = [segment(("one", 0.0, 0.4), ("two", 0.5, 0.9)), segment(("three", 1.0, 1.6), ("four", 1.7, 2.0))]
    for cut in np.arange(0.0, 2.2, 0.05):
        texts = [item.text for first, last in ((None, cut), (cut, None)) for item in part(whole, first, last)]
        assert "".join(texts) == " one two three four"
    assert part(whole, None, None) is whole
    without = [Segment(0.0, 1.0, " one"), Segment(1.0, 2.0, " two")]
    assert [item.text for item in part(without, None, 1.2)] == [" one"]


def test_times_are_of_the_session() -> None:
    moved = shifted(segment(("one", 0.5, 0.75)), 10.0)
    assert (moved.start, moved.end, moved.words[0].start, moved.words[0].end) == (10.5, 10.75, 10.5, 10.75)


def test_frames_hold_any_bytes() -> None:
    data = bytes(range(256))
    packed = pack("audio", {"a": 1}, data)
    assert packed.endswith(data)
    assert io.BytesIO(packed).read(8) == (len(packed) - 8 - 256).to_bytes(4, "big") + (256).to_bytes(4, "big")

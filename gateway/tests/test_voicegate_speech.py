"""Speech and spectrum piece by piece: what faster-whisper finds in one go."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from faster_whisper import vad
from faster_whisper.audio import decode_audio
from faster_whisper.feature_extractor import FeatureExtractor
from voicegate import speech
from voicegate.vad import WINDOW
from voicegate_support import clips

RATE = 16000
PIECE = speech.WINDOWS * WINDOW  # samples in one run of the detector
Samples = np.ndarray[Any, np.dtype[np.int16]]


def recording(seconds: float, seed: int = 0) -> Samples:
    """Clips with pauses of up to five seconds and some hiss."""
    chance = np.random.default_rng(seed)
    said = [(decode_audio(str(clip.path)) * 32768).astype(np.int16) for clip in clips("D")]
    parts: list[Samples] = []
    while sum(map(len, parts)) < seconds * RATE:
        parts += [said[chance.integers(len(said))], np.zeros(int(chance.random() * 5 * RATE), np.int16)]
    found = np.concatenate(parts)[: int(seconds * RATE)]
    return found + chance.normal(0, 3, len(found)).astype(np.int16)


@pytest.fixture(scope="module")
def minutes() -> Samples:
    return recording(4 * 60)


@pytest.mark.parametrize(
    "length", [1, 511, 512, RATE, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE - 40, 3 * PIECE]
)
def test_speech_is_that_of_faster_whisper(minutes: Samples, length: int) -> None:
    samples = minutes[:length]
    whole = samples.astype(np.float32) / 32768
    expected = vad.get_speech_timestamps(whole, vad.VadOptions())
    found = speech.find(samples)
    assert found == expected
    if length > RATE:
        assert len(found) >= 1
        collected = speech.floats(speech.collect(samples, found))
        assert np.array_equal(collected, np.concatenate(vad.collect_chunks(whole, expected)[0]))


def test_spans_are_those_of_faster_whisper(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 500 made-up courses of probabilities, whatever they look like."""
    chance = np.random.default_rng(0)
    several = 0
    for turn in range(500):
        count = int(chance.integers(1, 400))
        values = chance.random(count, np.float32)
        if turn % 3:  # calmer ones
            values = np.repeat(values, chance.integers(2, 80))[:count]
        length = max(1, count * WINDOW - int(chance.integers(1, WINDOW + 1)))
        monkeypatch.setattr(vad, "get_vad_model", lambda values=values: lambda _audio: values)
        expected = vad.get_speech_timestamps(np.zeros(length, np.float32), vad.VadOptions())
        assert speech.spans(values.tolist(), length) == expected
        several += len(expected) > 1
    assert several > 20


def test_finding_ends_when_cancelled(minutes: Samples) -> None:
    looks: list[int] = []

    def cancelled() -> bool:
        looks.append(1)
        return True

    speech.find(minutes, cancelled)
    assert len(looks) == 1


BLOCK = speech.FRAMES * 160


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize(
    "length", [1, 160, 399, 401, RATE, 30 * RATE, BLOCK - 160, BLOCK, BLOCK + 201, 2 * BLOCK + 77, 3 * BLOCK]
)
def test_spectrum_is_that_of_faster_whisper(minutes: Samples, length: int, mels: int) -> None:
    samples = minutes[:length]
    whole = samples.astype(np.float32) / 32768
    expected = FeatureExtractor(feature_size=mels)(whole)
    found = speech.Spectrum(feature_size=mels)
    # A library for matrices may add up in another order for another width: the last bit, at most.
    for given in (samples, whole):
        assert found(given).shape == expected.shape
        assert np.abs(found(given) - expected).max() <= 2**-22


def test_memory_of_a_long_recording_is_that_of_its_spectrum() -> None:
    samples = np.tile(recording(10, 1), 60)  # ten minutes
    extractor = speech.Spectrum()
    tracemalloc.start()
    extractor(samples)
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = extractor.mel_filters.shape[0] * 4 * len(samples) / 160
    assert peak < whole + 50e6

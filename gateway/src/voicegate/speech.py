"""Where somebody speaks, and what the model is given of that: piece by piece, so that hours fit in memory.

The same as faster-whisper computes (get_speech_timestamps, collect_chunks, FeatureExtractor). That holds
several copies of the whole recording at once, as 32-bit floats, and overlapping frames of it, two and a half
times as much again; this holds the recording as 16-bit integers, and pieces of fixed size of all the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from faster_whisper.feature_extractor import FeatureExtractor
from faster_whisper.vad import VadOptions, get_vad_model
from numpy.typing import NDArray

from voicegate.audio import RATE
from voicegate.vad import CONTEXT, WINDOW, Listening, Samples

Floats = NDArray[np.float32]

WINDOWS = 500  # for one run of the detector: 16 seconds
FRAMES = 3000  # of the spectrum computed at once: 30 seconds, or up to a minute at the end


def floats(samples: NDArray[Any]) -> Floats:
    """Between -1 and 1; what is floating point already stays as it is."""
    if samples.dtype == np.float32:
        return samples
    return samples.astype(np.float32) / np.float32(32768)


def probabilities(samples: Samples) -> Iterator[list[float]]:
    """How probable it is that somebody speaks, for each window; several at once."""
    listening = Listening(get_vad_model().session)
    count = len(samples) // WINDOW + 1
    for first in range(0, count, WINDOWS):
        piece = samples[first * WINDOW : (first + WINDOWS) * WINDOW]
        if first + WINDOWS >= count:
            piece = np.pad(piece, (0, (count - first) * WINDOW - len(piece)))
            piece[-CONTEXT:] = 0  # as faster-whisper has it
        yield listening.probabilities(piece)


def spans(speaking: Iterable[float], length: int) -> list[dict[str, int]]:
    """`start` and `end` in samples, from the probabilities of the windows of a recording of that `length`.

    Somebody begins to speak at the threshold and has ended after two seconds below a lower one; what is
    found is made longer at both ends, up to the middle of a pause.
    """
    options = VadOptions()
    low = float(np.float32(max(options.threshold - 0.15, 0.01)))  # they are compared as 32 bits
    pause = RATE * options.min_silence_duration_ms // 1000
    pad = RATE * options.speech_pad_ms // 1000
    found: list[dict[str, int]] = []
    start: int | None = None
    end: int | None = None  # if nothing more is said
    for index, value in enumerate(speaking):
        place = index * WINDOW
        if value >= options.threshold:
            end = None
            if start is None:
                start = place
        elif start is not None and value < low:
            if end is None:
                end = place
            if place - end >= pause:
                found.append({"start": start, "end": end})
                start = end = None
    if start is not None:
        found.append({"start": start, "end": length})
    for index, span in enumerate(found):
        if index == 0:
            span["start"] = max(0, span["start"] - pad)
        if index == len(found) - 1:
            span["end"] = min(length, span["end"] + pad)
            continue
        following = found[index + 1]
        silence = following["start"] - span["end"]
        room = pad if silence >= 2 * pad else silence // 2
        span["end"] += room
        following["start"] -= room
    return found


def find(samples: Samples, cancelled: Callable[[], bool] = lambda: False) -> list[dict[str, int]]:
    """Where somebody speaks; up to where it had come once `cancelled`."""
    speaking: list[float] = []
    for piece in probabilities(samples):
        speaking += piece
        if cancelled():
            break
    return spans(speaking, len(samples))


def collect(samples: Samples, found: Sequence[dict[str, int]]) -> Samples:
    """Only what was said, one after the other."""
    return np.concatenate([samples[span["start"] : span["end"]] for span in found])


class Spectrum(FeatureExtractor):  # type: ignore[misc]  # the package has no types
    """The log-Mel spectrogram, of 16-bit samples or floats."""

    def __call__(self, waveform: NDArray[Any], padding: int = 160, chunk_length: int | None = None) -> Floats:
        if chunk_length is not None:
            self.n_samples = chunk_length * self.sampling_rate
            self.nb_max_frames = self.n_samples // self.hop_length
        window = np.hanning(self.n_fft + 1)[:-1].astype(np.float32)
        # A frame is centred on every hop, with the sound mirrored at both ends.
        half = self.n_fft // 2
        length = len(waveform) + padding
        count = length // self.hop_length
        result = np.empty((self.mel_filters.shape[0], count), np.float32)
        # No small piece at the end: few columns are multiplied in another order, and differ in the last bit.
        firsts = range(0, max(count - FRAMES, 0) + 1, FRAMES)
        for first, last in itertools.zip_longest(firsts, firsts[1:], fillvalue=count):
            start, end = first * self.hop_length - half, (last - 1) * self.hop_length + half
            piece = floats(waveform[max(0, start) : min(end, len(waveform))])
            piece = np.pad(piece, (0, max(0, min(end, length) - max(len(waveform), start, 0))))
            piece = np.pad(piece, (max(0, -start), max(0, end - length)), mode="reflect")
            frames = np.lib.stride_tricks.sliding_window_view(piece, self.n_fft)[:: self.hop_length]
            power = np.abs(np.fft.rfft(frames * window, axis=-1).astype(np.complex64).T) ** 2
            result[:, first:last] = self.mel_filters @ power
        np.log10(np.clip(result, 1e-10, None, out=result), out=result)
        np.maximum(result, result.max() - 8.0, out=result)
        result += 4.0
        result /= 4.0
        return result

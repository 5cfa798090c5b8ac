"""Audio that arrives piece by piece, as 16 kHz mono samples. Decoded by PyAV, in the ears' process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import av
import numpy as np

from voicegate import audio, errors
from voicegate.ears_wire import RATE
from voicegate.vad import Samples

# Little is looked at before the first samples come out, and nothing but the one container is tried.
_OPTIONS = {"probesize": "4096", "analyzeduration": "0", "protocol_whitelist": ""}
_CONTAINERS = {"webm": "matroska", "ogg": "ogg"}
_CODECS = {"g711_ulaw": ("pcm_mulaw", 8000), "g711_alaw": ("pcm_alaw", 8000), "opus": ("libopus", 48000)}
# Damaged packets in a row that are left out before the stream is given up.
DAMAGED = 50

Next = Callable[[], bytes]  # waits for the next piece; empty at the end


def samples(form: str, rate: int, pieces: Next) -> Iterator[Samples]:
    """Decode what `pieces` gives. `rate`: of `pcm16`. ApiError (400) if it is not what it should be."""
    try:
        if form in _CONTAINERS:
            yield from _container(_CONTAINERS[form], pieces)
        elif form == "pcm16":
            yield from _pcm(rate, pieces)
        else:
            yield from _packets(form, pieces)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, MemoryError):  # PyAV's own is both; the audio is not to blame
            raise
        raise errors.invalid(
            f"The audio is not {form}, or it is damaged.", "format", "invalid_audio"
        ) from error


def _pcm(rate: int, pieces: Next) -> Iterator[Samples]:
    resampled = _Resampled()
    rest = b""
    while piece := pieces():
        data = rest + piece
        whole = len(data) // 2 * 2
        rest = data[whole:]
        found = np.frombuffer(data[:whole], "<i2")
        if rate == RATE:
            yield found
        elif found.shape[0]:
            frame = av.AudioFrame.from_ndarray(found[None], format="s16", layout="mono")
            frame.rate = rate
            yield from resampled.take(frame)


def _packets(form: str, pieces: Next) -> Iterator[Samples]:
    name, rate = _CODECS[form]
    decoder = av.CodecContext.create(name, "r")
    decoder.sample_rate = rate
    decoder.layout = "mono"
    resampled = _Resampled()
    damaged = 0
    while piece := pieces():
        try:
            frames = decoder.decode(av.Packet(piece))
        except av.error.InvalidDataError:
            damaged += 1
            if damaged > DAMAGED:
                raise
            continue
        damaged = 0
        for frame in frames:
            yield from resampled.take(frame)


def _container(name: str, pieces: Next) -> Iterator[Samples]:
    with av.open(_File(pieces), "r", format=name, options=_OPTIONS, buffer_size=4096) as container:
        if not container.streams.audio:
            raise errors.invalid("The stream holds no audio.", "format", "invalid_audio")
        resampled = _Resampled()
        for frame in audio.frames(container):
            yield from resampled.take(frame)


class _File:
    """The pieces, as PyAV reads a file."""

    def __init__(self, pieces: Next) -> None:
        self._pieces = pieces
        self._rest = b""
        self._ended = False

    def read(self, count: int) -> bytes:
        if not self._rest and not self._ended:  # it asks again after the end
            self._rest = self._pieces()
            self._ended = not self._rest
        found, self._rest = self._rest[:count], self._rest[count:]
        return found


class _Resampled:
    def __init__(self) -> None:
        self._resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)

    def take(self, frame: av.AudioFrame) -> Iterator[Samples]:
        audio.check_shape(frame.sample_rate, frame.layout.nb_channels)
        frame.pts = None
        for piece in self._resampler.resample(frame):
            yield piece.to_ndarray()[0]

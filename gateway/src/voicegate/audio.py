"""Whatever a client uploads, as 16 kHz mono samples. Decoded in process by PyAV: no ffmpeg binary."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

import av
import numpy as np
from numpy.typing import NDArray

from voicegate.errors import bad_audio, invalid

RATE = 16000

# Names of libavformat's demuxers. Playlists and anything else that points at other files or at
# addresses are left out: an upload must never make the server open something.
CONTAINERS = (
    "aac", "ac3", "aiff", "amr", "amrnb", "amrwb", "ape", "asf", "au", "avi", "caf", "eac3", "flac", "flv",
    "matroska", "mov", "mp3", "mpeg", "mpegts", "ogg", "tta", "w64", "wav", "wv",
)  # fmt: skip

Samples = NDArray[np.float32]


# Outside of these the resampler alone would need more memory than the audio, or make it of nothing.
RATES = range(1000, 768_001)  # Hz
CHANNELS = 64


def decode(
    source: BinaryIO,
    *,
    max_seconds: float = 4 * 3600,
    timeout: float = 300,
    cancelled: Callable[[], bool] = lambda: False,
) -> Samples:
    """All of `source`'s first audio stream, decoded within `timeout` seconds.

    ApiError (400) says what is wrong with it.
    """
    deadline = time.monotonic() + timeout
    try:
        container = av.open(source, mode="r", metadata_errors="ignore", options=_OPTIONS)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise bad_audio(_reason(error)) from error
    pieces: list[NDArray[np.int16]] = []
    total = 0
    try:
        with container:
            if not container.streams.audio:
                raise bad_audio("it holds no audio stream")
            stream = container.streams.audio[0]
            check_shape(stream.rate, stream.channels)
            stream.thread_type = "AUTO"
            # 16-bit samples, as the reference implementations feed the model.
            resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
            for frame in itertools.chain(frames(container), (None,)):
                if frame is not None:
                    check_shape(frame.sample_rate, frame.layout.nb_channels)
                for piece in resampler.resample(frame):
                    samples = piece.to_ndarray()[0]
                    pieces.append(samples)
                    total += samples.shape[0]
                if total > max_seconds * RATE:
                    raise invalid(
                        f"The audio is longer than this server takes ({max_seconds / 60:g} minutes).",
                        "file",
                        "audio_too_long",
                    )
                if time.monotonic() > deadline:
                    raise invalid(
                        f"Decoding the audio took longer than this server allows ({timeout:g} seconds).",
                        "file",
                        "decode_timeout",
                    )
                if cancelled():
                    break
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise bad_audio(_reason(error)) from error
    if total == 0:
        raise bad_audio("it holds no sound")
    return np.concatenate(pieces).astype(np.float32) / 32768.0


_OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": ""}


def check_shape(rate: int, channels: int) -> None:
    if rate not in RATES:
        raise bad_audio(f"its sample rate, {rate} Hz, is not within {RATES.start} to {RATES.stop - 1}")
    if channels > CHANNELS:
        raise bad_audio(f"it has {channels} channels, more than {CHANNELS}")


def frames(container: av.container.InputContainer) -> Iterator[av.AudioFrame]:
    """Decoded frames; a damaged one in the middle is left out, as players do."""
    frames = container.decode(audio=0)
    damaged = 0
    while True:
        try:
            frame = next(frames)
        except StopIteration:
            return
        except av.error.InvalidDataError:
            damaged += 1
            if damaged > 1000:
                raise
            continue
        frame.pts = None  # recorders leave gaps and jumps; the samples are what counts
        yield frame


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):  # PyAV's own is both; the audio is not to blame
        raise error
    if isinstance(error, av.error.EOFError):
        return "it ends too early"
    if isinstance(error, av.error.InvalidDataError):
        return "its format is not known or it is damaged"
    if isinstance(error, av.error.ArgumentError):  # also: a container that is not on the list
        return "its format is not supported"
    if isinstance(error, av.error.FFmpegError):
        return (error.strerror or type(error).__name__).lower()
    return str(error) or type(error).__name__

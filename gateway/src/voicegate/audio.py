"""Whatever a client uploads, as 16 kHz mono samples. Decoded by PyAV: no ffmpeg binary. See `decoder`."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

import av

from voicegate import errors
from voicegate.errors import bad_audio, invalid

RATE = 16000
SAMPLE_BYTES = 2

# Names of libavformat's demuxers. Playlists and anything else that points at other files or at
# addresses are left out: an upload must never make the server open something.
CONTAINERS = (
    "aac", "ac3", "aiff", "amr", "amrnb", "amrwb", "ape", "asf", "au", "avi", "caf", "eac3", "flac", "flv",
    "matroska", "mov", "mp3", "mpeg", "mpegts", "ogg", "tta", "w64", "wav", "wv",
)  # fmt: skip

# Outside of these the resampler alone would need more memory than the audio, or make it of nothing.
RATES = range(1000, 768_001)  # Hz
CHANNELS = 64


def _audio_decoders() -> str:
    found = set()
    for name in av.codecs_available:
        try:
            codec = av.Codec(name, "r")
        except ValueError:  # it only encodes
            continue
        if codec.type == "audio":
            found.add(codec.name)
    return ",".join(sorted(found))


# Opening a file decodes a little of every stream; a picture of absurd dimensions must not be among that.
_OPTIONS = {
    "format_whitelist": ",".join(CONTAINERS),
    "protocol_whitelist": "",
    "codec_whitelist": _audio_decoders(),
}


def decode(
    source: BinaryIO,
    target: BinaryIO,
    *,
    max_seconds: float = 4 * 3600,
    timeout: float = 300,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Write all of `source`'s first audio stream to `target`, as signed 16-bit samples.

    Ends early once `cancelled`. ApiError (400) says what is wrong with it. MemoryError.
    """
    deadline = time.monotonic() + timeout
    try:
        container = av.open(source, mode="r", metadata_errors="ignore", options=_OPTIONS)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise bad_audio(_reason(error)) from error
    total = 0
    try:
        with container:
            if not container.streams.audio:
                raise bad_audio("it holds no audio stream")
            stream = container.streams.audio[0]
            check_shape(stream.rate, stream.channels)
            # One thread decodes an hour in seconds, and needs a bounded amount of memory.
            stream.codec_context.thread_count = 1
            resampler = _Resampler()
            for frame in itertools.chain(frames(container), (None,)):
                for piece in resampler.resample(frame):
                    # The plane may be longer than what is in it.
                    target.write(memoryview(piece.planes[0])[: piece.samples * SAMPLE_BYTES])
                    total += piece.samples
                if total > max_seconds * RATE:
                    raise invalid(
                        f"The audio is longer than this server takes ({max_seconds / 60:g} minutes).",
                        "file",
                        "audio_too_long",
                    )
                if time.monotonic() > deadline:
                    raise errors.decode_timeout(timeout)
                if cancelled():
                    return
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise bad_audio(_reason(error)) from error
    if total == 0:
        raise bad_audio("it holds no sound")


class _Resampler:
    """To 16-bit samples, as the reference implementations feed the model.

    As PyAV's own, but that one starts a thread for every core, each with a stack that counts as memory.
    """

    def __init__(self) -> None:
        self._graph: av.filter.Graph | None = None
        self._shape: tuple[str, str, int] = ("", "", 0)

    def resample(self, frame: av.AudioFrame | None) -> Iterator[av.AudioFrame]:
        """What comes out when `frame` goes in; None: that was the last one."""
        if frame is not None:
            check_shape(frame.sample_rate, frame.layout.nb_channels)
            shape = (frame.format.name, frame.layout.name, frame.sample_rate)
            if self._graph is None:
                self._graph, self._shape = _graph(*shape), shape
            elif shape != self._shape:
                raise bad_audio("its format changes in the middle")
        if self._graph is None:
            return
        self._graph.push(frame)
        # Nothing more now, and nothing more at all.
        with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
            while True:
                yield self._graph.pull()


def _graph(sample_format: str, layout: str, rate: int) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add(
        "abuffer",
        sample_fmt=sample_format,
        channel_layout=layout,
        sample_rate=str(rate),
        time_base=f"1/{rate}",
    )
    target = graph.add("aformat", sample_fmts="s16", channel_layouts="mono", sample_rates=str(RATE))
    source.link_to(target)
    target.link_to(graph.add("abuffersink"))
    graph.configure()
    return graph


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

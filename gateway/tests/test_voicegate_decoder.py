"""Decoding in a process of its own: the same samples, and nothing that a file holds harms anybody else."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import openai
import pytest
from faster_whisper.audio import decode_audio
from voicegate.decoder import Decoder
from voicegate.errors import ApiError
from voicegate.settings import Settings
from voicegate_support import CLIPS, Server

CLIP = CLIPS / "D009.wav"
TEXT = "Turn up the volume."
RATE = 16000


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    decoder = Decoder(Settings(max_decode_seconds=1, max_decode_mib=64))
    yield decoder
    decoder.close()


def encoded(container: str, codec: str, rate: int, layout: str, picture: int = 0) -> bytes:
    """The clip in another form; `picture`: with a video beside it, so many pixels wide and high."""
    target = io.BytesIO()
    with av.open(str(CLIP)) as source, av.open(target, "w", format=container) as output:
        if picture:
            video = output.add_stream("mpeg4", rate=25)
            video.width = video.height = picture
            video.pix_fmt = "yuv420p"
        stream = output.add_stream(codec, rate=rate, layout=layout)
        if picture:
            frame = av.VideoFrame(picture, picture, "yuv420p")
            frame.pts, frame.time_base = 0, Fraction(1, 25)
            output.mux([*video.encode(frame), *video.encode(None)])
        resampler = av.AudioResampler(
            format=stream.codec_context.format, layout=layout, rate=rate,
            frame_size=stream.codec_context.frame_size or 1024,
        )  # fmt: skip
        for frame in (*source.decode(audio=0), None):
            for piece in resampler.resample(frame):
                output.mux(stream.encode(piece))
        output.mux(stream.encode(None))
    return target.getvalue()


def silence(seconds: int) -> bytes:
    """FLAC, some hundred bytes a minute."""
    target = io.BytesIO()
    with av.open(target, "w", format="flac") as output:
        stream = output.add_stream("flac", rate=RATE, layout="mono")
        stream.codec_context.format = "s16"
        for number in range(seconds * RATE // 4096 + 1):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = RATE, number * 4096
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return target.getvalue()


def claims_frames(count: int = 50_000_000) -> bytes:
    """Four thousand bytes of Monkey's Audio whose header claims a table that needs a gigabyte and more."""
    head = b"MAC " + struct.pack("<HHIIIIIII", 3990, 0, 52, 24, 4 * count, 0, 1000, 0, 0) + bytes(16)
    return head + struct.pack("<HHIIIHHI", 2000, 0, 73728, 100, count, 16, 1, RATE) + bytes(4000)


def claims_rate() -> bytes:
    content = bytearray(CLIP.read_bytes())
    content[24:28] = struct.pack("<I", 2**31 - 1)
    return bytes(content)


def nested(depth: int = 20_000) -> bytes:
    """MP4: boxes in boxes in boxes."""
    head = struct.pack(">I4s4sI4s", 20, b"ftyp", b"isom", 0, b"isom")
    return head + b"".join(
        struct.pack(">I4s", 8 * (depth - level), b"trak" if level else b"moov") for level in range(depth)
    )


def children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found.append(int(folder.name))
    return found


def eventually(found: Callable[[], list[int]]) -> list[int]:
    deadline = time.monotonic() + 10
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


def decoded(decoder: Decoder, content: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    with os.fdopen(os.memfd_create("upload"), "w+b") as source:
        source.write(content)
        source.seek(0)
        samples = decoder.decode(source, lambda: False)
    assert samples is not None
    return np.frombuffer(samples, np.int16).astype(np.float32) / np.float32(32768)


@pytest.mark.parametrize(
    "form",
    [
        ("wav", "pcm_s16le", 16000, "mono"),
        ("wav", "pcm_f32le", 8000, "stereo"),
        ("flac", "flac", 96000, "5.1"),
        ("webm", "libopus", 48000, "mono"),
        ("mp3", "libmp3lame", 44100, "stereo"),
        ("mp4", "aac", 44100, "mono"),
    ],
)
def test_same_samples_as_faster_whisper(decoder: Decoder, form: tuple[str, str, int, str]) -> None:
    content = encoded(*form)
    assert np.array_equal(decoded(decoder, content), decode_audio(io.BytesIO(content)))


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (claims_frames(), "decode_memory"),
        (claims_rate(), "invalid_audio"),
        (nested(), "invalid_audio"),
        (b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + bytes(range(256)) * 100, "invalid_audio"),
    ],
    ids=["claims memory", "claims a rate", "nested boxes", "garbage"],
)
def test_bomb(decoder: Decoder, content: bytes, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        decoded(decoder, content)
    assert (caught.value.status, caught.value.code) == (400, code)


def test_pictures_are_never_decoded(decoder: Decoder) -> None:
    """One of 8190 by 8190 pixels needs 100 MiB, and more than one is decoded to look at a file."""
    content = encoded("mp4", "aac", RATE, "mono", picture=8190)
    sound = encoded("mp4", "aac", RATE, "mono")
    assert np.array_equal(decoded(decoder, content), decoded(decoder, sound))


def test_one_that_hangs_is_ended(decoder: Decoder) -> None:
    """A pipe into which nobody writes: the decoder waits in the middle of a call and looks at no clock."""
    ours, theirs = os.pipe()
    started = time.monotonic()
    with os.fdopen(ours, "rb") as source, pytest.raises(ApiError) as caught:
        decoder.decode(source, lambda: False)
    os.close(theirs)
    assert caught.value.code == "decode_timeout"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGSEGV, "decode_crashed"), (signal.SIGKILL, "decode_memory")]
)
def test_one_that_dies(decoder: Decoder, number: int, code: str) -> None:
    ours, theirs = os.pipe()
    process = decoder._process.pid
    threading.Thread(target=lambda: os.kill(eventually(lambda: children(process))[0], number)).start()
    with os.fdopen(ours, "rb") as source, pytest.raises(ApiError) as caught:
        decoder.decode(source, lambda: False)
    os.close(theirs)
    assert (caught.value.status, caught.value.code) == (400, code)
    # Whoever comes next has the same process, and a child of its own.
    assert decoded(decoder, CLIP.read_bytes()).size
    assert decoder._process.pid == process


def test_the_process_itself_dies(decoder: Decoder) -> None:
    before = decoder._process.pid
    os.kill(before, signal.SIGKILL)
    assert decoded(decoder, CLIP.read_bytes()).size
    assert decoder._process.pid != before


def test_cancelled(decoder: Decoder) -> None:
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb") as source:
        assert decoder.decode(source, lambda: True) is None
    os.close(theirs)


def test_many_at_once(decoder: Decoder) -> None:
    expected = decoded(decoder, CLIP.read_bytes())
    files = len(os.listdir("/proc/self/fd"))
    same: list[bool] = []

    def decode() -> None:
        same.append(np.array_equal(decoded(decoder, CLIP.read_bytes()), expected))

    threads = [threading.Thread(target=decode) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 20
    process = decoder._process.pid
    deadline = time.monotonic() + 10
    while children(process):  # none is left, as a zombie either
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == files
    assert len(os.listdir(f"/proc/{process}/fd")) < 10


def test_bombs_harm_only_their_own_requests(serve: Callable[..., Server]) -> None:
    server = serve("--max-audio-minutes", "10")
    [engine] = children(server.process.pid)
    idle = _memory(engine, "VmRSS")
    bombs = {
        "hours": (silence(11 * 60), "audio_too_long"),
        "memory": (claims_frames(), "decode_memory"),
        "rate": (claims_rate(), "invalid_audio"),
        "nested": (nested(), "invalid_audio"),
    }
    assert all(len(content) < 200_000 for content, _code in bombs.values())
    found: dict[str, str | None] = {}
    texts: list[str] = []

    def throw(name: str) -> None:
        try:
            server.client().audio.transcriptions.create(file=("a", bombs[name][0]), model="whisper-1")
        except openai.BadRequestError as error:
            found[name] = error.code

    def say() -> None:
        create = server.client().audio.transcriptions.create
        texts.append(create(file=CLIP, model="whisper-1", language="en").text)

    threads = [threading.Thread(target=throw, args=(name,)) for name in bombs]
    threads += [threading.Thread(target=say) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {name: code for name, (_content, code) in bombs.items()}
    assert texts == [TEXT] * 4
    assert children(server.process.pid) == [engine]
    # The samples of a bomb that is long are not even mapped; what is computed for a clip is allowed for.
    assert _memory(engine, "VmHWM") < idle + 100
    status, _headers, body = server.post(
        "/v1/audio/transcriptions",
        [('name="model"', b"whisper-1"), ('name="file"', encoded("mp4", "aac", RATE, "mono", picture=8190))],
    )
    assert (status, json.loads(body)["text"]) == (200, TEXT)


def _memory(pid: int, name: str) -> float:
    """MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

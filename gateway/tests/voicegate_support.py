"""A real server on loopback with the demo model, driven by the official client."""

from __future__ import annotations

import csv
import http.server
import io
import itertools
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import wave
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import openai
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "demo" / "whisper-demo"
MODEL_EN = ROOT / "demo" / "whisper-demo-en"
CLIPS = ROOT / "demo" / "clips"
# What a server's environment needs to find the stand-in for pyannote.audio.
PYANNOTE_STANDIN = {
    "PYTHONPATH": os.pathsep.join(
        str(ROOT / "gateway" / part) for part in ("src", "tests", "tests/pyannote_standin")
    )
}


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """For a voicegate of this checkout, without settings of whoever runs the tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VOICEGATE_")}
    return clean | {"PYTHONPATH": str(ROOT / "gateway" / "src")} | (more or {})


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command of voicegate, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "voicegate", *arguments],
        env=environment(env), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Clip:
    file: str
    language: str
    text: str
    voice: str
    set: str

    @property
    def path(self) -> Path:
        return CLIPS / self.file


def clips(sets: str) -> list[Clip]:
    with (CLIPS / "clips.tsv").open(encoding="utf-8") as file:
        return [clip for row in csv.DictReader(file, delimiter="\t") if (clip := Clip(**row)).set in sets]


class Server:
    """`voicegate serve` as a process of its own, with what it logs."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "voicegate", "serve", "--port", "0", "--device", "cpu", *arguments],
            env=environment(env),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._listening = threading.Event()
        self.port = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if match := re.search(r'\blistening\b.*\bport"?[=:] ?(\d+)|\bport": (\d+).*"listening"', line):
                self.port = int(match[1] or match[2])
                self._listening.set()
        self._listening.set()

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_listening(self, seconds: float = 30) -> None:
        assert self._listening.wait(seconds), self.log
        assert self.port, self.log

    def wait_ready(self, seconds: float = 30) -> None:
        self.wait_listening(seconds)
        deadline = time.monotonic() + seconds
        while self.health()[0] != 200:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def health(self) -> tuple[int, dict[str, Any]]:
        status, _, body = self.request("GET", "/health")
        return status, json.loads(body)

    def wait_health(self, good: Callable[[dict[str, Any]], bool], seconds: float = 15) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not good(body := self.health()[1]):
            assert time.monotonic() < deadline, (body, self.log)
            time.sleep(0.02)
        return body

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        request = urllib.request.Request(self.url + path, body, headers or {}, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
                return response.status, _lower(response.headers), response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _lower(error.headers), error.read()

    def post(
        self, path: str, parts: list[tuple[str, bytes]], headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """A form whose parts are given as (header lines, content)."""
        body, content_type = form(parts)
        return self.request("POST", path, body, {"Content-Type": content_type} | (headers or {}))

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def stop(self) -> int:
        self.process.terminate()
        try:
            code = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join(5)
        return code


@dataclass(frozen=True)
class Call:
    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """Takes webhooks on loopback and answers each call with the next of `answers`, then with 204.

    An answer is a status, or a function that is given the handler and answers by itself.
    """

    def __init__(
        self,
        *answers: int | Callable[[http.server.BaseHTTPRequestHandler], None],
        context: ssl.SSLContext | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        self.calls: list[Call] = []
        left = list(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = handler.rfile.read(int(handler.headers["content-length"]))
                self.calls.append(Call(handler.path, _lower(handler.headers), body))
                answer = left.pop(0) if left else 204
                if callable(answer):
                    answer(handler)
                    return
                handler.send_response(answer)
                handler.send_header("Content-Length", "0")
                handler.end_headers()

            def log_message(handler, *_arguments: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer((address, 0), Handler)
        self._server.daemon_threads = True
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.url = f"http{'s' if context else ''}://{address}:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def form(parts: list[tuple[str, bytes]]) -> tuple[bytes, str]:
    body = b"".join(
        b"--xyz\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + content + b"\r\n"
        for head, content in parts
    )
    return body + b"--xyz--\r\n", "multipart/form-data; boundary=xyz"


def long_audio(repeats: int, pause: float = 2.5) -> bytes:
    """A clip said again and again, with pauses: as many segments as repeats."""
    with wave.open(str(CLIPS / "D009.wav"), "rb") as source:
        parameters = source.getparams()
        frames = source.readframes(source.getnframes())
    silence = b"\0" * (2 * int(parameters.framerate * pause))
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setparams(parameters)
        for _ in range(repeats):
            file.writeframes(frames + silence)
    return target.getvalue()


def samples_of(path: Path, rate: int = 16000) -> NDArray[np.int16]:
    """A file's audio, mono."""
    pieces: list[NDArray[np.int16]] = []
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=rate)
        for frame in itertools.chain(container.decode(audio=0), (None,)):
            pieces += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
    return np.concatenate(pieces)


def encoded(samples: NDArray[np.int16], form: str) -> list[bytes]:
    """16 kHz samples as a live client sends them, in small pieces (`form` as in `ears_wire.FORMATS`)."""
    if form == "pcm16":
        data = samples.astype("<i2").tobytes()
        return [data[first : first + 640] for first in range(0, len(data), 640)]
    names = {"g711_ulaw": ("pcm_mulaw", 8000), "g711_alaw": ("pcm_alaw", 8000)}
    codec, rate = names.get(form, ("libopus", 48000))
    source = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    source.rate = 16000
    resampler = av.AudioResampler(format="s16", layout="mono", rate=rate, frame_size=rate // 50)
    frames = [*(frame for part in (source, None) for frame in resampler.resample(part)), None]
    if form not in ("webm", "ogg"):
        coder: Any = av.CodecContext.create(codec, "w")
        coder.sample_rate, coder.layout, coder.format = rate, "mono", "s16"
        coder.time_base = Fraction(1, rate)
        return [bytes(packet) for frame in frames for packet in coder.encode(frame)]
    file = io.BytesIO()
    with av.open(
        file, "w", format=form, options={"page_duration": "20000"} if form == "ogg" else {}
    ) as output:
        stream: Any = output.add_stream(codec, rate=rate, layout="mono")
        for frame in frames:
            output.mux(stream.encode(frame))
    data = file.getvalue()
    return [data[first : first + 200] for first in range(0, len(data), 200)]


def conversation() -> bytes:
    """Two speakers, of whom the second is not as loud, as a WAV file."""
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        for name, volume in (("D009", 1.0), ("D026", 0.3), ("D030", 1.0)):
            with wave.open(str(CLIPS / f"{name}.wav")) as clip:
                samples = np.frombuffer(clip.readframes(clip.getnframes()), np.int16).astype(np.float32)
            peak = np.abs(samples).max()
            file.writeframes((samples / peak * 32000 * volume).astype(np.int16).tobytes())
            file.writeframes(b"\0" * 2 * 40000)
    return target.getvalue()

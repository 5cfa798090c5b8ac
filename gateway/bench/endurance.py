"""Does memory stay flat: over many short requests, and over one file of hours?

    .venv/bin/python gateway/bench/endurance.py [--requests 10000] [--hours 2] [--json FILE] [--svg FILE]
    .venv/bin/python gateway/bench/endurance.py --pid PID --port PORT ...     a server that runs already

Requests: short clips in several formats and forms of answer, over kept and fresh connections, mixed with
broken audio, unknown models and clients that leave. Each answer is held against what must come. After every
hundredth the memory of the server and of what it started is read (RSS and PSS, smaps_rollup). `growth` is the
slope of a straight line through the readings after the warm-up, in MiB per 1,000 requests.

File: clips again and again with pauses, as FLAC. `peak` is the kernel's own high-water mark of each process,
`peak_together` the largest sum of PSS that was seen, every 0.2 s.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import http.client
import io
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from overhead import ROOT, form

ROLES = {
    "voicegate.engine_process": "engine",
    "voicegate.decoder": "decoder",
    "voicegate.ears_process": "ears",
}
EVERY = 100  # requests between two readings
WARM_UP = 0.1  # of the requests: not counted as growth
URL = "/v1/audio/transcriptions"
MIB = 1024 * 1024


# -- reading memory


def family(server: int) -> dict[str, list[int]]:
    """Process ids of the server and what it started, by their roles."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found = {"server": [server]}
    waiting = list(children.get(server, ()))
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, ())
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            role = next((role for module, role in ROLES.items() if module in command), "other")
            found.setdefault(role, []).append(pid)
    return found


def _kilobytes(path: str, names: tuple[str, ...]) -> dict[str, float]:
    with open(path, encoding="ascii") as file:
        fields = (line.split() for line in file)
        return {field[0][:-1]: int(field[1]) / 1024 for field in fields if field[0][:-1] in names}


def reading(server: int) -> dict[str, float]:
    """MiB by role: `engine` and `engine_pss`, and so on."""
    values: dict[str, float] = {}
    for role, pids in family(server).items():
        for pid in pids:
            with contextlib.suppress(OSError):
                found = _kilobytes(f"/proc/{pid}/smaps_rollup", ("Rss", "Pss"))
                values[role] = values.get(role, 0.0) + found["Rss"]
                values[f"{role}_pss"] = values.get(f"{role}_pss", 0.0) + found["Pss"]
    return values


def peaks(server: int) -> dict[str, float]:
    """The highest RSS of each role since `forget_peaks`, MiB."""
    values: dict[str, float] = {}
    for role, pids in family(server).items():
        for pid in pids:
            with contextlib.suppress(OSError):
                high = _kilobytes(f"/proc/{pid}/status", ("VmHWM",))["VmHWM"]
                values[role] = max(values.get(role, 0.0), high)
    return values


def forget_peaks(server: int) -> None:
    for pid in itertools.chain(*family(server).values()):
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


# -- requests


@dataclass(frozen=True)
class Request:
    """One kind of request: what is sent, and what has to come back."""

    name: str
    audio: bytes
    fields: dict[str, str]
    status: int = 200
    text: str | None = None  # as it must stand in the answer
    code: str = ""
    fresh: bool = False  # on a connection of its own
    leave: str = ""  # "sent" or "sending": the client goes away then

    def send(self, port: int, kept: http.client.HTTPConnection) -> None:
        body, content_type = form(self.audio, {"model": "whisper-1"} | self.fields)
        if self.leave:
            return self._send_and_leave(port, body, content_type)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120) if self.fresh else kept
        connection.request("POST", URL, body, {"Content-Type": content_type})
        response = connection.getresponse()
        answer = response.read().decode()
        if self.fresh:
            connection.close()
        good = response.status == self.status and (self.text or "") in answer
        if self.code:
            good = good and json.loads(answer)["error"]["code"] == self.code
        if not good:
            raise SystemExit(f"{self.name}: {response.status} {answer[:500]}")
        return None

    def _send_and_leave(self, port: int, body: bytes, content_type: str) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            connection.sendall(body if self.leave == "sent" else body[: len(body) // 2])
            time.sleep(0.02)


def encoded(path: Path, container: str, codec: str, rate: int) -> bytes:
    target = io.BytesIO()
    with av.open(str(path)) as source, av.open(target, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        resampler = av.AudioResampler(
            format=stream.codec_context.format, layout="mono", rate=rate,
            frame_size=stream.codec_context.frame_size or 1024,
        )  # fmt: skip
        for frame in (*source.decode(audio=0), None):
            for piece in resampler.resample(frame):
                output.mux(stream.encode(piece))
        output.mux(stream.encode(None))
    return target.getvalue()


def spoken(folder: Path) -> list[dict[str, str]]:
    with (folder / "clips.tsv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file, delimiter="\t") if row["set"] == "D"]


def mixture(folder: Path) -> list[Request]:
    """One round of requests; a third of them are trouble."""
    rows = itertools.cycle(spoken(folder))

    def clip() -> tuple[Path, dict[str, str], str]:
        row = next(rows)
        return folder / row["file"], {"language": row["language"]}, row["text"]

    round_: list[Request] = []
    for form_, fresh in (("json", False), ("text", True), ("srt", False), ("verbose_json", False)):
        path, fields, text = clip()
        round_.append(
            Request(form_, path.read_bytes(), fields | {"response_format": form_}, text=text, fresh=fresh)
        )
    path, fields, text = clip()
    more = {"response_format": "verbose_json", "timestamp_granularities[]": "word"}
    round_.append(Request("words", path.read_bytes(), fields | more, text=text))
    path, fields, text = clip()
    round_.append(Request("stream", path.read_bytes(), fields | {"stream": "true"}, text=text, fresh=True))
    path, _fields, text = clip()
    round_.append(Request("language detected", path.read_bytes(), {}, text=text))
    for container, codec, rate, exact in (
        ("flac", "flac", 16000, True), ("webm", "libopus", 48000, False), ("mp3", "libmp3lame", 44100, False),
        ("mp4", "aac", 44100, False),
    ):  # fmt: skip
        path, fields, text = clip()
        content = encoded(path, container, codec, rate)
        round_.append(Request(container, content, fields, text=text if exact else None))
    wav = path.read_bytes()
    noise = random.Random(0).randbytes(30_000)  # noqa: S311
    bad = {"status": 400, "code": "invalid_audio"}
    trouble = [
        Request("garbage", noise, {}, **bad),  # type: ignore[arg-type]
        Request("header only", wav[:44], {}, fresh=True, **bad),  # type: ignore[arg-type]
        Request("unknown model", wav, {"model": "no-such"}, status=404, code="model_not_found"),
        Request("leaves before the answer", wav, {}, leave="sent"),
        Request("leaves in the upload", wav, {}, leave="sending"),
    ]
    for place, request in enumerate(trouble):
        round_.insert(3 * place + 2, request)
    return round_


def many(server: int, port: int, count: int, round_: list[Request], every: int = EVERY) -> dict[str, Any]:
    """Send `count` requests, one after the other, and read memory every hundredth. Ctrl-C: what there is."""
    kept = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    readings: list[dict[str, float]] = []
    started = time.monotonic()
    number = 0
    with contextlib.suppress(KeyboardInterrupt):
        for request in itertools.islice(itertools.cycle(round_), count):
            request.send(port, kept)
            number += 1
            if number % every == 0:
                readings.append({"requests": number} | reading(server))
    kept.close()
    return {"requests": number, "seconds": round(time.monotonic() - started, 1), "readings": readings}


def judged(readings: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """By role, after the warm-up: growth, MiB per 1,000 requests; means of the first and last quarter."""
    after = [item for item in readings if item["requests"] > WARM_UP * readings[-1]["requests"]]
    quarter = max(1, len(after) // 4)
    result: dict[str, dict[str, float]] = {}
    for role in sorted(set(readings[0]) - {"requests"}):
        values = [item[role] for item in after]
        slope, _start = statistics.linear_regression([item["requests"] / 1000 for item in after], values)
        result[role] = {
            "growth": round(slope, 3),
            "first_quarter": round(statistics.fmean(values[:quarter]), 1),
            "last_quarter": round(statistics.fmean(values[-quarter:]), 1),
        }
    return result


# -- a file of hours


def long_file(folder: Path, seconds: float, path: Path) -> float:
    """Clips of all languages in turn, with pauses of 0.3 to 8 s, as FLAC. Returns its length in seconds."""
    chance = random.Random(1)  # noqa: S311
    clips: list[np.ndarray[Any, np.dtype[np.int16]]] = []
    for row in spoken(folder):
        resampler = av.AudioResampler(format="s16", layout="mono", rate=16000)
        with av.open(str(folder / row["file"])) as source:
            frames = [
                piece for frame in (*source.decode(audio=0), None) for piece in resampler.resample(frame)
            ]
        clips.append(np.concatenate([frame.to_ndarray()[0] for frame in frames]))
    written = 0
    with av.open(str(path), "w", format="flac") as output:
        stream = output.add_stream("flac", rate=16000, layout="mono")
        stream.codec_context.format = "s16"
        fifo = av.AudioFifo()
        while written < seconds * 16000:
            for samples in (chance.choice(clips), np.zeros(int(chance.uniform(0.3, 8) * 16000), np.int16)):
                frame = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
                frame.sample_rate = 16000
                frame.pts = written
                written += samples.shape[0]
                fifo.write(frame)
            for piece in fifo.read_many(4096):
                output.mux(stream.encode(piece))
        if (rest := fifo.read(0, partial=True)) is not None:
            output.mux(stream.encode(rest))
        output.mux(stream.encode(None))
    return written / 16000


def one_file(server: int, port: int, path: Path, length: float) -> dict[str, Any]:
    before = reading(server)
    forget_peaks(server)
    together = 0.0
    ended = threading.Event()

    def watch() -> None:
        nonlocal together
        while not ended.wait(0.2):
            now = reading(server)
            together = max(together, sum(value for name, value in now.items() if name.endswith("_pss")))

    watching = threading.Thread(target=watch)
    watching.start()
    body, content_type = form(path.read_bytes(), {"model": "whisper-1", "response_format": "verbose_json"})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    started = time.monotonic()
    connection.request("POST", URL, body, {"Content-Type": content_type})
    response = connection.getresponse()
    answer = response.read()
    seconds = time.monotonic() - started
    connection.close()
    ended.set()
    watching.join()
    if response.status != 200:
        raise SystemExit(f"the file: {response.status} {answer.decode()[:500]}")
    highest = peaks(server)
    time.sleep(2)
    after = reading(server)
    return {
        "minutes": round(length / 60, 1),
        "upload_mib": round(path.stat().st_size / MIB, 1),
        "seconds": round(seconds, 1),
        "segments": len(json.loads(answer)["segments"]),
        "peak_together": round(together, 1),
    } | {
        role: {
            "before": round(before[role], 1),
            "peak": round(highest.get(role, 0.0), 1),
            "after": round(after.get(role, 0.0), 1),
        }
        for role in before
        if not role.endswith("_pss")
    }  # fmt: skip


# -- a plot


def plot(readings: list[dict[str, float]]) -> str:
    """RSS over requests, a line for each process, as SVG."""
    roles = [role for role in readings[0] if role != "requests" and not role.endswith("_pss")]
    width, height, left, bottom = 720, 300, 60, 40
    most = max(item[role] for item in readings for role in roles) * 1.1
    last = readings[-1]["requests"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="12">',
        f'<path d="M{left} 10V{height - bottom}H{width - 10}" fill="none" stroke="#888"/>',
        f'<text x="{left}" y="{height - 10}">0</text>',
        f'<text x="{width - 10}" y="{height - 10}" text-anchor="end">{last:,.0f} requests</text>',
    ]
    for role, colour in zip(roles, ("#1f77b4", "#d62728", "#2ca02c", "#9467bd"), strict=False):
        points = " ".join(
            f"{left + item['requests'] / last * (width - 10 - left):.1f},"
            f"{height - bottom - item.get(role, 0.0) / most * (height - bottom - 10):.1f}"
            for item in readings
        )
        x, y = points.split()[-1].split(",")
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(
            f'<text x="{x}" y="{float(y) - 5:.1f}" fill="{colour}" text-anchor="end">'
            f"{role}, {readings[-1].get(role, 0.0):.0f} MiB</text>"
        )
    return "\n".join([*parts, "</svg>\n"])


# -- all of it


@contextlib.contextmanager
def running(args: argparse.Namespace) -> Iterator[int]:
    """The process id of a server, ready to answer."""
    if args.pid:
        yield args.pid
        return
    command = [sys.executable, "-m", "voicegate", "serve", "--model", args.model, "--device", args.device,
               "--port", str(args.port), "--log-level", "warning", "--max-audio-minutes", "600"]  # fmt: skip
    server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT / "gateway" / "src")})
    try:
        deadline = time.monotonic() + 120
        while not ready(args.port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server did not become ready")
            time.sleep(0.2)
        yield server.pid
    finally:
        server.terminate()
        server.wait(20)


def ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "demo" / "whisper-demo"))
    parser.add_argument("--clips", type=Path, default=ROOT / "demo" / "clips")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--requests", type=int, default=10_000, help="0: none")
    parser.add_argument("--hours", type=float, default=2.0, help="0: no file")
    parser.add_argument("--port", type=int, default=8796)
    parser.add_argument("--pid", type=int, default=0, help="of a server that listens on --port already")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--svg", type=Path, help="draw the readings into this file")
    args = parser.parse_args()

    figures: dict[str, Any] = {}
    with running(args) as server:
        if args.requests:
            every = max(1, min(EVERY, args.requests // 20))
            found = many(server, args.port, args.requests, mixture(args.clips), every)
            figures["requests"] = found | {"memory": judged(found["readings"])}
        if args.hours:
            # Not on a disk, whose cache would be part of the picture.
            path = Path(f"/dev/shm/voicegate-endurance-{os.getpid()}.flac")  # noqa: S108
            try:
                length = long_file(args.clips, args.hours * 3600, path)
                figures["file"] = one_file(server, args.port, path, length)
            finally:
                path.unlink(missing_ok=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if args.svg and args.requests:
        args.svg.write_text(plot(figures["requests"]["readings"]), encoding="utf-8")
    figures.get("requests", {}).pop("readings", None)
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

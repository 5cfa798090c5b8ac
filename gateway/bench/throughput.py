"""How much work gets through the server, beside faster-whisper in process, in one run.

    .venv/bin/python gateway/bench/throughput.py [--requests 64] [--clients 1 8 32] [--json out.json]

For every number of clients the same requests go first through faster-whisper in process (one after another,
as one model computes one at a time), then over HTTP from that many threads, each on a connection kept open.
`http_added_ms` is for one client and a 1.5 s utterance: difference of the medians, taken in turns.

    … --beside http://ADDRESS:8000 --beside-model NAME

asks another server with OpenAI's audio API (Speaches) the same in the same run. It should serve that model,
with the same compute type, on the same machine, with as many threads as are told on stderr.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import io
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from overhead import ROOT, form


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "demo" / "whisper-demo"))
    parser.add_argument("--clip", default=str(ROOT / "demo" / "clips" / "D009.wav"))
    parser.add_argument("--requests", type=int, default=64, help="for each number of clients")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compute-type", default="int8")
    parser.add_argument("--port", type=int, default=8797)
    parser.add_argument("--beside", default="", help="URL of another server to measure as well")
    parser.add_argument("--beside-model", default="whisper-1", help="what that one calls the model")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    threads = min(8, len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "voicegate", "serve", "--model", args.model, "--device", args.device,
               "--compute-type", args.compute_type, "--port", str(args.port), "--cpu-threads", str(threads),
               "--queue-limit", str(max(args.clients)), "--log-level", "warning"]  # fmt: skip
    server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT / "gateway" / "src")})
    try:
        figures = measure(args, threads)
    finally:
        server.terminate()
        server.wait(20)
    print(json.dumps(figures, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


class Served:
    """A server, and the answer to the one request that it gets again and again."""

    def __init__(self, url: str, model: str, audio: bytes) -> None:
        self._address = urllib.parse.urlsplit(url).netloc
        self._body, content_type = form(audio, {"model": model, "language": "en"})
        self._headers = {"Content-Type": content_type}

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._address, timeout=300)

    def ask(self, connection: http.client.HTTPConnection) -> str:
        connection.request("POST", "/v1/audio/transcriptions", self._body, self._headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise SystemExit(f"{self._address} answered {response.status}: {answer}")
        return str(answer["text"]).strip()

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        connection = self.connect()
        while True:
            try:
                connection.request("GET", "/health")
                if (response := connection.getresponse()).read() and response.status == 200:
                    return connection.close()
            except OSError:
                connection.close()
            if time.monotonic() > deadline:
                raise SystemExit(f"{self._address} did not become ready")
            time.sleep(0.2)

    def per_second(self, requests: int, clients: int, expected: str) -> float:
        """From so many threads, each on a connection of its own."""
        work: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(requests):
            work.put(None)
        texts: list[str] = []

        def client() -> None:
            own = self.connect()
            while True:
                try:
                    work.get_nowait()
                except queue.Empty:
                    return own.close()
                texts.append(self.ask(own))

        workers = [threading.Thread(target=client) for _ in range(clients)]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - started
        if texts != [expected] * requests:
            raise SystemExit(f"{clients} clients: {len(texts)} answers, or texts that differ")
        return requests / seconds


def measure(args: argparse.Namespace, threads: int) -> dict[str, Any]:
    from faster_whisper import WhisperModel

    print(f"{threads} threads", file=sys.stderr)
    audio = Path(args.clip).read_bytes()
    model = WhisperModel(args.model, device=args.device, compute_type=args.compute_type, cpu_threads=threads)

    def in_process() -> str:
        segments, _ = model.transcribe(io.BytesIO(audio), language="en", vad_filter=True)
        return "".join(segment.text for segment in segments).strip()

    servers = {"http": Served(f"http://127.0.0.1:{args.port}", "whisper-1", audio)}
    if args.beside:
        servers["beside"] = Served(args.beside, args.beside_model, audio)
    for server in servers.values():
        server.wait()
    expected = in_process()
    figures = utterances(in_process, servers, args.requests, expected)
    for clients in args.clients:
        started = time.perf_counter()
        for _ in range(args.requests):
            in_process()
        raw = args.requests / (time.perf_counter() - started)
        found = {"in_process_per_second": round(raw, 2)}
        for name, server in servers.items():
            served = server.per_second(args.requests, clients, expected)
            found |= {f"{name}_per_second": round(served, 2), f"{name}_ratio": round(served / raw, 3)}
        figures[f"{clients} clients"] = found
    return figures


def utterances(
    in_process: Callable[[], str], servers: dict[str, Served], count: int, expected: str
) -> dict[str, Any]:
    """Milliseconds in process, and what each server adds to that, one request at a time, in turns."""
    asks: dict[str, Callable[[], str]] = {"in_process": in_process}
    for name, server in servers.items():
        asks[name] = functools.partial(server.ask, server.connect())
    seconds: dict[str, list[float]] = {name: [] for name in asks}
    for turn in range(count + 3):
        for name, ask in asks.items():
            started = time.perf_counter()
            text = ask()
            ended = time.perf_counter()
            if text != expected:
                raise SystemExit(f"{name}: the text differs: {text!r}")
            if turn >= 3:
                seconds[name].append(ended - started)
    median = {name: statistics.median(found) * 1000 for name, found in seconds.items()}
    added = {f"{name}_added_ms": round(median[name] - median["in_process"], 2) for name in servers}
    return {"in_process_ms": round(median["in_process"], 2), **added}


if __name__ == "__main__":
    sys.exit(main())

"""How much work gets through the server, beside faster-whisper in process, in one run.

    .venv/bin/python gateway/bench/throughput.py [--requests 64] [--clients 1 8 32] [--json out.json]

For every number of clients the same requests go first through faster-whisper in process (one after another,
as one model computes one at a time), then over HTTP from that many threads, each on a connection kept open.
`added_ms` is for one client and a 1.5 s utterance: difference of the medians, taken in turns.
"""

from __future__ import annotations

import argparse
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


def measure(args: argparse.Namespace, threads: int) -> dict[str, Any]:
    from faster_whisper import WhisperModel

    audio = Path(args.clip).read_bytes()
    body, content_type = form(audio, {"model": "whisper-1", "language": "en"})
    model = WhisperModel(args.model, device=args.device, compute_type=args.compute_type, cpu_threads=threads)

    def in_process() -> str:
        segments, _ = model.transcribe(io.BytesIO(audio), language="en", vad_filter=True)
        return "".join(segment.text for segment in segments).strip()

    def over_http(connection: http.client.HTTPConnection) -> str:
        connection.request("POST", "/v1/audio/transcriptions", body, {"Content-Type": content_type})
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise SystemExit(f"the server answered {response.status}: {answer}")
        return str(answer["text"])

    connection = http.client.HTTPConnection("127.0.0.1", args.port, timeout=300)
    deadline = time.monotonic() + 60
    while True:
        try:
            connection.request("GET", "/health")
            if (response := connection.getresponse()).read() and response.status == 200:
                break
        except OSError:
            connection.close()
        if time.monotonic() > deadline:
            raise SystemExit("the server did not become ready")
        time.sleep(0.2)

    expected = in_process()
    alone: list[float] = []
    added: list[float] = []
    for turn in range(args.requests + 3):
        started = time.perf_counter()
        in_process()
        middle = time.perf_counter()
        wrong = over_http(connection) != expected
        ended = time.perf_counter()
        if wrong:
            raise SystemExit("the texts differ")
        if turn >= 3:
            alone.append(middle - started)
            added.append(ended - middle)
    figures: dict[str, Any] = {
        "in_process_ms": round(statistics.median(alone) * 1000, 2),
        "added_ms": round((statistics.median(added) - statistics.median(alone)) * 1000, 2),
    }
    for clients in args.clients:
        started = time.perf_counter()
        for _ in range(args.requests):
            in_process()
        raw = args.requests / (time.perf_counter() - started)
        work: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(args.requests):
            work.put(None)
        texts: list[str] = []

        def client(work: queue.SimpleQueue[None] = work, texts: list[str] = texts) -> None:
            own = http.client.HTTPConnection("127.0.0.1", args.port, timeout=300)
            while True:
                try:
                    work.get_nowait()
                except queue.Empty:
                    return own.close()
                texts.append(over_http(own))

        workers = [threading.Thread(target=client) for _ in range(clients)]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        served = args.requests / (time.perf_counter() - started)
        if texts != [expected] * args.requests:
            raise SystemExit(f"{clients} clients: {len(texts)} answers, or texts that differ")
        figures[f"{clients} clients"] = {
            "in_process_per_second": round(raw, 2),
            "http_per_second": round(served, 2),
            "ratio": round(served / raw, 3),
        }
    return figures


if __name__ == "__main__":
    sys.exit(main())

"""What the server adds to faster-whisper in process, on the same clips, model and threads, in one run.

    .venv/bin/python gateway/bench/overhead.py [--rounds 5] [--json out.json] [--max-ratio 1.2]

The clips take turns: each is transcribed once in process and once over HTTP (kept connection, loopback)
before the next, so that both see the same machine. Medians per clip are added up.
"""

from __future__ import annotations

import argparse
import csv
import http.client
import io
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def form(audio: bytes, fields: dict[str, str]) -> tuple[bytes, str]:
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        "Content-Type: audio/wav\r\n\r\n".encode()
    )
    parts += [audio, f"\r\n--{boundary}--\r\n".encode()]
    return b"".join(parts), f"multipart/form-data; boundary={boundary}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "demo" / "whisper-demo"))
    parser.add_argument("--clips", default=str(ROOT / "demo" / "clips"))
    parser.add_argument("--threads", type=int, default=0, help="0: all cores, at most 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=8798)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument(
        "--max-ratio", type=float, help="exit 1 if the ratio with the language given is higher"
    )
    args = parser.parse_args()
    threads = args.threads or min(8, len(os.sched_getaffinity(0)))

    with (Path(args.clips) / "clips.tsv").open(encoding="utf-8") as file:
        clips = [row for row in csv.DictReader(file, delimiter="\t") if row["set"] in "DAF"]
    audio = {row["file"]: (Path(args.clips) / row["file"]).read_bytes() for row in clips}

    command = [sys.executable, "-m", "voicegate", "serve", "--model", args.model, "--device", "cpu",
               "--compute-type", "int8", "--port", str(args.port), "--cpu-threads", str(threads),
               "--log-level", "warning"]  # fmt: skip
    server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT / "gateway" / "src")})
    try:
        figures = measure(args.model, threads, args.rounds, args.port, clips, audio)
    finally:
        server.terminate()
        server.wait(20)
    print(json.dumps(figures, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if args.max_ratio and figures["language given"]["ratio"] > args.max_ratio:
        print(f"ratio above {args.max_ratio}", file=sys.stderr)
        return 1
    return 0


def measure(
    model_folder: str,
    threads: int,
    rounds: int,
    port: int,
    clips: list[dict[str, str]],
    audio: dict[str, bytes],
) -> dict[str, dict[str, float]]:
    from faster_whisper import WhisperModel

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    deadline = time.monotonic() + 60
    while True:
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            response.read()
            if response.status == 200:
                break
        except OSError:
            connection.close()
        if time.monotonic() > deadline:
            raise SystemExit("the server did not become ready")
        time.sleep(0.2)

    model = WhisperModel(model_folder, device="cpu", compute_type="int8", cpu_threads=threads)

    def in_process(row: dict[str, str], language: str | None) -> str:
        segments, _ = model.transcribe(io.BytesIO(audio[row["file"]]), language=language, vad_filter=True)
        return "".join(segment.text for segment in segments).strip()

    def over_http(row: dict[str, str], language: str | None) -> str:
        body, content_type = form(audio[row["file"]], {"model": "whisper-1", "language": language or ""})
        connection.request("POST", "/v1/audio/transcriptions", body, {"Content-Type": content_type})
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise SystemExit(f"the server answered {response.status}: {answer}")
        text: str = answer["text"]
        return text

    figures: dict[str, dict[str, float]] = {}
    for name, given in (("language given", True), ("language detected", False)):
        times: dict[str, dict[str, list[float]]] = {"process": {}, "http": {}}
        wrong = 0
        for turn in range(rounds + 1):  # the first one warms up
            for row in clips:
                language = row["language"] if given else None
                for kind, call in (("process", in_process), ("http", over_http)):
                    started = time.perf_counter()
                    text = call(row, language)
                    seconds = time.perf_counter() - started
                    wrong += text != row["text"]
                    if turn:
                        times[kind].setdefault(row["file"], []).append(seconds)
        mean = {
            kind: sum(statistics.median(values) for values in by_clip.values()) / len(by_clip)
            for kind, by_clip in times.items()
        }
        figures[name] = {
            "clips": len(clips),
            "in_process_ms": round(mean["process"] * 1000, 2),
            "http_ms": round(mean["http"] * 1000, 2),
            "added_ms": round((mean["http"] - mean["process"]) * 1000, 2),
            "ratio": round(mean["http"] / mean["process"], 3),
            "wrong_texts": wrong,
        }
    connection.close()
    return figures


if __name__ == "__main__":
    sys.exit(main())

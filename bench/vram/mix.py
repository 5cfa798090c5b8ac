# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""
Mixed requests to speech-to-text and Ollama on one card filled to plan: does anything run out of memory?

    python3 -m bench.vram.mix --stt http://HOST:8000 --ollama http://HOST:11434 --llm llama3.1:8b

Recordings of several lengths and questions of several lengths, in an order that a seed decides, so many at
once as --workers says. Prints what came of them and exits with 1 if one ran out of memory, failed otherwise,
or Ollama moved layers of a model to the CPU. On the machine with the card the least free VRAM is noted as
well. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import math
import random
import re
import statistics
import struct
import sys
import threading
import time
import urllib.parse
import uuid
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.vram import collection

collection.importable()

from ansible_collections.sottovoce.stack.plugins.module_utils._nvml import NvmlError, NvmlMissing, open_nvml

OK, OUT_OF_MEMORY, FAILED = "ok", "out of memory", "failed"
SPEECH, LANGUAGE = "speech-to-text", "Ollama"
# As CUDA, CTranslate2, llama.cpp and Ollama say it.
_MEMORY = re.compile(
    r"out of memory|cudaMalloc failed|ALLOC_FAILED|failed to allocate|requires more (system|GPU) memory", re.I
)
RATE = 16000
TIMEOUT = 600.0


@dataclass(frozen=True)
class Request:
    """To whom, and how much: seconds of a recording, or words of a question."""

    service: str
    size: int


@dataclass(frozen=True)
class Outcome:
    request: Request
    kind: str
    seconds: float
    text: str = ""


@dataclass(frozen=True)
class Servers:
    """URLs, and the names of the models to ask for."""

    stt: str
    ollama: str
    llm: str
    stt_model: str = "whisper-1"
    stt_key: str = ""


def kind_of(status: int, text: str) -> str:
    """What an answer says. An error may come in the body of a 200, too (Ollama)."""
    if status == 200 and not text.lstrip().startswith('{"error"'):
        return OK
    return OUT_OF_MEMORY if _MEMORY.search(text) else FAILED


def mixed(count: int, seconds: Sequence[int], words: Sequence[int], seed: int) -> list[Request]:
    """As many of the one as of the other, shuffled; of each size about as many."""
    every = [
        Request(SPEECH, seconds[number // 2 % len(seconds)])
        if number % 2 == 0
        else Request(LANGUAGE, words[number // 2 % len(words)])
        for number in range(count)
    ]
    random.Random(seed).shuffle(every)  # noqa: S311 - an order, no secret
    return every


def recording(seconds: int) -> bytes:
    """WAV with two tones that come and go, so that it is neither silence nor always the same."""
    samples = (
        int(8000 * math.sin(i * 0.0864) * math.sin(i * 0.00031) + 4000 * math.sin(i * 0.522))
        for i in range(seconds * RATE)
    )
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as audio:
        audio.setnchannels(1)
        audio.setsampwidth(2)
        audio.setframerate(RATE)
        audio.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
    return buffer.getvalue()


def send(url: str, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
    """Status and text; status 0 where no answer came."""
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(str(parts.hostname), parts.port, timeout=TIMEOUT)
    try:
        connection.request(method, parts.path.rstrip("/") + path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, f"{url} does not answer: {error}"
    finally:
        connection.close()


def transcribe(servers: Servers, audio: bytes) -> tuple[int, str]:
    boundary = uuid.uuid4().hex
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{servers.stt_model}\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="mix.wav"\r\n'
        "Content-Type: audio/wav\r\n\r\n"
    )
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    if servers.stt_key:
        headers["Authorization"] = f"Bearer {servers.stt_key}"
    body = head.encode() + audio + f"\r\n--{boundary}--\r\n".encode()
    return send(servers.stt, "POST", "/v1/audio/transcriptions", body, headers)


def ask(servers: Servers, words: int) -> tuple[int, str]:
    # Different each time, so that no cache of prompts answers.
    question = f"{uuid.uuid4()} " + "and then? " * (words // 2)
    asked = {"model": servers.llm, "prompt": question, "stream": False, "options": {"num_predict": 64}}
    return send(servers.ollama, "POST", "/api/generate", json.dumps(asked).encode(), {})


def on_the_cpu(text: str) -> list[str]:
    """Models of an answer of /api/ps that are not wholly in VRAM, each with its part in percent."""
    try:
        listed = json.loads(text)["models"]
        return [
            f"{item['name']} {100 * item['size_vram'] // item['size']} %"
            for item in listed
            if item["size_vram"] < item["size"]
        ]
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return []


class Free:
    """The least free VRAM of the first card, where this machine has one (MiB)."""

    def __init__(self) -> None:
        self.least: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            with open_nvml() as nvml:
                while not self._ended.wait(0.05):
                    device = nvml.devices()[0]
                    self.least = device.free_mib if self.least is None else min(self.least, device.free_mib)
        except (NvmlMissing, NvmlError, IndexError):
            return

    def __enter__(self) -> Free:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()


def run(servers: Servers, requests: Sequence[Request], workers: int) -> dict[str, Any]:
    """Send them all; what came of them, with the least free VRAM and models that fell to the CPU."""
    recordings = {size: recording(size) for size in {r.size for r in requests if r.service == SPEECH}}
    partly: dict[str, None] = {}

    def one(request: Request) -> Outcome:
        begin = time.monotonic()
        if request.service == SPEECH:
            status, text = transcribe(servers, recordings[request.size])
        else:
            status, text = ask(servers, request.size)
        kind = kind_of(status, text)
        took = time.monotonic() - begin
        if request.service == LANGUAGE:
            _status, loaded = send(servers.ollama, "GET", "/api/ps", b"", {})
            partly.update(dict.fromkeys(on_the_cpu(loaded)))
        return Outcome(request, kind, took, "" if kind == OK else f"{status} {text.strip()[:200]}")

    with Free() as free, ThreadPoolExecutor(workers) as pool:
        outcomes = list(pool.map(one, requests))
    return {**summed(outcomes), "partly_on_cpu": list(partly), "least_free_mib": free.least}


def summed(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    services: dict[str, Any] = {}
    for service in (SPEECH, LANGUAGE):
        own = [outcome for outcome in outcomes if outcome.request.service == service]
        services[service] = {
            **{kind: sum(outcome.kind == kind for outcome in own) for kind in (OK, OUT_OF_MEMORY, FAILED)},
            "median_s": round(statistics.median([o.seconds for o in own]), 3) if own else None,
        }
    messages = dict.fromkeys(outcome.text for outcome in outcomes if outcome.text)
    return {"requests": len(outcomes), "services": services, "messages": list(messages)[:5]}


def sound(result: dict[str, Any]) -> bool:
    counts = result["services"].values()
    return not result["partly_on_cpu"] and not any(each[OUT_OF_MEMORY] or each[FAILED] for each in counts)


def told(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['requests']} requests"]
    for service, each in result["services"].items():
        numbers = ", ".join(f"{each[kind]} {kind}" for kind in (OK, OUT_OF_MEMORY, FAILED))
        lines.append(f"  {service}: {numbers}; median {each['median_s']} s")
    if result["least_free_mib"] is not None:
        lines.append(f"  least free VRAM: {result['least_free_mib']} MiB")
    lines += [f"  partly on the CPU: {name}" for name in result["partly_on_cpu"]]
    return lines + [f"  {message}" for message in result["messages"]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stt", required=True)
    parser.add_argument("--stt-model", default="whisper-1")
    parser.add_argument("--stt-key-file", type=Path)
    parser.add_argument("--ollama", required=True)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", default="2,10,35,240", help="lengths of the recordings")
    parser.add_argument("--words", default="10,500,4000", help="lengths of the questions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here, too")
    given = parser.parse_args()
    key = given.stt_key_file.read_text(encoding="utf-8").strip() if given.stt_key_file else ""
    servers = Servers(given.stt, given.ollama, given.llm, given.stt_model, key)
    sizes = [[int(size) for size in text.split(",")] for text in (given.seconds, given.words)]
    result = run(servers, mixed(given.requests, sizes[0], sizes[1], given.seed), given.workers)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(told(result)))
    return 0 if sound(result) else 1


if __name__ == "__main__":
    sys.exit(main())

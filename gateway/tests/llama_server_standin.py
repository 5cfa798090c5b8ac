"""A stand-in for llama-server, the program that Ollama starts for each model: no weights, no card.

What Ollama 0.34 asks of it (its llm/llama_server.go and discover/llama_server.go): `--list-devices` and a
start without a model tell the card; a start with one loads it, logs what lies where, and answers /health,
/tokenize, /completion and /v1/embeddings. A model takes as many MiB as its GGUF has heads for keys and values
(`standins.model_of`); what the card has no room for goes to the CPU. Answers are made from what was asked
(`reply`, `vector`).

In the folder SOTTOVOCE_STANDIN_CARD lie cards.txt, the card as the NVML stand-in shows it, and journal.txt,
to which each runner adds lines: `load PID GPU_MIB CPU_MIB`, `begin PID`, `end PID`. Ollama ends it by
SIGKILL, so whoever keeps the card (`standins.SharedCard`) looks which processes are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HEADS = b"llama.attention.head_count_kv"
WORD_SECONDS = 0.02
NAME = "NVIDIA RTX A5000"


def reply(prompt: str) -> str:
    return f"You said: {prompt}"


def vector(text: str) -> list[float]:
    """Of length 1, as Ollama gives them."""
    numbers = [byte + 1.0 for byte in hashlib.sha256(text.encode()).digest()[:8]]
    length = sum(number * number for number in numbers) ** 0.5
    return [number / length for number in numbers]


def needed_mib(model: Path) -> int:
    header = model.read_bytes()[:4096]
    return int(struct.unpack_from("<I", header, header.index(HEADS) + len(HEADS) + 4)[0])


def note(folder: Path, *words: object) -> None:
    """One write, so that lines of several processes do not mix."""
    line = " ".join(str(word) for word in (words[0], os.getpid(), *words[1:]))
    file = os.open(folder / "journal.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def card(folder: Path) -> tuple[int, int]:
    """Total and free, MiB."""
    found = re.search(r"memory (\d+) 0 (\d+)", (folder / "cards.txt").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]), int(found[1]) - int(found[2])


class Runner(BaseHTTPRequestHandler):
    folder: Path

    def do_GET(self) -> None:
        self._answer({"status": "ok"} if self.path == "/health" else None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            self._answer({"tokens": list(body["content"].encode())})
        elif self.path == "/v1/embeddings":
            note(self.folder, "begin")
            time.sleep(WORD_SECONDS)
            tokens = len(body["input"])
            note(self.folder, "end")
            self._answer({"data": [{"embedding": vector(body["input"])}], "usage": {"prompt_tokens": tokens}})
        elif self.path == "/completion":
            note(self.folder, "begin")
            self._start("text/event-stream")
            words = re.findall(r"\S+\s*", reply(body["prompt"]))
            for word in words:
                time.sleep(WORD_SECONDS)
                self._event({"content": word, "stop": False})
            note(self.folder, "end")
            timings = {"prompt_n": len(body["prompt"]), "predicted_n": len(words)}
            self._event({"content": "", "stop": True, "stop_type": "eos", "timings": timings})
        else:
            self._answer(None)

    def _event(self, event: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _answer(self, body: Any) -> None:
        self._start("application/json", 200 if body else 404)
        self.wfile.write(json.dumps(body or {"error": f"the stand-in has no {self.path}"}).encode())

    def _start(self, content_type: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


def log(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main() -> None:
    options = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
    folder = Path(os.environ["SOTTOVOCE_STANDIN_CARD"])
    total, free = card(folder)
    if "--list-devices" in sys.argv:
        print(f"Available devices:\n  CUDA0: {NAME} ({total} MiB, {free} MiB free)")
        return
    if "--model" not in options:
        log(f"  Device 0: {NAME}, compute capability 8.6, VMM: yes, VRAM: {total} MiB")
        log("system_info: n_threads = 2 | CUDA : ARCHS = 860 |")
        return
    needed = needed_mib(Path(options["--model"]))
    here = min(free, needed)
    note(folder, "load", here, needed - here)
    Runner.folder = folder
    server = ThreadingHTTPServer(("127.0.0.1", int(options["--port"])), Runner)
    log(f"llama_prepare_model_devices: using device CUDA0 ({NAME}) (0000:01:00.0) - {free} MiB free")
    log(f"load_tensors: offloaded {2 if here == needed else 1}/2 layers to GPU")
    log(f"llama_kv_cache: CUDA0 KV buffer size = {here}.00 MiB")
    if here < needed:
        log(f"llama_kv_cache: CPU KV buffer size = {needed - here}.00 MiB")
    server.serve_forever()


if __name__ == "__main__":
    main()

"""Stand-ins for what fills a card, as far as memory goes: Ollama, its runners, Speaches. No GPU is needed.

The card itself is tests/support/nvml; its numbers are written here.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nvml_standin
import real_ollama


def write_card(path: Path, total: int, used: int) -> None:
    """One card for the NVML stand-in, MiB."""
    text = nvml_standin.DRIVER + nvml_standin.card(memory=f"{total} 0 {used}")
    fresh = path.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


class OllamaStandIn:
    """Ollama's API as far as memory goes, on a card whose numbers it writes for the NVML stand-in."""

    TOTAL = 12_000

    def __init__(self, folder: Path) -> None:
        self.cards = folder / "cards.txt"
        self.models: dict[str, dict[str, Any]] = {}
        self.sizes: dict[str, int] = {}
        self.log: list[str] = []
        self.embedders: set[str] = set()
        self.speech: Callable[[], int] = lambda: 0  # MiB the speech model holds
        self._lock = threading.RLock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with owner._lock:
                    listed = [owner._shown(name) for name in owner.models]
                self._answer({"models": listed})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if body["model"] in owner.embedders and self.path != "/api/embed" and body["keep_alive"]:
                    self._answer({"error": "does not support generate"}, 400)
                    return
                if body["keep_alive"] == 0:
                    owner.let_go(body["model"])
                else:
                    owner.load(body["model"], keep=float(body["keep_alive"]))
                self._answer({"done": True})

            def _answer(self, body: Any, status: int = 200) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.write()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def load(self, name: str, size: int = 0, keep: float = 300.0, busy: bool = False) -> None:
        """What does not fit beside the rest goes to the CPU."""
        with self._lock:
            self.sizes[name] = size or self.sizes[name]
            self.log.append(f"load {name}")
            free = self.TOTAL - self.used
            vram = min(free, self.sizes[name])
            self.models[name] = {
                "vram": vram,
                "until": time.time() + keep if keep >= 0 else 1e10,
                "busy": busy,
            }
            self.write()

    def let_go(self, name: str) -> None:
        with self._lock:
            self.log.append(f"unload {name}")
            found = self.models.get(name)
            if found is None:
                return
            found["until"] = time.time()
            if not found["busy"]:
                del self.models[name]
            self.write()

    def finish(self, name: str) -> None:
        with self._lock:
            found = self.models[name]
            found["busy"] = False
            if found["until"] <= time.time():
                del self.models[name]
            self.write()

    @property
    def used(self) -> int:
        return self.speech() + sum(int(one["vram"]) for one in self.models.values())

    def _shown(self, name: str) -> dict[str, Any]:
        found = self.models[name]
        until = datetime.datetime.fromtimestamp(min(found["until"], 9e9), datetime.UTC)
        mib = 1024 * 1024
        return {"name": name, "digest": "", "size": self.sizes[name] * mib, "size_vram": found["vram"] * mib,
                "expires_at": until.isoformat()}  # fmt: skip

    def write(self) -> None:
        write_card(self.cards, self.TOTAL, self.used)


class Loading:
    """A model in the memory of a Speaches: SelfDisposingModel of its base_model_manager.py, with ttl -1."""

    def __init__(self) -> None:
        self.loaded = False
        self.used = 0  # ref_count
        self.lock = threading.RLock()


class SpeachesStandIn:
    """Speaches 0.9.0-rc.3 with a model of `NEED` MiB on the card of `ollama`; another server hears for it.

    As its source has it (routers/misc.py, executors/shared/base_model_manager.py): a model is listed as
    loaded before it is, and stays listed when loading failed; DELETE takes it from the list first and then
    refuses (409) if it is in use or was never loaded, so that one in use goes with its last request. After
    the first load a CUDA context of `KEPT` MiB stays. What does not fit is an error 500 without a reason.
    """

    NEED, KEPT = 2500, 500  # of the need
    MODEL, ALIASES = "org/served", {"small": "org/small"}

    def __init__(self, ollama: OllamaStandIn, ears: str, port: int = 0) -> None:
        self.ollama = ollama
        self.ears = ears
        self.listed: dict[str, Loading] = {}
        self.every: list[Loading] = []
        self.log: list[str] = []
        self.context = False
        self.unseen = 0  # MiB on the card that nobody told of
        self.fail_once = False
        self.load_seconds = 0.0
        self.gate: threading.Semaphore | None = None  # one release for each answer
        self.most = 0  # MiB on the card at once
        self.connections: list[socket.socket] = []
        self._lock = threading.RLock()
        self.ollama.speech = lambda: self.vram + self.unseen
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                owner.connections.append(self.connection)

            def do_GET(self) -> None:
                path = urllib.parse.urlsplit(self.path).path
                models = [owner.MODEL, *owner.ALIASES.values()]
                if path == "/api/ps":
                    self._answer(200, {"models": [*owner.listed, "silero_vad_v5"]})
                elif path == "/v1/models":
                    self._answer(200, {"object": "list", "data": [{"id": model} for model in models]})
                elif (name := owner.resolve(path.removeprefix("/v1/models/"))) in models:
                    self._answer(200, {"id": name})
                else:
                    self._answer(404, {"detail": f"Model '{name}' not found"})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if self.path.startswith("/api/ps/"):
                    self._answer(*owner.load(urllib.parse.unquote(self.path.removeprefix("/api/ps/"))))
                else:
                    self._answer(*owner.hear(self.path, body, self.headers["content-type"]))

            def do_DELETE(self) -> None:
                self._answer(*owner.unload(urllib.parse.unquote(self.path.removeprefix("/api/ps/"))))

            def _answer(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                try:
                    self.send_response(status)
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except ConnectionError:
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """As when its process ends: open connections, too."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def vram(self) -> int:
        loaded = sum(item.loaded for item in self.every)
        return self.KEPT * self.context + loaded * (self.NEED - self.KEPT)

    def resolve(self, name: str) -> str:
        return self.ALIASES.get(name, name)

    def load(self, name: str) -> tuple[int, Any]:
        name = self.resolve(name)
        with self._lock:
            if name in self.listed:
                return 409, {"message": f"Model '{name}' is already loaded."}
        model = self._enter(name)
        if model is None:
            return 500, "Internal Server Error"
        self._exit(model)
        return 201, {"message": f"Model '{name}' loaded."}

    def unload(self, name: str) -> tuple[int, Any]:
        with self._lock:
            model = self.listed.pop(name, None)
        if model is None:
            return 404, {"message": f"Model {name} is not loaded."}
        with model.lock:  # not while it loads
            if not model.loaded or model.used:
                return 409, {"message": f"Model {name} is still in use. self.ref_count={model.used}"}
            self.log.append(f"unload {name}")
            self._let_go(model)
            return 200, {"message": f"Model {name} unloaded."}

    def hear(self, path: str, body: bytes, content_type: str) -> tuple[int, Any]:
        found = re.search(rb'name="model"\r\n\r\n([^\r]*)', body)
        assert found is not None
        name = self.resolve(found[1].decode())
        if name not in (self.MODEL, *self.ALIASES.values()):
            return 404, {"detail": f"Model '{name}' is not installed locally."}
        model = self._enter(name)
        if model is None:
            return 500, "Internal Server Error"
        try:
            if self.gate is not None:
                self.gate.acquire(timeout=20)
            if self.fail_once:
                self.fail_once = False
                return 500, "Internal Server Error"
            mine = body.replace(f"\r\n\r\n{found[1].decode()}\r\n".encode(), b"\r\n\r\nwhisper-1\r\n", 1)
            request = urllib.request.Request(self.ears + path, mine, {"Content-Type": content_type})  # noqa: S310
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                    return 200, json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, json.load(error)
        finally:
            self._exit(model)

    def _enter(self, name: str) -> Loading | None:
        """None: there is no room for it."""
        with self._lock:
            model = self.listed.setdefault(name, Loading())
        with model.lock:
            if not model.loaded:
                time.sleep(self.load_seconds)
                needed = self.NEED - (self.KEPT if self.context else 0)
                if self.ollama.TOTAL - self.ollama.used < needed:
                    self.log.append(f"no room for {name}")
                    return None
                model.loaded = self.context = True
                self.every.append(model)
                self.log.append(f"load {name}")
                self.most = max(self.most, self.vram)
                self.ollama.write()
            model.used += 1
            return model

    def _exit(self, model: Loading) -> None:
        with model.lock:
            model.used -= 1
            if not model.used and model not in self.listed.values():
                self._let_go(model)

    def _let_go(self, model: Loading) -> None:
        model.loaded = False
        self.every.remove(model)
        self.ollama.write()


class SharedCard:
    """A card that voicegate's engine and the runners of a real Ollama fill, while their processes are there.

    Runners (`llama_server_standin`) write what they take and do into the journal; a thread reads it and
    writes the card.
    """

    TOTAL = 12_000

    def __init__(self, folder: Path, speech: int) -> None:
        self.folder = folder
        self.cards = folder / "cards.txt"
        self.voicegate = 0  # its PID: an engine of it takes `speech` MiB
        self.most = 0  # MiB in use at once
        self._speech = speech
        self._stopping = threading.Event()
        self._journal = folder / "journal.txt"
        self._journal.touch()
        write_card(self.cards, self.TOTAL, 0)
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(5)

    def runners(self) -> dict[int, tuple[int, int]]:
        """All that ever loaded, by PID: MiB on the card and on the CPU."""
        lines = [line.split() for line in self._journal.read_text().splitlines()]
        return {int(pid): (int(more[0]), int(more[1])) for kind, pid, *more in lines if kind == "load"}

    def cut_off(self) -> list[int]:
        """PIDs of runners that ended, or are, in the middle of an answer."""
        lines = [line.split() for line in self._journal.read_text().splitlines()]
        begun = Counter(pid for kind, pid, *_more in lines if kind == "begin")
        begun.subtract(pid for kind, pid, *_more in lines if kind == "end")
        return [int(pid) for pid, left in begun.items() if left]

    def _keep(self) -> None:
        written = 0
        while not self._stopping.wait(0.01):
            used = sum(here for pid, (here, _cpu) in self.runners().items() if running(pid))
            used += self._speech * len(engines(self.voicegate))
            self.most = max(self.most, used)
            if used != written:
                write_card(self.cards, self.TOTAL, used)
                written = used


def running(pid: int) -> bool:
    """One that ended and was not waited for holds nothing any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def engines(voicegate: int) -> list[int]:
    """PIDs of a voicegate's engines: each has a context on the card, and a model or is about to."""
    found = []
    with contextlib.suppress(OSError):
        for pid in Path(f"/proc/{voicegate}/task/{voicegate}/children").read_text().split():
            if b"voicegate.engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes() and running(int(pid)):
                found.append(int(pid))
    return found


@contextlib.contextmanager
def ollama_with_runner(program: str, home: Path, card: SharedCard) -> Iterator[str]:
    """The real Ollama with the stand-in for llama-server where it looks for that; its URL."""
    for folder in ("bin", "lib/ollama"):
        (home / folder).mkdir(parents=True)
    shutil.copy(program, home / "bin/ollama")
    runner = home / "lib/ollama/llama-server"
    script = Path(__file__).with_name("llama_server_standin.py")
    runner.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{script}" "$@"\n', encoding="utf-8")
    runner.chmod(0o755)
    with real_ollama.serving(
        str(home / "bin/ollama"), home, {"SOTTOVOCE_STANDIN_CARD": str(card.folder)}
    ) as url:
        yield url


def model_of(mib: int, **more: int) -> bytes:
    """A GGUF that takes so many MiB, as Ollama reckons from its metadata and as the stand-in has it.

    Keys and values of one layer, 16 bits each: heads * 256 * 1024 positions * 2 * 2 bytes.
    """
    shape = {
        "llama.context_length": 1024,
        "llama.embedding_length": 256,
        "llama.attention.head_count_kv": mib,
    }
    return real_ollama.tiny_gguf(mib, {**shape, **{f"llama.{key}": value for key, value in more.items()}})

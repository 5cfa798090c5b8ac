# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ollama's API with deadlines, and the decisions of the role ollama_server as pure functions."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import queue
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_capability, _stt
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_footprint as footprint
from ansible_collections.sottovoce.stack.plugins.module_utils._deadline import NoAnswer, within

DEFAULT_PORT = 11434
STATE = "/var/lib/ollama"
DEFAULT_REGISTRY = "registry.ollama.ai"

# MiB that llama.cpp keeps free by itself when nothing is asked for.
FIT_TARGET_ALONE = 1024

_NAME = re.compile(r"^[\w.-]+(?::\d+)?(?:/[\w.-]+)*(?::[\w.-]+)?$")
_FROM = re.compile(r"^FROM\s.*sha256-([0-9a-f]{64})\s*$", re.MULTILINE)


class OllamaError(Exception):
    """The server refused or failed; the text is a message for the user."""


class OllamaUnreachable(OllamaError):
    """Nothing answers at the server's own address."""


class RegistryUnreachable(OllamaError):
    """The server is there, but the registry of models does not answer it."""


# --- decisions -------------------------------------------------------------------------------------------


def _known_whisper(model: str) -> str:
    """The name in the planner's table; the largest for what is not known."""
    try:
        name = _stt.resolve_model(model).name
        if name not in footprint.WHISPER:  # somebody's copy of a known model
            name = _stt.resolve_model(model.rsplit("/", 1)[-1]).name
    except _stt.SttError:
        name = ""
    return name if name in footprint.WHISPER else "large-v3"


def stt_peak_mib(model: str, quantization: str, engine: str = "speaches", live_model: str = "") -> int:
    """VRAM that a speech-to-text engine takes at most, with the formula's error; unknown models count as the
    largest, `auto` as the largest that it can choose.
    """
    batch = footprint.windows(float("inf"), engine)
    kind = "float16" if quantization == "auto" else quantization
    live = _known_whisper(live_model) if live_model and engine == "builtin" else ""
    return footprint.stt(_known_whisper(model), kind, batch, live).high


def fit_target_mib(
    asked: int,
    gpu: bool,
    roles: Iterable[str],
    stt_model: str,
    stt_quantization: str,
    stt_device: str,
    stt_engine: str = "speaches",
    planned: int = 0,
    stt_live_model: str = "",
) -> int:
    """MiB that llama-server leaves free on each device; 0 where there is no device. `planned` is what the
    VRAM plan of a card of known size says.
    """
    if not gpu:
        return 0
    if asked > 0 or planned > 0:
        return asked or planned
    if "stt_server" not in roles or stt_device == "cpu":
        return FIT_TARGET_ALONE
    return FIT_TARGET_ALONE + stt_peak_mib(stt_model, stt_quantization, stt_engine, stt_live_model)


def server_address(host: str) -> tuple[str, int]:
    """Host and port of OLLAMA_HOST as people write it: 0.0.0.0:11434, 0.0.0.0, :11434, [::]:11434, a URL."""
    text = host.strip()
    if "://" not in text:
        text = f"http://{text}"
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"ollama_host is no address: {host!r} ({error})") from error
    return parts.hostname or "127.0.0.1", DEFAULT_PORT if port is None else port


def server_listen(host: str) -> str:
    """Host:port to listen on, with the port that Ollama would choose written out."""
    name, port = server_address(host)
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def server_url(host: str, seen_from: str = "") -> str:
    """URL of a server, from the machine itself or from another one that knows it as `seen_from`."""
    name, port = server_address(host)
    if name in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        name = seen_from or "127.0.0.1"
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def normalise_name(name: str) -> str:
    """Name of a model as /api/tags shows it: with a tag, without the parts that are the default."""
    text = name.strip()
    if not _NAME.match(text):
        raise ValueError(f"{name!r} is no name of a model (like llama3.2:3b or hf.co/owner/model:Q4_K_M)")
    for prefix in (f"{DEFAULT_REGISTRY}/", "library/"):
        text = text.removeprefix(prefix)
    return text if ":" in text.rsplit("/", 1)[-1] else f"{text}:latest"


def registry_of(name: str) -> tuple[str, int]:
    """Host and port that a model would be pulled from."""
    first, _unused, rest = name.partition("/")
    if rest and ("." in first or ":" in first or first == "localhost"):
        host, _unused, port = first.partition(":")
        return host, int(port or 443)
    return DEFAULT_REGISTRY, 443


def wanted_models(default: str, extra: Iterable[str | Mapping[str, str]]) -> dict[str, list[Any]]:
    """Models of a role, each once: names to pull, and mappings (name, gguf) to create from a file."""
    pull: list[str] = []
    create: list[dict[str, str]] = []
    seen: set[str] = set()
    for item in [default, *extra]:
        entry = {"name": item} if isinstance(item, str) else dict(item)
        if not entry.get("name"):
            if item:
                raise ValueError(f"A model needs a name: {item!r}")
            continue
        unknown = sorted(set(entry) - {"name", "gguf", "checksum"})
        if unknown:
            known = "name, gguf, checksum"
            raise ValueError(f"Model {entry['name']}: unknown key {', '.join(unknown)}; known: {known}")
        name = normalise_name(entry["name"])
        if name.lower() in seen and "gguf" not in entry:
            continue
        if "gguf" in entry:
            # The default model may be one that is made here: the file wins over the registry.
            pull = [other for other in pull if normalise_name(other).lower() != name.lower()]
            create.append(entry)
        else:
            pull.append(entry["name"])
        seen.add(name.lower())
    return {"pull": pull, "create": create}


def problems(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings of the role, all at once, before anything is fetched."""
    found: list[str] = []
    try:
        server_address(settings["host"])
    except ValueError as error:
        found.append(str(error))
    try:
        wanted_models(settings["default_model"], settings["extra_models"])
    except ValueError as error:
        found.append(f"ollama_default_model, ollama_extra_models: {error}")
    if settings["kv_cache_type"] != "f16" and settings["flash_attention"] == "disabled":
        found.append(
            f"ollama_kv_cache_type {settings['kv_cache_type']} needs flash attention: "
            "set ollama_flash_attention to auto or enabled, or ollama_kv_cache_type to f16"
        )
    for name in ("models_dir", "llama_server"):
        if settings[name] and not str(settings[name]).startswith("/"):
            found.append(f"ollama_{name} must be an absolute path on the instance, is {settings[name]!r}")
    return found


def plan(
    settings: Mapping[str, Any], release: Mapping[str, Any], machine: Mapping[str, Any]
) -> dict[str, Any]:
    """What the role decides from its settings, what is installed or found, and facts about the machine."""
    gpu = settings["gpu"] == "enabled" or (settings["gpu"] == "auto" and bool(release.get("gpu")))
    judged = [_gpu_capability.ollama_device(str(card["capability"])) for card in machine.get("cards") or []]
    too_old = gpu and settings["gpu"] == "auto" and bool(judged) and all(why for _device, why in judged)
    gpu = gpu and not too_old
    target = fit_target_mib(
        int(settings["fit_target_mib"]),
        gpu,
        machine.get("roles") or [],
        str(machine["stt_model"]),
        str(machine["stt_quantization"]),
        str(machine["stt_device"]),
        str(machine["stt_engine"]),
        int(machine["planned_fit_target_mib"]),
        str(machine["stt_live_model"]),
    )
    environment: dict[str, str] = {
        "HOME": STATE,
        "OLLAMA_HOST": server_listen(settings["host"]),
        "OLLAMA_MODELS": settings["models_dir"],
        "OLLAMA_CONTEXT_LENGTH": str(settings["context_length"]),
        "OLLAMA_KEEP_ALIVE": str(settings["keep_alive"]),
        "OLLAMA_MAX_LOADED_MODELS": str(settings["max_loaded_models"]),
        "OLLAMA_NUM_PARALLEL": str(settings["num_parallel"]),
        "OLLAMA_KV_CACHE_TYPE": settings["kv_cache_type"],
    }
    if settings["flash_attention"] != "auto":
        environment["OLLAMA_FLASH_ATTENTION"] = "1" if settings["flash_attention"] == "enabled" else "0"
    if not settings["cloud"]:
        environment["OLLAMA_NO_CLOUD"] = "1"
    if target:
        environment["LLAMA_ARG_FIT_TARGET"] = str(target)
    environment |= {str(key): str(value) for key, value in settings["environment"].items()}
    own_models_dir = os.path.commonpath([STATE, os.path.normpath(settings["models_dir"])]) != STATE
    name = str(release.get("release", ""))
    return {
        "environment": environment,
        "gpu": gpu,
        "notes": [judged[0][1]] if too_old else [],
        "fit_target_mib": target,
        "local_url": server_url(settings["host"]),
        "url": server_url(settings["host"], str(machine.get("address") or "")),
        "own_models_dir": own_models_dir,
        "read_write_paths": [settings["models_dir"]] if own_models_dir else [],
        # Speech-to-text loads first where both live. No more than an order: neither needs the other.
        "after": [f"{unit}.service" for unit in sorted(_stt.UNITS.values())]
        if "stt_server" in (machine.get("roles") or [])
        else [],
        "release": name,
        "serves": bool(name) and bool(settings["enabled"]),
        "model": settings["default_model"],
        "infers": not name.endswith("-go") or bool(settings["llama_server"]),
        "skipped_sources": list(release.get("skipped_sources") or []),
        **wanted_models(settings["default_model"], settings["extra_models"]),
    }


def summary(plan: Mapping[str, Any], pulled: Mapping[str, Any]) -> dict[str, Any]:
    """What a person should know of it at the end."""
    facts: dict[str, Any] = {"engine": "Ollama", "skipped": [], "notes": []}
    if not plan["release"]:
        reasons = "; ".join(f"{item['what']}: {item['why']}" for item in plan["skipped_sources"])
        return facts | {"skipped": [{"what": "Ollama", "why": reasons}]}
    facts["version"] = plan["release"].split("-")[0]
    facts["device"] = "GPU" if plan["gpu"] else "CPU"
    if plan["model"]:
        facts["model"] = plan["model"]
    facts["notes"] += [f"{item['what']} was not used: {item['why']}" for item in plan["skipped_sources"]]
    facts["notes"] += plan["notes"]
    if not plan["infers"]:
        facts["notes"].append(
            "Ollama was built from its Go module: it serves its API, but inference needs llama-server, "
            "which is not part of that module (give one with ollama_llama_server, or use the release archive)"
        )
    if not plan["serves"]:
        facts["notes"].append("Ollama is installed but not enabled (ollama_service_enabled)")
        return facts
    facts["url"] = plan["url"]
    facts["skipped"] += pulled.get("left_out") or []
    if plan["fit_target_mib"]:
        facts["notes"].append(f"Ollama leaves {plan['fit_target_mib']} MiB of each GPU free")
    return facts


# --- the server ------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a pull is; layers are counted by digest because the server reports them one at a time."""

    status: str = ""
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)

    def feed(self, event: Mapping[str, Any]) -> bool:
        """Take in one event; true if it tells of something new."""
        before = (self.status, self.completed)
        self.status = str(event.get("status", self.status))
        if event.get("digest"):
            self.layers[str(event["digest"])] = (int(event.get("completed", 0)), int(event.get("total", 0)))
        return (self.status, self.completed) != before

    @property
    def completed(self) -> int:
        return sum(done for done, _total in self.layers.values())

    @property
    def total(self) -> int:
        return sum(total for _done, total in self.layers.values())


@dataclass(frozen=True)
class Limits:
    """Seconds: for one plain answer, until the registry answers, without progress, and for one model."""

    answer: float = 10.0
    registry: float = 5.0
    stall: float = 60.0
    total: float = 3600.0


class OllamaServer:
    """The few calls of Ollama's API that managing models needs."""

    def __init__(
        self, url: str, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OllamaError(f"url: {url!r} is no http(s) URL")
        self.url = url.rstrip("/")
        self.limits = limits or Limits()
        self._parts = parts
        self._clock = clock

    def version(self) -> str:
        return str(self._json("GET", "/api/version").get("version", ""))

    def models(self) -> dict[str, dict[str, Any]]:
        """Models that are there, by their name in lower case (Ollama ignores case)."""
        listed = self._json("GET", "/api/tags").get("models") or []
        return {normalise_name(str(item["name"])).lower(): item for item in listed}

    def blobs_of(self, name: str) -> list[str]:
        """SHA-256 of the files that a model was made from."""
        return _FROM.findall(str(self._json("POST", "/api/show", {"model": name}).get("modelfile", "")))

    def delete(self, name: str) -> None:
        self._json("DELETE", "/api/delete", {"model": name})

    def has_blob(self, digest: str) -> bool:
        status, _body = self._request("HEAD", f"/api/blobs/sha256:{digest}", accept=(200, 404))
        return status == 200

    def upload(self, path: str, digest: str) -> None:
        """Send a file; the server itself checks that it has this digest."""
        with open(path, "rb") as file:
            self._request(
                "POST",
                f"/api/blobs/sha256:{digest}",
                body=file,
                length=os.fstat(file.fileno()).st_size,
                timeout=self.limits.stall,
            )

    def create(self, name: str, files: Mapping[str, str]) -> None:
        body = {"model": name, "files": {key: f"sha256:{value}" for key, value in files.items()}}
        for event in self._stream("/api/create", body, first=self.limits.stall, what=f"creating {name}"):
            if event.get("error"):
                raise OllamaError(f"Ollama at {self.url} cannot make {name}: {event['error']}")

    def pull(self, name: str, on_progress: Callable[[Progress], None] = lambda progress: None) -> Progress:
        """Fetch a model; the server resumes what an earlier attempt left unfinished."""
        progress = Progress()
        host, port = registry_of(name)
        registry = host if port == 443 else f"{host}:{port}"
        try:
            what = f"pulling {name}"
            stream = self._stream(
                "/api/pull", {"model": name}, first=self.limits.registry, what=what, quiet=progress
            )
            for event in stream:
                if event.get("error"):
                    message = str(event["error"])
                    if not progress.layers and is_network_error(message):
                        raise RegistryUnreachable(f"{registry} cannot be reached: {_last_cause(message)}")
                    raise OllamaError(f"{name} cannot be pulled from {registry}: {message}")
                if progress.feed(event):
                    on_progress(progress)
        except _Silent as silent:
            if silent.first:
                raise RegistryUnreachable(
                    f"{registry} has not answered for {self.limits.registry:g} s"
                ) from silent
            raise OllamaError(
                f"{name}: no progress for {self.limits.stall:g} s at {progress.completed} of "
                f"{progress.total} bytes; run again, what is there is kept"
            ) from silent
        except _TooLong as error:
            raise OllamaError(
                f"{name}: not finished after {self.limits.total:g} s ({progress.completed} of "
                f"{progress.total} bytes); raise the timeout and run again, what is there is kept"
            ) from error
        if progress.status != "success":
            raise OllamaError(f"{name}: the server ended the pull after '{progress.status}' without success")
        return progress

    # --- plumbing

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(str(self._parts.hostname), self._parts.port, timeout=timeout)

    def _gone(self, error: Exception) -> OllamaUnreachable:
        return OllamaUnreachable(
            f"Ollama does not answer at {self.url} ({error}); "
            "is the unit running there (systemctl status ollama)?"
        )

    def _request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        length: int | None = None,
        timeout: float | None = None,
        accept: tuple[int, ...] = (200, 201),
    ) -> tuple[int, bytes]:
        connection = self._connect(timeout or self.limits.answer)
        headers = {} if length is None else {"Content-Length": str(length)}
        try:
            connection.request(method, self._parts.path.rstrip("/") + path, body=body, headers=headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._gone(error) from error
        finally:
            connection.close()
        if response.status not in accept:
            raise OllamaError(f"Ollama at {self.url}: {method} {path}: {response.status} {_error_text(data)}")
        return response.status, data

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        _status, data = self._request(method, path, body=None if body is None else json.dumps(body))
        if not data.strip():
            return {}
        try:
            value = json.loads(data)
        except ValueError as error:
            raise OllamaError(f"{self.url}{path} did not answer with JSON; is this really Ollama?") from error
        if not isinstance(value, dict):
            raise OllamaError(f"{self.url}{path} did not answer with a JSON object; is this really Ollama?")
        return value

    def _stream(
        self, path: str, body: Mapping[str, Any], *, first: float, what: str, quiet: Progress | None = None
    ) -> Iterator[dict[str, Any]]:
        """
        Events of a streamed answer. A thread reads, so that a silent server never holds us: `first`
        seconds until a layer is named, `limits.stall` without new bytes, `limits.total` for all.
        """
        lines: queue.SimpleQueue[bytes | Exception | None] = queue.SimpleQueue()
        connection = self._connect(self.limits.total)
        start = moved = self._clock()
        seen: tuple[str, int] | None = None

        sockets: list[socket.socket] = []

        def read() -> None:
            try:
                connection.connect()
                # Kept here, because the connection forgets it once the answer has begun.
                sockets.append(connection.sock)
                connection.request("POST", self._parts.path.rstrip("/") + path, body=json.dumps(body))
                response = connection.getresponse()
                for line in response:
                    lines.put(line)
                lines.put(None)
            except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
                lines.put(error)

        thread = threading.Thread(target=read, name=f"ollama {what}", daemon=True)
        thread.start()
        try:
            while True:
                now = self._clock()
                waiting = quiet is not None and not quiet.layers
                limit = first if waiting else self.limits.stall
                if quiet is not None and quiet.layers and not quiet.status.startswith("pulling"):
                    # Verifying a large file says nothing for a while.
                    limit = self.limits.total
                if now - start >= self.limits.total:
                    raise _TooLong(what)
                if now - moved >= limit:
                    raise _Silent(waiting)
                try:
                    left = min(limit - (now - moved), self.limits.total - (now - start))
                    line = lines.get(timeout=max(0.01, left))
                except queue.Empty:
                    continue
                if line is None:
                    return
                if isinstance(line, Exception):
                    raise self._gone(line)
                if not line.strip():
                    continue
                try:
                    event = json.loads(line)
                except ValueError as error:
                    raise OllamaError(f"{self.url}{path} did not answer with JSON lines") from error
                yield event
                if quiet is None:
                    moved = self._clock()
                elif quiet.layers and (quiet.status, quiet.completed) != seen:
                    # Until a layer is named the registry's limit runs from the start, whatever else is said.
                    seen = (quiet.status, quiet.completed)
                    moved = self._clock()
        finally:
            for sock in sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=2)
            connection.close()


class _Silent(Exception):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first


class _TooLong(Exception):
    pass


def _error_text(data: bytes) -> str:
    try:
        value = json.loads(data)
    except ValueError:
        return data[:200].decode("utf-8", "replace")
    return str(value.get("error", value)) if isinstance(value, dict) else str(value)


def _last_cause(message: str) -> str:
    return message.split("dial tcp: ")[-1]


def is_network_error(message: str) -> bool:
    """Whether an error that the server reports says that it got no answer from the network."""
    signs = (
        "dial tcp",
        "no such host",
        "i/o timeout",
        "connection refused",
        "network is unreachable",
        "TLS handshake timeout",
        "proxyconnect",
        "deadline exceeded",
        "connection reset",
        "server misbehaving",
    )
    return any(sign.lower() in message.lower() for sign in signs)


def can_connect(host: str, port: int, timeout: float) -> str:
    """Empty if a connection is possible, else why not; the name lookup is inside the time limit too."""
    try:
        within(timeout, lambda: socket.create_connection((host, port), timeout=timeout).close())
    except (OSError, NoAnswer) as error:
        return str(error)
    return ""


def file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- what the module does --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelTask:
    """Parameters of ollama_model."""

    names: tuple[str, ...]
    present: bool = True
    gguf: str | None = None
    checksum: str | None = None
    digest: str | None = None
    required: bool = True
    check: bool = False


@dataclass
class Outcome:
    """What was (or in check mode would be) done, per model."""

    changed: bool = False
    models: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)


def manage(
    server: OllamaServer,
    task: ModelTask,
    on_progress: Callable[[str, Progress], None] = lambda name, progress: None,
) -> Outcome:
    """Bring the models to the state asked for."""
    outcome = Outcome()
    try:
        there = server.models()
    except OllamaUnreachable:
        # A check before the first converge has no server yet; it holds no models either.
        if not task.check:
            raise
        there = {}
    unreachable: dict[tuple[str, int], str] = {}
    for asked in task.names:
        name = normalise_name(asked)
        item = there.get(name.lower())
        digest = str(item["digest"]) if item else ""
        if item:
            outcome.before[name] = digest
        if not task.present:
            _absent(server, task, name, item, outcome)
        elif task.gguf:
            _from_file(server, task, name, digest, outcome)
        else:
            _from_registry(server, task, name, digest, outcome, unreachable, on_progress)
    return outcome


def _absent(server: OllamaServer, task: ModelTask, name: str, item: Any, outcome: Outcome) -> None:
    if item:
        if not task.check:
            server.delete(name)
        outcome.changed = True
    outcome.models.append({"name": name, "action": "removed" if item else "absent"})


def _from_file(server: OllamaServer, task: ModelTask, name: str, digest: str, outcome: Outcome) -> None:
    path = str(task.gguf)
    want = (task.checksum or "").removeprefix("sha256:").lower()
    if digest and want and want in server.blobs_of(name):
        # The server knows what the model was made from; the file is not even read.
        outcome.after[name] = digest
        outcome.models.append({"name": name, "action": "present", "digest": digest, "gguf_sha256": want})
        return
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise OllamaError(f"gguf: {path} is no GGUF file (it starts with {magic!r})")
        actual = file_sha256(path)
    except OSError as error:
        raise OllamaError(f"gguf: {path} cannot be read: {error.strerror}") from error
    if want and actual != want:
        raise OllamaError(f"gguf: {path} has the SHA-256 {actual}, but checksum says {want}")
    if digest and actual in server.blobs_of(name):
        outcome.after[name] = digest
        outcome.models.append({"name": name, "action": "present", "digest": digest, "gguf_sha256": actual})
        return
    outcome.changed = True
    entry = {"name": name, "action": "created", "gguf_sha256": actual, "bytes": os.stat(path).st_size}
    if task.check:
        outcome.after[name] = f"made from {path} (sha256:{actual})"
    else:
        start = time.monotonic()
        if not server.has_blob(actual):
            server.upload(path, actual)
        server.create(name, {os.path.basename(path): actual})
        entry["seconds"] = round(time.monotonic() - start, 1)
        entry["digest"] = outcome.after[name] = str(server.models()[name.lower()]["digest"])
    outcome.models.append(entry)


def _from_registry(
    server: OllamaServer,
    task: ModelTask,
    name: str,
    digest: str,
    outcome: Outcome,
    unreachable: dict[tuple[str, int], str],
    on_progress: Callable[[str, Progress], None],
) -> None:
    want = (task.digest or "").removeprefix("sha256:").lower()
    if digest and digest.startswith(want):
        outcome.after[name] = digest
        outcome.models.append({"name": name, "action": "present", "digest": digest})
        return
    registry = registry_of(name)
    start = time.monotonic()
    entry: dict[str, Any] = {"name": name, "action": "pulled"}
    try:
        if registry in unreachable:
            raise RegistryUnreachable(unreachable[registry])
        if task.check:
            # Behind a proxy only a real pull would tell.
            proxied = any(key in os.environ for key in ("https_proxy", "HTTPS_PROXY"))
            why = "" if proxied else can_connect(*registry, timeout=server.limits.registry)
            if why:
                raise RegistryUnreachable(f"{registry[0]} cannot be reached: {why}")
            outcome.after[name] = f"pulled from {registry[0]}"
        else:
            progress = server.pull(name, lambda state: on_progress(name, state))
            entry["bytes"] = progress.total
            entry["seconds"] = round(time.monotonic() - start, 1)
            entry["digest"] = outcome.after[name] = str(server.models()[name.lower()]["digest"])
    except RegistryUnreachable as error:
        unreachable[registry] = str(error)
        if task.required:
            raise
        if digest:
            outcome.after[name] = digest
        outcome.left_out.append({"what": f"model {name}", "why": str(error)})
        outcome.models.append({"name": name, "action": "skipped"})
        return
    if want and not task.check and not entry["digest"].startswith(want):
        raise OllamaError(
            f"{name}: the registry now gives the digest {entry['digest'][:12]}, asked for is {want[:12]}; "
            "the pulled model stays there"
        )
    outcome.changed = outcome.changed or task.check or entry["digest"] != digest
    outcome.models.append(entry)

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""ollama_model: against the real server where one was built, and against a server that misbehaves."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import real_ollama
from ansible_collections.sottovoce.stack.plugins.module_utils import _ollama, _vram_relief
from ansible_collections.sottovoce.stack.plugins.module_utils._ollama import (
    Limits,
    ModelTask,
    OllamaError,
    OllamaServer,
    OllamaUnreachable,
    RegistryUnreachable,
    manage,
)
from real_ollama import free_port, tiny_gguf

# --- the real server -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = real_ollama.program()
    if not program:
        pytest.skip(real_ollama.NOT_BUILT)
    with real_ollama.serving(program, tmp_path_factory.mktemp("ollama")) as url:
        yield url


def test_real_server_makes_a_model_from_a_file_once(real: str, tmp_path: Path) -> None:
    server = OllamaServer(real)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf(1))
    digest = hashlib.sha256(tiny_gguf(1)).hexdigest()
    task = ModelTask(("House",), gguf=str(path))

    planned = manage(server, ModelTask(("House",), gguf=str(path), check=True))
    assert planned.changed
    assert planned.models[0]["action"] == "created"
    assert server.models() == {}

    first = manage(server, task)
    assert first.changed
    assert first.models[0]["gguf_sha256"] == digest
    assert server.blobs_of("house") == [digest]
    assert first.after == {"House:latest": server.models()["house:latest"]["digest"]}

    again = manage(server, ModelTask(("house",), gguf=str(path)))
    assert not again.changed
    assert again.models[0]["action"] == "present"

    # With the checksum the file is not needed any more.
    path.unlink()
    known = manage(server, ModelTask(("house",), gguf=str(path), checksum=f"sha256:{digest}"))
    assert not known.changed

    path.write_bytes(tiny_gguf(2))
    other = manage(server, task)
    assert other.changed
    assert other.before["House:latest"] != other.after["House:latest"]
    assert server.blobs_of("house") == [hashlib.sha256(tiny_gguf(2)).hexdigest()]

    assert manage(server, ModelTask(("house",), present=False, check=True)).changed
    assert "house:latest" in server.models()
    assert manage(server, ModelTask(("house",), present=False)).changed
    assert server.models() == {}
    assert not manage(server, ModelTask(("house",), present=False)).changed


def test_real_server_refuses_what_only_looks_like_gguf(real: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(OllamaError, match="cannot make broken:latest"):
        manage(OllamaServer(real), ModelTask(("broken",), gguf=str(path)))
    path.write_bytes(b"PK\3\4")
    with pytest.raises(OllamaError, match="is no GGUF file"):
        manage(OllamaServer(real), ModelTask(("broken",), gguf=str(path)))
    path.write_bytes(tiny_gguf(3))
    with pytest.raises(OllamaError, match="but checksum says"):
        manage(OllamaServer(real), ModelTask(("broken",), gguf=str(path), checksum="0" * 64))
    with pytest.raises(OllamaError, match="cannot be read"):
        manage(OllamaServer(real), ModelTask(("broken",), gguf=str(tmp_path / "nothing")))


def test_real_server_takes_the_request_to_unload(real: str, tmp_path: Path) -> None:
    """Without llama-server it loads nothing; what it is asked is the same."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf(9))
    manage(OllamaServer(real), ModelTask(("idle",), gguf=str(path)))
    _vram_relief.unload(real, "idle:latest")
    with pytest.raises(_vram_relief.ReliefError, match=r"unknown:1b was not unloaded: 404 .*not found"):
        _vram_relief.unload(real, "unknown:1b")
    manage(OllamaServer(real), ModelTask(("idle",), present=False))


def test_real_server_says_which_registry_it_cannot_reach(real: str) -> None:
    # Port 9 of loopback: nobody listens there.
    name = "localhost:9/owner/model"
    with pytest.raises(RegistryUnreachable, match="localhost:9 cannot be reached"):
        manage(OllamaServer(real), ModelTask((name,)))
    start = time.monotonic()
    outcome = manage(OllamaServer(real), ModelTask((name, "localhost:9/owner/second"), required=False))
    assert time.monotonic() - start < 5
    assert not outcome.changed
    left_out = [item["what"] for item in outcome.left_out]
    assert left_out == [f"model {name}:latest", "model localhost:9/owner/second:latest"]
    assert outcome.left_out[0]["why"] == outcome.left_out[1]["why"]


def test_module_as_ansible_runs_it(real: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf(4))

    def run(check: bool, **args: Any) -> dict[str, Any]:
        common = {"url": real, "_ansible_check_mode": check, "_ansible_diff": True}
        wrapped = {"ANSIBLE_MODULE_ARGS": {**common, **args}}
        done = subprocess.run(
            [sys.executable, "-m", "ansible_collections.sottovoce.stack.plugins.modules.ollama_model"],
            input=json.dumps(wrapped), capture_output=True, text=True, check=False, timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    assert run(True, name=["mod"], gguf=str(path))["changed"]
    first = run(False, name=["mod"], gguf=str(path))
    assert first["changed"]
    assert first["diff"]["before"] == ""
    assert first["diff"]["after"].startswith("mod:latest ")
    assert run(False, name=["mod"], gguf=str(path))["changed"] is False
    assert "exactly one name" in run(False, name=["a", "b"], gguf=str(path))["msg"]
    assert run(False, name=["mod"], state="absent")["diff"]["after"] == ""


# --- servers that misbehave ------------------------------------------------------------------------------

Step = dict[str, Any] | float
Script = Callable[[http.server.BaseHTTPRequestHandler, dict[str, Any]], None]


@contextlib.contextmanager
def fake(script: Script) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                script(self, json.loads(body) if body.startswith(b"{") else {})

        do_GET = do_POST = do_DELETE = do_HEAD = answer

        def log_message(self, *_args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def reply(handler: http.server.BaseHTTPRequestHandler, value: Any, status: int = 200) -> None:
    data = json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def puller(*steps: Step, tags: list[dict[str, Any]] | None = None) -> Script:
    """A server whose pull sends these events; a number is a pause in seconds."""
    listed: list[dict[str, Any]] = list(tags or [])

    def script(handler: http.server.BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if handler.path == "/api/tags":
            reply(handler, {"models": listed})
            return
        assert handler.path == "/api/pull"
        handler.send_response(200)
        handler.end_headers()
        for step in steps:
            if isinstance(step, float):
                time.sleep(step)
                continue
            if step.get("status") == "success":
                listed[:] = [{"name": _ollama.normalise_name(body["model"]), "digest": "new" + "0" * 61}]
            handler.wfile.write(json.dumps(step).encode() + b"\n")
            handler.wfile.flush()

    return script


MANIFEST = {"status": "pulling manifest"}
VERIFYING = {"status": "verifying sha256 digest"}
SUCCESS = {"status": "success"}


def layer(done: int, digest: str = "sha256:aa", total: int = 100) -> dict[str, Any]:
    return {"status": f"pulling {digest[7:]}", "digest": digest, "total": total, "completed": done}


def test_pull_reports_its_progress_and_size() -> None:
    seen: list[tuple[str, int, int]] = []
    layers = (layer(0), layer(60), layer(100), layer(20, "sha256:bb", 20))
    with fake(puller(MANIFEST, *layers, VERIFYING, SUCCESS)) as url:
        outcome = manage(
            OllamaServer(url), ModelTask(("m",)), lambda name, p: seen.append((name, p.completed, p.total))
        )
    assert outcome.changed
    assert outcome.models[0]["bytes"] == 120
    assert outcome.models[0]["digest"].startswith("new")
    assert ("m:latest", 60, 100) in seen
    assert seen[-1] == ("m:latest", 120, 120)


def test_silent_registry_is_given_up_after_its_limit() -> None:
    with fake(puller(MANIFEST, 10.0)) as url:
        start = time.monotonic()
        with pytest.raises(RegistryUnreachable, match=r"has not answered for 0\.5 s"):
            manage(OllamaServer(url, Limits(registry=0.5)), ModelTask(("m",)))
        assert time.monotonic() - start < 4


def test_repeated_manifest_lines_do_not_extend_the_registrys_limit() -> None:
    steps: list[Step] = [MANIFEST, 0.2]
    with fake(puller(*steps * 30)) as url:
        start = time.monotonic()
        with pytest.raises(RegistryUnreachable):
            manage(OllamaServer(url, Limits(registry=0.8)), ModelTask(("m",)))
        assert time.monotonic() - start < 4


def test_stalled_pull_is_given_up_though_the_server_goes_on_talking() -> None:
    steps: list[Step] = [layer(10), 0.2]
    with fake(puller(MANIFEST, *steps * 30)) as url:
        with pytest.raises(OllamaError, match=r"no progress for 0\.6 s at 10 of 100 bytes") as caught:
            manage(OllamaServer(url, Limits(stall=0.6)), ModelTask(("m",)))
        assert not isinstance(caught.value, RegistryUnreachable)


def test_slow_pull_that_moves_is_not_a_stalled_one() -> None:
    steps: list[Step] = []
    for done in range(10, 101, 10):
        steps += [0.15, layer(done)]
    with fake(puller(MANIFEST, *steps, VERIFYING, 1.0, SUCCESS)) as url:
        assert manage(OllamaServer(url, Limits(stall=0.7)), ModelTask(("m",))).changed


def test_deadline_of_one_model() -> None:
    steps: list[Step] = []
    for done in range(1, 100):
        steps += [0.1, layer(done)]
    with fake(puller(MANIFEST, *steps)) as url, pytest.raises(OllamaError, match="not finished after 1 s"):
        manage(OllamaServer(url, Limits(total=1)), ModelTask(("m",)))


def test_error_in_a_stream_with_status_200() -> None:
    with (
        fake(puller(MANIFEST, {"error": "pull model manifest: file does not exist"})) as url,
        pytest.raises(OllamaError, match=r"m:latest cannot be pulled from registry\.ollama\.ai: ") as caught,
    ):
        # required speaks of the network only, not of a name that does not exist.
        manage(OllamaServer(url), ModelTask(("m",), required=False))
    assert not isinstance(caught.value, RegistryUnreachable)
    assert str(caught.value).endswith("file does not exist")


def test_stream_that_ends_early() -> None:
    with fake(puller(MANIFEST, layer(10))) as url, pytest.raises(OllamaError, match="without success"):
        manage(OllamaServer(url), ModelTask(("m",)))


def test_digest_that_the_registry_no_longer_gives() -> None:
    tags = [{"name": "m:latest", "digest": "old" + "0" * 61}]
    with fake(puller(MANIFEST, layer(100), SUCCESS, tags=tags)) as url:
        assert not manage(OllamaServer(url), ModelTask(("m",), digest="old000")).changed
        with pytest.raises(OllamaError, match="now gives the digest new000000000"):
            manage(OllamaServer(url), ModelTask(("m",), digest="f00"))
    with fake(puller(MANIFEST, layer(100), SUCCESS, tags=tags)) as url:
        outcome = manage(OllamaServer(url), ModelTask(("m",), digest="new0"))
        assert outcome.changed
        assert outcome.before["m:latest"].startswith("old")
        assert outcome.after["m:latest"].startswith("new")


def test_present_model_is_not_pulled_whatever_its_spelling() -> None:
    with fake(puller(tags=[{"name": "Llama3:latest", "digest": "ab" * 32}])) as url:
        names = ("llama3", "library/llama3:latest", "registry.ollama.ai/library/Llama3")
        outcome = manage(OllamaServer(url), ModelTask(names))
    assert not outcome.changed
    assert {model["action"] for model in outcome.models} == {"present"}


def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(OllamaUnreachable, match="does not answer at"):
        manage(OllamaServer(url), ModelTask(("localhost:9/m",)))
    # Before the first converge a check has no server to ask.
    planned = manage(OllamaServer(url), ModelTask(("localhost:9/m",), check=True, required=False))
    assert [item["what"] for item in planned.left_out] == ["model localhost:9/m:latest"]
    assert not planned.changed


def test_server_that_is_something_else() -> None:
    def script(handler: http.server.BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        data = b"<html>welcome</html>"
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    with fake(script) as url, pytest.raises(OllamaError, match="is this really Ollama"):
        manage(OllamaServer(url), ModelTask(("m",)))
    with pytest.raises(OllamaError, match=r"no http\(s\) URL"):
        OllamaServer("127.0.0.1:11434")


def test_server_error_carries_its_text() -> None:
    with (
        fake(lambda handler, body: reply(handler, {"error": "disk is full"}, 500)) as url,
        pytest.raises(OllamaError, match="GET /api/tags: 500 disk is full"),
    ):
        manage(OllamaServer(url), ModelTask(("m",)))


def test_name_lookup_is_inside_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_args: Any, **_kwargs: Any) -> None:
        time.sleep(1.5)
        raise OSError("too late")

    monkeypatch.setattr("socket.create_connection", slow)
    start = time.monotonic()
    assert _ollama.can_connect("registry.invalid", 443, 0.3) == "no answer within 0.3 s"
    assert time.monotonic() - start < 1.4

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role ollama_server decides, and where it gets the program from."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.sottovoce.stack.plugins.module_utils import _ollama, _ollama_source
from ansible_collections.sottovoce.stack.plugins.module_utils._ollama_source import (
    Request,
    SourceError,
    accepted,
    find,
    from_go,
    from_release,
)

ROOT = Path(__file__).parents[2]
ROLE = ROOT / "roles" / "ollama_server"
ARCH = _ollama_source.ARCHITECTURES[platform.machine()]


def load(name: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((ROLE / name).read_text())
    return value


def settings(**changes: Any) -> dict[str, Any]:
    defaults = {key.removeprefix("ollama_server_"): value for key, value in load("defaults/main.yml").items()}
    return {**defaults, "enabled": True, **changes}


MACHINE = {
    "gpu": False,
    "roles": ["ollama_server"],
    "address": "10.120.0.1",
    "stt_model": "large-v3-turbo",
    "stt_quantization": "float16",
    "stt_device": "auto",
    "stt_engine": "speaches",
    "stt_live_model": "",
    "planned_fit_target_mib": 0,
}

# --- the role's own files --------------------------------------------------------------------------------


def test_every_option_has_its_default_and_both_spellings() -> None:
    options = load("meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    defaults = load("defaults/main.yml")
    internal = load("vars/main.yml")
    assert {name: option["default"] for name, option in options.items() if "default" in option} == defaults
    for name in defaults:
        short = name.replace("ollama_server_", "ollama_", 1)
        assert options[short].get("type") == options[name]["type"]
        assert options[short].get("choices") == options[name].get("choices")
        assert f"{{{{ {short} | default({name})" in internal[f"__{name}"]
    assert len(options) == 2 * len(defaults)


def test_readme_lists_every_variable_with_its_default() -> None:
    rows = re.findall(r"^\| `(ollama_\w+)` \| `([^`]*)` \|", (ROLE / "README.md").read_text(), re.MULTILINE)
    told = {name.replace("ollama_", "ollama_server_", 1): yaml.safe_load(value) for name, value in rows}
    assert told == load("defaults/main.yml")


def test_default_version_is_pinned_for_every_architecture() -> None:
    pins = load("vars/main.yml")["__ollama_server_pins"][load("defaults/main.yml")["ollama_server_version"]]
    assert set(pins) == {"go", *_ollama_source.ARCHITECTURES.values()}
    for arch in set(_ollama_source.ARCHITECTURES.values()):
        assert re.fullmatch(r"[0-9a-f]{64}", pins[arch])
    assert re.fullmatch(r"h1:[A-Za-z0-9+/]{43}=", pins["go"])


# --- decisions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "quantization", "measured"),
    [
        ("large-v2", "float16", 6090),
        ("large-v2", "int8", 4500),
        ("large-v3", "float16", 4521),
        ("large-v3", "int8", 2953),
        ("large-v3-turbo", "float16", 2537),
        ("distil-large-v3", "float16", 2409),
        ("distil-large-v3", "int8", 1481),
    ],
)
def test_stt_peak_covers_what_was_measured(model: str, quantization: str, measured: int) -> None:
    peak = _ollama.stt_peak_mib(model, quantization)
    assert peak >= measured
    # The batch of eight that is reserved for is 1400 MB, the formula's error 10 %.
    assert peak <= measured + 2100


def test_stt_peak_of_names_as_people_write_them() -> None:
    peak = _ollama.stt_peak_mib
    assert peak("turbo", "float16") == peak("Systran/faster-whisper-large-v3-turbo", "float16")
    assert peak("whisper-1", "int8") == peak("large-v3-turbo", "int8_float16")
    assert peak("Systran/faster-distil-whisper-large-v3", "int8") == peak("distil-large-v3", "int8")
    assert peak("somebody/unknown", "float16") == peak("large-v3", "float16")
    assert peak("tiny", "int8") < peak("tiny", "float16") < peak("tiny", "float32")


def test_fit_target_only_where_there_is_a_gpu_and_more_where_it_is_shared() -> None:
    target = functools.partial(_ollama.fit_target_mib, stt_model="medium", stt_quantization="int8")
    assert target(0, False, ["stt_server"], stt_device="auto") == 0
    assert target(9000, False, ["stt_server"], stt_device="auto") == 0
    assert target(0, True, ["ollama_server"], stt_device="auto") == 1024
    assert target(0, True, ["stt_server"], stt_device="cpu") == 1024
    assert target(0, True, ["stt_server"], stt_device="auto") == 1024 + _ollama.stt_peak_mib("medium", "int8")
    live = target(0, True, ["stt_server"], stt_device="auto", stt_engine="builtin", stt_live_model="tiny")
    assert live == 1024 + _ollama.stt_peak_mib("medium", "int8", "builtin", "tiny")
    assert live > target(0, True, ["stt_server"], stt_device="auto", stt_engine="builtin")
    assert target(7000, True, ["stt_server"], stt_device="auto") == 7000


@pytest.mark.parametrize(
    ("host", "listen", "local", "seen"),
    [
        ("0.0.0.0:11434", "0.0.0.0:11434", "http://127.0.0.1:11434", "http://10.0.0.5:11434"),
        ("0.0.0.0", "0.0.0.0:11434", "http://127.0.0.1:11434", "http://10.0.0.5:11434"),
        (":8080", "127.0.0.1:8080", "http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("10.1.2.3", "10.1.2.3:11434", "http://10.1.2.3:11434", "http://10.1.2.3:11434"),
        ("[::]:9", "[::]:9", "http://127.0.0.1:9", "http://10.0.0.5:9"),
        ("http://localhost:1", "localhost:1", "http://localhost:1", "http://localhost:1"),
    ],
)
def test_addresses(host: str, listen: str, local: str, seen: str) -> None:
    assert _ollama.server_listen(host) == listen
    assert _ollama.server_url(host) == local
    assert _ollama.server_url(host, "10.0.0.5") == seen


def test_models_each_once_and_files_before_the_registry() -> None:
    extra = ["nomic-embed-text", "llama3.2:3b", "NOMIC-embed-text:latest"]
    wanted = _ollama.wanted_models("llama3.2:3b", extra)
    assert wanted == {"pull": ["llama3.2:3b", "nomic-embed-text"], "create": []}
    entry = {"name": "house", "gguf": "/srv/house.gguf"}
    assert _ollama.wanted_models("house", [entry]) == {"pull": [], "create": [entry]}
    assert _ollama.wanted_models("", []) == {"pull": [], "create": []}


def test_problems_are_told_all_at_once() -> None:
    assert _ollama.problems(settings()) == []
    found = _ollama.problems(
        settings(
            host="0.0.0.0:port",
            default_model="no such name",
            kv_cache_type="q8_0",
            flash_attention="disabled",
            models_dir="models",
        )
    )
    assert len(found) == 4
    assert "ollama_host" in found[0]
    assert "'no such name' is no name of a model" in found[1]
    assert "ollama_flash_attention" in found[2]
    assert "ollama_models_dir" in found[3]
    assert "unknown key file" in _ollama.problems(settings(extra_models=[{"name": "a", "file": "/x"}]))[0]
    assert "needs a name" in _ollama.problems(settings(extra_models=[{"gguf": "/x"}]))[0]


def test_plan_on_a_cpu() -> None:
    plan = _ollama.plan(settings(), {"release": "0.34.4"}, MACHINE)
    assert plan["environment"] == {
        "HOME": "/var/lib/ollama",
        "OLLAMA_HOST": "0.0.0.0:11434",
        "OLLAMA_MODELS": "/var/lib/ollama/models",
        "OLLAMA_CONTEXT_LENGTH": "8192",
        "OLLAMA_KEEP_ALIVE": "5m",
        "OLLAMA_MAX_LOADED_MODELS": "2",
        "OLLAMA_NUM_PARALLEL": "1",
        "OLLAMA_KV_CACHE_TYPE": "f16",
        "OLLAMA_NO_CLOUD": "1",
    }
    assert plan["url"] == "http://10.120.0.1:11434"
    assert plan["after"] == []
    assert plan["pull"] == ["nomic-embed-text"]
    assert (plan["gpu"], plan["infers"], plan["serves"]) == (False, True, True)


@pytest.mark.parametrize(
    ("capabilities", "gpu", "asked"),
    [
        (["3.5"], False, "auto"),
        (["3.5", "8.6"], True, "auto"),
        ([""], True, "auto"),
        (["3.5"], True, "enabled"),
    ],
)
def test_cards_that_ollama_cannot_use_leave_it_on_the_cpu(
    capabilities: list[str], gpu: bool, asked: str
) -> None:
    machine = MACHINE | {"cards": [{"capability": capability} for capability in capabilities]}
    plan = _ollama.plan(settings(gpu=asked), {"release": "0.34.4", "gpu": True}, machine)
    assert plan["gpu"] is gpu
    assert any("needs 5.0" in note for note in _ollama.summary(plan, {})["notes"]) is not gpu


def test_plan_on_a_shared_gpu_with_a_volume_for_models() -> None:
    machine = MACHINE | {"roles": ["ollama_server", "stt_server"]}
    changes = {"models_dir": "/srv/models", "flash_attention": "enabled", "cloud": True}
    changed = settings(**changes, environment={"OLLAMA_KEEP_ALIVE": -1})
    plan = _ollama.plan(changed, {"release": "0.34.4-go", "gpu": True}, machine)
    assert plan["environment"]["LLAMA_ARG_FIT_TARGET"] == "5137"
    assert plan["environment"]["OLLAMA_FLASH_ATTENTION"] == "1"
    assert plan["environment"]["OLLAMA_KEEP_ALIVE"] == "-1"
    assert "OLLAMA_NO_CLOUD" not in plan["environment"]
    assert plan["read_write_paths"] == ["/srv/models"]
    assert plan["after"] == ["speaches.service", "voicegate.service"]
    assert not plan["infers"]
    helped = settings(llama_server="/usr/bin/llama-server")
    assert _ollama.plan(helped, {"release": "0.34.4-go"}, machine)["infers"]
    assert not _ollama.plan(settings(gpu="disabled"), {"release": "x", "gpu": True}, machine)["gpu"]


def test_summary_is_honest() -> None:
    skipped = [{"what": "Ollama's release archive", "why": "github.com cannot be reached"}]
    built = _ollama.plan(settings(), {"release": "0.34.4-go", "skipped_sources": skipped}, MACHINE)
    told = _ollama.summary(built, {"left_out": [{"what": "model m", "why": "unreachable"}]})
    assert told["version"] == "0.34.4"
    assert told["skipped"] == [{"what": "model m", "why": "unreachable"}]
    assert any("github.com cannot be reached" in note for note in told["notes"])
    assert any("inference needs llama-server" in note for note in told["notes"])

    nothing = _ollama.plan(settings(), {"release": "", "skipped_sources": skipped}, MACHINE)
    told = _ollama.summary(nothing, {})
    assert "url" not in told
    why = "Ollama's release archive: github.com cannot be reached"
    assert told["skipped"] == [{"what": "Ollama", "why": why}]


# --- sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "changes", "expected"),
    [
        ("1.0", {}, True),
        ("1.0-go", {}, True),
        ("0.9", {}, False),
        ("", {}, False),
        ("1.0-go", {"source": "release"}, False),
        ("1.0", {"source": "release"}, True),
        ("1.0", {"source": "go"}, False),
        ("1.0", {"archive": "/a"}, True),
        ("1.0-go", {"archive": "/a"}, False),
        ("1.0-bbbbbbbb", {"archive": "/a", "archive_sha256": "b" * 64}, True),
        ("1.0", {"archive": "/a", "archive_sha256": "b" * 64}, False),
        ("1.0-bbbbbbbb", {}, False),
    ],
)
def test_what_is_installed_is_good_enough(installed: str, changes: dict[str, Any], expected: bool) -> None:
    assert accepted(installed, Request("1.0", "amd64", pins={"amd64": "a" * 64}, **changes)) is expected


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An HTTP server for the releases: its URL and its folder."""
    root = tmp_path / "www"
    (root / "v1.0").mkdir(parents=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", root
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)


def silent(_text: str) -> None:
    pass


def test_release_archive_is_fetched_once_and_checked(folder: tuple[str, Path], tmp_path: Path) -> None:
    url, root = folder
    data = b"an archive" * 1000
    remote = root / "v1.0" / "ollama-linux-arm64.tar.zst"
    remote.write_bytes(data)
    pinned = hashlib.sha256(data).hexdigest()
    pins, cache = {"arm64": pinned}, str(tmp_path / "cache")
    request = Request("1.0", "arm64", release_url=url + "/", pins=pins, cache=cache)

    planned = from_release(Request(**{**request.__dict__, "check": True}), silent)
    assert planned.fetched
    assert not Path(planned.src).exists()

    said: list[str] = []
    found = from_release(request, said.append)
    assert (found.kind, found.release, found.fetched) == ("release", "1.0", True)
    assert Path(found.src).read_bytes() == data
    assert said
    remote.unlink()
    assert not from_release(request, silent).fetched

    # A damaged copy in the cache is not used.
    Path(found.src).write_bytes(b"damaged")
    with pytest.raises(SourceError, match="answers 404"):
        from_release(request, silent)


def test_archive_with_another_digest_leaves_nothing_behind(folder: tuple[str, Path], tmp_path: Path) -> None:
    url, root = folder
    (root / "v1.0" / "ollama-linux-amd64.tar.zst").write_bytes(b"something else")
    pins, cache = {"amd64": "a" * 64}, str(tmp_path / "cache")
    request = Request("1.0", "amd64", release_url=url, pins=pins, cache=cache)
    with pytest.raises(SourceError, match="expected is aaaa"):
        from_release(request, silent)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".lock"]


def test_release_that_breaks_off(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _address = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n" + b"x" * 1000)
                time.sleep(3)

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        pins = {"amd64": "a" * 64}
        request = Request("1.0", "amd64", release_url=url, pins=pins, cache=str(tmp_path), reach_timeout=0.5)
        start = time.monotonic()
        with pytest.raises(SourceError, match="broke off"):
            from_release(request, silent)
        assert time.monotonic() - start < 3
    assert not list(tmp_path.rglob("*.part"))


def test_unreachable_release_is_found_out_in_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Accepts (the kernel does) and never answers.
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        pins = {"amd64": "a" * 64}
        request = Request("1.0", "amd64", release_url=url, pins=pins, cache=str(tmp_path), reach_timeout=0.5)
        start = time.monotonic()
        with pytest.raises(SourceError, match=r"has not answered for 0\.5 s|cannot be reached"):
            from_release(request, silent)
        assert time.monotonic() - start < 2


def test_unknown_version_names_the_variable_to_set(tmp_path: Path) -> None:
    request = Request("9.9", "amd64", release_url="http://127.0.0.1:9", cache=str(tmp_path))
    found, skipped = find(request, silent)
    assert found is None
    assert "set ollama_archive_sha256" in skipped[0]["why"]
    assert "no checksum of the Go module is known for version 9.9" in skipped[1]["why"]


def test_local_archive(tmp_path: Path) -> None:
    path = tmp_path / "mine.tar.zst"
    path.write_bytes(b"mine")
    digest = hashlib.sha256(b"mine").hexdigest()
    pins = {"amd64": "a" * 64}
    request = functools.partial(Request, "1.0", "amd64", pins=pins)
    found, skipped = find(request(archive=str(path), archive_sha256=digest), silent)
    assert found is not None
    assert (found.kind, found.release, found.src, skipped) == ("archive", f"1.0-{digest[:8]}", str(path), [])
    _found, skipped = find(request(source="archive", archive=str(path)), silent)
    assert f"has the SHA-256 {digest}, expected is aaaa" in skipped[0]["why"]
    _found, skipped = find(request(source="archive", archive=str(tmp_path / "no")), silent)
    assert "is no file on the controller" in skipped[0]["why"]


GO = """#!/bin/sh
echo "$@" >> {log}
case "$1" in
  version) echo "go version go{version} linux/amd64" ;;
  list) [ "$2" = -m ] && {{ sleep {pause}; {listing}; exit $?; }}; printf 'a\\nb\\nc\\n' ;;
  mod) printf '{{"Sum": "h1:real", "Dir": "/module"}}' ;;
  build) while [ "$1" != -o ]; do shift; done
    echo a >&2; {compile}; echo "GOTOOLCHAIN=$GOTOOLCHAIN" > "$2" ;;
esac
"""


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A toolchain that only pretends, so that its failures can be had at will."""
    monkeypatch.setenv("CC", "true")
    monkeypatch.setenv("GOFLAGS", "-mod=vendor")

    def make(version: str = "1.26.0", **parts: str) -> Request:
        path = tmp_path / "go"
        values = {"pause": "0", "listing": "true", "compile": "true", **parts}
        path.write_text(GO.format(log=tmp_path / "log", version=version, **values))
        path.chmod(0o755)
        pins, cache = {"go": "h1:real"}, str(tmp_path / "cache")
        return Request("1.0", ARCH, pins=pins, go=str(path), cache=cache, reach_timeout=2, timeout=20)

    return make


def test_go_builds_once(go: Any, tmp_path: Path) -> None:
    request = go()
    found = from_go(request, silent)
    assert (found.kind, found.release, found.fetched) == ("go", "1.0-go", True)
    assert os.access(found.src, os.X_OK)
    calls = (tmp_path / "log").read_text()
    assert "-X=github.com/ollama/ollama/version.Version=1.0" in calls
    assert "-mod=readonly" in calls
    assert not from_go(request, silent).fetched
    assert (tmp_path / "log").read_text() == calls
    # Neither a changed program nor another pin passes for the cached build.
    Path(found.src).write_text("changed")
    assert from_go(request, silent).fetched


def test_older_go_is_told_to_fetch_the_right_one(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOTOOLCHAIN", "local")
    assert Path(from_go(go("1.24.4"), silent).src).read_text() == "GOTOOLCHAIN=auto\n"


@pytest.mark.parametrize(
    ("version", "parts", "message"),
    [
        ("1.19.8", {}, r"is Go 1\.19; 1\.26 is needed"),
        ("1.26.0", {"listing": "echo 'dial tcp: no such host' >&2; false"}, "proxy cannot be used: dial tcp"),
        ("1.26.0", {"pause": "9"}, "the Go module proxy has not answered for 2 s"),
        ("1.26.0", {"compile": "echo undefined: x >&2; exit 1"}, "the build failed: a / undefined: x"),
    ],
)
def test_go_that_does_not_work(go: Any, version: str, parts: dict[str, str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        from_go(go(version, **parts), silent)


def test_go_module_with_another_checksum_is_not_built(go: Any, tmp_path: Path) -> None:
    request = Request(**{**go().__dict__, "pins": {"go": "h1:other"}})
    with pytest.raises(SourceError, match="has the checksum h1:real, expected is h1:other"):
        from_go(request, silent)
    assert "build" not in (tmp_path / "log").read_text()


def test_build_past_its_deadline_is_ended(go: Any, tmp_path: Path) -> None:
    request = Request(**{**go(compile=f"echo $$ > {tmp_path}/pid; sleep 60").__dict__, "timeout": 1.0})
    start = time.monotonic()
    with pytest.raises(SourceError, match="not finished in time"):
        from_go(request, silent)
    assert time.monotonic() - start < 10
    pid = int((tmp_path / "pid").read_text())
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        pytest.fail("the build goes on")


def test_no_toolchain_and_no_crossing(go: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    request = go()
    other = "arm64" if ARCH == "amd64" else "amd64"
    with pytest.raises(SourceError, match="no building across"):
        from_go(Request(**{**request.__dict__, "arch": other}), silent)
    with pytest.raises(SourceError, match="no Go toolchain on the controller"):
        from_go(Request(**{**request.__dict__, "go": str(tmp_path / "none")}), silent)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(SourceError, match="needs a C compiler"):
        from_go(request, silent)


def test_two_at_once_build_once(go: Any, tmp_path: Path) -> None:
    request = go(compile="sleep 1")
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(from_go(request, silent))) for _unused in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(results) == 2
    builds = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("build")]
    assert len(builds) == 1


@pytest.mark.skipif(not shutil.which("go"), reason="no Go toolchain here")
def test_pinned_checksum_is_the_modules(tmp_path: Path) -> None:
    version = load("defaults/main.yml")["ollama_server_version"]
    pins = load("vars/main.yml")["__ollama_server_pins"][version]
    argv = ["go", "mod", "download", "-json", f"{_ollama_source.MODULE}@v{version}"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("the Go module proxy does not answer")
    if done.returncode:
        pytest.skip(f"the Go module cannot be had: {done.stdout.strip() or done.stderr.strip()}")
    assert json.loads(done.stdout)["Sum"] == pins["go"]

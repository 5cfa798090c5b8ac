"""The command line: what is refused before anything starts, fetching from a hub, ending."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from voicegate.settings import SECRETS, Settings
from voicegate_support import CLIPS, MODEL, MODEL_EN, Server, run


def test_wrong_settings_are_refused_at_once() -> None:
    result = run("serve", "--model", "huge", "--compute-type", "float12", env={"VOICEGATE_PORT": "x"})
    assert result.returncode == 2
    assert "--compute-type: 'float12' is not one of auto, int8, int8_float32" in result.stderr
    assert "--model: unknown model 'huge'" in result.stderr
    assert "large-v3-turbo" in result.stderr
    assert "VOICEGATE_PORT: 'x' is not a whole number" in result.stderr


def test_model_that_is_not_here(tmp_path: Path) -> None:
    result = run("serve", "--model", "tiny", env={"HF_HOME": str(tmp_path)})
    assert result.returncode == 2
    assert f"HF_HOME={tmp_path} voicegate fetch --model tiny" in result.stderr
    assert "Traceback" not in result.stderr


def test_folder_without_a_model(tmp_path: Path) -> None:
    result = run("serve", "--model", str(tmp_path))
    assert result.returncode == 2
    assert "has no config.json, model.bin, tokenizer.json" in result.stderr


def test_broken_model_ends_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(MODEL_EN, folder)
    (folder / "model.bin").write_bytes(b"\0" * 1000)
    result = run("serve", "--model", str(folder), "--port", "0", "--device", "cpu")
    assert result.returncode == 1
    assert f"cannot load {folder}" in result.stderr
    assert "Traceback" not in result.stderr


def test_language_the_model_cannot() -> None:
    result = run("serve", "--model", str(MODEL_EN), "--port", "0", "--device", "cpu", "--language", "de")
    assert result.returncode == 1
    assert "knows only English" in result.stderr


def test_gpu_that_is_not_there() -> None:
    import ctranslate2

    if ctranslate2.get_cuda_device_count():
        pytest.skip("this machine has a GPU")
    result = run("serve", "--model", str(MODEL), "--port", "0", "--device", "cuda")
    assert result.returncode == 1
    assert "CTranslate2 sees 0 GPUs" in result.stderr


def test_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = run("serve", "--model", str(MODEL), "--port", port, "--device", "cpu")
    assert result.returncode == 1
    assert "Address already in use" in result.stderr
    assert f"cannot_listen host=127.0.0.1 port={port}" in result.stderr


def test_help_lists_every_option() -> None:
    text = run("serve", "--help").stdout
    for item in dataclasses.fields(Settings):
        option = item.name.replace("_", "-")
        if item.name in SECRETS:  # would be in every process list
            continue
        assert f"--{option} " in text, option
    assert run("--version").stdout.startswith("voicegate ")


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    started = time.monotonic()
    result = run(
        "fetch", "--model", "tiny", env={"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    )
    assert result.returncode == 3
    assert "the hub at http://127.0.0.1:9 cannot be reached" in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - started < 15


def test_fetch_of_what_needs_none() -> None:
    assert run("fetch", "--model", "huge").returncode == 2
    assert run("fetch", "--model", str(MODEL)).returncode == 2


REVISION = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as downloading a model needs, serving the demo model."""

    protocol_version = "HTTP/1.1"
    repository = "someone/demo-whisper"
    folder = MODEL_EN
    token = ""  # that gives access to its files, where it is gated

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        names = sorted(item.name for item in self.folder.iterdir())
        if re.fullmatch(rf"/api/models/{self.repository}(/revision/\w+)?", path):
            body = {
                "id": self.repository,
                "sha": REVISION,
                "siblings": [{"rfilename": name} for name in names],
            }
            self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/api/models/{self.repository}/tree/"):
            tree = [
                {"type": "file", "path": name, "oid": "0" * 40, "size": (self.folder / name).stat().st_size}
                for name in names
            ]
            self._answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif (match := re.fullmatch(rf"/{self.repository}/resolve/\w+/([\w.]+)", path)) and match[1] in names:
            if self.token and self.headers["authorization"] != f"Bearer {self.token}":
                self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
                return
            content = (self.folder / match[1]).read_bytes()
            headers = {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self._answer(200, content, headers)
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_fetch_of_a_gated_pipeline(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.yaml").write_text("pipeline: {}")
    (tmp_path / "token").write_text("hf_good\n")
    monkeypatch.setattr(Hub, "folder", tmp_path / "model")
    monkeypatch.setattr(Hub, "token", "hf_good")
    fetch = ("fetch", "--diarization-model", Hub.repository)
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub}
    for more in ({}, {"HF_TOKEN": "hf_bad"}):
        refused = run(*fetch, env=env | more)
        assert refused.returncode == 5
        for part in (f"accept them at {hub}/{Hub.repository}", f"{hub}/settings/tokens", "--hf-token-file"):
            assert part in refused.stderr
        assert "Traceback" not in refused.stderr
    done = run(*fetch, "--hf-token-file", str(tmp_path / "token"), env=env)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "config.yaml").read_text() == "pipeline: {}"
    assert run(*fetch, env=env | {"HF_TOKEN": "hf_good"}).returncode == 0
    assert run(*fetch, "--hf-token-file", str(tmp_path / "none"), env=env).returncode == 2
    assert run("fetch", "--diarization-model", "none").returncode == 2


def test_fetch_and_serve_by_hub_id(hub: str, tmp_path: Path, serve: Callable[..., Server]) -> None:
    env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub}
    result = run("fetch", "--model", Hub.repository, "--revision", REVISION, env=env)
    assert result.returncode == 0, result.stderr
    assert (Path(result.stdout.strip()) / "model.bin").read_bytes() == (MODEL_EN / "model.bin").read_bytes()
    # The hub is not needed any more.
    server = serve(
        "--model", Hub.repository, "--revision", REVISION,
        "--live-model", Hub.repository, "--live-revision", REVISION,
        env={"HF_HOME": str(tmp_path)},
    )  # fmt: skip
    client = server.client()
    [model] = client.models.list().data
    assert (model.id, model.owned_by) == (Hub.repository, "someone")
    assert client.models.retrieve(Hub.repository).id == Hub.repository
    answer = client.audio.transcriptions.create(file=CLIPS / "D009.wav", model=Hub.repository)
    assert answer.text == "Turn up the volume."
    other = run("fetch", "--model", "someone/else", env=env)
    assert other.returncode == 4
    assert "no public model someone/else" in other.stderr

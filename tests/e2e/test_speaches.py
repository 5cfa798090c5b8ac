"""
The role stt_server with the real Speaches.

Its source is on no package registry: SOTTOVOCE_SPEACHES_SOURCE names a checkout or an archive of it.
SOTTOVOCE_SPEACHES_PYTHON names the prefix of a Python 3.12 on this machine, which is handed in
read-only; left out, one of pyenv's is taken.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import time
import urllib.request
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _stt, _stt_plan, _stt_speaches
from e2e import wait_for

pytestmark = [pytest.mark.incus, pytest.mark.speaches]

ROOT = Path(__file__).resolve().parents[2]
DOMAIN, MACHINE = "spe2e", "spe2e-speech"
CLIP, SENTENCE = ROOT / "demo/clips/D000.wav", "Turn on the heater."
INFRA = """
project_name: e2e-speaches
global:
  addressing: {{base_octet: 10, zone_base: 191, zone_step: 10}}
domains:
  {domain}:
    ephemeral: true
    machines:
      {machine}:
        roles: [base_system, stt_server]
        devices:
          python312: {{type: disk, source: {python}, path: /opt/python3.12, readonly: "true"}}
"""
HOST_VARS = """
stt_server_engine: {engine}
stt_server_engine_fallback: ""
stt_server_speaches_source: {source}
stt_server_python: /opt/python3.12/bin/python3.12
stt_server_model: {model}
stt_server_quantization: {quantization}
"""


def python_prefix() -> str:
    """Prefix of a Python 3.12 on this machine, or nothing."""
    given = os.environ.get("SOTTOVOCE_SPEACHES_PYTHON")
    found = [given] if given else sorted(map(str, Path.home().glob(".pyenv/versions/3.12.*")))
    return found[-1] if found else ""


def incus(*arguments: str) -> str:
    done = subprocess.run(
        ["incus", *arguments, "--project", DOMAIN], check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout


def inside(*command: str) -> str:
    """Run a command in the machine."""
    done = subprocess.run(
        ["incus", "exec", MACHINE, "--project", DOMAIN, "--", *command],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr


@dataclass
class Server:
    collection: Any
    inventory: Path
    source: str
    first: Any = None

    def configure(
        self, engine: str = "speaches", model: str = "whisper-demo", quantization: str = "float16"
    ) -> None:
        (self.inventory / "host_vars" / f"{MACHINE}.yml").write_text(
            HOST_VARS.format(
                engine=engine, source=self.source, model=ROOT / "demo" / model, quantization=quantization
            ),
            encoding="utf-8",
        )

    def set(self, line: str) -> None:
        """One more variable of the machine, until the next `configure`."""
        with (self.inventory / "host_vars" / f"{MACHINE}.yml").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def apply(self, *arguments: str) -> Any:
        return self.collection.play("apply", self.inventory, *arguments, timeout=1200)

    @property
    def url(self) -> str:
        (state,) = json.loads(incus("list", MACHINE, "--format", "json"))
        addresses = state["state"]["network"]["eth0"]["addresses"]
        address = next(entry["address"] for entry in addresses if entry["family"] == "inet")
        return f"http://{address}:8000"

    def on_card(self) -> list[str]:
        """The speech models that Speaches says it has loaded."""
        with urllib.request.urlopen(f"{self.url}/api/ps", timeout=10) as answer:
            return [name for name in json.load(answer)["models"] if name.startswith("local/")]

    def hear(
        self, model: str, port: int = 8000, audio: bytes = CLIP.read_bytes(), timeout: float = 60
    ) -> str:
        body, kind = _stt_speaches.form({"model": model}, CLIP.name, audio)
        request = urllib.request.Request(
            f"{self.url.removesuffix('8000')}{port}/v1/audio/transcriptions",
            data=body,
            headers={"Content-Type": kind},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout) as response:
            answer: dict[str, Any] = json.load(response)
        return str(answer["text"])


@pytest.fixture(scope="module")
def server(collection: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    source = os.environ.get("SOTTOVOCE_SPEACHES_SOURCE", "")
    if not source:
        pytest.skip("no source of Speaches (SOTTOVOCE_SPEACHES_SOURCE)")
    python = python_prefix()
    if not python or not shutil.which("incus"):
        pytest.skip("no Python 3.12 to hand in (SOTTOVOCE_SPEACHES_PYTHON)")
    inventory = tmp_path_factory.mktemp("speaches") / "inventory"
    (inventory / "host_vars").mkdir(parents=True)
    (inventory / "infra.yml").write_text(
        INFRA.format(domain=DOMAIN, machine=MACHINE, python=python), encoding="utf-8"
    )
    made = Server(collection, inventory, source)
    made.configure()
    try:
        collection.play("apply", inventory, "--tags", "infra,base")
        # A Python that was moved finds its library through the loader's list.
        inside("sh", "-c", "echo /opt/python3.12/lib > /etc/ld.so.conf.d/python3.12.conf && ldconfig")
        made.first = made.apply()
        yield made
    except AssertionError:
        print(inside("journalctl", "--no-pager", "--lines=80", "--unit=speaches", "--unit=voicegate"))
        raise
    finally:
        collection.play("destroy", inventory, "-e", "confirm=yes", check=False)


def test_first_apply_gives_speaches_with_its_model(server: Server) -> None:
    assert "speaches, 0.9.0-rc.3, whisper-demo, int8, cpu" in server.first.output
    assert inside("systemctl", "is-active", "speaches").strip() == "active"
    loaded = urllib.request.urlopen(f"{server.url}/api/ps", timeout=10).read()
    assert json.loads(loaded)["models"][0].startswith("local/whisper-demo-")


@pytest.mark.parametrize("name", ["whisper-1", str(ROOT / "demo/whisper-demo")])
def test_requests_may_use_the_names_people_write(server: Server, name: str) -> None:
    assert server.hear(name) == SENTENCE


def test_installed_as_documented(server: Server) -> None:
    shown = inside("systemctl", "show", "speaches", "--property=User,WorkingDirectory,UnitFileState")
    unit = dict(line.split("=", 1) for line in shown.split())
    assert (unit["User"], unit["UnitFileState"]) == ("speaches", "enabled")
    assert unit["WorkingDirectory"].startswith("/opt/speaches/releases/0.9.0-rc.3")
    aliases = json.loads(inside("cat", f"{unit['WorkingDirectory']}/model_aliases.json"))
    assert aliases["large-v3-turbo"] == "deepdml/faster-whisper-large-v3-turbo-ct2"
    environment = inside("cat", "/etc/sottovoce/speaches.env")
    assert 'WHISPER__COMPUTE_TYPE="int8"' in environment
    assert "API_KEY" not in environment
    assert inside("stat", "-c", "%U:%G %a", "/etc/sottovoce/speaches.env").strip() == "root:speaches 640"


def test_nothing_to_do(server: Server) -> None:
    assert server.apply().changed == 0


def test_changed_model_and_quantization(server: Server) -> None:
    server.configure(model="whisper-demo-en", quantization="float32")
    run = server.apply("--tags", "stt")
    assert "whisper-demo-en, float32, cpu" in run.output
    assert server.hear("whisper-1") == SENTENCE
    assert "float32" in inside("cat", "/etc/sottovoce/speaches.env")


def test_other_engine_and_back(server: Server) -> None:
    server.configure(engine="builtin")
    server.apply("--tags", "stt")
    assert inside("systemctl", "is-active", "voicegate", "speaches").split() == ["active", "inactive"]
    assert inside("systemctl", "is-enabled", "voicegate", "speaches").split() == ["enabled", "disabled"]
    assert server.hear("whisper-1") == SENTENCE
    server.configure()
    server.apply("--tags", "stt")
    assert inside("systemctl", "is-active", "voicegate", "speaches").split() == ["inactive", "active"]
    assert server.hear("whisper-1") == SENTENCE


def test_the_gateway_in_front_of_it(server: Server) -> None:
    infra = server.inventory / "infra.yml"
    before = infra.read_text(encoding="utf-8")
    infra.write_text(before.replace("stt_server]", "stt_server, voice_gateway]"), encoding="utf-8")
    run = server.apply("--tags", "infra,stt")
    assert inside("systemctl", "is-active", "voicegate", "speaches").split() == ["active", "active"]
    listening = inside("ss", "-Htln")
    assert "127.0.0.1:8001 " in listening
    assert "0.0.0.0:8000 " in listening
    assert "speaches, 0.9.0-rc.3, whisper-demo" in run.output
    for name in ("whisper-1", str(ROOT / "demo/whisper-demo")):
        assert server.hear(name) == SENTENCE
    assert len(server.on_card()) == 1  # Speaches' own API, through it
    assert server.apply().changed == 0
    takes_turns(server)
    tell_speakers_apart(server)
    infra.write_text(before, encoding="utf-8")
    server.apply("--tags", "infra,stt")
    assert inside("systemctl", "is-active", "voicegate", "speaches").split() == ["inactive", "active"]
    assert server.hear("whisper-1") == SENTENCE


def many_times(count: int) -> bytes:
    """The clip again and again, as one recording."""
    with wave.open(str(CLIP), "rb") as source:
        parameters, frames = source.getparams(), source.readframes(source.getnframes())
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setparams(parameters)
        file.writeframes(frames * count)
    return target.getvalue()


def takes_turns(server: Server) -> None:
    """A gateway like the unit's, but as on a card: the model is loaded for a request, and goes after it."""
    unit = inside("systemctl", "cat", "voicegate").splitlines()
    (start,) = [line.removeprefix("ExecStart=") for line in unit if line.startswith("ExecStart=")]
    options = ["--port=8002", "--data-dir=", "--vram-policy=exclusive", "--vram-need-mib=100"]
    environment = "--property=EnvironmentFile=/etc/sottovoce/voicegate.env"
    inside("systemd-run", "--unit=turns", environment, *start.split(), *options)
    try:
        wait_for(30, lambda: not server.on_card())
        for _ in range(2):
            assert server.hear("whisper-1", 8002) == SENTENCE
            wait_for(30, lambda: not server.on_card())
        # Speaches works on what its client has left: the model goes when it has ended, and not before.
        with pytest.raises(TimeoutError):
            server.hear("whisper-1", 8002, many_times(400), timeout=2)
        time.sleep(1)
        assert server.on_card()
        wait_for(120, lambda: not server.on_card())
        log = inside("journalctl", "--no-pager", "--unit=turns")
        assert log.count(" model_loaded ") == 3, log
        assert log.count(" model_unloaded ") == 4, log
        assert log.count(" vram step=proceed policy=exclusive ") == 3, log
        assert "speaches_failed" not in log
        assert "model_in_use" not in log
    finally:
        inside("systemctl", "stop", "turns")
    assert server.hear("whisper-1") == SENTENCE  # Speaches loads it by itself
    assert len(server.on_card()) == 1


CARD = "---\nlibrary_name: onnx\npipeline_tag: speaker-segmentation\ntags: [pyannote]\n---\n"


def tell_speakers_apart(server: Server) -> None:
    """Its models are not to be had here: skipped by name; with empty ones the endpoint is reached."""
    server.set("voice_gateway_diarization: true")
    run = server.apply("--tags", "stt")
    told = "skipped: telling speakers apart: fedirz/segmentation_community_1 is not on this machine"
    assert told in run.output
    assert ask_for_speakers(server) == (400, "diarization_unavailable")
    for model, file in _stt_plan.DIARIZATION_MODELS.items():
        folder = f"{_stt_plan.hub_cache('speaches')}/{_stt.hub_folder(model)}"
        snapshot = f"{folder}/snapshots/0000"
        inside("sh", "-c", f"mkdir -p {folder}/refs {snapshot} && printf 0000 > {folder}/refs/main")
        inside("sh", "-c", f"printf %s '{CARD}' > {snapshot}/README.md && echo none > {snapshot}/{file}")
    run = server.apply("--tags", "stt")
    assert "telling speakers apart" not in run.output
    assert 'VOICEGATE_DIARIZATION="upstream"' in inside("cat", "/etc/sottovoce/voicegate.env")
    # Speaches has read the recording, finds the models and cannot load them.
    assert ask_for_speakers(server) == (503, "diarization_failed")
    assert "ONNXRuntimeError" in inside("journalctl", "--no-pager", "--unit=speaches")
    assert server.apply().changed == 0


def ask_for_speakers(server: Server) -> tuple[int, str]:
    form = {"model": "whisper-1", "response_format": "diarized_json"}
    body, kind = _stt_speaches.form(form, CLIP.name, CLIP.read_bytes())
    answer = _stt_speaches.http(
        "POST", f"{server.url}/v1/audio/transcriptions", body, {"Content-Type": kind}, 60
    )
    return answer.status, str(answer.json()["error"]["code"])

"""A folder as one archive: digests, unpacking by one rename, and what must be refused."""

from __future__ import annotations

import dataclasses
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from ansible_collections.sottovoce.stack.plugins.filter.stt import GATEWAY_ROLES_OWN, stt_request
from ansible_collections.sottovoce.stack.plugins.module_utils import _stt, _stt_tree
from voicegate.settings import SECRETS, Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    (root / "src/pkg").mkdir(parents=True)
    (root / "src/pkg/a.py").write_text("a = 1\n")
    (root / "src/pkg/__pycache__").mkdir()
    (root / "src/pkg/__pycache__/a.pyc").write_bytes(b"x")
    (root / "src/run.sh").write_text("#!/bin/sh\n")
    (root / "src/run.sh").chmod(0o755)
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").write_text("")
    (root / "README.md").write_text("read me\n")
    (root / "tests").mkdir()
    (root / "tests/t.py").write_text("")
    return root


def test_caches_and_environments_do_not_count(source: Path) -> None:
    assert [name for name, _unused in _stt_tree.walk(source)] == [
        "README.md",
        "src/pkg/a.py",
        "src/run.sh",
        "tests/t.py",
    ]
    assert [name for name, _unused in _stt_tree.walk(source, ["src"])] == ["src/pkg/a.py", "src/run.sh"]


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "src/pkg/a.py").write_text("a = 2\n"),
        lambda root: (root / "src/run.sh").chmod(0o644),
        lambda root: (root / "README.md").rename(root / "READ.md"),
        lambda root: (root / "tests/t.py").unlink(),
        lambda root: (root / "new").write_text(""),
    ],
)
def test_every_change_changes_the_digest(source: Path, change: object) -> None:
    before = _stt_tree.digest(source)
    assert callable(change)
    change(source)
    assert _stt_tree.digest(source) != before


def test_digest_does_not_depend_on_times_or_other_modes(source: Path) -> None:
    before = _stt_tree.digest(source)
    os.utime(source / "README.md", (1, 1))
    (source / "README.md").chmod(0o600)
    assert _stt_tree.digest(source) == before


def _tar(path: Path, names: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_an_archive_has_the_digest_of_its_folder(source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "a.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        for name, path in _stt_tree.walk(source):
            tar.add(path, arcname=f"project-1.0/{name}")
    assert _stt_tree.source_digest(packed) == _stt_tree.digest(source)
    zipped = tmp_path / "a.zip"
    with zipfile.ZipFile(zipped, "w") as bundle:
        for name, path in _stt_tree.walk(source):
            bundle.write(path, f"project-1.0/{name}")
    assert _stt_tree.source_digest(zipped) == _stt_tree.digest(source)
    assert _stt_tree.source_digest(packed, ["src"]) == _stt_tree.digest(source, ["src"])


def test_install_and_install_again(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "opt/here"
    digest = _stt_tree.source_digest(source)
    (tmp_path / "scratch").mkdir()
    archive = _stt_tree.normal_archive(source, [], tmp_path / "scratch")
    assert _stt_tree.recorded(dest) == ""
    _stt_tree.install(archive, dest, digest)
    assert _stt_tree.recorded(dest) == digest
    assert _stt_tree.digest(dest) == digest
    assert (dest / "src/run.sh").stat().st_mode & 0o777 == 0o755
    assert (dest / "src/pkg/a.py").stat().st_mode & 0o777 == 0o644
    (dest / "left over").write_text("")
    _stt_tree.install(archive, dest, digest)
    assert not (dest / "left over").exists()
    assert [path.name for path in dest.parent.iterdir()] == ["here"]


def test_what_is_not_expected_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    archive = _stt_tree.normal_archive(source, [], tmp_path / "scratch")
    dest = tmp_path / "opt/here"
    with pytest.raises(_stt_tree.TreeError, match="expected was ffff"):
        _stt_tree.install(archive, dest, "ffff")
    assert list(dest.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil"])
def test_an_archive_cannot_write_outside(tmp_path: Path, name: str) -> None:
    archive = _tar(tmp_path / "a.tar", {"fine": b"", name: b"evil"})
    with pytest.raises(_stt_tree.TreeError, match="outside"):
        _stt_tree.install(archive, tmp_path / "opt/here", "x")


def test_links_in_an_archive_are_left_out(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        link = tarfile.TarInfo("link")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/passwd"
        tar.addfile(link)
        info = tarfile.TarInfo("file")
        tar.addfile(info, io.BytesIO(b""))
    target = tmp_path / "out"
    target.mkdir()
    _stt_tree.unpack(archive, target)
    assert [path.name for path in target.iterdir()] == ["file"]


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"\x1f\x8b broken gzip"])
def test_no_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(content)
    with pytest.raises(_stt_tree.TreeError):
        _stt_tree.source_digest(path)


def test_cut_archive(source: Path, tmp_path: Path) -> None:
    (source / "big").write_bytes(os.urandom(100_000))
    packed = tmp_path / "a.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(source, arcname="x")
    packed.write_bytes(packed.read_bytes()[:40_000])
    with pytest.raises(_stt_tree.TreeError):
        _stt_tree.source_digest(packed)


def test_hub_layout(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.bin").write_bytes(b"weights")
    digest = _stt_tree.digest(model)
    (tmp_path / "scratch").mkdir()
    dest = tmp_path / "hub/models--local--x"
    _stt_tree.install(
        _stt_tree.normal_archive(model, [], tmp_path / "scratch"), dest, digest, as_hub_cache=True
    )
    revision = (dest / "refs/main").read_text()
    assert len(revision) == 40
    assert (dest / "snapshots" / revision / "model.bin").read_bytes() == b"weights"
    card = (dest / "snapshots" / revision / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ctranslate2\n")
    assert "automatic-speech-recognition" in card
    assert _stt_tree.recorded(dest) == digest


def test_prune_keeps_the_newest_and_what_is_not_ours(tmp_path: Path) -> None:
    for age, name in enumerate(["new", "old", "oldest"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / _stt_tree.MARKER).write_text('{"digest": "x"}')
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "foreign").mkdir()
    assert _stt_tree.prune(tmp_path / "new", 2) == [str(tmp_path / "oldest")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "new", "old"]


def settings(**changes: object) -> dict[str, object]:
    return {"model": "small", "quantization": "int8", "engine": "builtin", "engine_fallback": "", **changes}


def test_request_reads_the_controller(tmp_path: Path) -> None:
    model = tmp_path / "voices"
    model.mkdir()
    (model / "model.bin").write_bytes(b"weights")
    request = stt_request(settings(model="./voices"), str(ROOT / "gateway"), str(tmp_path))
    assert request["problems"] == []
    assert request["model"]["path"] == str(model)
    assert request["model_digest"] == _stt_tree.digest(model)
    assert request["gateway_version"]
    assert request["cuda_lock"]
    assert request["ctranslate2"]["builtin"].startswith("4.")


def test_nothing_falls_back_to_an_engine_that_cannot_speak(tmp_path: Path) -> None:
    asked = settings(engine="speaches", engine_fallback="builtin")
    assert stt_request(asked, str(ROOT / "gateway"), str(tmp_path))["engine_fallback"] == "builtin"
    asked["tts_model"] = "speaches-ai/Kokoro-82M-v1.0-ONNX"
    assert stt_request(asked, str(ROOT / "gateway"), str(tmp_path))["engine_fallback"] == ""


def test_request_names_what_is_wrong_on_the_controller(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    request = stt_request(
        settings(model="./empty", fallback_model="/nowhere", speaches_source="./gone", quantization="x"),
        str(tmp_path / "no-gateway"),
        str(tmp_path),
    )
    text = "\n".join(request["problems"])
    for part in ("stt_server_quantization", "no model.bin", "/nowhere", "gone", "collection is not whole"):
        assert part in text


def test_settings_of_the_gateway_are_voicegates_own() -> None:
    front = {
        "engine_port": 8000,
        "wyoming_port": 0,
        "settings": {"queue_limit": 1, "queu_limit": 1, "model": "x"},
    }
    request = stt_request(settings(gateway=front, port=8000), str(ROOT / "gateway"))
    first, second, third = request["problems"]
    assert "voice_gateway_engine_port: 8000" in first
    assert "no setting 'queu_limit'" in second
    assert "queue_limit" in second
    assert "'model' follows from a variable" in third
    front = {"engine_port": 8001, "wyoming_port": 0, "settings": {}, "diarization": True}
    asked = settings(gateway=front, port=8000)
    assert stt_request({**asked, "engine": "speaches"}, str(ROOT / "gateway"))["problems"] == []
    [only] = stt_request({**asked, "engine": "builtin"}, str(ROOT / "gateway"))["problems"]
    assert "voice_gateway_diarization: only the engine speaches" in only
    names = {field.name for field in dataclasses.fields(Settings)}
    assert names >= GATEWAY_ROLES_OWN
    every = dict.fromkeys(names - GATEWAY_ROLES_OWN - set(SECRETS), 1)
    front = {"engine_port": 8001, "wyoming_port": 0, "settings": every}
    told = stt_request(settings(gateway=front, port=8000, engine="speaches"), str(ROOT / "gateway"))
    assert told["problems"] == []
    # With the engine in voicegate, its small model is the role's.
    first, second = stt_request(settings(gateway=front, port=8000), str(ROOT / "gateway"))["problems"]
    assert "'live_model' follows" in first + second
    assert "'live_revision' follows" in first + second


def test_the_live_model_is_read_like_the_model(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small/model.bin").write_bytes(b"weights")
    request = stt_request(settings(live_model="./small"), str(ROOT / "gateway"), str(tmp_path))
    assert request["problems"] == []
    assert request["live_model"]["path"] == str(tmp_path / "small")
    assert request["live_model_digest"] == _stt_tree.digest(tmp_path / "small")
    (tmp_path / "empty").mkdir()
    (problem,) = stt_request(settings(live_model="./empty"), str(ROOT / "gateway"), str(tmp_path))["problems"]
    assert problem.startswith("stt_server_live_model: ")
    assert "no model.bin" in problem


def test_a_folder_that_is_not_on_the_controller_may_be_on_the_machine(tmp_path: Path) -> None:
    request = stt_request(settings(model="/srv/there"), str(ROOT / "gateway"), str(tmp_path))
    assert request["problems"] == []
    assert request["model_digest"] == ""


def test_the_version_of_ctranslate2_is_known_for_the_pinned_speaches_alone() -> None:
    defaults = yaml.safe_load((ROOT / "roles/stt_server/defaults/main.yml").read_text(encoding="utf-8"))
    pinned = defaults["stt_server_speaches_digest"]
    request = stt_request(settings(speaches_digest=pinned), str(ROOT / "gateway"))
    assert request["ctranslate2"]["speaches"] == _stt.SPEACHES_CTRANSLATE2
    other = stt_request(settings(speaches_digest="0" * 64), str(ROOT / "gateway"))
    assert other["ctranslate2"]["speaches"] == ""

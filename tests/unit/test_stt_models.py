"""Names of models, quantizations, devices: what people write, and what is refused with the list."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from ansible_collections.sottovoce.stack.plugins.filter.stt import stt_problems
from ansible_collections.sottovoce.stack.plugins.module_utils import _stt
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("written", "repository", "listed"),
    [
        ("tiny", "Systran/faster-whisper-tiny", "Systran/faster-whisper-tiny"),
        ("Medium", "Systran/faster-whisper-medium", "Systran/faster-whisper-medium"),
        (
            "large-v3-turbo",
            "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
            "deepdml/faster-whisper-large-v3-turbo-ct2",
        ),
        (
            "turbo",
            "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
            "deepdml/faster-whisper-large-v3-turbo-ct2",
        ),
        (
            "whisper-1",
            "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
            "deepdml/faster-whisper-large-v3-turbo-ct2",
        ),
        ("large", "Systran/faster-whisper-large-v3", "Systran/faster-whisper-large-v3"),
        ("openai/whisper-small", "Systran/faster-whisper-small", "Systran/faster-whisper-small"),
        ("whisper-large-v3", "Systran/faster-whisper-large-v3", "Systran/faster-whisper-large-v3"),
        (
            "distil-large-v3",
            "Systran/faster-distil-whisper-large-v3",
            "Systran/faster-distil-whisper-large-v3",
        ),
        ("someone/their-model-ct2", "someone/their-model-ct2", "someone/their-model-ct2"),
        ("Systran/faster-whisper-base", "Systran/faster-whisper-base", "Systran/faster-whisper-base"),
    ],
)
def test_names_people_write(written: str, repository: str, listed: str) -> None:
    choice = _stt.resolve_model(written)
    assert (choice.repository, choice.listed) == (repository, listed)
    assert not choice.is_folder


def test_an_id_from_the_table_keeps_its_pinned_revision() -> None:
    assert _stt.resolve_model("Systran/faster-whisper-base").revision == _stt.MODELS["base"].revision
    assert _stt.resolve_model("someone/else").revision == ""


@pytest.mark.parametrize(
    ("written", "path"),
    [("/srv/m", "/srv/m"), ("./m", "/base/m"), ("../x/m/", "/x/m"), ("/srv/a/../m/", "/srv/m")],
)
def test_folders(written: str, path: str) -> None:
    choice = _stt.resolve_model(written, "/base")
    assert choice.is_folder
    assert choice.path == path
    assert choice.name == "m"


@pytest.mark.parametrize(
    ("written", "near"), [("larg-v3-turbo", "large-v3-turbo"), ("meduim", "medium"), ("trubo", "turbo")]
)
def test_a_typo_is_refused_with_the_list_and_a_near_name(written: str, near: str) -> None:
    with pytest.raises(_stt.SttError) as error:
        _stt.resolve_model(written)
    assert f"Did you mean '{near}'?" in str(error.value)
    assert all(name in str(error.value) for name in _stt.MODELS)


@given(st.text(max_size=60))
def test_any_text_is_resolved_or_refused(text: str) -> None:
    try:
        choice = _stt.resolve_model(text, "/base")
    except _stt.SttError:
        return
    assert choice.is_folder != bool(choice.repository)


def test_table_is_whole() -> None:
    for entry in _stt.MODELS.values():
        assert re.fullmatch(r"[0-9a-f]{40}", entry.revision)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.repository)
    assert len({entry.revision for entry in _stt.MODELS.values()}) == len(_stt.MODELS)
    assert set(_stt.ALIASES.values()) <= set(_stt.MODELS)


def test_the_builtin_engine_knows_the_same_models() -> None:
    sys.path.insert(0, str(ROOT / "gateway/src"))
    from voicegate import models

    assert {name: entry.repository for name, entry in _stt.MODELS.items()} == models.REPOSITORIES
    assert set(_stt.known_names()) == {*models.REPOSITORIES, *models.SYNONYMS, "whisper-1"}


def test_faster_whisper_knows_the_same_models() -> None:
    utils = pytest.importorskip("faster_whisper.utils")
    ours = {name: entry.repository for name, entry in _stt.MODELS.items()}
    theirs = {name: ours[_stt.ALIASES.get(name, name)] for name in utils._MODELS}
    assert theirs == utils._MODELS


@pytest.mark.parametrize("quantization", _stt.QUANTIZATIONS)
def test_known_quantizations(quantization: str) -> None:
    assert _stt.check_quantization(quantization) == quantization


def test_unknown_quantization_names_all() -> None:
    with pytest.raises(_stt.SttError) as error:
        _stt.check_quantization("float61")
    assert "Did you mean 'float16'?" in str(error.value)
    assert all(name in str(error.value) for name in _stt.QUANTIZATIONS)


@pytest.mark.parametrize(
    ("asked", "device", "effective"),
    [
        ("float16", "cpu", "int8"),
        ("int8_float16", "cpu", "int8"),
        ("bfloat16", "cpu", "int8"),
        ("int8", "cpu", "int8"),
        ("float32", "cpu", "float32"),
        ("float16", "cuda", "float16"),
        ("int8_float16", "cuda", "int8_float16"),
    ],
)
def test_quantization_on_a_device(asked: str, device: str, effective: str) -> None:
    got, note = _stt.effective_quantization(asked, device)
    assert got == effective
    assert bool(note) == (asked != effective)
    assert not note or (asked in note and effective in note)


CARD = ["nvidia0", "nvidiactl", "nvidia-uvm"]


def test_device_auto() -> None:
    assert _stt.effective_device("auto", CARD) == ("cuda", "")
    assert _stt.effective_device("auto", []) == ("cpu", "")
    assert _stt.effective_device("cpu", CARD) == ("cpu", "")


def test_a_card_without_uvm_is_said_and_not_used() -> None:
    device, note = _stt.effective_device("auto", ["nvidia0", "nvidiactl"])
    assert device == "cpu"
    assert "/dev/nvidia-uvm" in note
    assert "restart" in note


def test_a_card_on_a_machine_without_cuda_build() -> None:
    device, note = _stt.effective_device("auto", CARD, "aarch64")
    assert device == "cpu"
    assert "aarch64" in note


@pytest.mark.parametrize("nodes", [[], ["nvidia0"], ["nvidiactl", "nvidia-uvm"]])
def test_cuda_without_a_usable_card_is_refused(nodes: list[str]) -> None:
    with pytest.raises(_stt.SttError, match="stt_server_device is cuda"):
        _stt.effective_device("cuda", nodes)


def test_problems_are_named_all_at_once() -> None:
    found = stt_problems(
        {
            "stt_server_model": "meduim",
            "stt_server_quantization": "int9",
            "stt_server_engine": "speeches",
            "stt_server_engine_fallback": "none",
            "stt_server_device": "gpu",
            "stt_server_language": "english",
            "stt_server_port": 70000,
            "stt_server_fallback_model": "demo/whisper-demo",
        }
    )
    assert [message.split(":")[0] for message in found] == [
        "stt_server_model",
        "stt_server_quantization",
        "stt_server_engine",
        "stt_server_engine_fallback",
        "stt_server_device",
        "stt_server_fallback_model",
        "stt_server_language",
        "stt_server_port",
    ]
    assert "Did you mean 'speaches'?" in found[2]


def test_defaults_have_no_problem() -> None:
    import yaml

    defaults = yaml.safe_load((ROOT / "roles/stt_server/defaults/main.yml").read_text(encoding="utf-8"))
    assert stt_problems(defaults) == []
    assert stt_problems({}) == []
    assert {
        name: defaults[name]
        for name in (
            "stt_server_host",
            "stt_server_port",
            "stt_server_model",
            "stt_server_quantization",
            "stt_server_language",
            "stt_server_enabled",
        )
    } == {
        "stt_server_host": "0.0.0.0",
        "stt_server_port": 8000,
        "stt_server_model": "large-v3-turbo",
        "stt_server_quantization": "float16",
        "stt_server_language": "",
        "stt_server_enabled": True,
    }


def test_aliases_of_speaches() -> None:
    model = _stt.resolve_model("large-v3-turbo").listed
    aliases = _stt.speaches_aliases(model, "large-v3-turbo")
    for name in ("large-v3-turbo", "turbo", "whisper-1", "mobiuslabsgmbh/faster-whisper-large-v3-turbo"):
        assert aliases[name] == model
    assert aliases["tiny"] == "Systran/faster-whisper-tiny"
    assert model not in aliases
    # Speaches looks a name up once: an alias of an alias would not be found.
    assert not set(aliases) & set(aliases.values())
    json.dumps(aliases)


def test_whisper_1_means_the_configured_model() -> None:
    aliases = _stt.speaches_aliases("local/demo-123", "/srv/demo")
    assert aliases["whisper-1"] == "local/demo-123"
    assert aliases["/srv/demo"] == "local/demo-123"
    assert aliases["turbo"] == "deepdml/faster-whisper-large-v3-turbo-ct2"


@pytest.mark.parametrize("name", ["model", "my model", "--", "a--b", "ü"])
def test_local_ids_are_ids_the_cache_can_hold(name: str) -> None:
    identifier = _stt.local_id(name, "0123456789abcdef")
    # `--` would be read back as a slash.
    assert re.fullmatch(r"local/[A-Za-z0-9][\w.]*(-[\w.]+)*-0123456789ab", identifier)
    assert _stt.hub_folder(identifier).removeprefix("models--").replace("--", "/") == identifier


def test_only_speaches_speaks_and_only_with_a_model_of_the_hub() -> None:
    model = "speaches-ai/Kokoro-82M-v1.0-ONNX"
    assert stt_problems({"stt_server_tts_model": model}) == []
    (found,) = stt_problems({"stt_server_tts_model": model, "stt_server_engine": "builtin"})
    assert "set stt_server_engine: speaches" in found
    (found,) = stt_problems({"stt_server_tts_model": "kokoro"})
    assert "'kokoro' is no id on the hub" in found

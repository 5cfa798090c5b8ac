"""What the role will do on a machine, from what was asked and what is there."""

from __future__ import annotations

import http.server
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _stt, _stt_plan
from ansible_collections.sottovoce.stack.plugins.modules import stt_preflight

PINNED = "p" * 64


def request(**changes: Any) -> dict[str, Any]:
    model = changes.pop("model", "large-v3-turbo")
    live = changes.pop("live_model", "")
    return {
        "host": "0.0.0.0",
        "port": 8000,
        "model": asdict(_stt.resolve_model(model)),
        "model_digest": "",
        "live_model": asdict(_stt.resolve_model(live)) if live else {},
        "live_model_digest": "",
        "quantization": "float16",
        "language": "",
        "enabled": True,
        "engine": "speaches",
        "engine_fallback": "builtin",
        "device": "auto",
        "ttl": -1,
        "has_key": False,
        "fallback_path": "",
        "fallback_digest": "",
        "hub_endpoint": "",
        "hub_url": "https://hub.test",
        "speaches_version": "1.0",
        "speaches_digest": PINNED,
        "speaches_source": "",
        "speaches_source_digest": "",
        "speaches_url": "https://source.test/a.tar.gz",
        "python": "",
        "python_url": "https://python.test",
        "gateway_path": "/c/gateway",
        "gateway_digest": "g" * 64,
        "gateway_version": "0.1.0",
        "cuda_lock": "c",
        **changes,
    }


class Machine:
    """A machine as far as the planner looks; counts the addresses that were asked."""

    def __init__(self, **there: Any) -> None:
        self.down: dict[str, str] = there.get("down", {})
        self.asked: list[str] = []
        self.digests: dict[str, str] = there.get("digests", {})
        self.stamps: dict[str, str] = there.get("stamps", {})
        self.facts = _stt_plan.Facts(
            nodes=there.get("nodes", []),
            machine="x86_64",
            python="3.11",
            python_path="/usr/bin/python3",
            digest_at=lambda path: self.digests.get(path, ""),
            stamp_at=lambda path: self.stamps.get(path, ""),
            model_at=lambda path: path in there.get("models", ()),
            cached=lambda cache, identifier, revision: (cache, identifier) in there.get("cached", ()),
            unreachable=self._unreachable,
            has_python=lambda python: python in there.get("pythons", ()),
            running=there.get("running", ()),
            cards=lambda: there.get("cards", ()),
            in_cache=lambda cache, identifier, file: (cache, identifier, file) in there.get("files", ()),
            hub_status=lambda url: there.get("hub", {}).get(url, 0),
        )

    def _unreachable(self, url: str) -> str:
        self.asked.append(url)
        return self.down.get(url, "")


OFFLINE = {
    "https://hub.test": "hub.test: no such name",
    "https://source.test/a.tar.gz": "source.test: no such name",
    "https://python.test": "python.test: no such name",
}


def test_connected_machine_gets_speaches() -> None:
    plan = _stt_plan.make_plan(request(), Machine().facts)
    assert plan["engine"] == plan["unit"] == "speaches"
    assert plan["release"]["path"] == "/opt/speaches/releases/1.0"
    assert plan["release"]["url"] == "https://source.test/a.tar.gz"
    assert plan["model"]["id"] == "deepdml/faster-whisper-large-v3-turbo-ct2"
    assert plan["install"]
    assert plan["skipped"] == []
    environment = plan["environment"]
    assert environment["WHISPER__COMPUTE_TYPE"] == "int8"
    assert environment["WHISPER__INFERENCE_DEVICE"] == "cpu"
    assert environment["STT_MODEL_TTL"] == "-1"
    assert environment["ENABLE_UI"] == "false"
    assert "CUDAExecutionProvider" in environment["UNSTABLE_ORT_OPTS__EXCLUDE_PROVIDERS"]
    assert environment["HF_HOME"] == "/var/lib/speaches/hf"
    assert plan["working_directory"] == plan["release"]["path"]
    assert plan["ready"].endswith(" --load deepdml/faster-whisper-large-v3-turbo-ct2 http://127.0.0.1:8000")
    # Settings that do nothing, or harm, are left out.
    assert not {"WHISPER__MODEL", "PRELOAD_MODELS", "API_KEY", "LD_LIBRARY_PATH"} & set(environment)


def test_unreachable_source_gives_the_other_engine_and_says_so() -> None:
    machine = Machine(down={"https://source.test/a.tar.gz": "source.test: no such name"})
    plan = _stt_plan.make_plan(request(), machine.facts)
    assert plan["engine"] == "builtin"
    assert plan["unit"] == "voicegate"
    assert plan["skipped"] == [
        {
            "what": "speaches",
            "why": "its source cannot be reached (source.test: no such name); "
            "the engine builtin is used instead",
        }
    ]
    assert plan["model"]["revision"] == _stt.MODELS["large-v3-turbo"].revision


def test_no_network_at_all_gives_the_fallback_model() -> None:
    machine = Machine(down=OFFLINE)
    plan = _stt_plan.make_plan(
        request(fallback_path="/demo/whisper-demo/", fallback_digest="d" * 64), machine.facts
    )
    assert plan["engine"] == "builtin"
    assert plan["model"] == {
        "name": "whisper-demo",
        "id": "whisper-demo",
        "src": "/demo/whisper-demo/",
        "digest": "d" * 64,
        "dest": f"/opt/voicegate/models/{'d' * 12}/whisper-demo",
        "argument": f"/opt/voicegate/models/{'d' * 12}/whisper-demo",
    }
    assert plan["environment"]["VOICEGATE_MODEL"] == plan["model"]["dest"]
    assert [item["what"] for item in plan["skipped"]] == ["speaches", "model large-v3-turbo"]
    assert plan["provide"] == [plan["model"]]


def test_no_network_and_no_fallback_model_is_refused() -> None:
    with pytest.raises(_stt.SttError, match="stt_server_fallback_model"):
        _stt_plan.make_plan(request(engine="builtin"), Machine(down=OFFLINE).facts)


def test_no_fallback_engine_means_to_fail() -> None:
    with pytest.raises(_stt.SttError, match="stt_server_engine_fallback"):
        _stt_plan.make_plan(request(engine_fallback=""), Machine(down=OFFLINE).facts)


def test_nothing_to_do_asks_no_address() -> None:
    first = _stt_plan.make_plan(request(), Machine().facts)
    release = first["release"]["path"]
    machine = Machine(
        down=OFFLINE,
        digests={release: PINNED},
        stamps={release: first["stamp"]},
        cached={("/var/lib/speaches/hf/hub", first["model"]["id"])},
        running=["speaches"],
    )
    plan = _stt_plan.make_plan(request(), machine.facts)
    assert machine.asked == []
    assert (plan["engine"], plan["install"], plan["provide"], plan["stop"]) == (
        "speaches",
        False,
        [],
        [],
    )


def test_missing_python_312_counts_as_a_source() -> None:
    machine = Machine(down={"https://python.test": "python.test: refused"})
    plan = _stt_plan.make_plan(request(), machine.facts)
    assert plan["engine"] == "builtin"
    assert "Python 3.12" in plan["skipped"][0]["why"]
    assert _stt_plan.make_plan(
        request(), Machine(down={"https://python.test": "no"}, pythons=["3.12"]).facts
    )["engine"] == ("speaches")


def test_a_python_that_is_not_there_is_refused() -> None:
    with pytest.raises(_stt.SttError, match="/opt/py/bin/python3"):
        _stt_plan.make_plan(request(python="/opt/py/bin/python3"), Machine().facts)


def test_speaches_with_a_model_it_cannot_get_falls_back() -> None:
    machine = Machine(down={"https://hub.test": "hub.test: refused"}, pythons=["3.12"])
    plan = _stt_plan.make_plan(
        request(fallback_path="/demo/whisper-demo", fallback_digest="d" * 64), machine.facts
    )
    assert plan["engine"] == "builtin"
    assert "model hub" in plan["skipped"][0]["why"]


def test_local_source_of_speaches_needs_no_address() -> None:
    machine = Machine(down=OFFLINE, pythons=["/opt/py/bin/python3"])
    plan = _stt_plan.make_plan(
        request(
            model="/srv/demo",
            model_digest="m" * 64,
            speaches_source="/src/speaches",
            speaches_source_digest="s" * 64,
            python="/opt/py/bin/python3",
        ),
        machine.facts,
    )
    assert machine.asked == []
    assert plan["release"]["path"] == "/opt/speaches/releases/1.0-ssssssss"
    assert plan["model"]["id"] == f"local/demo-{'m' * 12}"
    assert plan["model"]["dest"] == f"/var/lib/speaches/hf/hub/models--local--demo-{'m' * 12}"
    assert plan["aliases"]["whisper-1"] == plan["model"]["id"]


def test_folder_on_the_machine() -> None:
    there = request(engine="builtin", model="/srv/there")
    plan = _stt_plan.make_plan(there, Machine(models=["/srv/there"]).facts)
    assert plan["environment"]["VOICEGATE_MODEL"] == "/srv/there"
    assert plan["provide"] == []
    with pytest.raises(_stt.SttError, match="neither on the controller nor on this machine"):
        _stt_plan.make_plan(there, Machine().facts)


def test_gpu() -> None:
    machine = Machine(nodes=["nvidia0", "nvidiactl", "nvidia-uvm"])
    plan = _stt_plan.make_plan(request(engine="builtin", cards=[{"capability": "8.6"}]), machine.facts)
    assert (plan["device"], plan["compute_type"], plan["cuda"]) == ("cuda", "float16", True)
    assert plan["notes"] == []
    assert plan["environment"]["LD_LIBRARY_PATH"].startswith(
        "/opt/stt-cuda/lib/python3.11/site-packages/nvidia/cublas/lib:"
    )
    assert "cudnn/lib" in plan["environment"]["LD_LIBRARY_PATH"]


def test_change_of_engine_stops_the_other_unit() -> None:
    plan = _stt_plan.make_plan(request(engine="builtin"), Machine(running=["speaches", "voicegate"]).facts)
    assert plan["stop"] == ["speaches"]


def test_disabled_stops_everything() -> None:
    plan = _stt_plan.make_plan(
        request(engine="builtin", enabled=False), Machine(running=["speaches", "voicegate"]).facts
    )
    assert plan["stop"] == ["speaches", "voicegate"]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "medium"},
        {"quantization": "float32"},
        {"port": 8001},
        {"language": "de"},
        {"ttl": 60},
        {"gateway_digest": "h" * 64},
        {"live_model": "tiny"},
    ],
)
def test_every_setting_changes_the_unit_or_its_environment(change: dict[str, Any]) -> None:
    before = _stt_plan.make_plan(request(engine="builtin"), Machine().facts)
    after = _stt_plan.make_plan(request(engine="builtin", **change), Machine().facts)
    assert (before["environment"], before["exec_start"]) != (after["environment"], after["exec_start"])


def test_details_of_speaches_with_a_key_are_not_asked_for() -> None:
    assert _stt_plan.make_plan(request(), Machine().facts)["details_url"] == "http://127.0.0.1:8000/api/ps"
    assert _stt_plan.make_plan(request(has_key=True), Machine().facts)["details_url"] == ""


def test_summary_tells_what_the_engine_says() -> None:
    plan = _stt_plan.make_plan(request(engine="builtin"), Machine().facts)
    health = {"json": {"model": "large-v3-turbo", "device": "cpu", "compute_type": "float32"}}
    summary = _stt_plan.summarize(plan, True, "10.1.2.3", health)
    assert summary["url"] == "http://10.1.2.3:8000/v1"
    assert summary["quantization"] == "float32"
    assert "int8 was asked of the engine, which computes as float32" in summary["notes"]
    assert any("int8" in note and "float16" in note for note in summary["notes"])
    # In check mode nothing was asked.
    assert _stt_plan.summarize(plan, True, "", {"skipped": True})["quantization"] == "int8"
    assert _stt_plan.summarize(plan, False, "10.1.2.3", {})["url"] == ""


GPU = ("nvidia0", "nvidiactl", "nvidia-uvm")
VERSIONS = {"speaches": "4.5.0", "builtin": "4.8.5"}


def on_card(capability: str, quantization: str, **changes: Any) -> dict[str, Any]:
    asked = request(quantization=quantization, ctranslate2=VERSIONS, **{"engine": "builtin", **changes})
    cards = [{"name": "Card", "capability": capability}]
    return _stt_plan.make_plan(asked, Machine(nodes=GPU, cards=cards, pythons=["3.12"]).facts)


@pytest.mark.parametrize(
    ("capability", "asked", "device", "compute_type", "noted"),
    [
        ("8.6", "auto", "cuda", "float16", False),
        ("7.5", "int8_float16", "cuda", "int8_float16", False),
        ("6.1", "auto", "cuda", "int8", False),
        ("6.1", "float16", "cuda", "int8", True),
        ("5.2", "auto", "cpu", "int8", True),
        ("", "auto", "cuda", "float16", True),
        ("", "bfloat16", "cuda", "bfloat16", True),
    ],
)
def test_the_card_decides_the_compute_type(
    capability: str, asked: str, device: str, compute_type: str, noted: bool
) -> None:
    plan = on_card(capability, asked)
    assert (plan["device"], plan["compute_type"], bool(plan["notes"])) == (device, compute_type, noted)
    assert plan["environment"]["VOICEGATE_COMPUTE_TYPE"] == compute_type
    assert plan["environment"]["VOICEGATE_DEVICE"] == device


def test_what_a_card_cannot_compute_is_refused() -> None:
    with pytest.raises(_stt.SttError, match=r"bfloat16.*Card \(Turing.*stt_server_quantization: float16"):
        on_card("7.5", "bfloat16")
    with pytest.raises(_stt.SttError, match=r"stt_server_device: cpu"):
        on_card("5.2", "auto", device="cuda")


def test_int8_on_blackwell_depends_on_the_engine() -> None:
    with pytest.raises(_stt.SttError, match=r"engine speaches brings CTranslate2 4\.5\.0"):
        on_card("12.0", "int8", engine="speaches")
    assert on_card("12.0", "int8", engine="builtin")["compute_type"] == "int8"
    assert on_card("12.0", "auto", engine="speaches")["compute_type"] == "float16"


def test_what_apply_found_counts_before_the_driver() -> None:
    machine = Machine(nodes=GPU, cards=[{"capability": "6.1"}])
    asked = request(engine="builtin", quantization="auto", cards=[{"capability": "8.6"}])
    assert _stt_plan.make_plan(asked, machine.facts)["compute_type"] == "float16"


def test_auto_on_a_cpu() -> None:
    plan = _stt_plan.make_plan(request(engine="builtin", quantization="auto"), Machine().facts)
    assert (plan["device"], plan["compute_type"], plan["notes"]) == ("cpu", "int8", [])


def test_what_the_plan_of_the_card_says_reaches_voicegate_on_a_card() -> None:
    turns = {"vram_policy": "yield", "vram_need_mib": 2500, "vram_kept_mib": 477, "ollama_pinned": ""}
    asked = request(engine="builtin", turns=turns, cards=[{"capability": "8.6"}])
    card = Machine(nodes=GPU)
    environment = _stt_plan.make_plan(asked, card.facts)["environment"]
    assert environment["VOICEGATE_VRAM_POLICY"] == "yield"
    assert environment["VOICEGATE_VRAM_NEED_MIB"] == "2500"
    assert "VOICEGATE_OLLAMA_PINNED" not in environment
    assert "VOICEGATE_VRAM_KEPT_MIB" not in environment
    environment = _stt_plan.make_plan(asked, Machine().facts)["environment"]
    assert not any("VRAM" in name for name in environment)


def live_settings(plan: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in plan["environment"].items() if "LIVE" in name}


def test_the_live_model_comes_as_the_main_one_does() -> None:
    asked = request(engine="builtin", live_model="tiny")
    plan = _stt_plan.make_plan(asked, Machine().facts)
    tiny = _stt.MODELS["tiny"]
    assert live_settings(plan) == {
        "VOICEGATE_LIVE_MODEL": tiny.repository,
        "VOICEGATE_LIVE_REVISION": tiny.revision,
    }
    assert plan["provide"] == [plan["model"], plan["live_model"]]
    assert plan["skipped"] == []
    cached = {("/var/lib/voicegate/hf/hub", _stt.MODELS["large-v3-turbo"].repository)}
    assert _stt_plan.make_plan(asked, Machine(cached=cached).facts)["provide"] == [plan["live_model"]]


def test_a_live_model_from_the_controller_or_the_machine() -> None:
    asked = request(engine="builtin", live_model="/srv/small")
    copied = _stt_plan.make_plan({**asked, "live_model_digest": "m" * 64}, Machine().facts)
    path = f"/opt/voicegate/models/{'m' * 12}/small"
    assert live_settings(copied) == {"VOICEGATE_LIVE_MODEL": path}
    assert copied["provide"][1]["src"] == "/srv/small"
    there = _stt_plan.make_plan(asked, Machine(models=["/srv/small"]).facts)
    assert live_settings(there) == {"VOICEGATE_LIVE_MODEL": "/srv/small"}
    assert there["provide"] == [there["model"]]
    with pytest.raises(_stt.SttError, match="stt_server_live_model: there is no folder"):
        _stt_plan.make_plan(asked, Machine().facts)


def test_without_the_hub_there_is_no_live_model_and_the_summary_says_so() -> None:
    cached = {("/var/lib/voicegate/hf/hub", _stt.MODELS["large-v3-turbo"].repository)}
    asked = request(engine="builtin", live_model="tiny")
    plan = _stt_plan.make_plan(asked, Machine(down=OFFLINE, cached=cached).facts)
    assert live_settings(plan) == {}
    assert plan["provide"] == []
    skipped = {
        "what": "live model tiny",
        "why": "the model hub cannot be reached (hub.test: no such name); live speech uses the main model",
    }
    assert _stt_plan.summarize(plan, True, "", {})["skipped"] == [skipped]


def test_the_same_model_is_loaded_once() -> None:
    plan = _stt_plan.make_plan(request(engine="builtin", model="tiny", live_model="tiny"), Machine().facts)
    assert live_settings(plan) == {}
    assert plan["provide"] == [plan["model"]]
    assert any("stt_server_live_model" in note for note in plan["notes"])


def test_another_engine_is_refused_a_live_model() -> None:
    wrong = {"stt_server_engine": "speaches", "stt_server_live_model": "tiny"}
    (problem,) = _stt.problems(wrong)
    assert problem.startswith("stt_server_live_model: only the engine builtin")
    assert "Set stt_server_engine: builtin" in problem
    assert _stt.problems({**wrong, "stt_server_engine": "builtin"}) == []
    (problem,) = _stt.problems({"stt_server_engine": "builtin", "stt_server_live_model": "tiyn"})
    assert problem.startswith("stt_server_live_model: 'tiyn'")
    assert "'tiny'" in problem


GATEWAY = {"engine_port": 8001, "wyoming_port": 0, "settings": {}}


def gateway(**changes: Any) -> dict[str, Any]:
    return {**GATEWAY, **changes}


def test_the_gateway_takes_the_address_and_speaches_the_loopback() -> None:
    asked = request(gateway=gateway(settings={"queue_limit": 32}), language="de", port=9000)
    plan = _stt_plan.make_plan(asked, Machine(running=["speaches", "voicegate"]).facts)
    assert (plan["unit"], plan["url"], plan["run"]) == ("speaches", "http://127.0.0.1:8001", True)
    assert plan["environment"]["UVICORN_HOST"] == "127.0.0.1"
    front = plan["gateway"]
    assert (front["unit"], front["url"]) == ("voicegate", "http://127.0.0.1:9000")
    assert front["install"]
    expected = {
        "VOICEGATE_HOST": "0.0.0.0",
        "VOICEGATE_PORT": "9000",
        "VOICEGATE_UPSTREAM": "http://127.0.0.1:8001",
        "VOICEGATE_UPSTREAM_MODEL": plan["model"]["id"],
        "VOICEGATE_LANGUAGE": "de",
        "VOICEGATE_QUEUE_LIMIT": "32",
    }
    assert expected.items() <= front["environment"].items()
    assert "VOICEGATE_WYOMING_PORT" not in front["environment"]
    assert plan["stop"] == []
    installed = Machine(stamps={front["release"]["path"]: front["stamp"]})
    assert not _stt_plan.make_plan(asked, installed.facts)["gateway"]["install"]


TURNS = {
    "vram_policy": "yield", "vram_need_mib": 3739, "vram_kept_mib": 477, "vram_fallback": "cpu",
    "ollama_url": "http://127.0.0.1:11434",
}  # fmt: skip


def test_the_gateway_decides_when_speaches_is_on_the_card() -> None:
    card = Machine(nodes=GPU).facts
    asked = request(gateway=gateway(), turns=TURNS, ttl=300, cards=[{"capability": "8.6"}])
    plan = _stt_plan.make_plan(asked, card)
    assert "--load" not in plan["ready"]
    assert plan["model_state"] == "present"
    assert plan["environment"]["STT_MODEL_TTL"] == "-1"
    front = plan["gateway"]
    assert front["gpu"]
    expected = {
        "VOICEGATE_TTL": "300",
        "VOICEGATE_VRAM_POLICY": "yield",
        "VOICEGATE_VRAM_NEED_MIB": "3739",
        "VOICEGATE_VRAM_KEPT_MIB": "477",
        "VOICEGATE_OLLAMA_URL": "http://127.0.0.1:11434",
    }
    assert expected.items() <= front["environment"].items()
    assert "VOICEGATE_VRAM_FALLBACK" not in front["environment"]


@pytest.mark.parametrize(
    "changes",
    [
        {"turns": {**TURNS, "vram_policy": "resident"}},
        {"turns": TURNS, "gateway": {}},
        {"turns": TURNS, "device": "cpu"},
        {},
    ],
)
def test_speaches_loads_by_itself_where_nobody_takes_turns(changes: dict[str, Any]) -> None:
    asked = request(**{"gateway": gateway(), "ttl": 300, "cards": [{"capability": "8.6"}], **changes})
    plan = _stt_plan.make_plan(asked, Machine(nodes=GPU).facts)
    assert " --load " in plan["ready"]
    assert plan["model_state"] == "loaded"
    assert plan["environment"]["STT_MODEL_TTL"] == "300"
    if "gateway" in plan:
        assert not plan["gateway"]["gpu"]
        assert not any("VRAM" in name or "TTL" in name for name in plan["gateway"]["environment"])


def test_the_builtin_engine_is_in_the_gateway() -> None:
    asked = request(engine="builtin", gateway=gateway(wyoming_port=10300))
    plan = _stt_plan.make_plan(asked, Machine(running=["speaches", "voicegate"]).facts)
    assert not plan["run"]
    assert plan["stop"] == ["speaches"]
    front = plan["gateway"]
    assert front["unit"] == "voicegate"
    assert front["environment"] == {
        **plan["environment"],
        "VOICEGATE_WYOMING_PORT": "10300",
        "VOICEGATE_DATA_DIR": "/var/lib/voicegate/jobs",
    }
    assert front["url"] == "http://127.0.0.1:8000"


def test_the_live_model_of_another_engine_does_not_reach_the_builtin_one() -> None:
    front = gateway(settings={"live_model": "somebody/small", "queue_limit": 3})
    plan = _stt_plan.make_plan(request(gateway=front), Machine().facts)
    assert plan["gateway"]["environment"]["VOICEGATE_LIVE_MODEL"] == "somebody/small"
    fallen = _stt_plan.make_plan(
        request(gateway=front), Machine(down={"https://source.test/a.tar.gz": "down"}).facts
    )
    assert fallen["engine"] == "builtin"
    assert "VOICEGATE_LIVE_MODEL" not in fallen["gateway"]["environment"]
    assert fallen["gateway"]["environment"]["VOICEGATE_QUEUE_LIMIT"] == "3"
    assert any("live_model is not for the engine builtin" in note for note in fallen["notes"])
    own = _stt_plan.make_plan(
        request(engine="builtin", live_model="tiny", gateway=gateway()), Machine().facts
    )
    live = own["gateway"]["environment"]["VOICEGATE_LIVE_MODEL"]
    assert live == _stt.MODELS["tiny"].repository


def test_without_the_gateway_its_unit_is_stopped() -> None:
    plan = _stt_plan.make_plan(request(), Machine(running=["speaches", "voicegate"]).facts)
    assert plan["stop"] == ["voicegate"]
    assert plan["run"]
    assert "gateway" not in plan


def test_disabled_stops_the_gateway_too() -> None:
    asked = request(gateway=gateway(), enabled=False)
    plan = _stt_plan.make_plan(asked, Machine(running=["speaches", "voicegate"]).facts)
    assert plan["stop"] == ["speaches", "voicegate"]
    assert not plan["run"]


def test_the_summary_has_the_gateways_address() -> None:
    plan = _stt_plan.make_plan(request(gateway=gateway()), Machine().facts)
    assert _stt_plan.summarize(plan, True, "10.1.2.3", {})["url"] == "http://10.1.2.3:8000/v1"


SPEAKERS = gateway(diarization=True)
HUB = {
    f"https://hub.test/{model}/resolve/main/{file}": 302
    for model, file in _stt_plan.DIARIZATION_MODELS.items()
}
GATED = "https://hub.test/fedirz/segmentation_community_1/resolve/main/model.onnx"


def test_speaches_gets_what_it_needs_to_tell_speakers_apart() -> None:
    plan = _stt_plan.make_plan(request(gateway=SPEAKERS), Machine(hub=HUB).facts)
    assert plan["skipped"] == []
    front = plan["gateway"]
    assert front["environment"]["VOICEGATE_DIARIZATION"] == "upstream"
    assert front["diarization_models"] == list(_stt_plan.DIARIZATION_MODELS)


def test_models_that_are_there_need_no_hub() -> None:
    cache = _stt_plan.hub_cache("speaches")
    asked = request(gateway=SPEAKERS)
    speech = (cache, asked["model"]["listed"])
    there = [(cache, model, file) for model, file in _stt_plan.DIARIZATION_MODELS.items()]
    machine = Machine(files=there, cached=[speech], down={"https://hub.test": "no such name"})
    plan = _stt_plan.make_plan(asked, machine.facts)
    assert plan["skipped"] == []
    assert plan["gateway"]["environment"]["VOICEGATE_DIARIZATION"] == "upstream"
    assert "https://hub.test" not in machine.asked


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_is_told_with_the_place_to_get_it(status: int) -> None:
    for has_token, words in ((False, "voice_gateway_hf_token is not set"), (True, "does not open it")):
        asked = request(gateway=gateway(diarization=True, has_hf_token=has_token))
        with pytest.raises(_stt.SttError, match=words) as caught:
            _stt_plan.make_plan(asked, Machine(hub={**HUB, GATED: status}).facts)
        assert "https://hub.test/fedirz/segmentation_community_1" in str(caught.value)
        assert "https://hub.test/settings/tokens" in str(caught.value)


def test_a_model_that_the_hub_does_not_have() -> None:
    with pytest.raises(_stt.SttError, match="has no fedirz/segmentation_community_1"):
        _stt_plan.make_plan(request(gateway=SPEAKERS), Machine(hub={**HUB, GATED: 404}).facts)


@pytest.mark.parametrize(("status", "why"), [(0, "no answer"), (503, "HTTP 503")])
def test_speakers_are_skipped_where_the_hub_does_not_answer(status: int, why: str) -> None:
    plan = _stt_plan.make_plan(request(gateway=SPEAKERS), Machine(hub={**HUB, GATED: status}).facts)
    [skipped] = plan["skipped"]
    assert skipped["what"] == "telling speakers apart"
    assert (
        f"fedirz/segmentation_community_1 is not on this machine and the model hub cannot be reached ({why})"
        in (skipped["why"])
    )
    assert "VOICEGATE_DIARIZATION" not in plan["gateway"]["environment"]
    assert "diarization_models" not in plan["gateway"]


def test_the_engine_that_was_fallen_back_to_tells_no_speakers_apart() -> None:
    machine = Machine(down={"https://source.test/a.tar.gz": "no such name"}, hub=HUB)
    plan = _stt_plan.make_plan(request(gateway=SPEAKERS), machine.facts)
    assert plan["engine"] == "builtin"
    assert [item["what"] for item in plan["skipped"]] == ["speaches", "telling speakers apart"]
    assert "VOICEGATE_DIARIZATION" not in plan["gateway"]["environment"]


class Hub(http.server.BaseHTTPRequestHandler):
    """Redirects whoever has the token, as the hub does, to where nobody is."""

    def do_HEAD(self) -> None:
        self.send_response(302 if self.headers["authorization"] == "Bearer hf_good" else 401)
        self.send_header("Location", "http://127.0.0.1:9/")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


def test_the_hub_is_asked_with_the_token() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/a/b/resolve/main/c"
    try:
        assert [stt_preflight.Probe(2, token).status(url) for token in ("hf_good", "", "x")] == [
            302,
            401,
            401,
        ]
    finally:
        server.shutdown()
        server.server_close()
    assert stt_preflight.Probe(2).status(url) == 0


def test_files_of_a_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "model.onnx").touch()
    assert stt_preflight.in_cache(str(tmp_path), "a/b", "model.onnx")
    assert not stt_preflight.in_cache(str(tmp_path), "a/b", "model.bin")
    assert not stt_preflight.cached(str(tmp_path), "a/b", "")

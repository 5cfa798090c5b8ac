"""
Ollama and speech-to-text on one card: one plan for both, whichever of them a run is for, and their order
after a reboot.

The stack of test_stack.py, with real units and servers. There is no card: host vars say how large it is, and
that Ollama may use one, so that the plan is made and written; the models of the plan are the demo model under
their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from ansible_collections.sottovoce.stack.plugins.filter import vram
from ansible_collections.sottovoce.stack.plugins.module_utils import _stt
from e2e import Run, Stack, health, incus, unit, wait_for

HOST = "e2e-speech"
PLAN = {
    "gpu_vram_mib": 12288,
    "ollama_gpu": "enabled",
    "stt_server_engine": "builtin",
    "stt_server_port": 8001,
}
INVOCATION = "InvocationID"


def planned(values: dict[str, Any]) -> dict[str, Any]:
    """What the plan of the machine says."""
    roles = ["base_system", "ollama_server", "stt_server"]
    plans = vram.vram_plans([HOST], {HOST: {"instance_gpu": True, "instance_roles": roles, **values}})
    settings: dict[str, Any] = plans[HOST]["settings"]
    return settings


class Shared:
    """The machine, with what is on its card."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def provision(self, values: dict[str, Any], tags: str) -> Run:
        """Not the whole of apply: that would ask Incus, which knows of no card."""
        self.stack.set_host_vars(HOST, yaml.safe_dump({**PLAN, **values}))
        return self.stack.collection.play("provision", self.stack.inventory, "--tags", tags)

    @staticmethod
    def fit_target() -> int:
        lines = incus("exec", HOST, "--", "cat", "/etc/sottovoce/ollama.env").splitlines()
        found = [
            line.partition("=")[2].strip('"') for line in lines if line.startswith("LLAMA_ARG_FIT_TARGET=")
        ]
        return int(found[0]) if found else 0


@pytest.fixture(scope="module")
def shared(stack: Stack) -> Iterator[Shared]:
    # The names that the plan chooses from, as files on the machine: nothing is downloaded here.
    for name in ("large-v3", "medium", "small"):
        model = _stt.MODELS[name]
        folder = f"/var/lib/voicegate/hf/hub/{_stt.hub_folder(model.repository)}/snapshots/{model.revision}"
        script = f"mkdir -p {folder} && cp /opt/voicegate/models/*/whisper-demo/* {folder}"
        incus("exec", HOST, "--", "sh", "-c", f"{script} && chown -R voicegate: /var/lib/voicegate/hf")
    file = stack.inventory / "host_vars" / f"{HOST}.yml"
    before = file.read_text(encoding="utf-8") if file.exists() else "stt_server_port: 8001\n"
    found = Shared(stack)
    found.provision({"stt_server_model": "medium", "stt_server_quantization": "int8"}, "ollama,stt")
    if not incus("exec", HOST, "--", "sh", "-c", "readlink /opt/ollama/current || true").strip():
        pytest.skip("Ollama could not be had on this machine (no release, no Go toolchain)")
    yield found
    stack.set_host_vars(HOST, before)
    stack.apply("--tags", "ollama,stt")


def test_a_larger_speech_model_reaches_ollama_in_the_same_run(shared: Shared) -> None:
    small = {"stt_server_model": "medium", "stt_server_quantization": "int8"}
    large = {"stt_server_model": "large-v3", "stt_server_quantization": "float32"}
    assert shared.fit_target() == planned({**PLAN, **small})["fit_target_mib"]
    ollama, others = unit(HOST, "ollama", INVOCATION), unit(HOST, "systemd-networkd", INVOCATION)

    shared.provision(large, "stt")

    assert shared.fit_target() == planned({**PLAN, **large})["fit_target_mib"]
    assert health(HOST, 8001, "/health")["model"] == "large-v3"
    # Its environment is read at its start only.
    now = unit(HOST, "ollama", INVOCATION)
    assert now != ollama
    (pid,) = unit(HOST, "ollama", "MainPID")
    running = incus("exec", HOST, "--", "sh", "-c", f"tr '\\0' '\\n' </proc/{pid}/environ")
    assert f"LLAMA_ARG_FIT_TARGET={shared.fit_target()}" in running.splitlines()
    assert unit(HOST, "systemd-networkd", INVOCATION) == others

    assert shared.provision(large, "stt").changed == 0
    assert unit(HOST, "ollama", INVOCATION) == now


def test_what_the_plan_does_not_hang_on_leaves_ollama_alone(shared: Shared) -> None:
    large = {"stt_server_model": "large-v3", "stt_server_quantization": "float32"}
    ollama, speech = unit(HOST, "ollama", INVOCATION), unit(HOST, "voicegate", INVOCATION)
    shared.provision({**large, "stt_server_language": "en"}, "stt")
    assert unit(HOST, "voicegate", INVOCATION) != speech
    assert unit(HOST, "ollama", INVOCATION) == ollama


def test_a_run_for_speech_neither_updates_ollama_nor_fetches_models(shared: Shared) -> None:
    values = {
        "stt_server_model": "large-v3", "stt_server_quantization": "float32", "stt_server_language": "en",
        "ollama_version": "0.99.0",
    }  # fmt: skip
    ollama = unit(HOST, "ollama", INVOCATION)
    run = shared.provision(values, "stt")
    assert "Fetch the models" not in run.output
    assert "Install the release" not in run.output
    assert unit(HOST, "ollama", INVOCATION) == ollama


def test_another_language_model_changes_what_auto_means_for_speech(shared: Shared) -> None:
    auto = {"stt_server_model": "auto", "stt_server_quantization": "auto"}
    shared.provision(auto, "stt")
    first = planned({**PLAN, **auto})
    assert health(HOST, 8001, "/health")["model"] == first["stt_server_model"] == "large-v3"

    beside = {**auto, "ollama_default_model": "mistral-nemo"}
    shared.provision(beside, "ollama")

    then = planned({**PLAN, **beside})
    assert health(HOST, 8001, "/health")["model"] == then["stt_server_model"] == "small"
    assert shared.fit_target() == then["fit_target_mib"]
    speech = unit(HOST, "voicegate", INVOCATION)
    shared.provision(beside, "ollama")
    assert unit(HOST, "voicegate", INVOCATION) == speech


def started(name: str) -> tuple[int, int]:
    """When the process of a unit started, and when the unit was active, in microseconds since boot."""
    begin, active = unit(HOST, name, "ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    return int(begin), int(active)


def reboot() -> None:
    incus("restart", HOST, timeout=120)
    wait_for(90, lambda: unit(HOST, "ollama", "ActiveState") == ["active"])


def test_after_a_reboot_speech_is_loaded_before_ollama_starts(shared: Shared) -> None:
    reboot()
    wait_for(90, lambda: health(HOST, 11434, "/api/version")["version"])
    assert health(HOST, 8001, "/health")["load_state"] == "loaded"
    begin, loaded = started("voicegate")
    ollama, _active = started("ollama")
    assert begin < loaded <= ollama
    journal = incus("exec", HOST, "--", "journalctl", "-b", "--unit=voicegate", "--output=cat", "--no-pager")
    assert "speech-to-text is ready after " in journal
    print(f"loaded after {(loaded - begin) / 1e6:.2f} s, Ollama {(ollama - loaded) / 1e6:.2f} s later")


@pytest.mark.parametrize(("ill", "sound"), [("voicegate", "ollama"), ("ollama", "voicegate")])
def test_one_that_does_not_start_does_not_take_the_other_down(shared: Shared, ill: str, sound: str) -> None:
    folder = f"/etc/systemd/system/{ill}.service.d"
    break_it = (
        f"mkdir -p {folder} && printf '[Service]\\nExecStart=\\nExecStart=/bin/false\\n' >{folder}/ill.conf"
    )
    incus("exec", HOST, "--", "sh", "-c", break_it)
    try:
        incus("restart", HOST, timeout=120)
        wait_for(90, lambda: unit(HOST, sound, "ActiveState") == ["active"])
        wait_for(90, lambda: unit(HOST, ill, "ActiveState") == ["failed"])
        assert unit(HOST, sound, "ActiveState") == ["active"]
    finally:
        incus(
            "exec",
            HOST,
            "--",
            "sh",
            "-c",
            f"rm -r {folder}; systemctl daemon-reload; systemctl restart {ill}",
        )

"""
The whole stack as a user meets it, brought up once from the installed tarball.

The tests go through one life of it, in this order.
"""

from __future__ import annotations

import json
import re

from e2e import OCTET, ROOT, Stack, health, incus, unit, wait_for

SENTENCE = "What is the temperature in the kitchen?"


def test_the_first_apply_ends_with_the_sentence_heard_through_open_webui(stack: Stack) -> None:
    summary = " ".join(stack.first.output.partition("TASK [Sum up]")[2].split())
    assert re.search(rf"heard through Open WebUI in [0-9.]+ s: {re.escape(SENTENCE)}", summary), summary
    assert f"http://10.{OCTET}.0.2:3000" in summary


def test_the_second_apply_changes_nothing(stack: Stack) -> None:
    again = stack.apply()
    assert again.changed == 0
    assert set(again.recap) == {"localhost", "e2e-speech", "e2e-webui"}


def test_status_shows_machines_services_and_the_model(stack: Stack) -> None:
    output = stack.collection.play("status", stack.inventory).output
    for words in ("e2e-speech", "running", f"10.{OCTET}.0.1", "voicegate", "open-webui", "MiB free"):
        assert words in output


def test_a_new_quantization_with_tags_stt_touches_speech_to_text_alone(stack: Stack) -> None:
    others = {name: unit("e2e-speech", name, "InvocationID") for name in ("ollama", "systemd-networkd")}
    webui = unit("e2e-webui", "open-webui", "InvocationID")
    before = unit("e2e-speech", "voicegate", "InvocationID")
    assert health("e2e-speech", 8000, "/health")["compute_type"] == "int8"

    stack.set_host_vars("e2e-speech", "stt_server_quantization: float32\n")
    changed = stack.apply("--tags", "stt")

    assert health("e2e-speech", 8000, "/health")["compute_type"] == "float32"
    assert unit("e2e-speech", "voicegate", "InvocationID") != before
    assert {name: unit("e2e-speech", name, "InvocationID") for name in others} == others
    assert unit("e2e-webui", "open-webui", "InvocationID") == webui
    assert "heard through the speech-to-text server in " in changed.output
    assert SENTENCE in " ".join(changed.output.split())
    assert stack.apply("--tags", "stt").changed == 0


def test_a_wrong_quantization_is_refused_and_nothing_is_touched(stack: Stack) -> None:
    before = unit("e2e-speech", "voicegate", "InvocationID")
    stack.set_host_vars("e2e-speech", "stt_server_quantization: flot16\n")
    refused = stack.collection.play("apply", stack.inventory, "--tags", "stt", check=False)
    assert refused.code != 0
    text = " ".join(refused.output.split())
    assert "flot16" in text
    assert "float16" in text
    assert unit("e2e-speech", "voicegate", "InvocationID") == before
    stack.set_host_vars("e2e-speech", "stt_server_quantization: float32\n")


def test_a_new_port_of_speech_to_text_reaches_a_running_open_webui(stack: Stack) -> None:
    """Open WebUI copies its settings at the first start; a later change must take effect all the same."""
    webui = unit("e2e-webui", "open-webui", "InvocationID")
    stack.set_host_vars("e2e-speech", "stt_server_quantization: float32\nstt_server_port: 8001\n")
    stack.stt_url = f"http://10.{OCTET}.0.1:8001/v1"
    stack.apply("--tags", "stt,webui")
    assert health("e2e-speech", 8001, "/health")["status"] == "ok"
    verified = stack.collection.play("verify", stack.inventory)
    assert "heard through Open WebUI in " in " ".join(verified.output.split())
    # Not by a restart: people are in the middle of their chats.
    assert unit("e2e-webui", "open-webui", "InvocationID") == webui
    assert stack.apply().changed == 0


def test_the_gateway_stands_at_the_address_of_the_engine(stack: Stack) -> None:
    """With the built-in engine it is the same unit; home automation comes with it."""
    infra = stack.inventory / "infra.yml"
    infra.write_text(
        infra.read_text(encoding="utf-8").replace("stt_server]", "stt_server, voice_gateway]"),
        encoding="utf-8",
    )
    stack.set_host_vars(
        "e2e-speech",
        "stt_server_quantization: float32\nstt_server_port: 8001\nvoice_gateway_engine_port: 8002\n"
        "voice_gateway_wyoming: true\nvoice_gateway_settings: {queue_limit: 5}\n"
        f"stt_server_engine: builtin\nstt_server_live_model: {ROOT / 'demo/whisper-demo-en'}\n",
    )
    stack.apply("--tags", "stt")
    told = health("e2e-speech", 8001, "/health")
    assert (told["status"], told["queue"]["limit"], told["compute_type"]) == ("ok", 5, "float32")
    # With a small model beside it for live speech.
    (invocation,) = unit("e2e-speech", "voicegate", "InvocationID")
    journal = incus("exec", "e2e-speech", "--", "journalctl", f"_SYSTEMD_INVOCATION_ID={invocation}")
    assert re.findall(r"model_loaded .*?model=\S*/(\S+)", journal) == ["whisper-demo", "whisper-demo-en"]
    incus("file", "push", str(ROOT / "demo/clips/D000.wav"), "e2e-speech/root/speech.wav")
    handed_in = ["curl", "-sS", "-F", "audio=@/root/speech.wav", "http://127.0.0.1:8001/jobs"]
    made = incus("exec", "e2e-speech", "--", *handed_in)
    job = f"/jobs/{json.loads(made)['id']}"
    wait_for(30, lambda: health("e2e-speech", 8001, job)["status"] == "done")
    assert health("e2e-speech", 8001, f"{job}/result?format=json")["text"] == "Turn on the heater."
    listening = incus("exec", "e2e-speech", "--", "ss", "-Htln")
    assert ":10300 " in listening
    assert stack.apply().changed == 0
    infra.write_text(infra.read_text(encoding="utf-8").replace(", voice_gateway]", "]"), encoding="utf-8")
    stack.set_host_vars("e2e-speech", "stt_server_quantization: float32\nstt_server_port: 8001\n")
    stack.apply("--tags", "stt")
    assert health("e2e-speech", 8001, "/health")["queue"]["limit"] == 16


def test_everything_comes_back_after_a_restart_of_the_containers(stack: Stack) -> None:
    incus("restart", "e2e-speech", "e2e-webui", timeout=120)
    wait_for(90, lambda: health("e2e-speech", 8001, "/health")["status"] == "ok")
    wait_for(90, lambda: health("e2e-webui", 3000, "/health")["status"])
    verified = stack.collection.play("verify", stack.inventory)
    assert SENTENCE in " ".join(verified.output.split())


def test_a_check_of_everything_changes_nothing_and_foresees_nothing(stack: Stack) -> None:
    run = stack.collection.play("check", stack.inventory, "--check", "--diff")
    assert run.changed == 0

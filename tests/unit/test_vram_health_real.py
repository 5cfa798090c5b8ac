# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""vram_health in a real container with real systemd units; only the card and the models are a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import nvml_standin as standin
import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import Endpoint, IncusClient
from test_incus_connection_real import Lab

pytestmark = pytest.mark.incus
ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30

# Has the card open as CUDA would, in a child too (Ollama's models are children), and answers HTTP.
DAEMON = """
import http.server, json, os, subprocess, sys
port, answers = int(sys.argv[1]), json.loads(sys.argv[2])
card = os.open("/dev/nvidia0", os.O_RDWR)
child = subprocess.Popen(["sleep", "3600"], pass_fds=[card])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(answers.get(self.path, {})).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        # Ollama's way to unload: keep_alive 0.
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        listed = answers["/api/ps"]["models"]
        assert self.path == "/api/generate" and asked["keep_alive"] == 0
        answers["/api/ps"] = {"models": [model for model in listed if model["name"] != asked["model"]]}
        self.do_GET()
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
UNIT = """[Service]
ExecStart=/usr/bin/python3 /opt/daemon.py {port} '{answers}'
[X-Sottovoce]
Health=http://127.0.0.1:{port}/health
Details=http://127.0.0.1:{port}/api/ps
"""
EXPIRES = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
MODELS: dict[str, dict[str, Any]] = {
    "ollama": {
        "models": [{"name": "llama3.1:8b", "size": 6 * GIB, "size_vram": 6 * GIB, "expires_at": EXPIRES}]
    },
    "speaches": {"models": ["Systran/faster-whisper-medium"]},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not standin.has_compiler():
        pytest.skip(standin.NO_COMPILER)
    return standin.build(tmp_path_factory.mktemp("nvml"))


class Machine:
    """A container with two units that use a card, and what vram_health says of it."""

    def __init__(self, lab: Lab, library: Path) -> None:
        self.lab = lab
        device = {"type": "unix-char", "source": "/dev/null", "path": "/dev/nvidia0", "mode": "0666"}
        path = f"/1.0/instances/{lab.name}"
        lab.client.run("PATCH", path, project=lab.project, body={"devices": {"card": device}})
        self.put("/opt/libnvidia-ml.so.1", library.read_bytes())
        self.put("/opt/daemon.py", DAEMON.encode())
        lab.sh("until systemctl is-system-running | grep -Eq 'running|degraded'; do sleep 0.2; done")
        for port, (name, answer) in enumerate(MODELS.items(), 8101):
            text = UNIT.format(port=port, answers=json.dumps({"/api/ps": answer}))
            self.put(f"/etc/systemd/system/{name}.service", text.encode())
        self.start()

    def start(self) -> None:
        self.lab.sh("systemctl daemon-reload; systemctl start ollama speaches")
        for port in (8101, 8102):
            probe = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{port}/', timeout=2)"
            self.lab.sh(
                f'n=0; until python3 -c "{probe}" 2>/dev/null; do n=$((n+1)); [ $n -lt 50 ]; sleep 0.2; done'
            )

    def put(self, path: str, content: bytes) -> None:
        source = self.lab.folder / "file"
        source.write_bytes(content)
        target = f"{self.lab.name}{path}"
        command = ["incus", "file", "push", "--quiet", str(source), target, "--project", self.lab.project]
        subprocess.run(command, check=True, timeout=60)

    def pids(self, unit: str) -> list[int]:
        """The daemon and its child."""
        main = self.lab.sh(f"systemctl show --property=MainPID --value {unit}")
        return [
            int(main),
            *(int(pid) for pid in self.lab.sh(f"cat /proc/{main}/task/{main}/children").split()),
        ]

    def look(self, cards: str, library: str = "/opt/libnvidia-ml.so.1", **options: Any) -> dict[str, Any]:
        self.put("/opt/cards.txt", (standin.DRIVER + cards).encode())
        answer = self.lab.folder / "answer.json"
        answer.unlink(missing_ok=True)
        done = self.lab.play(
            [
                {
                    "name": "Look",
                    "sottovoce.stack.vram_health": options,
                    "environment": {"SOTTOVOCE_NVML": library, "SOTTOVOCE_NVML_STANDIN": "/opt/cards.txt"},
                    "register": "found",
                    "ignore_errors": True,
                },
                {
                    "name": "Keep",
                    "ansible.builtin.copy": {"content": "{{ found | to_json }}", "dest": str(answer)},
                    "delegate_to": "localhost",
                    "connection": "local",
                    "vars": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable},
                },
            ]
        )
        assert done.returncode == 0, done.stdout + done.stderr
        result: dict[str, Any] = json.loads(answer.read_text())
        assert result["changed"] is False
        return result


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Iterator[Machine]:
    endpoint = Endpoint()
    if not os.path.exists(endpoint.path):
        pytest.skip(f"no Incus daemon at {endpoint.path}")
    with IncusClient(endpoint) as client:
        lab = Lab(client, tmp_path_factory.mktemp("vram"))
        try:
            lab.make()
            yield Machine(lab, library)
        finally:
            lab.remove()


def units(result: dict[str, Any]) -> dict[str, tuple[int | None, str]]:
    return {unit["name"]: (unit["used_mib"], unit["source"]) for unit in result["units"]}


def ids(result: dict[str, Any]) -> list[str]:
    return [finding["id"] for finding in result["findings"]]


def test_processes_lead_to_their_units(machine: Machine) -> None:
    ollama, speaches = machine.pids("ollama"), machine.pids("speaches")
    cards = standin.card(
        0, f"process {ollama[0]} 300 compute", f"process {ollama[1]} 5900 compute",
        f"process {speaches[0]} 2700 compute", memory="24564 451 8950",
    )  # fmt: skip
    result = machine.look(
        cards, expected_units=["ollama", "speaches"], plan={"ollama": 6200, "speaches": 2800}
    )
    assert (result["status"], result["findings"]) == ("ok", [])
    assert units(result) == {"ollama": (6200, "processes"), "speaches": (2700, "processes")}
    assert {unit["state"] for unit in result["units"]} == {"active"}
    assert [(m["unit"], m["engine"], m["offload_percent"]) for m in result["models"]] == [
        ("ollama", "ollama", 100),
        ("speaches", "speaches", None),
    ]
    print(f"vram_health took {result['seconds']} s in the container")
    assert result["seconds"] <= 0.5


def test_hidden_processes_are_given_by_difference(machine: Machine) -> None:
    # Process 1 is systemd here and something else where the driver counts.
    cards = standin.card(0, "process 1 4000 compute", memory="24564 451 9000")
    for text in (cards, standin.card(0, "hidden", memory="24564 451 9000")):
        result = machine.look(text)
        assert units(result) == {"ollama": (6144, "difference"), "speaches": (2856, "difference")}
        assert any("by difference" in note for note in result["notes"])


def test_two_cards_mig_and_one_that_is_lost(machine: Machine) -> None:
    pid = machine.pids("ollama")[1]
    cards = (
        standin.card(0, "mig MIG-a 1 9856 16 9800", f"process {pid} 9800 compute 1", memory="81559 600 9800")
        + standin.card(1, "lost nvmlDeviceGetTemperature")
    )  # fmt: skip
    result = machine.look(cards)
    assert ids(result) == ["low-free", "gpu-lost", "high-use"]
    assert units(result)["ollama"] == (9800, "processes")
    assert "MIG-a" in result["findings"][0]["what"]


def test_a_stopped_unit_fails_the_task_only_where_asked(machine: Machine) -> None:
    machine.lab.sh("systemctl stop speaches")
    try:
        cards = standin.card(0, "hidden", memory="24564 451 6144")
        expected = ["ollama", "speaches"]
        quiet = machine.look(cards, expected_units=expected)
        assert (ids(quiet), quiet["failed"], quiet["status"]) == (["unit-missing"], False, "fail")
        assert units(quiet) == {"ollama": (6144, "difference"), "speaches": (0, "none")}
        loud = machine.look(cards, expected_units=expected, fail_on="fail")
        assert loud["failed"]
        assert "speaches should use the card, but is inactive" in loud["msg"]
    finally:
        machine.start()


def test_without_nvml_nvidia_smi_is_asked_and_its_garbage_is_a_finding(machine: Machine) -> None:
    row = "0, GPU-1, 00000000:01:00.0, RTX A5000, 570.86.15, 24564, 9000, 15113, 8.6, 41, 0, 0, 0x0"
    absent = "/opt/absent.so"
    none = machine.look("", library=absent)
    assert (none["status"], none["source"], none["gpus"]) == ("ok", "none", [])
    machine.put("/usr/local/bin/nvidia-smi", f"#!/bin/sh\necho '{row}'\n".encode())
    machine.lab.sh("chmod 755 /usr/local/bin/nvidia-smi")
    try:
        result = machine.look("", library=absent)
        assert (result["source"], result["driver"], result["status"]) == ("nvidia-smi", "570.86.15", "ok")
        assert units(result) == {"ollama": (6144, "difference"), "speaches": (2856, "difference")}
        machine.lab.sh(
            "sed -i 's/^echo .*/echo Segmentation fault/' /usr/local/bin/nvidia-smi; touch /dev/nvidiactl"
        )
        result = machine.look("", library=absent)
        assert ids(result) == ["gpu-unreadable"]
        assert "absent.so" in result["findings"][0]["why"]
        assert "Segmentation" in result["findings"][0]["why"]
    finally:
        machine.lab.sh("rm -f /usr/local/bin/nvidia-smi /dev/nvidiactl")


def test_a_daemon_that_hangs_costs_no_more_than_its_time(machine: Machine) -> None:
    machine.lab.sh("systemctl kill -s STOP ollama")
    try:
        result = machine.look(standin.card(0, "hidden", memory="24564 451 9000"))
    finally:
        machine.lab.sh("systemctl kill -s CONT ollama")
    assert any(note.startswith("ollama: its models are not known") for note in result["notes"])
    assert units(result) == {"ollama": (None, "unknown"), "speaches": (None, "unknown")}
    print(f"vram_health took {result['seconds']} s beside a daemon that hangs")
    assert result["seconds"] <= 0.8


def test_the_kernel_log_of_a_container(machine: Machine) -> None:
    result = machine.look(standin.card(0))
    readable = machine.lab.sh("dmesg >/dev/null 2>&1 && echo yes || echo no") == "yes"
    assert result["xid_readable"] is readable
    assert any("kernel log" in note for note in result["notes"]) is not readable


def test_the_exporter_writes_what_the_module_finds(machine: Machine) -> None:
    pid = machine.pids("ollama")[1]
    cards = standin.card(0, f"process {pid} 6000 compute", memory="24564 451 6010")
    machine.put("/opt/cards.txt", (standin.DRIVER + cards).encode())
    machine.lab.sh("mkdir -p /etc/systemd/system/vram-exporter.service.d")
    settings = "SOTTOVOCE_NVML=/opt/libnvidia-ml.so.1 SOTTOVOCE_NVML_STANDIN=/opt/cards.txt"
    machine.put(
        "/etc/systemd/system/vram-exporter.service.d/standin.conf",
        f"[Service]\nEnvironment={settings}\n".encode(),
    )
    role = {"ansible.builtin.import_role": {"name": "sottovoce.stack.vram_exporter"}}
    plan = {"vram_exporter_plan": {"ollama": 5000}, "vram_exporter_interval": 2}
    command = [*machine.lab.command([role], **plan), "--check"]
    before = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert before.returncode == 0, before.stdout
    assert machine.lab.sh("ls /opt") == "cards.txt\ndaemon.py\nlibnvidia-ml.so.1"
    first, second = machine.lab.play([role], **plan), machine.lab.play([role], **plan)
    assert first.returncode == 0, first.stdout
    assert "changed=0 " in second.stdout, second.stdout
    target = "/var/lib/prometheus/node-exporter/sottovoce_vram.prom"
    machine.lab.sh(f"n=0; until [ -s {target} ]; do n=$((n+1)); [ $n -lt 100 ]; sleep 0.2; done")
    text = machine.lab.sh(f"cat {target}")
    assert f'sottovoce_vram_used_bytes{{gpu="0",unit="ollama"}} {6000 << 20}' in text
    assert 'sottovoce_vram_plan_drift_ratio{unit="ollama"} 0.2' in text
    assert 'sottovoce_vram_offload_ratio{unit="ollama",model="llama3.1:8b"} 1.0' in text
    stopped = machine.lab.play([role], vram_exporter_enabled=False)
    assert stopped.returncode == 0, stopped.stdout
    machine.lab.sh(f"! systemctl is-active --quiet vram-exporter.timer && test ! -e {target}")


def test_an_idle_model_is_unloaded_when_the_card_is_nearly_full(machine: Machine) -> None:
    machine.put("/opt/cards.txt", (standin.DRIVER + standin.card(0, memory="24564 451 24000")).encode())
    machine.lab.sh("systemctl stop ollama; rm -f /var/lib/vram-exporter/state.json")
    machine.start()
    role = {"ansible.builtin.import_role": {"name": "sottovoce.stack.vram_exporter"}}
    on = {"vram_exporter_relieve": True, "vram_exporter_interval": 1}
    journal = f"journalctl --unit=vram-exporter --output=cat --no-pager --since=@{int(time.time())}"
    text = "cat /var/lib/prometheus/node-exporter/sottovoce_vram.prom"
    metric = 'sottovoce_vram_evictions_total{unit="ollama",model="llama3.1:8b",reason="low-free"}'

    def told(words: str) -> None:
        for _try in range(60):
            if words in machine.lab.sh(journal):
                return
            time.sleep(0.5)
        pytest.fail(f"not told: {words}\n{machine.lab.sh(journal)}")

    # Somebody's request is under way, as a connection shows.
    hold = "import socket, time; s = socket.create_connection(('127.0.0.1', 8101)); time.sleep(3600)"
    machine.lab.sh(f'systemd-run --quiet --unit=client python3 -c "{hold}"')
    first, second = machine.lab.play([role], **on), machine.lab.play([role], **on)
    assert first.returncode == 0, first.stdout
    assert "changed=0 " in second.stdout, second.stdout
    told("113 MiB of VRAM are free, less than the reserve of 512; Ollama may be at work (1 connections)")
    shown = machine.lab.sh(text)
    assert f"{metric} 0" in shown
    assert f"sottovoce_vram_reserve_bytes {512 << 20}" in shown

    machine.lab.sh("systemctl stop client")
    told("llama3.1:8b (6144 MiB) is idle and was unloaded: [113] MiB were free, now [113]")
    told("Ollama has no model in VRAM that could be unloaded")
    assert f"{metric} 1" in machine.lab.sh(text)

    # Loaded again, it is kept; what was counted stays.
    kept = machine.lab.play([role], **on, vram_exporter_keep_models=["llama3.1:8b"])
    assert kept.returncode == 0, kept.stdout
    machine.lab.sh("systemctl stop ollama")
    machine.start()
    told("llama3.1:8b is kept: nothing is unloaded")
    off = machine.lab.play([role], vram_exporter_interval=1)
    assert off.returncode == 0, off.stdout
    machine.lab.sh("systemctl start vram-exporter")
    shown = machine.lab.sh(text)
    assert f"{metric} 1" in shown
    assert "reserve_bytes" not in shown
    assert machine.lab.play([role], vram_exporter_enabled=False).returncode == 0


def test_nvidias_own_binding_runs_against_the_stand_in(library: Path, tmp_path: Path) -> None:
    uv = str(Path(sys.executable).parent / "uv")
    target = tmp_path / "packages"
    done = subprocess.run(
        [uv, "pip", "install", "--quiet", "--no-deps", "--target", str(target), "nvidia-ml-py==13.615.71"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"nvidia-ml-py could not be installed: {done.stderr.strip()[-200:]}")
    cards = standin.card(0, "ecc 3 1", "process 100 5000 compute", memory="24564 451 9000") + standin.card(
        1, "mig MIG-a 1 9856 16 4000", "lost nvmlDeviceGetTemperature", memory="81559 600 4000"
    )
    environment = {
        **standin.environment(library, tmp_path, standin.DRIVER + cards),
        "PYTHONPATH": str(target),
        "LD_LIBRARY_PATH": str(library.parent),
    }
    script = """
import pynvml as n
n.nvmlInit()
one, two = (n.nvmlDeviceGetHandleByIndex(i) for i in range(n.nvmlDeviceGetCount()))
memory = n.nvmlDeviceGetMemoryInfo(one, version=n.nvmlMemory_v2)
assert [memory.total >> 20, memory.reserved >> 20, memory.used >> 20] == [24564, 451, 9000], memory
assert n.nvmlDeviceGetPciInfo(one).busId == "00000000:01:00.0", n.nvmlDeviceGetPciInfo(one).busId
assert [(p.pid, p.usedGpuMemory >> 20) for p in n.nvmlDeviceGetComputeRunningProcesses(one)] == [(100, 5000)]
assert n.nvmlDeviceGetCudaComputeCapability(one) == (8, 6)
assert n.nvmlDeviceGetTotalEccErrors(one, 1, 0) == 1
assert n.nvmlDeviceGetCurrentClocksEventReasons(one) == n.nvmlClocksEventReasonGpuIdle
assert n.nvmlSystemGetDriverVersion() == "570.86.15" and n.nvmlSystemGetCudaDriverVersion() == 12080
assert n.nvmlDeviceGetMigMode(two) == [1, 1]
assert n.nvmlDeviceGetUUID(n.nvmlDeviceGetMigDeviceHandleByIndex(two, 0)) == "MIG-a"
assert n.nvmlDeviceGetTemperature(one, n.NVML_TEMPERATURE_GPU) == 41
try:
    n.nvmlDeviceGetTemperature(two, n.NVML_TEMPERATURE_GPU)
except n.NVMLError_GpuIsLost:
    print("as meant")
n.nvmlShutdown()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "as meant", done.stderr

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The connection against a real daemon: INCUS_SOCKET (or INCUS_DIR) says which.

Everything is in a project of its own that is removed at the end. The instance is made from the
alias in SOTTOVOCE_TEST_IMAGE, else from any local container image with Python.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    Endpoint,
    IncusClient,
    IncusError,
    IncusForbidden,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_websocket import run_command

pytestmark = pytest.mark.incus
ROOT = Path(__file__).resolve().parents[2]


class Lab:
    """One instance in a project of its own."""

    def __init__(self, client: IncusClient, folder: Path) -> None:
        self.client = client
        self.folder = folder
        self.project = f"conn-{os.urandom(3).hex()}"
        self.name = "box"

    def make(self) -> None:
        aliases = self.client.get("/1.0/images/aliases", query={"recursion": 1}).metadata or []
        names = [a["name"] for a in aliases if a.get("type", "container") == "container"]
        if not names:
            pytest.skip("the daemon has no container image")
        wanted = os.environ.get("SOTTOVOCE_TEST_IMAGE")
        image = wanted if wanted in names else names[0]
        pools = [pool["name"] for pool in self.client.get("/1.0/storage-pools?recursion=1").metadata]
        if not pools:
            pytest.skip("the daemon has no storage pool")
        pool = "default" if "default" in pools else pools[0]
        config = {"features.images": "false", "features.profiles": "true", "features.networks": "false"}
        self.client.run("POST", "/1.0/projects", body={"name": self.project, "config": config})
        body = {
            "name": self.name,
            "source": {"type": "image", "alias": image},
            "devices": {"root": {"type": "disk", "path": "/", "pool": pool}},
            "start": True,
        }
        self.client.run("POST", "/1.0/instances", project=self.project, body=body)
        if run_command(self.client, self.name, ["python3", "-c", ""], project=self.project).returncode:
            pytest.skip(f"the image {image} has no Python")

    def remove(self) -> None:
        path = f"/1.0/instances/{self.name}"
        error: IncusError | None = None
        for step in (
            lambda: self.state("stop"),
            lambda: self.client.run("DELETE", path, project=self.project),
            lambda: self.client.run("DELETE", f"/1.0/projects/{self.project}"),
        ):
            try:
                step()
            except IncusError as exc:
                error = exc
        if self.project in str(self.client.get("/1.0/projects").metadata):
            raise AssertionError(f"left behind: {error}")

    def state(self, action: str) -> None:
        body = {"action": action, "force": True, "timeout": 30}
        self.client.run("PUT", f"/1.0/instances/{self.name}/state", project=self.project, body=body)

    def sh(self, script: str) -> str:
        result = run_command(self.client, self.name, ["/bin/sh", "-c", script], project=self.project)
        assert result.returncode == 0, result.stderr
        return result.stdout.decode().strip()

    def processes(self, text: str) -> list[str]:
        script = 'for p in /proc/[0-9]*; do tr "\\0" " " <$p/cmdline 2>/dev/null; echo; done'
        return [line for line in self.sh(script).splitlines() if text in line and "/proc/" not in line]

    def command(self, tasks: list[dict[str, Any]] | Path, **variables: Any) -> list[str]:
        inventory = {
            "all": {
                "hosts": {
                    "box.example": {
                        "ansible_connection": "sottovoce.stack.incus",
                        "ansible_incus_instance": self.name,
                        "ansible_incus_project": self.project,
                        "ansible_incus_socket": self.client.endpoint.path,
                        "ansible_python_interpreter": "/usr/bin/python3",
                        "ansible_host": "10.0.0.9",
                        **variables,
                    }
                }
            }
        }
        (self.folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
        play = {"hosts": "all", "gather_facts": False, "tasks": tasks}
        (self.folder / "play.yml").write_text(yaml.safe_dump([play]))
        program = str(Path(sys.executable).parent / "ansible-playbook")
        return [program, "-i", str(self.folder / "hosts.yml"), str(self.folder / "play.yml")]

    def play(self, tasks: list[dict[str, Any]], **variables: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(tasks, **variables),
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_PIPELINING": "0"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    endpoint = Endpoint()
    if not os.path.exists(endpoint.path):
        pytest.skip(f"no Incus daemon at {endpoint.path}")
    with IncusClient(endpoint) as client:
        it = Lab(client, tmp_path_factory.mktemp("conn"))
        try:
            it.make()
            yield it
        finally:
            it.remove()


def test_a_playbook_with_everything(lab: Lab) -> None:
    big, back = lab.folder / "big.bin", lab.folder / "fetched.bin"
    with big.open("wb") as handle:
        for _unused in range(120):
            handle.write(os.urandom(1 << 20))
    script = lab.folder / "s.sh"
    script.write_text('#!/bin/sh\necho $#; echo "$2"\n')
    run = lab.play(
        [
            {"ansible.builtin.ping": None},
            {"ansible.builtin.user": {"name": "alice", "groups": ["games"]}},
            {"ansible.builtin.copy": {"content": "h\u00e4llo\n", "dest": "/root/a b.txt", "mode": "0640"}},
            {"ansible.builtin.copy": {"src": str(big), "dest": "/root/big.bin", "mode": "0600"}},
            {"ansible.builtin.fetch": {"src": "/root/big.bin", "dest": str(back), "flat": True}},
            {"ansible.builtin.stat": {"path": "/root/a b.txt"}, "register": "small"},
            {
                "ansible.builtin.raw": "echo raw $HOME; exit 3",
                "register": "raw",
                "failed_when": "raw.rc != 3",
            },
            {"ansible.builtin.script": f"{script} one 'two three'", "register": "script"},
            {"ansible.builtin.shell": "exit 127", "register": "code", "failed_when": "code.rc != 127"},
            {
                "ansible.builtin.command": "id -Gn",
                "become": True,
                "become_user": "alice",
                "become_method": "ansible.builtin.su",
                "register": "su",
            },
            {
                "ansible.builtin.shell": "id -un; pwd",
                "vars": {"ansible_user": "alice"},
                "register": "alice",
            },
            {
                "ansible.builtin.copy": {"content": "x", "dest": "/home/alice/mine", "mode": "0644"},
                "vars": {"ansible_user": "alice"},
                "register": "mine",
            },
            {
                "ansible.builtin.command": "id -u",
                "vars": {"ansible_user": "1234:5678", "ansible_remote_tmp": "/tmp/r"},
                "register": "number",
            },
            {
                "ansible.builtin.shell": "wc -c; head -c 3000000 /dev/zero | tr '\\0' x",
                "args": {"stdin": "{{ 'x' * 3000000 }}"},
                "register": "both",
                "no_log": True,
            },
            {"ansible.builtin.shell": "sleep 1; echo done", "async": 30, "poll": 1, "register": "later"},
            {"ansible.builtin.meta": "reset_connection"},
            {
                "ansible.builtin.assert": {
                    "that": [
                        "small.stat.mode == '0640'",
                        "raw.stdout | trim == 'raw /root'",
                        "script.stdout_lines == ['2', 'two three']",
                        "su.stdout == 'alice games'",
                        "alice.stdout_lines == ['alice', '/home/alice']",
                        "mine.owner == 'alice'",
                        "number.stdout == '1234'",
                        "both.stdout_lines[0] == '3000001'",
                        "both.stdout | length == 3000008",
                        "later.stdout == 'done'",
                    ]
                }
            },
        ]
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert back.read_bytes() == big.read_bytes()
    # Modules were pipelined although the environment says otherwise.
    shown = subprocess.run(
        [*lab.command([{"ansible.builtin.ping": None}]), "-vvv"],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_PIPELINING": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert shown.count("EXEC ") == 1
    assert "PUT " not in shown


def test_a_failed_transfer_names_the_reason(lab: Lab) -> None:
    lab.sh("mkdir -p /small && mount -t tmpfs -o size=1m none /small")
    source = lab.folder / "source"
    source.write_bytes(b"x" * 5_000_000)
    run = lab.play(
        [{"ansible.builtin.copy": {"src": str(source), "dest": "/small/x", "mode": "0644"}}],
        ansible_remote_tmp="/small/tmp",
    )
    assert run.returncode != 0
    assert "No space left on device" in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("stop", "start", "is stopped. Start it: incus start box --project"),
        ("freeze", "unfreeze", "is frozen (paused). Resume it: incus resume box --project"),
    ],
)
def test_states(lab: Lab, before: str, after: str, words: str) -> None:
    lab.state(before)
    try:
        run = lab.play([{"ansible.builtin.ping": None}])
    finally:
        lab.state(after)
    assert run.returncode != 0
    assert "UNREACHABLE" in run.stdout
    assert words in " ".join((run.stdout + run.stderr).split())


def test_missing_instance_project_and_user(lab: Lab) -> None:
    for variables, words in (
        ({"ansible_incus_instance": "nobody"}, "There is no instance 'nobody'"),
        ({"ansible_incus_instance": "box.lan"}, "Names of instances have no dots"),
        ({"ansible_incus_project": "nowhere"}, "There is no Incus project 'nowhere'"),
        ({"ansible_user": "nobodyhere"}, "has no user 'nobodyhere'"),
        ({"ansible_executable": "/bin/none"}, "cannot run /bin/none"),
    ):
        run = lab.play([{"ansible.builtin.ping": None}], **variables)
        assert words in " ".join((run.stdout + run.stderr).split()), variables


def test_a_restarting_instance_is_waited_for(lab: Lab) -> None:
    lab.state("stop")
    timer = threading.Timer(2, lambda: _start_it(lab))
    timer.start()
    run = lab.play(
        [
            {"ansible.builtin.wait_for_connection": {"timeout": 60, "sleep": 1}},
            {"ansible.builtin.reboot": {"reboot_timeout": 90, "connect_timeout": 2}},
            {"ansible.builtin.ping": None},
        ]
    )
    timer.join()
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_timeout_and_an_interrupt_leave_no_process(lab: Lab) -> None:
    run = lab.play([{"ansible.builtin.shell": "sleep 3011 & sleep 3012; true"}], ansible_incus_exec_timeout=3)
    assert "did not end within 3 s and was killed" in " ".join((run.stdout + run.stderr).split())
    run = lab.play([{"ansible.builtin.shell": "sleep 3013; true", "timeout": 3}])
    assert "Timed out after 3 second" in run.stdout + run.stderr
    assert lab.processes("sleep 301") == []
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            lab.command([{"ansible.builtin.shell": "sleep 3014; true"}]), cwd=ROOT, start_new_session=True
        )
        try:
            _until(lambda: lab.processes("sleep 3014"))
            process.send_signal(number)
            process.wait(30)
            _until(lambda: not lab.processes("sleep 301"))
        finally:
            process.kill()
            process.wait(10)


def test_a_child_that_stays_does_not_hold_the_task(lab: Lab) -> None:
    begin = time.monotonic()
    run = lab.play([{"ansible.builtin.raw": "sleep 3021 & echo hi", "register": "out"}])
    assert run.returncode == 0, run.stdout + run.stderr
    assert time.monotonic() - begin < 30
    assert lab.processes("sleep 3021")
    lab.sh("kill $(grep -ls 3021 /proc/[0-9]*/cmdline | tr -dc '0-9\\n' | head -n 1); true")


def test_a_remote_over_tls(lab: Lab) -> None:
    if not os.environ.get("INCUS_DIR"):
        pytest.skip("only in a daemon of its own (INCUS_DIR): it has to listen on the network")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    cert, key = lab.folder / "c.crt", lab.folder / "c.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", "2", "-subj", "/CN=test", "-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
        timeout=30,
    )
    address = f"127.0.0.1:{port}"
    lab.client.request("PATCH", "/1.0", body={"config": {"core.https_address": address}})
    try:
        fingerprint = lab.client.get("/1.0").metadata["environment"]["certificate_fingerprint"]
        endpoint = Endpoint(
            url=f"https://{address}", client_cert=str(cert), client_key=str(key), server_cert=fingerprint
        )
        with (
            pytest.raises(IncusForbidden, match="incus config trust add-certificate"),
            IncusClient(endpoint) as c,
        ):
            c.get("/1.0/projects")
        pem = "".join(cert.read_text().splitlines()[1:-1])
        body = {"type": "client", "name": "test", "certificate": pem}
        lab.client.request("POST", "/1.0/certificates", body=body)
        data = os.urandom(30_000_000)
        with IncusClient(endpoint) as remote:
            assert lab.project in str(remote.get("/1.0/projects").metadata)
            result = run_command(remote, lab.name, ["cat"], project=lab.project, stdin=data, timeout=60)
        assert result.stdout == data
        run = lab.play(
            [{"ansible.builtin.ping": None}],
            ansible_incus_url=f"https://{address}",
            ansible_incus_client_cert=str(cert),
            ansible_incus_client_key=str(key),
            ansible_incus_server_cert=fingerprint,
        )
        assert run.returncode == 0, run.stdout + run.stderr
    finally:
        lab.client.request("PATCH", "/1.0", body={"config": {"core.https_address": ""}})


def _start_it(lab: Lab) -> None:
    with lab.client.clone() as client:
        client.run("PUT", f"/1.0/instances/{lab.name}/state", project=lab.project, body={"action": "start"})


def _until(condition: Any, patience: float = 20.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)

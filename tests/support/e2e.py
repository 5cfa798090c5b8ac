"""The stack that the end-to-end tests bring up, and how they look into it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Second octet of addresses that nothing else on this machine uses, for machines of the zone semi-trusted.
OCTET = int(os.environ.get("SOTTOVOCE_TEST_OCTET") or 210)
INFRA = f"""---
project_name: e2e
global:
  addressing: {{base_octet: 10, zone_base: {OCTET - 20}}}
domains:
  e2e-ai:
    description: What the end-to-end tests bring up
    ephemeral: true
    machines:
      e2e-speech:
        gpu: {{optional: true}}
        roles: [base_system, ollama_server, stt_server]
      e2e-webui:
        roles: [base_system, open_webui]
"""
PROJECT = "e2e-ai"


@dataclass
class Run:
    """One finished playbook."""

    code: int
    output: str
    recap: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def changed(self) -> int:
        return sum(host["changed"] for host in self.recap.values())


def read_recap(output: str) -> dict[str, dict[str, int]]:
    lines = output.partition("PLAY RECAP")[2].splitlines()
    found = {}
    for line in lines:
        match = re.match(r"(\S+)\s+: (ok=.*)", line)
        if match:
            found[match[1]] = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", match[2])}
    return found


@dataclass
class Collection:
    """The installed collection, and how to run its playbooks as a user does: by their full names."""

    path: Path

    def environment(self) -> dict[str, str]:
        config = self.path / "ansible.cfg"
        return {**os.environ, "ANSIBLE_CONFIG": str(config), "ANSIBLE_NOCOLOR": "1", "PYTHONUNBUFFERED": "1"}

    def command(self, playbook: str, inventory: Path, *arguments: str) -> list[str]:
        return [
            str(BIN / "ansible-playbook"), "-i", str(inventory), f"sottovoce.stack.{playbook}", *arguments
        ]  # fmt: skip

    def play(
        self,
        playbook: str,
        inventory: Path,
        *arguments: str,
        check: bool = True,
        timeout: float = 600,
        environment: dict[str, str] | None = None,
    ) -> Run:
        """Run a playbook to its end; the output is shown when the test fails."""
        done = subprocess.run(
            self.command(playbook, inventory, *arguments),
            env={**self.environment(), **(environment or {})},
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        print(done.stdout)
        if check:
            assert done.returncode == 0, f"{playbook} ended with {done.returncode}"
        return Run(done.returncode, done.stdout, read_recap(done.stdout))


@dataclass
class Stack:
    """A whole stack: speech and webui, brought up once for all tests of the session."""

    collection: Collection
    inventory: Path
    first: Run
    stt_url: str = f"http://10.{OCTET}.0.1:8000/v1"

    def set_host_vars(self, host: str, text: str) -> None:
        (self.inventory / "host_vars" / f"{host}.yml").write_text(text, encoding="utf-8")

    def apply(self, *arguments: str) -> Run:
        return self.collection.play("apply", self.inventory, *arguments)


def incus(*arguments: str, timeout: float = 60) -> str:
    return subprocess.run(
        ["incus", "--project", PROJECT, *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    ).stdout


def unit(instance: str, name: str, *properties: str) -> list[str]:
    """Values of properties of a unit, in the order of their names."""
    shown = incus("exec", instance, "--", "systemctl", "show", name, f"--property={','.join(properties)}")
    values = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    return [values[name] for name in properties]


def health(instance: str, port: int, path: str) -> dict[str, Any]:
    script = f"import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:{port}{path}').read().decode())"
    answer: dict[str, Any] = json.loads(incus("exec", instance, "--", "python3", "-c", script))
    return answer


def wait_for(seconds: float, probe: Callable[[], Any]) -> Any:
    """The first true answer of probe, asked once a second."""
    deadline = time.monotonic() + seconds
    last: BaseException | None = None
    while time.monotonic() < deadline:
        try:
            answer = probe()
        except (subprocess.CalledProcessError, ValueError, KeyError) as error:
            last = error
        else:
            if answer:
                return answer
        time.sleep(1)
    raise AssertionError(f"not within {seconds} s (last: {last})")

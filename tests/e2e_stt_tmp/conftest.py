"""
End-to-end tests: a stack that apply brings up in the Incus daemon of this run.

tests/e2e.sh starts that daemon (INCUS_DIR) and runs these. The collection under test is the built tarball,
installed into an empty path, as a user has it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/support"))
BIN = Path(sys.executable).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "" if os.environ.get("INCUS_DIR") else "no Incus daemon of its own (run tests/e2e.sh)"
    for item in items:
        if reason and "e2e" in Path(str(item.fspath)).parts:
            item.add_marker(pytest.mark.skip(reason=reason))


@dataclass
class Run:
    """One finished playbook."""

    code: int
    output: str
    recap: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def changed(self) -> int:
        return sum(host["changed"] for host in self.recap.values())


def _recap(output: str) -> dict[str, dict[str, int]]:
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
        self, playbook: str, inventory: Path, *arguments: str, check: bool = True, timeout: float = 600
    ) -> Run:
        """Run a playbook to its end; the output is shown when the test fails."""
        done = subprocess.run(
            self.command(playbook, inventory, *arguments),
            env=self.environment(),
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
        return Run(done.returncode, done.stdout, _recap(done.stdout))


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """The tarball of this checkout, built and installed into an empty path."""
    path = tmp_path_factory.mktemp("user")
    galaxy = str(BIN / "ansible-galaxy")
    subprocess.run(
        [galaxy, "collection", "build", "--output-path", str(path), str(ROOT)], check=True, cwd=ROOT
    )
    (tarball,) = path.glob("sottovoce-stack-*.tar.gz")
    subprocess.run(
        [galaxy, "collection", "install", str(tarball), "-p", str(path / "collections"), "--offline"],
        check=True,
        cwd=path,

    )
    (path / "ansible.cfg").write_text(
        "[defaults]\ncollections_path = collections\nforks = 10\n"
        "[inventory]\nenable_plugins = sottovoce.stack.infra\n",
        encoding="utf-8",
    )
    return Collection(path)


@dataclass
class Stack:
    """A whole stack: speech and webui, brought up once for all tests of the session."""

    collection: Collection
    inventory: Path
    first: Run

    def set_host_vars(self, host: str, text: str) -> None:
        (self.inventory / "host_vars" / f"{host}.yml").write_text(text, encoding="utf-8")

    def apply(self, *arguments: str) -> Run:
        return self.collection.play("apply", self.inventory, *arguments)


@pytest.fixture(scope="session")
def stack(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    inventory = tmp_path_factory.mktemp("stack") / "inventory"
    shutil.copytree(ROOT / "tests/e2e/inventory", inventory)
    (inventory / "host_vars").mkdir(exist_ok=True)
    group_vars = inventory / "group_vars"
    group_vars.mkdir(exist_ok=True)
    (group_vars / "all.yml").write_text(f"stt_server_fallback_model: {ROOT}/demo/model\n", encoding="utf-8")
    first = collection.play("apply", inventory)
    yield Stack(collection, inventory, first)
    collection.play("destroy", inventory, "-e", "confirm=yes")

"""
The role incus_host on Debian 13: a container with systemd stands for the machine, Incus runs nested in it.

The container is made by apply from an image of trixie, so base_system runs on Debian 13 as well. It takes a
minute or two (and the first time another one for the image), so it runs only where it is asked for:

    SOTTOVOCE_TEST_DEBIAN13=1 tests/e2e.sh tests/e2e/test_host_debian13.py
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e import BIN, OCTET, Collection, Run, read_recap
from incusd import Daemon

pytestmark = pytest.mark.skipif(
    not os.environ.get("SOTTOVOCE_TEST_DEBIAN13"),
    reason="takes up to three minutes (Debian 13 with an Incus in it): SOTTOVOCE_TEST_DEBIAN13=1 runs it",
)

IMAGE = "sottovoce/debian/13"
PROJECT = "thirteen"
INFRA = f"""---
project_name: {PROJECT}
global:
  addressing: {{base_octet: 10, zone_base: {OCTET + 3 - 20}}}
domains:
  {PROJECT}:
    ephemeral: true
    machines:
      d13:
        os_image: {IMAGE}
        config: {{security.nesting: "true"}}
        roles: [base_system]
"""
PLAYBOOK = """---
- name: Prepare a machine as a host of containers
  hosts: instances
  gather_facts: false
  roles: [sottovoce.stack.incus_host]
"""
# What a user of that Incus may have made before.
OWN = """
set -e
incus storage create mine dir
incus network create mine0 ipv4.address=192.168.117.1/24 ipv6.address=none
incus profile device add default root disk path=/ pool=mine
incus profile device add default eth0 nic network=mine0
"""
SHOWN = """
set -e
incus storage show mine
incus network show mine0
incus profile show default
incus project list --format=csv
"""


@dataclass
class Machine:
    """A Debian 13 that was never a host, and the playbook of one role for it."""

    collection: Collection
    inventory: Path

    def prepare(self, *arguments: str) -> Run:
        playbook = self.inventory.parent / "prepare.yml"
        playbook.write_text(PLAYBOOK, encoding="utf-8")
        done = subprocess.run(
            [str(BIN / "ansible-playbook"), "-i", str(self.inventory), str(playbook), *arguments],
            env=self.collection.environment(),
            cwd=self.collection.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        print(done.stdout)
        assert done.returncode == 0
        return Run(done.returncode, done.stdout, read_recap(done.stdout))

    def shell(self, script: str) -> str:
        done = subprocess.run(
            ["incus", "--project", PROJECT, "exec", "d13", "--", "sh", "-c", script],
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, f"{script} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def pools(self) -> list[str]:
        return sorted(self.shell("incus storage list --format=csv --columns=n").split())


@pytest.fixture(scope="module")
def machine(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    Daemon(Path(os.environ["INCUS_DIR"]).parent).import_image(IMAGE, release="trixie")
    inventory = tmp_path_factory.mktemp("debian13") / "infra.yml"
    inventory.write_text(INFRA, encoding="utf-8")
    collection.play("apply", inventory, "--tags", "infra,base")
    yield Machine(collection, inventory)
    collection.play("destroy", inventory, "-e", "confirm=yes")


def test_it_is_debian_13_with_a_base_system_that_stays(machine: Machine) -> None:
    assert 'VERSION_ID="13"' in machine.shell("cat /etc/os-release")
    assert machine.shell("cat /proc/1/comm").strip() == "systemd"
    assert machine.collection.play("apply", machine.inventory, "--tags", "infra,base").changed == 0


def test_incus_comes_to_it_from_debians_own_archive_once(machine: Machine) -> None:
    foreseen = machine.prepare("--check", "--diff")
    assert foreseen.changed > 0
    assert machine.shell("command -v incus || echo none").strip() == "none"

    assert machine.prepare().changed > 0
    assert machine.shell("ls /etc/apt/sources.list.d").split().count("sottovoce-backports.sources") == 0
    # The socket is what brings it back after a reboot.
    assert machine.shell("systemctl is-enabled incus.socket").strip() == "enabled"
    assert machine.shell("systemctl is-active incus.service").strip() == "active"
    assert machine.shell("incus version | grep -c 'Server version: 6'").strip() == "1"
    assert machine.pools() == ["default"]

    assert machine.prepare().changed == 0
    assert machine.prepare("--check", "--diff").changed == 0


def test_what_a_user_made_there_stays_as_it_is(machine: Machine) -> None:
    machine.shell(OWN)
    before = machine.shell(SHOWN)
    assert "pool: mine" in before
    assert machine.prepare().changed == 0
    # A pool of another name is made beside theirs.
    assert machine.prepare("-e", "incus_host_storage_pool=second").recap["d13"]["changed"] == 1
    assert machine.pools() == ["default", "mine", "second"]
    assert machine.shell(SHOWN) == before

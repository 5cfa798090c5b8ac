"""What a machine with a card looks like from inside, and one without."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests/support"))
import testinfra_incus

NODES = ["nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"]


def host(name: str) -> Any:
    return testinfra_incus.host(name, "mol-gpu")


@pytest.mark.parametrize("node", NODES)
def test_a_user_who_is_not_root_may_open_the_node(node: str) -> None:
    done = host("mol-card").run("setpriv --reuid=65534 --regid=65534 --clear-groups cat /dev/%s", node)
    # The card is a stand-in without a driver: that is what the kernel says once access was granted.
    assert "No such device or address" in done.stderr


def test_the_drivers_userland_is_there() -> None:
    mounts = host("mol-card").check_output("cat /proc/mounts")
    assert "/libcuda.so." in mounts
    assert "/libnvidia-ml.so." in mounts


def test_the_other_machine_has_nothing_of_it() -> None:
    machine = host("mol-none")
    assert [node for node in NODES if machine.file(f"/dev/{node}").exists] == []
    assert "libcuda" not in machine.check_output("cat /proc/mounts")

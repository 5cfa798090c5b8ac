"""apply and doctor as a user runs them, on a host whose driver is not as it should be."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from e2e import BIN, ROOT
from gpu_site import Site
from simulated_gpu import DRIVER, Cards


def play(name: str, infra: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [str(BIN / "ansible-playbook"), "-i", str(infra), f"playbooks/{name}.yml", *arguments],
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    print(done.stdout)
    return done.returncode, " ".join(done.stdout.split())


@pytest.fixture
def infra(site: Site, tmp_path: Path) -> Path:
    path = tmp_path / "infra.yml"
    path.write_text(site.document({"speech": {"gpu": True}}), encoding="utf-8")
    return path


def test_a_sound_host_lets_the_machine_be_made(site: Site, infra: Path) -> None:
    code, _said = play("apply", infra, "--tags", "host,infra")
    assert code == 0
    assert site.nodes("speech")["nvidia-uvm"] == "ENXIO"
    code, said = play("doctor", infra)
    assert code == 0, said


def test_without_uvm_nothing_is_made(site: Site, cards: Cards, infra: Path) -> None:
    cards.uvm(False)
    # What makes the node at boot was switched off as well; the role may write it, but here nothing runs it.
    code, said = play("apply", infra, "--tags", "host,infra")
    assert code != 0
    assert "[uvm-missing]" in said
    assert site.names() == set()


def test_two_versions_of_the_driver_are_refused(site: Site, cards: Cards, infra: Path) -> None:
    cards.driver("580.65.06", library=DRIVER)
    code, said = play("apply", infra, "--tags", "host,infra")
    assert code != 0
    assert "580.65.06" in said
    assert DRIVER in said
    assert site.names() == set()
    code, said = play("doctor", infra)
    assert code == 2

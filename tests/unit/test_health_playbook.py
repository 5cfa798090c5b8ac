# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""playbooks/health.yml as `make health` runs it, on this machine in the place of an instance; the card is a
stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nvml_standin as standin
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not standin.has_compiler():
        pytest.skip(standin.NO_COMPILER)
    return standin.build(tmp_path_factory.mktemp("nvml"))


def health(folder: Path, library: Path, cards: str, **variables: object) -> subprocess.CompletedProcess[str]:
    here = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    hosts = {
        "gpu-server": {**here, "instance_gpu": True, **variables},
        "webui": {**here, "instance_gpu": False},
        "down": {
            "ansible_connection": "sottovoce.stack.incus",
            "ansible_incus_socket": str(folder / "absent"),
        },
    }
    inventory = {"instances": {"hosts": hosts}}
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
    return subprocess.run(
        [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(folder / "hosts.yml"),
         str(ROOT / "playbooks/health.yml")],
        env={**os.environ, **standin.environment(library, folder, standin.DRIVER + cards), "NO_COLOR": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_health_shows_the_card_and_succeeds(library: Path, tmp_path: Path) -> None:
    done = health(tmp_path, library, standin.card(0))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gpu-server: ok (nvml, driver 570.86.15, CUDA 12.8)\n" in done.stdout
    assert "  GPU 0 NVIDIA RTX A5000: 0 of 24564 MiB used, 24113 free, 451 reserved, 41 °C\n" in done.stdout
    assert "webui:" not in done.stdout.partition("PLAY RECAP")[0]


def test_health_fails_where_the_card_is_not_as_it_should_be(library: Path, tmp_path: Path) -> None:
    hot = standin.card(0, more={"temperature": "99"})
    done = health(tmp_path, library, hot, sottovoce_vram_min_free_mib=30000)
    assert done.returncode == 2
    assert "fail: GPU 0 (NVIDIA RTX A5000) has 24113 of 24564 MiB free" in done.stdout
    assert "warn: GPU 0 (NVIDIA RTX A5000) has 99 °C" in done.stdout


@pytest.mark.parametrize(("request_", "code"), [({}, 2), ({"instance_gpu_request": {"optional": True}}, 0)])
def test_health_of_a_machine_that_lost_its_card(
    tmp_path: Path, request_: dict[str, object], code: int
) -> None:
    done = health(tmp_path, tmp_path / "absent.so", "", **request_)
    assert done.returncode == code, done.stdout
    assert ("no card is here" in done.stdout) is bool(code)


def test_health_of_a_machine_that_cannot_be_reached(library: Path, tmp_path: Path) -> None:
    done = health(
        tmp_path,
        library,
        "",
        ansible_connection="sottovoce.stack.incus",
        ansible_incus_socket=str(tmp_path / "absent"),
    )
    assert done.returncode == 2
    assert "gpu-server: not known: " in done.stdout

"""
The libraries of the host's driver in a real container.

A stand-in for the hardware: files instead of device nodes, and made-up libraries that tell their version.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e import BIN, OCTET, Collection

NAME, PROJECT = "card1", "userland"
INFRA = f"""---
project_name: userland
global:
  addressing: {{base_octet: 10, zone_base: {OCTET + 4 - 20}}}
domains:
  {PROJECT}:
    ephemeral: true
    machines:
      {NAME}: {{roles: [base_system]}}
"""
PLAY = """---
- name: The role alone
  hosts: instances
  gather_facts: false
  roles: [sottovoce.stack.gpu_userland]
  post_tasks:
    - name: Show the summary
      ansible.builtin.debug:
        var: gpu_userland_summary
"""
OLD, NEW = "570.1.2", "580.65.06"


@dataclass
class Container:
    folder: Path
    collection: Collection

    def inside(self, *command: str) -> str:
        return subprocess.run(
            ["incus", "--project", PROJECT, "exec", NAME, "--", *command],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        ).stdout

    def role(self, driver: str, *arguments: str) -> tuple[int, str]:
        """Run the role; return its status and output."""
        done = subprocess.run(
            [
                *(str(BIN / "ansible-playbook"), "-i", str(self.folder / "infra.yml")),
                *(str(self.folder / "play.yml"), "-e", f"gpu_userland_driver={driver}"),
                *("-e", f"gpu_userland_library_path={self.folder}/lib", *arguments),
            ],
            env=self.collection.environment(),
            cwd=self.collection.path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        print(done.stdout, done.stderr)
        return done.returncode, done.stdout

    def loaded(self) -> str:
        """What a user that is not root gets when it loads libcuda as CUDA does."""
        script = "import ctypes; print(ctypes.c_int.in_dll(ctypes.CDLL('libcuda.so.1'), 'version').value)"
        return self.inside("runuser", "-u", "nobody", "--", "python3", "-c", script).strip()


@pytest.fixture
def container(tmp_path: Path, collection: Collection) -> Iterator[Container]:
    if not shutil.which("gcc"):
        pytest.skip("no gcc to make libraries with")
    (tmp_path / "infra.yml").write_text(INFRA, encoding="utf-8")
    (tmp_path / "play.yml").write_text(PLAY, encoding="utf-8")
    (tmp_path / "lib").mkdir()
    for driver in (OLD, NEW):
        source = tmp_path / "library.c"
        source.write_text(f"int version = {driver.split('.')[0]};\n", encoding="utf-8")
        for base in ("libcuda", "libnvidia-ml", "libnvidia-ptxjitcompiler"):
            subprocess.run(
                [
                    *("gcc", "-shared", "-fPIC", f"-Wl,-soname,{base}.so.1", str(source)),
                    *("-o", str(tmp_path / "lib" / f"{base}.so.{driver}")),
                ],
                check=True,
            )
    collection.play("apply", tmp_path / "infra.yml", "--tags", "infra,base")
    found = Container(tmp_path, collection)
    nodes = "/dev/nvidia0 /dev/nvidiactl /dev/nvidia-uvm"
    found.inside("sh", "-c", f"touch {nodes} && chmod 666 {nodes}")
    yield found
    collection.play("destroy", tmp_path / "infra.yml", "-e", "confirm=yes")


def test_copy_second_run_upgrade_and_refusal(container: Container) -> None:
    code, told = container.role(OLD, "--check")
    assert (code, "changed=1 " in told) == (0, True)
    assert container.inside("sh", "-c", "ls /opt").strip() == ""

    code, told = container.role(OLD)
    assert (code, "changed=1 " in told) == (0, True)
    assert f"driver {OLD}, libraries copied from the host" in told
    assert "libcuda.so.1 (libc6,x86-64) => /opt/nvidia/current/libcuda.so.1" in container.inside(
        "ldconfig", "-p"
    )
    assert container.loaded() == "570"

    code, told = container.role(OLD)
    assert (code, "changed=0 " in told) == (0, True)

    code, told = container.role(NEW)
    assert (code, "changed=1 " in told) == (0, True)
    assert f"went from {OLD} to {NEW}" in told
    assert container.loaded() == "580"
    kept = container.inside("ls", "/opt/nvidia").split()
    assert kept == [NEW, "current", "userland.json"]

    # Nobody has this one: the old libraries stay, and what to do is told.
    code, told = container.role("999.1")
    assert code != 0
    for part in ("libcuda.so.999.1", "nvidia-container-toolkit", "no userland of exactly 999.1"):
        assert part in told
    assert container.loaded() == "580"

    # Not everybody may open the card.
    container.inside("chmod", "660", "/dev/nvidia0")
    code, told = container.role(NEW)
    assert code != 0
    assert f"incus config device set {NAME}" in told
    code, told = container.role(NEW, "-e", "gpu_userland_required=false")
    assert code == 0

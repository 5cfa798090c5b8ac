"""The userland of a GPU in a container, on made-up roots: what is seen, decided, copied and removed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_userland as userland
from ansible_collections.sottovoce.stack.plugins.module_utils._nvidia_driver import loaded_driver

DRIVER = "570.86.15"
NODES = {"/dev/nvidia0": 0o666, "/dev/nvidiactl": 0o666, "/dev/nvidia-uvm": 0o666}
PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Jan 23 23:00:00 UTC 2025\nGCC version: 12\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder)\n"


def elf(machine: int = 62, text: str = "") -> bytes:
    return b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + machine.to_bytes(2, "little") + text.encode()


def put(root: Path, name: str, content: bytes | str = b"") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def container(tmp_path: Path) -> Path:
    """A container with the nodes of a card and no library."""
    root = tmp_path / "container"
    for node, mode in NODES.items():
        put(root, node[1:]).chmod(mode)
    put(root, "proc/driver/nvidia/version", PROPRIETARY.format(DRIVER))
    put(root, "proc/sys/kernel/random/boot_id", "one\n")
    (root / "usr/lib/x86_64-linux-gnu").mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")
    return root


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host with a whole userland, and what a container must not get."""
    root = tmp_path / "host"
    for base in (*userland.REQUIRED, *userland.OPTIONAL, "libnvidia-glcore"):
        put(root, f"usr/lib/x86_64-linux-gnu/{base}.so.{DRIVER}", elf(text=base))
    put(root, "usr/lib/x86_64-linux-gnu/libcuda.so.550.1", elf())
    return root


def libraries(root: Path, version: str, mounted: bool = False) -> None:
    """What nvidia.runtime or a package puts into a container."""
    lines = []
    for base in ("libcuda", "libnvidia-ml"):
        put(root, f"usr/lib/x86_64-linux-gnu/{base}.so.{version}", elf())
        lines.append(f"1 2 0:3 / /usr/lib/x86_64-linux-gnu/{base}.so.{version} ro - ext4 /dev/x ro")
    if mounted:
        put(root, "proc/self/mountinfo", "\n".join(lines))


def decided(root: Path) -> dict[str, Any]:
    return userland.decide(userland.look(root, "x86_64"), "gpu-server", "ai")


def copy(host: Path, root: Path, driver: str = DRIVER) -> list[str]:
    """What action and module do between them."""
    files = userland.host_files(host, driver, "x86_64")
    sent = root / "tmp/sent"
    for name, path in files.items():
        put(sent, name, path.read_bytes())
    removed = userland.install(root, driver, sent, {n: userland.sha256(p) for n, p in files.items()})
    userland.record(root, driver, "copied")
    return removed


@pytest.mark.parametrize("text", [PROPRIETARY, OPEN])
@pytest.mark.parametrize("version", [DRIVER, "550.163", "535.54.03"])
def test_driver_version(tmp_path: Path, text: str, version: str) -> None:
    put(tmp_path, "proc/driver/nvidia/version", text.format(version))
    assert loaded_driver(str(tmp_path))[0] == version


@pytest.mark.parametrize("text", ["", "NVRM version: something else\n"])
def test_no_driver_version(tmp_path: Path, text: str) -> None:
    assert loaded_driver(str(tmp_path))[0] == ""
    put(tmp_path, "proc/driver/nvidia/version", text)
    assert loaded_driver(str(tmp_path))[0] == ""


@pytest.mark.parametrize(("mounted", "source"), [(True, "mounted"), (False, "packages")])
def test_a_match_is_left_as_it_is(container: Path, mounted: bool, source: str) -> None:
    libraries(container, DRIVER, mounted)
    plan = decided(container)
    assert (plan["source"], plan["problems"], plan["install"], plan["remove"]) == (source, [], False, False)


def test_a_mounted_mismatch_names_the_restart(container: Path) -> None:
    libraries(container, "560.35.03", mounted=True)
    (problem,) = decided(container)["problems"]
    for part in (DRIVER, "libcuda.so.560.35.03", "incus restart gpu-server --project ai"):
        assert part in problem


@pytest.mark.parametrize("version", ["560.35.03", "570.86.1", "570.86.150"])
def test_packages_of_another_version_do_not_count(container: Path, version: str) -> None:
    libraries(container, version)
    assert decided(container)["install"] is True


def test_half_a_userland_does_not_count(container: Path) -> None:
    put(container, f"usr/lib/x86_64-linux-gnu/libcuda.so.{DRIVER}", elf())
    assert decided(container)["install"] is True


def test_no_uvm_names_what_to_do(container: Path) -> None:
    (container / "dev/nvidia-uvm").unlink()
    (problem,) = decided(container)["problems"]
    assert "/dev/nvidia-uvm" in problem
    assert "nvidia-modprobe -u -c 0, then incus restart gpu-server --project ai" in problem


def test_nodes_that_only_root_opens(container: Path) -> None:
    (container / "dev/nvidia0").chmod(0o660)
    put(container, "dev/nvidia-caps/nvidia-cap1").chmod(0o400)
    (problem,) = decided(container)["problems"]
    assert "/dev/nvidia0 (mode 0660)" in problem
    assert "nvidia-cap1" not in problem


def test_without_nodes_it_is_a_problem(tmp_path: Path) -> None:
    plan = decided(tmp_path)
    assert plan["vendor"] == ""
    assert "no device node of a GPU" in plan["problems"][0]


@pytest.mark.parametrize(
    ("nodes", "vendor"), [(["dev/kfd", "dev/dri/renderD128"], "amd"), (["dev/dri/renderD128"], "other")]
)
def test_other_cards_are_named_and_left_alone(tmp_path: Path, nodes: list[str], vendor: str) -> None:
    for node in nodes:
        put(tmp_path, node)
    plan = decided(tmp_path)
    assert (plan["vendor"], plan["problems"], plan["install"], len(plan["notes"])) == (vendor, [], False, 1)


def test_a_driver_that_cannot_be_read_changes_nothing(container: Path) -> None:
    (container / "proc/driver/nvidia/version").unlink()
    plan = decided(container)
    assert (plan["problems"], plan["install"], plan["source"]) == ([], False, "")
    assert "cannot be read" in plan["notes"][0]


def test_the_host_gives_the_least_that_computing_needs(host: Path) -> None:
    files = userland.host_files(host, DRIVER, "x86_64")
    assert sorted(files) == sorted(f"{base}.so.{DRIVER}" for base in (*userland.REQUIRED, *userland.OPTIONAL))


def test_older_drivers_without_the_optional_parts(host: Path) -> None:
    for base in userland.OPTIONAL:
        (host / f"usr/lib/x86_64-linux-gnu/{base}.so.{DRIVER}").unlink()
    assert len(userland.host_files(host, DRIVER, "x86_64")) == len(userland.REQUIRED)


def test_libraries_where_only_the_loader_knows_them(host: Path, tmp_path: Path) -> None:
    (host / "srv").mkdir()
    (host / "usr/lib/x86_64-linux-gnu").rename(host / "srv/nvidia")
    with pytest.raises(userland.UserlandError, match="has no libcuda"):
        userland.host_files(host, DRIVER, "x86_64")
    cached = "\tlibcuda.so.1 (libc6,x86-64) => /srv/nvidia/libcuda.so.1\n"
    assert len(userland.host_files(host, DRIVER, "x86_64", cached)) == 5


def test_another_version_or_machine_is_refused(host: Path) -> None:
    with pytest.raises(userland.UserlandError, match=r"libcuda\.so\.570\.99"):
        userland.host_files(host, "570.99", "x86_64")
    put(host, f"usr/lib/x86_64-linux-gnu/libcuda.so.{DRIVER}", elf(machine=183))
    with pytest.raises(userland.UserlandError, match="another machine"):
        userland.host_files(host, DRIVER, "x86_64")
    with pytest.raises(userland.UserlandError, match="riscv64"):
        userland.host_files(host, DRIVER, "riscv64")


def test_the_controller_gives_its_own_only_to_a_container_on_its_kernel(host: Path) -> None:
    with pytest.raises(userland.UserlandError, match="not on this machine"):
        userland.controller_files(DRIVER, "x86_64", "another boot", "")
    with pytest.raises(userland.UserlandError, match="no folder"):
        userland.controller_files(DRIVER, "x86_64", "another boot", "/nonexistent")
    named = str(host / "usr/lib/x86_64-linux-gnu")
    assert len(userland.controller_files(DRIVER, "x86_64", "another boot", named)) == 5


@pytest.mark.parametrize(("text", "taken"), [(f"v{DRIVER}", True), ("v560.1", False)])
def test_nvidia_smi_must_be_of_the_same_driver(host: Path, text: str, taken: bool) -> None:
    program = put(host, "usr/bin/nvidia-smi", elf(text=text))
    assert ("nvidia-smi" in userland.host_files(host, DRIVER, "x86_64", "", str(program))) is taken


def test_copy_and_the_second_run(host: Path, container: Path) -> None:
    assert decided(container)["install"] is True
    assert copy(host, container) == []
    home = container / "opt/nvidia"
    assert os.readlink(home / "current") == DRIVER
    assert (home / "current" / f"libcuda.so.{DRIVER}").read_bytes() == elf(text="libcuda")
    assert (container / userland.LOADER).read_text() == "/opt/nvidia/current\n"
    plan = decided(container)
    assert (plan["source"], plan["install"], plan["notes"]) == ("copied", False, [])
    assert userland.record(container, DRIVER, "copied") is False


def test_a_new_driver_replaces_the_copy(host: Path, container: Path) -> None:
    copy(host, container)
    new = "580.65.06"
    for base in userland.REQUIRED:
        put(host, f"usr/lib/x86_64-linux-gnu/{base}.so.{new}", elf(text=new))
    put(container, "proc/driver/nvidia/version", OPEN.format(new))
    plan = decided(container)
    assert plan["install"] is True
    assert f"from {DRIVER} to {new}" in plan["notes"][0]
    assert copy(host, container, new) == [DRIVER]
    assert sorted(path.name for path in (container / "opt/nvidia").iterdir()) == [
        new,
        "current",
        "userland.json",
    ]
    assert decided(container)["source"] == "copied"


def test_a_copy_that_was_damaged_is_made_again(host: Path, container: Path) -> None:
    copy(host, container)
    (container / f"opt/nvidia/{DRIVER}/libcuda.so.{DRIVER}").write_bytes(b"cut off")
    assert decided(container)["install"] is True
    copy(host, container)
    assert decided(container)["source"] == "copied"


def test_our_copy_leaves_when_libraries_are_mounted(host: Path, container: Path) -> None:
    copy(host, container)
    libraries(container, DRIVER, mounted=True)
    assert decided(container)["remove"] is True
    assert userland.remove(container) == [DRIVER]
    assert not (container / userland.LOADER).exists()
    assert decided(container)["remove"] is False


def test_what_arrives_is_held_to_its_digest(container: Path) -> None:
    sent = container / "tmp/sent"
    put(sent, "libcuda.so.1.2", b"other")
    with pytest.raises(userland.UserlandError, match="other contents"):
        userland.install(container, "1.2", sent, {"libcuda.so.1.2": "0" * 64})
    assert list((container / "opt/nvidia").iterdir()) == []
    with pytest.raises(userland.UserlandError, match="no name"):
        userland.install(container, "1.2", sent, {"../x": "0" * 64})


def test_the_systems_own_nvidia_smi_is_left(host: Path, container: Path) -> None:
    own = put(container, userland.PROGRAM, b"mine")
    sent = container / "tmp/sent"
    path = put(sent, "nvidia-smi", elf())
    userland.install(container, DRIVER, sent, {"nvidia-smi": userland.sha256(path)})
    assert own.read_bytes() == b"mine"


MADISON = f"""
   libcuda1 | {DRIVER}-1 | source
   libcuda1 | 550.163.01-2 | source
 libnvidia-ml1 | {DRIVER}-1 | source
 libnvidia-ptxjitcompiler1 | {DRIVER}-1 | source
"""


@pytest.mark.parametrize(
    ("told", "chosen"),
    [
        (MADISON, [f"{name}={DRIVER}-1" for name in userland.package_sets(DRIVER)[0]]),
        (
            f" libnvidia-compute-570 | {DRIVER}-0ubuntu0.24.04.1 | source",
            [f"libnvidia-compute-570={DRIVER}-0ubuntu0.24.04.1"],
        ),
        (
            f" libcuda1 | {DRIVER}-1 | s\n libnvidia-compute-570-server | {DRIVER}-0ubuntu1 | s",
            [f"libnvidia-compute-570-server={DRIVER}-0ubuntu1"],
        ),
    ],
)
def test_packages_of_exactly_the_driver(told: str, chosen: list[str]) -> None:
    assert userland.choose_packages(DRIVER, told) == chosen


@pytest.mark.parametrize("told", ["", " libcuda1 | 570.86.150-1 | s\n libcuda1 | 570.86.1-1 | s"])
def test_no_package_of_exactly_the_driver(told: str) -> None:
    with pytest.raises(userland.UserlandError, match=f"exactly {DRIVER}"):
        userland.choose_packages(DRIVER, told)


def test_summary() -> None:
    base = {"vendor": "nvidia", "driver": DRIVER, "source": "", "problems": [], "notes": ["n"]}
    after = {**base, "source": "packages", "notes": []}
    found = userland.summarize([base, {**base, "install": ["libcuda1=1"]}, after])
    assert found["version"] == f"driver {DRIVER}, libraries from packages"
    assert found["notes"] == ["installed libcuda1=1"]
    # A skipped task registers no result of the module.
    told = userland.summarize([{**base, "problems": ["why"]}, {"skipped": True}, {}])
    assert told["skipped"] == [{"what": "GPU", "why": "why"}]
    assert json.loads(json.dumps(told)) == told

"""Findings of gpu_preflight over made-up hosts, each both ways. No real card is asked anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_facts as gpu_facts
from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_preflight as preflight
from ansible_collections.sottovoce.stack.plugins.module_utils._gpu_preflight import Finding, Wanted, wanted_by
from ansible_collections.sottovoce.stack.plugins.module_utils._nvidia_driver import loaded_driver
from host_root import DRIVER, IDS, PCI, UNIT, Host, sound_host

ROOT = Path(__file__).parents[2]
EXTENSIONS = frozenset({"resources_gpu", "gpu_devices", "nvidia_runtime", "nvidia_runtime_config"})
INCUS = gpu_facts.Incus("6.0.4", EXTENSIONS)
CONTAINER = {"name": "box", "vm": False, "optional": False, "runtime": False, "mig": False, "pcis": []}
VM = {**CONTAINER, "name": "virt", "vm": True}


def answers(**outputs: str) -> gpu_facts.Run:
    """Commands that are there, by name; others are missing."""

    def run(argv: Sequence[str]) -> str:
        return outputs.get(argv[0].replace("-", "_"), "")

    return run


NONE = answers()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return sound_host(tmp_path)


def look(
    host: Host,
    machines: list[dict[str, Any]] | None = None,
    incus: gpu_facts.Incus | None = INCUS,
    run: gpu_facts.Run = NONE,
) -> dict[str, Finding]:
    """Findings by id."""
    facts = gpu_facts.read_facts(str(host.root), incus, ["libnvidia-container-tools"], run)
    found = preflight.findings(facts, wanted_by(machines))
    assert len({f.id for f in found}) == len(found)
    return {f.id: f for f in found}


def test_nothing_is_found_on_a_sound_host(host: Host) -> None:
    assert look(host) == {}
    assert look(host, [CONTAINER]) == {}


def test_every_finding_says_what_why_and_what_to_do(host: Host) -> None:
    # One host with much wrong at once.
    host.remove("dev/nvidia-uvm", "dev/nvidiactl", "usr/bin/nvidia-container-cli")
    host.packages("libcuda1")
    host.process(7, "python3", "/dev/nvidia0")
    host.driver("550.1")
    for finding in look(host).values():
        assert finding.severity in ("error", "warning", "info")
        assert finding.what
        assert finding.why
        assert finding.remedy.endswith(".")
        assert finding.line().count(f"[{finding.id}]") == 1


# --- the bus ---------------------------------------------------------------------------------------------


def test_no_card(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.card(vendor="1a03", device="2000", driver="ast")  # board management
    assert look(host)["no-card"].severity == "error"
    assert look(host, [CONTAINER])["no-card"].severity == "error"
    assert look(host, [{**CONTAINER, "optional": True}])["no-card"].severity == "warning"
    assert look(host, [])["no-card"].severity == "info"


def test_no_card_on_a_member_of_a_cluster_stops_nothing(tmp_path: Path) -> None:
    clustered = gpu_facts.Incus("6.0.4", EXTENSIONS, clustered=True)
    facts = gpu_facts.read_facts(str(tmp_path), clustered, (), answers())
    wanted = wanted_by([CONTAINER])
    found = preflight.findings(facts, wanted)
    assert [f.severity for f in found] == ["warning"]
    assert "other members" in found[0].why
    assert preflight.blocking(found, facts, wanted) == []
    assert "the others are not looked at" in preflight.host_lines(facts)[-1]


def test_nouveau(host: Host) -> None:
    host.card(driver="nouveau")
    host.remove("proc/driver/nvidia/version", "sys/module/nvidia/version")
    found = look(host)
    assert found["nouveau"].severity == "error"
    assert "GA102" in found["nouveau"].what
    assert "driver-not-loaded" not in found
    assert "driver-missing" not in found


def test_a_second_card_in_other_hands_is_a_warning_unless_it_is_asked_for(host: Host) -> None:
    host.card(driver="nouveau", pci="0000:02:00.0")
    assert look(host)["nouveau"].severity == "warning"
    assert look(host, [{**CONTAINER, "pcis": ["0000:02:00.0"]}])["nouveau"].severity == "error"


def test_vfio(host: Host) -> None:
    host.card(driver="vfio-pci", group="7")
    assert look(host, [CONTAINER])["vfio"].severity == "error"
    assert "vfio" not in look(host, [VM])


def test_card_that_the_driver_does_not_take(host: Host) -> None:
    host.card(driver="")
    assert DRIVER in look(host)["card-refused"].what


# --- the NVIDIA driver -----------------------------------------------------------------------------------


def unloaded(host: Host) -> None:
    host.card(driver="")
    host.remove("proc/driver/nvidia/version", "sys/module/nvidia/version")
    (host.root / "lib/modules").mkdir(parents=True)


def test_driver_missing(host: Host) -> None:
    unloaded(host)
    found = look(host)
    assert found["driver-missing"].severity == "error"
    assert found["driver-missing"].mends == ""


def test_driver_not_loaded(host: Host) -> None:
    unloaded(host)
    found = look(host, run=answers(modinfo=f"{DRIVER}\n"))
    assert found["driver-not-loaded"].mends == preflight.MAKES_NODES
    assert "driver-missing" not in found
    assert "secure-boot" not in found


def test_module_that_is_there_without_modinfo_counts_as_there(host: Host) -> None:
    unloaded(host)
    host.write(f"lib/modules/{os.uname().release}/updates/dkms/nvidia.ko.xz")
    found = look(host)
    # Nobody knows whether it would load, so nothing is promised.
    assert found["driver-not-loaded"].mends == ""


def test_secure_boot(host: Host) -> None:
    unloaded(host)
    path = host.root / gpu_facts._SECURE_BOOT
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x06\x00\x00\x00\x01")
    run = answers(modinfo=f"{DRIVER}\n")
    assert "mokutil" in look(host, run=run)["secure-boot"].remedy
    path.write_bytes(b"\x06\x00\x00\x00\x00")
    assert "secure-boot" not in look(host, run=run)


@pytest.mark.parametrize(
    ("on_disk", "remedy"),
    [
        ("570.100", "Reboot: the module on disk fits already."),
        ("565.1", "The module on disk is 565.1"),
        ("", "dkms status"),
    ],
)
def test_version_mismatch(host: Host, on_disk: str, remedy: str) -> None:
    (host.root / "lib/modules").mkdir(parents=True)
    host.remove(f"usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{DRIVER}")
    host.write("usr/lib/x86_64-linux-gnu/libnvidia-ml.so.570.100")
    found = look(host, run=answers(modinfo=on_disk))["version-mismatch"]
    assert found.severity == "error"
    assert DRIVER in found.what
    assert "570.100" in found.what
    assert remedy in found.remedy
    assert found.mends == ""


def test_the_library_in_use_decides_and_not_one_left_behind(host: Host) -> None:
    host.write("usr/lib/x86_64-linux-gnu/libnvidia-ml.so.999.1")
    assert "version-mismatch" in look(host)
    host.link("usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", f"libnvidia-ml.so.{DRIVER}")
    assert "version-mismatch" not in look(host)
    # As Debian's alternatives do it: by absolute links.
    host.write("usr/lib/x86_64-linux-gnu/nvidia/current/libnvidia-ml.so.535.1")
    host.link("etc/alternatives/nvml", "/usr/lib/x86_64-linux-gnu/nvidia/current/libnvidia-ml.so.535.1")
    host.link("usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", "/etc/alternatives/nvml")
    assert "535.1 (/usr/lib/x86_64-linux-gnu/nvidia/current/" in look(host)["version-mismatch"].what


def test_driver_replaced(host: Host) -> None:
    (host.root / "lib/modules").mkdir(parents=True)
    assert look(host, run=answers(modinfo="575.1"))["driver-replaced"].severity == "warning"
    assert "driver-replaced" not in look(host, run=answers(modinfo=DRIVER))


def test_userland_missing(host: Host) -> None:
    host.remove(f"usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{DRIVER}")
    assert look(host)["userland-missing"].severity == "error"
    host.remove("usr/bin/nvidia-container-cli")
    assert look(host)["userland-missing"].severity == "info"


@pytest.mark.parametrize(
    ("device", "kind", "needs"),
    [
        ("2b85", "proprietary", "open"),
        ("1b80", "open", "proprietary"),
        ("2b85", "open", ""),
        ("1b80", "proprietary", ""),
        ("2204", "open", ""),
        ("2204", "proprietary", ""),
    ],
)
def test_module_kind(host: Host, device: str, kind: str, needs: str) -> None:
    host.card(device=device)
    host.driver(kind=kind)
    found = look(host)
    assert bool(needs) == ("module-kind" in found)
    if needs:
        assert f"needs the {needs} kernel module" in found["module-kind"].what


def test_version_without_the_line_of_proc(host: Host) -> None:
    host.remove("proc/driver/nvidia/version")
    assert loaded_driver(str(host.root)) == (DRIVER, "")
    host.driver("535.183.01", "proprietary")
    assert loaded_driver(str(host.root)) == ("535.183.01", "proprietary")


# --- nodes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", ["nvidia0", "nvidiactl"])
def test_node_missing(host: Host, node: str) -> None:
    host.remove(f"dev/{node}")
    found = look(host)["node-missing"]
    assert found.severity == "error"
    assert f"/dev/{node} is not there" in found.what
    assert found.mends == preflight.MAKES_NODES


def test_uvm_missing(host: Host) -> None:
    host.remove("dev/nvidia-uvm")
    found = look(host)
    assert found["uvm-missing"].severity == "error"
    assert found["uvm-missing"].mends == preflight.MAKES_NODES
    assert "uvm-unit" not in found


@pytest.mark.parametrize(
    ("text", "enabled", "enough"),
    [
        (UNIT, True, True),
        (UNIT, False, False),
        (UNIT.replace("Before=incus.service\n", ""), True, False),
        (UNIT.replace("Before=incus.service", "Before=foo.service incus.socket"), True, True),
        (UNIT.replace("nvidia-modprobe -c0 -u", "nvidia-modprobe -c0"), True, False),
        (UNIT.replace("/usr/bin/nvidia-modprobe -c0 -u", "/sbin/modprobe nvidia-uvm"), True, True),
        (UNIT.replace("-c0 -u", "--unified-memory"), True, True),
    ],
)
def test_uvm_unit(host: Host, text: str, enabled: bool, enough: bool) -> None:
    host.remove("etc/systemd/system/nvidia-uvm.service")
    host.remove("etc/systemd/system/multi-user.target.wants/nvidia-uvm.service")
    host.unit(text, "other.service", enabled)
    assert ("uvm-unit" not in look(host)) == enough


def test_a_drop_in_of_incus_makes_the_node_as_well(host: Host) -> None:
    host.remove("etc/systemd/system/nvidia-uvm.service")
    assert look(host)["uvm-unit"].severity == "warning"
    host.write(
        "etc/systemd/system/incus.service.d/gpu.conf",
        "[Service]\nExecStartPre=-/usr/bin/nvidia-modprobe -u -c=0\n",
    )
    assert "uvm-unit" not in look(host)


def test_the_files_of_the_role_are_what_the_preflight_looks_for(host: Host) -> None:
    files = ROOT / "roles/gpu_host/files"
    host.unit((files / "nvidia-uvm.service").read_text())
    assert "uvm-unit" not in look(host)
    # The same on a host without systemd.
    host.remove("etc/systemd/system/nvidia-uvm.service")
    (host.root / "run/systemd/system").rmdir()
    host.write("etc/init.d/nvidia-uvm", (files / "nvidia-uvm.init").read_text())
    assert "uvm-unit" in look(host)
    host.link("etc/rc2.d/S01nvidia-uvm", "../init.d/nvidia-uvm")
    assert "uvm-unit" not in look(host)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not there")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = (ROOT / "roles/gpu_host/files/nvidia-uvm.service").read_text()
    path = tmp_path / "nvidia-uvm.service"
    path.write_text(unit.replace("/usr/local/sbin/nvidia-uvm-nodes", "/bin/true"))
    answer = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert "nvidia-uvm.service" not in answer.stderr
    assert answer.returncode == 0, answer.stderr


def can_unshare() -> bool:
    command = ["unshare", "-m", "true"]
    return os.geteuid() == 0 and subprocess.run(command, timeout=10, check=False).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="needs a mount namespace of its own")
@pytest.mark.parametrize("tool", [True, False])
def test_the_script_makes_the_nodes_of_every_card(tmp_path: Path, tool: bool) -> None:
    """The script itself over a made-up /proc; the programs that touch the kernel write down their calls."""
    commands = ["modprobe", "mknod", *(["nvidia-modprobe"] if tool else [])]
    for name in commands:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n')
        path.chmod(0o755)
    (tmp_path / "devices").write_text("Character devices:\n195 nvidia\n508 nvidia-uvm\n")
    for number in (0, 3):
        card = tmp_path / f"gpus/0000:0{number}:00.0/information"
        card.parent.mkdir(parents=True)
        card.write_text(f"Model: \t A card\nDevice Minor: \t {number}\n")
    script = f"""
    mount --bind {tmp_path}/devices /proc/devices
    mount -t tmpfs none /proc/driver
    mkdir -p /proc/driver/nvidia/gpus
    cp -r {tmp_path}/gpus/. /proc/driver/nvidia/gpus/
    PATH={tmp_path}/bin:$PATH sh {ROOT}/roles/gpu_host/files/nvidia-uvm-nodes
    """
    subprocess.run(["unshare", "-m", "sh", "-ec", script], timeout=20, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    if tool:
        assert calls == ["nvidia-modprobe -c0 -u", "nvidia-modprobe -c=0", "nvidia-modprobe -c=3"]
    else:
        assert calls == [
            "modprobe nvidia",
            "modprobe nvidia-uvm",
            "mknod -m 0666 /dev/nvidiactl c 195 255",
            "mknod -m 0666 /dev/nvidia-uvm c 508 0",
            "mknod -m 0666 /dev/nvidia-uvm-tools c 508 1",
            "mknod -m 0666 /dev/nvidia0 c 195 0",
            "mknod -m 0666 /dev/nvidia3 c 195 3",
        ]


# --- tools and Incus -------------------------------------------------------------------------------------


def test_runtime_tools(host: Host) -> None:
    host.remove("usr/bin/nvidia-container-cli")
    found = look(host)["runtime-tools"]
    assert (found.severity, found.mends) == ("info", "")
    assert look(host, [{**CONTAINER, "runtime": True}])["runtime-tools"].severity == "error"


@pytest.mark.parametrize(("candidate", "offered"), [("1.17.4-1", True), ("(none)", False)])
def test_runtime_tools_that_apt_offers(host: Host, candidate: str, offered: bool) -> None:
    host.remove("usr/bin/nvidia-container-cli")
    policy = f"libnvidia-container-tools:\n  Installed: (none)\n  Candidate: {candidate}\n"
    found = look(host, run=answers(apt_cache=policy))["runtime-tools"]
    assert bool(found.mends) == offered


def test_hook_of_packages_below_opt(host: Host) -> None:
    host.remove("usr/share/lxc/hooks/nvidia")
    assert "LXC's nvidia hook" in look(host)["runtime-tools"].what
    host.write("opt/incus/share/lxc/hooks/nvidia")
    assert "runtime-tools" not in look(host)


def test_incus(host: Host) -> None:
    assert look(host, incus=None)["incus-silent"].severity == "info"
    old = gpu_facts.Incus("0.1", EXTENSIONS - {"nvidia_runtime"})
    assert "nvidia_runtime" in look(host, incus=old)["incus-old"].what
    sliced = {**CONTAINER, "mig": True, "runtime": True}
    assert "gpu_mig_uuid" in look(host, [sliced])["incus-old"].what


# --- who else uses it ------------------------------------------------------------------------------------


def test_card_busy(host: Host) -> None:
    host.process(4711, "python3", "/dev/nvidia0", "/dev/nvidia-uvm")
    found = look(host)["card-busy"]
    assert found.severity == "warning"
    assert "python3 (pid 4711)" in found.what
    assert "4711" in found.remedy


def test_processes_that_are_not_in_the_way(host: Host) -> None:
    host.process(200, "ollama", "/dev/nvidia0", cgroup="0::/lxc.payload.speech/system.slice")
    host.process(201, "nvtop", "/dev/nvidiactl")
    host.process(202, "bash", "/dev/null")
    assert look(host) == {}


def test_display(host: Host) -> None:
    host.process(300, "Xorg", "/dev/nvidia0")
    found = look(host)
    assert "Xorg (pid 300)" in found["display"].what
    assert "card-busy" not in found


def test_a_desktop_on_the_intel_card_is_not_in_the_way(host: Host) -> None:
    host.card("8086", "56a0", "i915", pci="0000:00:02.0", drm=("card0", "renderD128"))
    host.process(300, "gnome-shell", "/dev/dri/card0", "/dev/dri/renderD128")
    assert look(host) == {}


def test_a_busy_card_keeps_a_virtual_machine_from_starting(host: Host) -> None:
    host.card(group="7")
    host.process(4711, "python3", "/dev/nvidia0")
    assert look(host, [VM])["card-busy"].severity == "error"
    assert look(host, [VM, CONTAINER])["card-busy"].severity == "warning"


def test_processes_of_others_unseen() -> None:
    # Not below pytest's folder, which is closed to others; as root nothing would be hidden.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        host = sound_host(Path(folder))
        host.process(1, "init")
        hidden = host.root / "proc/1/fd"
        hidden.chmod(0)
        was = os.geteuid()
        if was == 0:
            os.seteuid(65534)
        try:
            found = look(host)
        finally:
            os.seteuid(was)
            hidden.chmod(0o755)
    assert list(found) == ["holders-unseen"]
    assert found["holders-unseen"].severity == "info"


def test_the_search_for_holders_ends_in_time(host: Host) -> None:
    times = iter([0.0, gpu_facts.SCAN_SECONDS + 1])
    holders, complete, _unused = gpu_facts.read_holders(str(host.root), lambda: next(times))
    assert holders == []
    assert not complete


def test_persistence(host: Host) -> None:
    shutil.rmtree(host.root / "proc/100")
    assert look(host)["persistence"].severity == "info"


# --- virtual machines ------------------------------------------------------------------------------------


def test_iommu_off(host: Host) -> None:
    assert look(host, [VM])["iommu-off"].severity == "error"
    assert "iommu-off" not in look(host, [CONTAINER])
    host.card(group="7")
    assert look(host, [VM]) == {}


def test_iommu_group(host: Host) -> None:
    host.card(group="7")
    for pci, kind in (("0000:01:00.1", "0x040300"), ("0000:00:01.0", "0x060400")):
        host.write(f"sys/bus/pci/devices/{pci}/class", f"{kind}\n")
        host.link(f"sys/kernel/iommu_groups/7/devices/{pci}", f"../../../../bus/pci/devices/{pci}")
    # Its own sound output and a bridge do not matter.
    assert look(host, [VM]) == {}
    host.write("sys/bus/pci/devices/0000:02:00.0/class", "0x020000\n")
    host.link("sys/kernel/iommu_groups/7/devices/0000:02:00.0", "../../../../bus/pci/devices/0000:02:00.0")
    assert "0000:02:00.0" in look(host, [VM])["iommu-group"].what


def test_for_virtual_machines_only_the_driver_of_the_host_does_not_matter(host: Host) -> None:
    host.card(driver="nouveau", group="7")
    host.remove("dev/nvidia-uvm", "proc/driver/nvidia/version", "sys/module/nvidia/version")
    assert look(host, [VM]) == {}


# --- upgrades --------------------------------------------------------------------------------------------


def test_unattended_upgrades(host: Host) -> None:
    host.packages("nvidia-driver", "libcuda1", "bash", "libnvidia-container1", "nvidia-container-toolkit")
    found = look(host)["unattended-upgrades"]
    assert found.severity == "warning"
    assert "(libcuda1, nvidia-driver)" in found.what
    assert found.mends == preflight.HOLDS


def test_unattended_upgrades_that_cannot_break_anything(host: Host) -> None:
    driver = ("nvidia-driver", "libnvidia-ml1", "libcuda1", "nvidia-kernel-dkms", "libnvidia-compute-570")
    host.packages(*driver, hold=driver)
    assert look(host) == {}
    host.packages(*driver)
    assert "unattended-upgrades" in look(host)
    # What the role writes covers them all, and not the container tools.
    mended = (ROOT / "roles/gpu_host/files/unattended-upgrades").read_text()
    host.write("etc/apt/apt.conf.d/52sottovoce-nvidia", mended)
    assert look(host) == {}
    host.remove("etc/apt/apt.conf.d/52sottovoce-nvidia")
    host.write("etc/apt/apt.conf.d/50own", 'Unattended-Upgrade::Package-Blacklist:: "(lib)?(nvidia|cuda)";')
    assert look(host) == {}
    host.write(
        "etc/apt/apt.conf.d/50own", '// Unattended-Upgrade::Package-Blacklist:: "(lib)?(nvidia|cuda)";'
    )
    assert "unattended-upgrades" in look(host)
    host.write("etc/apt/apt.conf.d/50own", 'APT { Periodic { Unattended-Upgrade "0"; }; };')
    assert look(host) == {}


def test_apt_takes_the_file_of_the_role() -> None:
    if not shutil.which("apt-config"):
        pytest.skip("apt-config is not there")
    path = ROOT / "roles/gpu_host/files/unattended-upgrades"
    answer = subprocess.run(
        ["apt-config", "-c", str(path), "dump", "Unattended-Upgrade::Package-Blacklist"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert 'Package-Blacklist:: "(lib)?nvidia-(?!container)";' in answer.stdout


# --- AMD and Intel ---------------------------------------------------------------------------------------


def amd(tmp_path: Path, driver: str = "amdgpu") -> Host:
    host = Host(tmp_path)
    host.write("usr/share/misc/pci.ids", IDS)
    host.card("1002", "744c", driver, drm=("card0", "renderD128") if driver else ())
    return host


def test_amd(tmp_path: Path) -> None:
    host = amd(tmp_path)
    assert list(look(host)) == ["kfd-missing"]
    host.write("dev/kfd")
    assert list(look(host)) == ["kfd-device"]
    host.remove("dev/dri/renderD128")
    assert look(host)["render-node"].severity == "error"


def test_amd_without_its_driver(tmp_path: Path) -> None:
    found = look(amd(tmp_path, ""))["drm-driver"]
    assert "Navi 31" in found.what
    assert "modprobe amdgpu" in found.remedy


@pytest.mark.parametrize("driver", ["i915", "xe"])
def test_intel(tmp_path: Path, driver: str) -> None:
    host = Host(tmp_path)
    host.card("8086", "56a0", driver, drm=("card0", "renderD128"))
    assert look(host) == {}
    host.card("8086", "56a0", "")
    assert look(host)["drm-driver"].severity == "error"


# --- who wants a card, and what becomes of the findings --------------------------------------------------


def test_machines_that_want_a_card() -> None:
    state = {
        "profiles": [
            {
                "project": "ai",
                "name": "gpu",
                "devices": {"g": {"type": "gpu", "pci": "01:00.0"}},
                "config": {},
            },
            {"project": "ai", "name": "rt", "devices": {}, "config": {"nvidia.runtime": "true"}},
        ],
        "instances": [
            {"project": "ai", "name": "a", "type": "container", "gpu": {"optional": True}},
            {"project": "ai", "name": "b", "type": "container", "profiles": ["gpu", "rt"]},
            {"project": "ai", "name": "c", "type": "virtual-machine", "devices": {"x": {"type": "gpu"}}},
            {
                "project": "ai",
                "name": "d",
                "type": "container",
                "gpu": None,
                "devices": {"n": {"type": "nic"}},
            },
            {"project": "other", "name": "e", "type": "container", "profiles": ["gpu"]},
            {
                "project": "ai",
                "name": "f",
                "type": "container",
                "gpu": {"mig": "1g.10gb", "pci": "0000:02:00.0"},
            },
        ],
    }
    found = {m["name"]: m for m in preflight.machines(state)}
    assert list(found) == ["a", "b", "c", "f"]
    assert found["a"]["optional"]
    assert found["b"]["runtime"]
    assert found["b"]["pcis"] == [PCI]
    assert found["c"]["vm"]
    assert found["f"]["mig"]
    assert found["f"]["runtime"]
    wanted = wanted_by(found.values())
    assert wanted.required
    assert wanted.vms == ("c",)
    assert wanted.runtime == ("b", "f")
    assert preflight.machines({}) == []


def test_errors_stop_only_where_somebody_needs_the_card(host: Host) -> None:
    host.card(driver="nouveau")
    facts = gpu_facts.read_facts(str(host.root), INCUS, (), answers())

    def stops(machines: list[dict[str, Any]] | None) -> int:
        wanted = wanted_by(machines)
        return len(preflight.blocking(preflight.findings(facts, wanted), facts, wanted))

    assert stops(None) > 0
    assert stops([CONTAINER]) > 0
    assert stops([{**CONTAINER, "optional": True}]) == 0
    assert stops([{**CONTAINER, "optional": True}, CONTAINER]) > 0
    assert stops([]) == 0


def test_nothing_is_an_error_where_no_machine_wants_a_card(host: Host) -> None:
    host.card(driver="nouveau")
    assert look(host, [])["nouveau"].severity == "warning"
    host.card(driver="vfio-pci")
    assert "vfio" not in look(host, [])


def test_root_at_hand() -> None:
    assert gpu_facts.root_at_hand(answers(), uid=0)
    assert gpu_facts.root_at_hand(answers(sudo="0\n"), uid=1000)
    assert not gpu_facts.root_at_hand(answers(), uid=1000)


def test_notes_leave_out_what_is_only_good_to_know() -> None:
    def finding(name: str, severity: str) -> dict[str, str]:
        return {"id": name, "severity": severity, "what": "W", "why": "y", "remedy": "R.", "mends": ""}

    found = [finding("no-card", "warning"), finding("display", "warning"), finding("persistence", "info")]
    assert preflight.notes(found) == ["W: y. R. [no-card]", "W: y. R. [display]"]
    assert preflight.notes(found, wanted_optionally=True) == ["W: y. R. [display]"]


def test_report(host: Host) -> None:
    host.remove("dev/nvidia-uvm")
    facts = gpu_facts.read_facts(str(host.root), INCUS, (), answers())
    found = [vars(f) for f in preflight.findings(facts)]
    lines = preflight.report({"looked": True, "host": preflight.host_lines(facts), "findings": found})
    text = "\n".join(lines)
    assert f"NVIDIA card {PCI} (GA102 [GeForce RTX 3090]), driver nvidia" in lines
    assert f"NVIDIA driver: kernel {DRIVER} (open module), userland {DRIVER}" in lines
    assert "ERROR     uvm-missing  /dev/nvidia-uvm is not there" in text
    assert "  remedy: nvidia-modprobe -c0 -u, then restart the machine." in lines
    assert preflight.report({"looked": True, "host": ["x"], "findings": []})[-1] == "Nothing was found."
    assert preflight.report({"looked": False, "note": "remote"})[-1] == "remote"


def test_unknown_wishes_count_as_needs() -> None:
    assert Wanted() == wanted_by(None)
    assert Wanted().required
    assert not wanted_by([]).anybody


def test_docs_explain_every_finding() -> None:
    text = (ROOT / "docs/gpu.md").read_text()
    source = (ROOT / "plugins/module_utils/_gpu_preflight.py").read_text()
    names = [
        line.split('"')[1]
        for before, line in zip(source.splitlines(), source.splitlines()[1:], strict=False)
        if before.rstrip().endswith("Finding(")
    ]
    assert len(names) > 20
    assert [name for name in names if f"`{name}`" not in text] == []


def test_looking_is_quick(host: Host) -> None:
    for pid in range(1000, 1400):
        host.process(pid, "sleep", *["/dev/null"] * 10)
    start = time.monotonic()
    look(host)
    assert time.monotonic() - start < 0.5


# --- module, playbook and role ---------------------------------------------------------------------------


@pytest.fixture
def play(
    host: Host, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("play")
    env = {
        **os.environ,
        "SOTTOVOCE_HOST_ROOT": str(host.root),
        "INCUS_SOCKET": str(folder / "none.socket"),
        "ANSIBLE_NOCOLOR": "1",
    }

    def run(*arguments: str, infra: str = "", **tasks: Any) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / ".venv/bin/ansible-playbook"), *arguments]
        if infra:
            (folder / "infra.yml").write_text(infra)
            command += ["-i", str(folder / "infra.yml")]
        if tasks:
            name = folder / "play.yml"
            head = {"hosts": "localhost", "connection": "local", "gather_facts": False}
            name.write_text(yaml.safe_dump([{**head, **tasks}]))
            command.append(str(name))
        return subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
        )

    return run


INFRA = """
project_name: t
global: {addressing: {base_octet: 10, zone_base: 100, zone_step: 10}}
domains:
  d:
    machines:
      box: {gpu: GPU, roles: [base_system]}
"""
ROLE = {"ansible.builtin.include_role": {"name": "sottovoce.stack.gpu_host"}}


def test_doctor_shows_findings_and_fails_on_errors(host: Host, play: Callable[..., Any]) -> None:
    sound = play("playbooks/doctor.yml", infra=INFRA.replace("GPU", "true"))
    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert "incus-silent" in sound.stdout
    host.remove("dev/nvidia-uvm")
    answer = play("playbooks/doctor.yml", infra=INFRA.replace("GPU", "true"))
    assert answer.returncode == 2
    assert "ERROR     uvm-missing   /dev/nvidia-uvm is not there" in answer.stdout
    assert "docs/gpu.md explains each finding" in answer.stdout + answer.stderr


def test_apply_stops_before_anything_is_changed(host: Host, play: Callable[..., Any]) -> None:
    host.card(driver="nouveau")
    answer = play("playbooks/host.yml", "--check", infra=INFRA.replace("GPU", "true"))
    assert answer.returncode == 2
    assert "[nouveau]" in answer.stdout + answer.stderr
    assert "Look at Incus on this machine" not in answer.stdout


def test_apply_goes_on_where_the_card_is_optional(host: Host, play: Callable[..., Any]) -> None:
    host.card(driver="nouveau")
    answer = play("playbooks/host.yml", "--check", infra=INFRA.replace("GPU", "{optional: true}"))
    assert "Look at Incus on this machine" in answer.stdout
    assert "[nouveau]" not in answer.stdout + answer.stderr


def test_apply_does_not_look_where_no_machine_wants_a_card(host: Host, play: Callable[..., Any]) -> None:
    host.card(driver="nouveau")
    answer = play("playbooks/host.yml", "--check", infra=INFRA.replace("gpu: GPU, ", ""))
    assert "Look at Incus on this machine" in answer.stdout
    assert "Look at the GPU of this host" not in answer.stdout


def test_role_in_check_mode_shows_what_it_would_mend(host: Host, play: Callable[..., Any]) -> None:
    host.remove("dev/nvidia-uvm", "etc/systemd/system/nvidia-uvm.service")
    host.packages("libcuda1")
    before = sorted(str(path) for path in host.root.rglob("*"))
    show = {"ansible.builtin.debug": {"var": "gpu_host_summary"}}
    answer = play("--check", "--diff", tasks=[ROLE, show])
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "Before=incus.service" in answer.stdout
    assert "Package-Blacklist" in answer.stdout
    assert "[uvm-missing]" in answer.stdout
    assert sorted(str(path) for path in host.root.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="the role's files belong to root")
def test_role_mends_and_looks_again(host: Host, play: Callable[..., Any]) -> None:
    host.remove("etc/systemd/system/nvidia-uvm.service")
    host.packages("libcuda1")
    answer = play(tasks=[ROLE, ROLE])
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (host.root / "usr/local/sbin/nvidia-uvm-nodes").stat().st_mode & 0o777 == 0o755
    assert "changed=3" in answer.stdout
    # The link of the unit that was taken away makes the new one enabled.
    assert look(host) == {}
    # The second time there is nothing to mend, so nothing is looked at again.
    assert answer.stdout.count("Look at the GPU of this host]") == 2
    assert answer.stdout.count("Look again]") == 1


def test_role_stops_at_what_it_could_not_mend(host: Host, play: Callable[..., Any]) -> None:
    host.remove("dev/nvidia-uvm")
    off = {"gpu_host_make_nodes": False}
    answer = play(vars=off, tasks=[ROLE])
    assert answer.returncode == 2
    assert "[uvm-missing]" in answer.stdout + answer.stderr
    optional = [{**CONTAINER, "optional": True}]
    answer = play(
        vars={**off, "gpu_host_machines": optional},
        tasks=[ROLE, {"ansible.builtin.debug": {"var": "gpu_host_summary"}}],
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "[uvm-missing]" in answer.stdout


def test_a_remote_server_is_named_in_one_line(play: Callable[..., Any]) -> None:
    answer = play(
        vars={"gpu_host_remote_url": "https://gpu-host:8443"},
        tasks=[ROLE, {"ansible.builtin.debug": {"var": "gpu_host_summary.notes"}}],
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "https://gpu-host:8443" in answer.stdout
    assert "cannot be looked into from here" in " ".join(answer.stdout.split())

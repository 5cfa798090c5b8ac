"""
A made-up host: a folder with the files that gpu_preflight looks at.

SOTTOVOCE_HOST_ROOT=<folder> makes the module gpu_preflight take that folder for `/`, and the role gpu_host
write below it and start no service. It is for tests only and says nothing of any real card. Paths in it:

    sys/bus/pci/devices/<pci>/{vendor,device,class,drm/renderDN}, links driver and iommu_group
    proc/driver/nvidia/version, proc/driver/nvidia/gpus/<pci>/information, sys/module/nvidia/version
    lib/modules (none: the module on disk is not known), usr/lib/<triplet>/libnvidia-ml.so.<version>
    dev/nvidia0, dev/nvidiactl, dev/nvidia-uvm (any file), proc/<pid>/{comm,cgroup,fd/N}
    usr/bin/nvidia-container-cli, usr/share/lxc/hooks/nvidia, usr/share/misc/pci.ids,
    etc/…, var/lib/dpkg/status
"""

from __future__ import annotations

import os
from pathlib import Path

PCI = "0000:01:00.0"
DRIVER = "570.86.15"
IDS = """# a part of the list of PCI ids
1002  AMD
\t744c  Navi 31 [Radeon RX 7900 XTX]
10de  NVIDIA
\t1b80  GP104 [GeForce GTX 1080]
\t2204  GA102 [GeForce RTX 3090]
\t2b85  GB202 [GeForce RTX 5090]
8086  Intel
\t56a0  DG2 [Arc A770]
"""
UNIT = """[Unit]
Before=incus.service
[Service]
Type=oneshot
ExecStart=/usr/bin/nvidia-modprobe -c0 -u
"""


class Host:
    """The folder, and ways to put things into it and take them out."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str = "") -> Path:
        full = self.root / path
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_text(text)
        return full

    def link(self, path: str, target: str) -> None:
        full = self.root / path
        full.parent.mkdir(parents=True, exist_ok=True)
        full.unlink(missing_ok=True)
        full.symlink_to(target)

    def remove(self, *paths: str) -> None:
        for path in paths:
            (self.root / path).unlink()

    def card(
        self,
        vendor: str = "10de",
        device: str = "2204",
        driver: str = "nvidia",
        pci: str = PCI,
        drm: tuple[str, ...] = (),
        group: str = "",
    ) -> None:
        """A display controller; its DRM nodes are made as well."""
        base = f"sys/bus/pci/devices/{pci}"
        self.write(f"{base}/vendor", f"0x{vendor}\n")
        self.write(f"{base}/device", f"0x{device}\n")
        self.write(f"{base}/class", "0x030000\n")
        link = self.root / base / "driver"
        link.unlink(missing_ok=True)
        if driver:
            link.symlink_to(f"../../../../bus/pci/drivers/{driver}")
        for name in drm:
            (self.root / base / "drm" / name).mkdir(parents=True, exist_ok=True)
            self.write(f"dev/dri/{name}")
        if group:
            members = self.root / f"sys/kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / pci).symlink_to(f"../../../../bus/pci/devices/{pci}")
            (self.root / base / "iommu_group").symlink_to(f"../../../../kernel/iommu_groups/{group}")

    def driver(self, version: str = DRIVER, kind: str = "open") -> None:
        """The loaded kernel module of NVIDIA, as its own line in /proc says it."""
        name = (
            f"Open Kernel Module for x86_64  {version}"
            if kind == "open"
            else f"x86_64 Kernel Module  {version}"
        )
        self.write(
            "proc/driver/nvidia/version", f"NVRM version: NVIDIA UNIX {name}  Release Build\nGCC version:\n"
        )
        self.write("sys/module/nvidia/version", f"{version}\n")
        self.write(f"proc/driver/nvidia/gpus/{PCI}/information", "Model: \t\t A card\nDevice Minor: \t 0\n")

    def process(self, pid: int, name: str, *nodes: str, cgroup: str = "0::/user.slice") -> None:
        self.write(f"proc/{pid}/comm", f"{name[:15]}\n")
        self.write(f"proc/{pid}/cgroup", f"{cgroup}\n")
        for number, node in enumerate(nodes):
            self.link(f"proc/{pid}/fd/{number}", node)
        (self.root / f"proc/{pid}/fd").mkdir(exist_ok=True)

    def unit(self, text: str = UNIT, name: str = "nvidia-uvm.service", enabled: bool = True) -> None:
        self.write(f"etc/systemd/system/{name}", text)
        if enabled:
            self.link(f"etc/systemd/system/multi-user.target.wants/{name}", f"/etc/systemd/system/{name}")

    def packages(self, *names: str, hold: tuple[str, ...] = ()) -> None:
        """Installed packages, and unattended upgrades switched on as Debian does it."""
        wanted = {name: "hold" if name in hold else "install" for name in names}
        stanzas = [f"Package: {n}\nStatus: {w} ok installed\nPriority: optional\n" for n, w in wanted.items()]
        self.write("var/lib/dpkg/status", "\n".join(stanzas))
        self.write("usr/bin/unattended-upgrade")
        self.write("etc/apt/apt.conf.d/20auto-upgrades", 'APT::Periodic::Unattended-Upgrade "1";\n')


def sound_host(root: Path) -> Host:
    """A systemd host with one NVIDIA card where nothing is to be found."""
    host = Host(root)
    host.card()
    host.driver()
    host.write("usr/share/misc/pci.ids", IDS)
    (root / "run/systemd/system").mkdir(parents=True)
    host.write(f"usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{DRIVER}")
    for node in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        host.write(f"dev/{node}")
    host.write("usr/bin/nvidia-container-cli")
    host.write("usr/share/lxc/hooks/nvidia")
    host.unit()
    host.process(100, "nvidia-persistenced", "/dev/nvidia0")
    os.makedirs(root / "etc/apt/apt.conf.d")
    os.makedirs(root / "usr/local/sbin")
    return host

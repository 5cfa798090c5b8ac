# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a host's files say of its GPUs and their drivers. Reads only, and nothing that can block.

Every function takes `root`, the folder that stands for `/`. What cannot be read counts as absent.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence

from ansible_collections.sottovoce.stack.plugins.module_utils._incus_gpu import normal_pci
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_host import init_system
from ansible_collections.sottovoce.stack.plugins.module_utils._nvidia_driver import loaded_driver

# Vendors whose cards compute; anything else that drives a screen is board management or emulated.
VENDORS = {"10de": "NVIDIA", "1002": "AMD", "8086": "Intel"}
# Seconds that the search for holders of the card may take, and one command.
SCAN_SECONDS = 0.25
COMMAND_SECONDS = 1.0

_LIBRARY_FOLDERS = (
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    # Debian keeps the driver's libraries apart, and links to them.
    "usr/lib/x86_64-linux-gnu/nvidia/current",
    "usr/lib/aarch64-linux-gnu/nvidia/current",
)
_LIBRARIES = ("libnvidia-ml.so", "libcuda.so")
# Where incusd looks: its PATH as packaged, and LXC's hooks (packages below /opt bring their own).
_TOOL_FOLDERS = ("usr/libexec/incus", "usr/sbin", "usr/bin", "sbin", "bin", "opt/incus/bin")
_HOOKS = ("usr/share/lxc/hooks/nvidia", "opt/incus/share/lxc/hooks/nvidia")
_UNIT_FOLDERS = ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")
_MAKES_UVM = re.compile(r"nvidia-uvm|nvidia-modprobe\b.*\s(-\w*u\w*|--unified-memory)\b")
# Packages whose kernel half and userland half must be of one version. The container tools are none of them.
DRIVER_PACKAGE = re.compile(r"(lib)?nvidia-(?!container)|libcuda1$|libcudadebugger1$|libnvcuvid1$")
_SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"

Run = Callable[[Sequence[str]], str]


@dataclasses.dataclass(frozen=True)
class HostCard:
    """A display controller with what sysfs says of it; `driver` empty if none is bound."""

    pci: str
    vendor: str
    device: str
    driver: str
    name: str = ""
    drm: tuple[str, ...] = ()  # paths of its nodes, /dev/dri/card0 and so on
    iommu_group: str = ""
    group_others: tuple[str, ...] = ()  # of the same IOMMU group, neither this card nor a bridge

    def __str__(self) -> str:
        return f"{self.pci} ({self.name})" if self.name else self.pci


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process of the host that has a card's node open."""

    pid: int
    name: str
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


@dataclasses.dataclass(frozen=True)
class Incus:
    """What GET /1.0 says, as far as it matters here."""

    version: str
    extensions: frozenset[str]
    clustered: bool = False


@dataclasses.dataclass(frozen=True)
class HostFacts:
    """Everything the findings are made from."""

    cards: tuple[HostCard, ...] = ()
    loaded: str = ""  # version of the loaded kernel module; empty if none is
    kind: str = ""  # open, proprietary or empty (not known)
    installed: str | None = None  # version of the module on disk; empty: none; None: not known
    library: str = ""  # version of the userland library
    library_path: str = ""
    minors: tuple[tuple[str, int], ...] = ()  # PCI address and number of /dev/nvidiaN
    nodes: frozenset[str] = frozenset()
    uvm_by: str = ""  # what makes /dev/nvidia-uvm before Incus starts
    tools: str = ""
    hook: str = ""
    tools_offered: bool = False
    holders: tuple[Holder, ...] = ()
    holders_complete: bool = True
    persistenced: bool = False
    iommu: bool = False
    secure_boot: bool = False
    upgrades: tuple[str, ...] = ()  # driver packages that unattended upgrades may replace
    init: str = "systemd"
    incus: Incus | None = None

    def of(self, vendor: str) -> list[HostCard]:
        return [card for card in self.cards if card.vendor == vendor]


def run_command(argv: Sequence[str]) -> str:
    """Output of a harmless command; empty if it is missing, fails or takes too long."""
    path = shutil.which(argv[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        return ""
    try:
        answer = subprocess.run(
            [path, *argv[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def root_at_hand(run: Run = run_command, uid: int | None = None) -> bool:
    """Is this root, or does sudo make it so without asking for a password?"""
    if (os.geteuid() if uid is None else uid) == 0:
        return True
    return run(["sudo", "-n", "id", "-u"]).strip() == "0"


def _read(root: str, path: str) -> str:
    try:
        with open(os.path.join(root, path), encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def _entries(root: str, path: str) -> list[str]:
    try:
        return sorted(os.listdir(os.path.join(root, path)))
    except OSError:
        return []


def _link_name(path: str) -> str:
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return ""


# Cards


def _hex(root: str, path: str) -> str:
    return _read(root, path).strip().removeprefix("0x").lower()


def pci_name(root: str, vendor: str, device: str) -> str:
    """The name in the system's list of PCI ids, such as `GB202 [GeForce RTX 5090]`; empty if unknown."""
    text = _read(root, "usr/share/misc/pci.ids") or _read(root, "usr/share/hwdata/pci.ids")
    start = text.find(f"\n{vendor}  ")
    if start < 0:
        return ""
    end = re.compile(r"\n[0-9a-f]").search(text, start + 1)
    found = re.compile(rf"\n\t{device}  (.*)").search(text, start, end.start() if end else len(text))
    return found[1].strip() if found else ""


def _card(root: str, pci: str) -> HostCard:
    base = f"sys/bus/pci/devices/{pci}"
    folder = os.path.join(root, base)
    group = _link_name(os.path.join(folder, "iommu_group"))
    others = []
    for other in _entries(root, f"{base}/iommu_group/devices"):
        bridge = _hex(root, f"sys/bus/pci/devices/{other}/class").startswith("06")
        # Incus takes the functions of one slot together: a card's sound output is no stranger.
        if other.rpartition(".")[0] != pci.rpartition(".")[0] and not bridge:
            others.append(other)
    vendor, device = _hex(root, f"{base}/vendor"), _hex(root, f"{base}/device")
    return HostCard(
        pci=normal_pci(pci),
        vendor=vendor,
        device=device,
        driver=_link_name(os.path.join(folder, "driver")),
        name=pci_name(root, vendor, device) if vendor in VENDORS else "",
        drm=tuple(
            f"/dev/dri/{name}"
            for name in _entries(root, f"{base}/drm")
            if name.startswith(("card", "renderD"))
        ),
        iommu_group=group,
        group_others=tuple(others),
    )


def read_cards(root: str) -> list[HostCard]:
    """Display controllers (PCI class 03) of vendors whose cards compute."""
    found = []
    for pci in _entries(root, "sys/bus/pci/devices"):
        if _hex(root, f"sys/bus/pci/devices/{pci}/class").startswith("03"):
            card = _card(root, pci)
            if card.vendor in VENDORS:
                found.append(card)
    return found


# The NVIDIA driver


def minors(root: str) -> dict[str, int]:
    """PCI address to the number of its node /dev/nvidiaN."""
    found = {}
    for pci in _entries(root, "proc/driver/nvidia/gpus"):
        match = re.search(
            r"^Device Minor:\s*(\d+)", _read(root, f"proc/driver/nvidia/gpus/{pci}/information"), re.M
        )
        if match:
            found[normal_pci(pci)] = int(match[1])
    return found


def _resolved(root: str, path: str) -> str:
    """Where a chain of links ends, with absolute links taken below `root`."""
    for _unused in range(8):
        full = os.path.join(root, path)
        if not os.path.islink(full):
            break
        target = os.readlink(full)
        path = (
            target.lstrip("/")
            if target.startswith("/")
            else os.path.normpath(os.path.join(os.path.dirname(path), target))
        )
    return path


def library(root: str) -> tuple[str, str]:
    """
    Version and path of the driver's userland library; both empty if there is none.

    The version is the end of the file's name. Of several, the one that `.so.1` leads to is in use.
    """
    version = re.compile(r"\.so\.(\d+\.\d+(?:\.\d+)?)$")
    for name in _LIBRARIES:
        for folder in _LIBRARY_FOLDERS:
            path = _resolved(root, f"{folder}/{name}.1")
            match = version.search(path)
            if match and os.path.exists(os.path.join(root, path)):
                return match[1], f"/{path}"
    for name in _LIBRARIES:
        for folder in _LIBRARY_FOLDERS:
            pattern = os.path.join(glob.escape(os.path.join(root, folder)), f"{name}.*")
            for path in sorted(glob.glob(pattern), reverse=True):
                match = version.search(path)
                if match:
                    return match[1], f"/{folder}/{os.path.basename(path)}"
    return "", ""


def module_on_disk(root: str, run: Run = run_command) -> str | None:
    """Version of the module that the next boot of this kernel would load; empty if there is none."""
    if not os.path.isdir(os.path.join(root, "lib/modules")):
        return None
    text = run(["modinfo", "-b", root, "-F", "version", "nvidia"]).strip()
    if text:
        return text.split()[-1]
    # An empty answer may also mean that modinfo is missing: then look for the file itself.
    release = os.uname().release
    found = glob.glob(
        os.path.join(glob.escape(root), "lib/modules", glob.escape(release), "**", "nvidia*.ko*"),
        recursive=True,
    )
    return None if found else ""


def device_nodes(root: str) -> frozenset[str]:
    """Of /dev what belongs to GPUs, as paths."""
    names = [name for name in _entries(root, "dev") if name.startswith("nvidia") or name == "kfd"]
    names += [f"dri/{name}" for name in _entries(root, "dev/dri")]
    return frozenset(f"/dev/{name}" for name in names)


def uvm_maker(root: str) -> str:
    """Path of the enabled unit (or init script) that makes /dev/nvidia-uvm before Incus starts; or empty."""
    for folder in _UNIT_FOLDERS:
        for name in _entries(root, folder):
            path = f"{folder}/{name}"
            if name in ("incus.service.d", "incusd.service.d"):
                for part in _entries(root, path):
                    if _makes_uvm(_read(root, f"{path}/{part}")):
                        return f"/{path}/{part}"
            elif name.endswith(".service"):
                text = _read(root, path)
                if (
                    _makes_uvm(text)
                    and re.search(r"^Before=.*\bincus\.(service|socket)\b", text, re.M)
                    and _enabled(root, name)
                ):
                    return f"/{path}"
    if init_system(root) != "systemd":
        for name in _entries(root, "etc/init.d"):
            text = _read(root, f"etc/init.d/{name}")
            started = glob.glob(os.path.join(glob.escape(root), "etc/rc2.d", f"S*{name}"))
            if (
                started
                and _MAKES_UVM.search(text)
                and re.search(r"^# X-Start-Before:.*\bincus\b", text, re.M)
            ):
                return f"/etc/init.d/{name}"
    return ""


def _makes_uvm(text: str) -> bool:
    return any(
        _MAKES_UVM.search(line)
        for line in text.splitlines()
        if line.startswith(("ExecStart=", "ExecStartPre="))
    )


def _enabled(root: str, unit: str) -> bool:
    pattern = os.path.join(glob.escape(root), "etc/systemd/system", "*.[wr]*", glob.escape(unit))
    return any(os.path.dirname(path).endswith((".wants", ".requires")) for path in glob.glob(pattern))


def first_file(root: str, paths: Sequence[str]) -> str:
    return next((f"/{path}" for path in paths if os.path.isfile(os.path.join(root, path))), "")


def offered(packages: Sequence[str], run: Run = run_command) -> bool:
    """Does a configured apt source have all of them?"""
    text = run(["apt-cache", "policy", *packages])
    candidates = re.findall(r"^  Candidate: (.*)$", text, re.M)
    return len(candidates) == len(packages) and "(none)" not in candidates


# Processes


def read_holders(root: str, clock: Callable[[], float] = time.monotonic) -> tuple[list[Holder], bool, bool]:
    """
    Processes outside of containers that have a card's node open, whether all could be looked at, and
    whether the persistence daemon runs (which is not among them).
    """
    deadline = clock() + SCAN_SECONDS
    found: list[Holder] = []
    complete, persistenced = True, False
    for pid in _entries(root, "proc"):
        if not pid.isdigit():
            continue
        if clock() > deadline:
            return found, False, persistenced
        # The kernel cuts this name at 15 characters.
        name = _read(root, f"proc/{pid}/comm").strip()
        if name.startswith("nvidia-persiste"):
            persistenced = True
            continue
        nodes = set()
        folder = os.path.join(root, "proc", pid, "fd")
        try:
            numbers = os.listdir(folder)
        except PermissionError:
            complete = False
            continue
        except OSError:  # it ended meanwhile
            continue
        for number in numbers:
            try:
                target = os.readlink(os.path.join(folder, number))
            except OSError:
                continue
            if target.startswith(("/dev/nvidia", "/dev/dri/", "/dev/kfd")):
                nodes.add(target)
        # Incus names the control group of what runs in a container so.
        if nodes and "lxc.payload" not in _read(root, f"proc/{pid}/cgroup"):
            found.append(Holder(int(pid), name or "?", tuple(sorted(nodes))))
    return found, complete, persistenced


# Upgrades


def unattended(root: str) -> list[str]:
    """Installed packages of the driver that unattended upgrades may replace; empty if those are off."""
    text = "\n".join(
        _read(root, f"etc/apt/apt.conf.d/{name}")
        for name in _entries(root, "etc/apt/apt.conf.d")
        if "." not in name or name.endswith(".conf")
    )
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("//", "#")))
    switches = re.findall(r'\bUnattended-Upgrade\s+"([^"]*)"', text)
    if not switches or switches[-1] in ("0", ""):
        return []
    if not first_file(root, ["usr/bin/unattended-upgrade", "usr/bin/unattended-upgrades"]):
        return []
    blocked = re.findall(r'Package-Blacklist::\s*"([^"]*)"', text)
    for block in re.findall(r"Package-Blacklist\s*\{([^}]*)\}", text):
        blocked += re.findall(r'"([^"]*)"', block)
    found = []
    status = re.compile(r"^Package: (\S+)\nStatus: (\S+) \S+ installed$", re.M)
    for package, selection in status.findall(_read(root, "var/lib/dpkg/status")):
        if not DRIVER_PACKAGE.match(package) or selection == "hold":
            continue
        # Its own rule: a pattern is matched from the start of the name.
        if not any(_matches(pattern, package) for pattern in blocked):
            found.append(package)
    return sorted(set(found))


def _matches(pattern: str, package: str) -> bool:
    try:
        return re.match(pattern, package) is not None
    except re.error:
        return False


def _secure_boot(root: str) -> bool:
    try:
        with open(os.path.join(root, _SECURE_BOOT), "rb") as handle:
            return handle.read(5)[4:] == b"\x01"
    except OSError:
        return False


def read_facts(
    root: str = "/",
    incus: Incus | None = None,
    container_tools: Sequence[str] = (),
    run: Run = run_command,
) -> HostFacts:
    """Look at a host. container_tools: packages that apt is asked for if nvidia-container-cli is missing."""
    cards = read_cards(root)
    if not cards:
        return HostFacts(incus=incus, init=init_system(root))
    holders, complete, persistenced = read_holders(root)
    facts = HostFacts(
        cards=tuple(cards),
        nodes=device_nodes(root),
        holders=tuple(holders),
        holders_complete=complete,
        persistenced=persistenced,
        iommu=bool(_entries(root, "sys/kernel/iommu_groups")),
        init=init_system(root),
        incus=incus,
    )
    if not facts.of("10de"):
        return facts
    version, kind = loaded_driver(root)
    userland, path = library(root)
    tools = first_file(root, [f"{folder}/nvidia-container-cli" for folder in _TOOL_FOLDERS])
    return dataclasses.replace(
        facts,
        loaded=version,
        kind=kind,
        installed=module_on_disk(root, run),
        library=userland,
        library_path=path,
        minors=tuple(sorted(minors(root).items())),
        uvm_by=uvm_maker(root),
        tools=tools,
        hook=first_file(root, _HOOKS),
        tools_offered=not tools and bool(container_tools) and offered(container_tools, run),
        secure_boot=_secure_boot(root),
        upgrades=tuple(unattended(root)),
    )

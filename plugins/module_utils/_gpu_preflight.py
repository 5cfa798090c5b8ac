# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What keeps a host's GPU from reaching a machine, why, and what mends it: facts to findings, no I/O."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils._gpu_facts import (
    VENDORS,
    Holder,
    HostCard,
    HostFacts,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_gpu import normal_pci
from ansible_collections.sottovoce.stack.plugins.module_utils._summary import table

ERROR, WARNING, INFO = "error", "warning", "info"
_ORDER = (ERROR, WARNING, INFO)

# API extensions without which a card cannot be found or handed over; those for slices of a card.
_EXTENSIONS = ("resources_gpu", "gpu_devices", "nvidia_runtime", "nvidia_runtime_config")
_MIG_EXTENSIONS = ("gpu_mig", "gpu_mig_uuid")
# The host's drivers that let a card compute.
_DRIVERS = {"10de": ("nvidia",), "1002": ("amdgpu",), "8086": ("i915", "xe")}
# Programs that draw a screen.
_DISPLAY = re.compile(
    r"X(org|wayland)?$|gnome-shell|kwin_|plasmashell|sway$|weston|mutter|gdm|sddm|lightdm|Hyprland"
)
# What role gpu_host does.
MAKES_NODES = "loads nvidia-uvm, makes the nodes, and adds a service that does so before Incus at each boot"
HOLDS = "excludes the driver's packages from unattended upgrades"
INSTALLS = "installs nvidia-container-cli from the apt source that offers it"


@dataclasses.dataclass(frozen=True)
class Finding:
    """`remedy` is what a person does; `mends` what role gpu_host does by itself, empty if it does nothing."""

    id: str
    severity: str
    what: str
    why: str
    remedy: str
    mends: str = ""

    def line(self) -> str:
        return f"{self.what}: {self.why}. {self.remedy} [{self.id}]"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the declared machines want of the host's cards. `known` is false if nobody said."""

    known: bool = False
    required: bool = True  # some machine does not go without
    vms: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()  # machines that need nvidia.runtime
    mig: bool = False
    pcis: frozenset[str] = frozenset()

    @property
    def only_vms(self) -> bool:
        return bool(self.vms) and not self.containers

    @property
    def anybody(self) -> bool:
        return not self.known or bool(self.vms or self.containers)


def machines(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    Of a desired state, as the inventory plugin makes it, the machines that want a GPU: by `gpu`, by a device
    of their own or by one of a profile. Each {name, vm, optional, runtime, mig, pcis}.
    """
    profiles = {(p["project"], p["name"]): p for p in state.get("profiles") or []}
    found = []
    for instance in state.get("instances") or []:
        request = instance.get("gpu") or {}
        used = [profiles.get((instance["project"], name), {}) for name in instance.get("profiles") or []]
        devices = [
            device
            for holder in (*used, instance)
            for device in (holder.get("devices") or {}).values()
            if device.get("type") == "gpu"
        ]
        if not request and not devices:
            continue
        config: dict[str, Any] = {}
        for holder in (*used, instance):
            config.update(holder.get("config") or {})
        mig = bool(request.get("mig")) or any(device.get("gputype") == "mig" for device in devices)
        pcis = [str(value) for value in (request.get("pci"), *(d.get("pci") for d in devices)) if value]
        found.append(
            {
                "name": str(instance["name"]),
                "vm": instance.get("type") == "virtual-machine",
                "optional": bool(request.get("optional")),
                "runtime": mig or str(config.get("nvidia.runtime", "")).lower() in ("true", "1", "yes", "on"),
                "mig": mig,
                "pcis": [normal_pci(pci) for pci in pcis],
            }
        )
    return found


def wanted_by(found: Iterable[Mapping[str, Any]] | None) -> Wanted:
    """All that `machines` found together; None means that nobody said."""
    if found is None:
        return Wanted()
    listed = list(found)
    return Wanted(
        known=True,
        required=any(not m["optional"] for m in listed),
        vms=tuple(m["name"] for m in listed if m["vm"]),
        containers=tuple(m["name"] for m in listed if not m["vm"]),
        runtime=tuple(m["name"] for m in listed if m["runtime"] and not m["vm"]),
        mig=any(m["mig"] for m in listed),
        pcis=frozenset(pci for m in listed for pci in m["pcis"]),
    )


def findings(facts: HostFacts, wanted: Wanted = Wanted()) -> list[Finding]:
    """All that is to be said of a host, the worst first."""
    found = list(_incus(facts, wanted))
    if not facts.cards:
        found.append(_no_card(facts, wanted))
    else:
        found += _bindings(facts, wanted)
        if facts.of("10de") and not wanted.only_vms:
            found += _nvidia(facts, wanted)
        if not wanted.only_vms:
            found += _render(facts)
        found += _processes(facts, wanted)
        if wanted.vms:
            found += _iommu(facts, wanted)
    if not wanted.anybody:
        found = [dataclasses.replace(f, severity=WARNING) if f.severity == ERROR else f for f in found]
    return sorted(found, key=lambda finding: _ORDER.index(finding.severity))


def _no_card(facts: HostFacts, wanted: Wanted) -> Finding:
    clustered = bool(facts.incus and facts.incus.clustered)
    severity = ERROR if wanted.required and not clustered else WARNING
    if not wanted.anybody:
        severity = INFO
    return Finding(
        "no-card",
        severity,
        "This host has no NVIDIA, AMD or Intel card on its PCI bus",
        "there is nothing to hand to a machine"
        + (
            "; other members of the cluster were not looked at"
            if severity == WARNING and wanted.required
            else ""
        ),
        "See lspci -nn. If a card is built in: power, slot and firmware settings; in a virtual"
        " machine, hand the card"
        " to it first. To go on without: gpu: {optional: true} in infra.yml.",
    )


def _incus(facts: HostFacts, wanted: Wanted) -> Iterator[Finding]:
    if facts.incus is None:
        yield Finding(
            "incus-silent",
            INFO,
            "Incus does not answer here",
            "whether it is new enough could not be asked",
            "make apply installs and starts it.",
        )
        return
    needed = (*_EXTENSIONS, *(_MIG_EXTENSIONS if wanted.mig else ()))
    missing = [name for name in needed if name not in facts.incus.extensions]
    if missing:
        yield Finding(
            "incus-old",
            ERROR,
            f"Incus {facts.incus.version} lacks {', '.join(missing)}",
            "it cannot find cards or hand them over",
            "Update it: apt install --only-upgrade incus-base (Incus 6.0 or later).",
        )


def _healthy(card: HostCard) -> bool:
    return card.driver in _DRIVERS[card.vendor]


def _bindings(facts: HostFacts, wanted: Wanted) -> Iterator[Finding]:
    """Cards that are in the wrong hands, or in none."""
    for card in facts.cards:
        # Beside a card of the vendor that works this one may be for something else, unless it is named.
        spare = any(_healthy(c) for c in facts.of(card.vendor)) and card.pci not in wanted.pcis
        severity = WARNING if spare else ERROR
        if card.driver == "vfio-pci":
            if wanted.vms or not wanted.anybody:
                continue  # as a virtual machine has it
            native = _DRIVERS[card.vendor][0]
            yield Finding(
                "vfio",
                severity,
                f"Card {card} is bound to vfio-pci",
                "it is set aside for virtual machines, a container cannot use it",
                "Remove its id from 'options vfio-pci' under /etc/modprobe.d and from the kernel's"
                " command line"
                f" (vfio-pci.ids), then: update-initramfs -u && reboot. Its driver is {native}.",
            )
        elif wanted.only_vms or _healthy(card):
            continue
        elif card.vendor == "10de":
            if card.driver == "nouveau":
                yield Finding(
                    "nouveau",
                    severity,
                    f"Card {card} is driven by nouveau",
                    "CUDA needs NVIDIA's driver, and two cannot have one card",
                    "Install NVIDIA's driver (Debian: apt install nvidia-driver from non-free; Ubuntu:"
                    " ubuntu-drivers install), which blacklists nouveau, then: update-initramfs -u &&"
                    " reboot.",
                )
            elif facts.loaded:
                yield Finding(
                    "card-refused",
                    severity,
                    f"NVIDIA driver {facts.loaded} is loaded but does not drive card {card}",
                    "the driver is too old or too new for it, of the other kind (open or proprietary),"
                    " or the card"
                    " failed",
                    f"journalctl -k -b | grep -i -e nvrm -e {card.pci[5:]} says why. See nvidia.com for the"
                    " branch that knows the card.",
                )
        elif not card.driver or card.vendor == "1002":
            native = _DRIVERS[card.vendor][0]
            yield Finding(
                "drm-driver",
                severity,
                f"{VENDORS[card.vendor]} card {card} is driven by {card.driver or 'nothing'}, not by"
                f" {native}",
                "without it there is no render node to hand over",
                f"modprobe {native}; if that fails, install the firmware (Debian: firmware-amd-graphics or"
                " firmware-misc-nonfree; Ubuntu: linux-firmware) and see journalctl -k -b.",
            )


# NVIDIA


def _nvidia(facts: HostFacts, wanted: Wanted) -> Iterator[Finding]:
    if not facts.loaded:
        yield from _not_loaded(facts)
        return
    yield from _versions(facts, wanted)
    yield from _kind(facts)
    yield from _nodes(facts)
    yield from _tools(facts, wanted)
    if facts.upgrades:
        yield Finding(
            "unattended-upgrades",
            WARNING,
            f"Unattended upgrades may replace the NVIDIA driver ({', '.join(facts.upgrades[:3])}"
            + (f" and {len(facts.upgrades) - 3} more)" if len(facts.upgrades) > 3 else ")"),
            "they exchange the userland under the loaded kernel module: from then on no new program"
            " can use the card,"
            " until a reboot",
            f"apt-mark hold {' '.join(facts.upgrades)}, and upgrade by hand with a reboot.",
            HOLDS,
        )
    if not facts.persistenced:
        yield Finding(
            "persistence",
            INFO,
            "nvidia-persistenced does not run",
            "the driver lets go of an idle card, and the next program waits until it is set up again",
            "systemctl enable --now nvidia-persistenced (package nvidia-persistenced).",
        )


def _not_loaded(facts: HostFacts) -> Iterator[Finding]:
    if any(card.driver in ("nouveau", "vfio-pci") for card in facts.of("10de")):
        return  # said already, and why it is not loaded
    if facts.installed == "":
        yield Finding(
            "driver-missing",
            ERROR,
            "No NVIDIA kernel module is installed for the running kernel",
            "without it the card does nothing",
            "Install the driver (Debian: apt install linux-headers-$(uname -r) nvidia-driver from"
            " non-free; Ubuntu:"
            " ubuntu-drivers install). After a kernel update: dkms status shows whether it was built"
            " for this kernel.",
        )
    elif facts.secure_boot:
        yield Finding(
            "secure-boot",
            ERROR,
            "The NVIDIA kernel module is not loaded, and Secure Boot is on",
            "the kernel refuses modules that are not signed by a key it knows",
            "modprobe nvidia: 'Key was rejected' confirms it. Then enrol the key that dkms signs with"
            " (Debian:"
            " mokutil --import /var/lib/dkms/mok.pub; Ubuntu: mokutil --import"
            " /var/lib/shim-signed/mok/MOK.der),"
            " reboot and confirm it there.",
        )
    else:
        yield Finding(
            "driver-not-loaded",
            ERROR,
            "The NVIDIA kernel module is not loaded",
            "without it the card does nothing",
            "modprobe nvidia; if that fails, journalctl -k -b | grep -i nvrm says why.",
            MAKES_NODES if facts.installed else "",
        )


def _versions(facts: HostFacts, wanted: Wanted) -> Iterator[Finding]:
    if not facts.library:
        runtime = bool(wanted.runtime) or bool(facts.tools and facts.hook)
        yield Finding(
            "userland-missing",
            ERROR if runtime else INFO,
            "The host has no userland library of the NVIDIA driver (libnvidia-ml.so)",
            "nvidia.runtime takes the libraries from the host"
            if runtime
            else "nvidia-smi does not run on the host; machines get a userland of their own",
            f"Install the userland of exactly {facts.loaded} (Debian: nvidia-smi libcuda1; Ubuntu:"
            f" nvidia-utils-{facts.loaded.partition('.')[0]}).",
        )
    elif facts.library != facts.loaded:
        waiting = facts.installed == facts.library
        yield Finding(
            "version-mismatch",
            ERROR,
            f"The loaded kernel module is {facts.loaded}, the userland {facts.library}"
            f" ({facts.library_path})",
            "every program gets 'Driver/library version mismatch'; what runs goes on, what starts anew fails",
            "Reboot: the module on disk fits already."
            if waiting
            else "Reboot. If it stays so, the module was not built for this kernel: dkms status; dkms"
            " autoinstall."
            if not facts.installed
            else f"The module on disk is {facts.installed}: install both halves from one source, in"
            " one version,"
            " and reboot.",
        )
    elif facts.installed and facts.installed != facts.loaded:
        yield Finding(
            "driver-replaced",
            WARNING,
            f"Kernel module {facts.installed} is installed, {facts.loaded} is loaded",
            "the next boot loads another version than the userland has",
            f"Bring the userland to {facts.installed}, reboot, and run make apply.",
        )


def _kind(facts: HostFacts) -> Iterator[Finding]:
    for card in facts.of("10de"):
        # Code names as in the list of PCI ids: GB Blackwell; GM, GP, GV Maxwell to Volta.
        if facts.kind == "proprietary" and re.match(r"GB\d", card.name):
            needs, has = "open", "proprietary"
        elif facts.kind == "open" and re.match(r"G[MPV]\d", card.name):
            needs, has = "proprietary", "open"
        else:
            continue
        yield Finding(
            "module-kind",
            ERROR,
            f"Card {card} needs the {needs} kernel module, and the {has} one is loaded",
            "Blackwell is driven by the open modules only, cards before Turing by the proprietary ones only",
            f"Install the {needs} kind (Debian:"
            f" nvidia-{'open-' if needs == 'open' else ''}kernel-dkms; Ubuntu:"
            f" nvidia-driver-<branch>{'-open' if needs == 'open' else ''}) and reboot.",
        )


def _nodes(facts: HostFacts) -> Iterator[Finding]:
    wanted = {"/dev/nvidiactl"}
    driven = {card.pci for card in facts.of("10de") if _healthy(card)}
    wanted |= {f"/dev/nvidia{minor}" for pci, minor in facts.minors if pci in driven}
    if not facts.minors and driven and not any(re.fullmatch(r"/dev/nvidia\d+", n) for n in facts.nodes):
        wanted.add("/dev/nvidia0")
    missing = sorted(wanted - facts.nodes)
    if missing:
        yield Finding(
            "node-missing",
            ERROR,
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there",
            "a container gets the nodes that exist when it starts",
            "nvidia-modprobe -c0 (with -c1 and so on for further cards), then restart the machine.",
            MAKES_NODES,
        )
    if "/dev/nvidia-uvm" not in facts.nodes:
        yield Finding(
            "uvm-missing",
            ERROR,
            "/dev/nvidia-uvm is not there",
            "a container that starts now has no CUDA: it gets the nodes that exist at its start, and"
            " nothing says so"
            " (CUDA then reports 'unknown error', 999)",
            "nvidia-modprobe -c0 -u, then restart the machine.",
            MAKES_NODES,
        )
    elif not facts.uvm_by:
        yield Finding(
            "uvm-unit",
            WARNING,
            "Nothing makes /dev/nvidia-uvm before Incus starts",
            "it is there now, but after a reboot machines that start with the host may have no CUDA",
            "A service of type oneshot with Before=incus.service and"
            " ExecStart=/usr/bin/nvidia-modprobe -c0 -u.",
            MAKES_NODES,
        )


def _tools(facts: HostFacts, wanted: Wanted) -> Iterator[Finding]:
    if facts.tools and facts.hook:
        return
    lacking = [
        what
        for what, there in (("nvidia-container-cli", facts.tools), ("LXC's nvidia hook", facts.hook))
        if not there
    ]
    install = "Install libnvidia-container-tools" if not facts.tools else "Install liblxc-common"
    who = ", ".join(wanted.runtime)
    yield Finding(
        "runtime-tools",
        ERROR if who else INFO,
        f"The host lacks {' and '.join(lacking)}",
        f"nvidia.runtime of {who} needs it, and MIG slices need nvidia.runtime"
        if who
        else "nvidia.runtime cannot be used; machines get the card's nodes and a userland of their own"
        " that is"
        " matched to the driver, which works as well",
        f"{install} (from an apt source that you trust: NVIDIA's for the tools, the distribution's for"
        " LXC), or leave"
        " nvidia.runtime out.",
        INSTALLS if facts.tools_offered else "",
    )


# AMD and Intel


def _render(facts: HostFacts) -> Iterator[Finding]:
    for card in facts.cards:
        if card.vendor == "10de" or not _healthy(card):
            continue
        render = [node for node in card.drm if "/renderD" in node]
        if not set(render) & facts.nodes:
            yield Finding(
                "render-node",
                ERROR if len(facts.cards) == 1 else WARNING,
                f"{VENDORS[card.vendor]} card {card} has no render node under /dev/dri",
                "it is what programs compute through",
                f"udevadm trigger; if it stays away, journalctl -k -b | grep {card.driver} says why.",
            )
    if not any(card.vendor == "1002" and _healthy(card) for card in facts.cards):
        return
    if "/dev/kfd" not in facts.nodes:
        yield Finding(
            "kfd-missing",
            WARNING,
            "/dev/kfd is not there",
            "ROCm computes through it; Vulkan does without",
            "modprobe amdgpu with a kernel that has CONFIG_HSA_AMD (Debian's and Ubuntu's have).",
        )
    else:
        yield Finding(
            "kfd-device",
            INFO,
            "Incus hands over an AMD card's nodes in /dev/dri, and not /dev/kfd",
            "ROCm in the machine needs it",
            "Add to the machine in infra.yml: devices:"
            " {kfd: {type: unix-char, source: /dev/kfd, path: /dev/kfd, mode:"
            ' "0666"}}.',
        )


# Who else uses it


def _uses(holder: Holder, facts: HostFacts) -> bool:
    """Does it hold a card that can be handed over; the control nodes alone hold none."""
    vendors = {card.vendor for card in facts.cards}
    # An Intel card beside another is what a desktop runs on.
    targets = [card for card in facts.cards if card.vendor != "8086" or vendors == {"8086"}]
    drm = {node for card in targets for node in card.drm}
    return any(
        re.fullmatch(r"/dev/nvidia\d+", node) or node == "/dev/kfd" or node in drm for node in holder.nodes
    )


def _processes(facts: HostFacts, wanted: Wanted) -> Iterator[Finding]:
    using = [holder for holder in facts.holders if _uses(holder, facts)]
    screens = [holder for holder in using if _DISPLAY.match(holder.name)]
    others = [holder for holder in using if holder not in screens]
    severity = ERROR if wanted.only_vms else WARNING
    blocks = "Incus does not start a virtual machine with a card in use" if wanted.vms else ""
    if screens:
        yield Finding(
            "display",
            severity,
            f"A screen is drawn with the card: {_some(screens)}",
            blocks or "it takes VRAM that the plan for the machine does not know of",
            "Put the screen on another card, or run without one: systemctl set-default"
            " multi-user.target && reboot.",
        )
    if others:
        yield Finding(
            "card-busy",
            severity,
            f"Processes of the host use the card: {_some(others)}",
            blocks or "they take VRAM and time that the machine was promised",
            "Stop them or move them into a machine; what they are: ps -fp"
            f" {','.join(str(h.pid) for h in others[:8])}.",
        )
    if not facts.holders_complete:
        yield Finding(
            "holders-unseen",
            INFO,
            "Not every process could be looked at",
            "whether the host itself uses the card is known in part",
            "Run make doctor as root.",
        )


def _some(holders: Sequence[Holder]) -> str:
    shown = ", ".join(str(holder) for holder in holders[:5])
    return f"{shown} and {len(holders) - 5} more" if len(holders) > 5 else shown


def _iommu(facts: HostFacts, wanted: Wanted) -> Iterator[Finding]:
    who = ", ".join(wanted.vms)
    if not facts.iommu:
        yield Finding(
            "iommu-off",
            ERROR,
            "The IOMMU is off (/sys/kernel/iommu_groups is empty)",
            f"no card can be handed to a virtual machine ({who})",
            "Switch on VT-d or AMD-Vi in the firmware settings; on Intel also add intel_iommu=on to"
            " the kernel's"
            " command line (GRUB_CMDLINE_LINUX in /etc/default/grub, update-grub), then reboot.",
        )
        return
    for card in facts.cards:
        if card.group_others and (card.pci in wanted.pcis or not wanted.pcis):
            yield Finding(
                "iommu-group",
                WARNING,
                f"Card {card} shares IOMMU group {card.iommu_group} with {', '.join(card.group_others)}",
                "a group goes to a virtual machine as a whole or not at all",
                "Put the card into another slot, or bind the others to vfio-pci as well.",
            )


# For people


def blocking(found: Iterable[Finding], facts: HostFacts, wanted: Wanted) -> list[Finding]:
    """
    The errors that an apply must not go on with: none where no machine needs a card, or where another
    member of a cluster may have it.
    """
    if not wanted.required or not wanted.anybody or (facts.incus and facts.incus.clustered):
        return []
    return [finding for finding in found if finding.severity == ERROR]


def notes(found: Iterable[Mapping[str, Any]], wanted_optionally: bool = False) -> list[str]:
    """
    One line per finding for the summary of apply, without what is only good to know. That an optional
    card is not there at all is said by incus_infra.
    """
    return [
        Finding(**{field.name: finding[field.name] for field in dataclasses.fields(Finding)}).line()
        for finding in found
        if finding["severity"] != INFO and not (wanted_optionally and finding["id"] == "no-card")
    ]


def refusal(lines: Sequence[str]) -> str:
    """The message that ends an apply; `lines` as in the result's `blocking`."""
    return "\n".join(
        [
            "This host cannot hand its GPU to a machine yet:",
            *(f"- {line}" for line in lines),
            "make doctor shows this again, docs/gpu.md explains each [finding]. To go on without the card:"
            " gpu: {optional: true} in infra.yml.",
        ]
    )


def host_lines(facts: HostFacts) -> list[str]:
    """What was looked at, one line for each thing."""
    lines = [
        f"{VENDORS[card.vendor]} card {card}, driver {card.driver or 'none'}" for card in facts.cards
    ] or ["no card"]
    if facts.of("10de"):
        kind = f" ({facts.kind} module)" if facts.kind else ""
        lines.append(
            f"NVIDIA driver: kernel {facts.loaded or 'not loaded'}{kind}, userland {facts.library or 'none'}"
        )
        lines.append(
            f"container tools: {facts.tools or 'none'}, LXC hook: {facts.hook or 'none'},"
            f" nvidia-uvm made by: {facts.uvm_by or 'nothing before Incus'}"
        )
    incus = facts.incus.version if facts.incus else "no answer"
    if facts.incus and facts.incus.clustered:
        incus += ", a member of a cluster; the others are not looked at from here"
    lines.append(f"Incus: {incus}")
    return lines


def report(result: Mapping[str, Any]) -> list[str]:
    """The lines that doctor shows of a result of gpu_preflight: what was looked at, a table, remedies."""
    lines = [str(line) for line in result.get("host") or []]
    found = result.get("findings") or []
    if not found:
        return [*lines, "", "Nothing was found." if result.get("looked") else str(result.get("note", ""))]
    rows = [[f["severity"].upper(), f["id"], f["what"]] for f in found]
    lines += ["", *table(["SEVERITY", "FINDING", "WHAT"], rows)]
    for finding in found:
        lines += ["", f"{finding['id']}: {finding['what']}", f"  why:    {finding['why']}"]
        lines.append(f"  remedy: {finding['remedy']}")
        if finding["mends"]:
            lines.append(f"  apply:  {finding['mends']}")
    return lines

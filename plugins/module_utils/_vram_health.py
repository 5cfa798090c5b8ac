# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Is the VRAM of this machine as it should be? From facts to a report; asks nothing itself. All in MiB."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

from ansible_collections.sottovoce.stack.plugins.module_utils._nvml import LIB_RM_VERSION_MISMATCH, Device

MIB = 1024 * 1024
OK, WARN, FAIL = "ok", "warn", "fail"
RANK = {OK: 0, WARN: 1, FAIL: 2}
# Clock event reasons that say that a card runs slower than it is asked to by heat or power supply.
THROTTLED = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake")
# Of used memory that no visible process accounts for, what a driver keeps for itself on an idle card.
IDLE_MIB = 64
# Part of a card that the driver reserves at most; counted as used by old drivers, nvidia-smi and amdgpu.
RESERVED = 0.025
# A second copy of a model is at least this part of what the unit needs at rest (its weights and its CUDA
# context, of which there is one however many copies there are).
SECOND_COPY = 0.6
# What a process has open when it uses a card. (All that asks NVML has /dev/nvidiactl open.)
DEVICE_NODES = re.compile(r"/dev/(nvidia(\d+|-uvm)|dxg|kfd|dri/renderD\d+)")

# Xid errors after which a card must be reset or replaced; NVIDIA's "XID Errors" document. The others are
# most often a program's fault.
XID_FATAL = {
    48: "an uncorrectable ECC error",
    64: "a row of memory could not be remapped",
    74: "an NVLink error",
    79: "the GPU has fallen off the bus",
    95: "an uncontained ECC error",
    119: "the GPU's own processor (GSP) does not answer",
    120: "the GPU's own processor (GSP) failed",
}
_XID = re.compile(
    r"^<\d+>\[\s*(\d+)\.\d+\].*NVRM: Xid \(PCI:([0-9a-fA-F]+:[0-9a-fA-F]+:[0-9a-fA-F]+)[^)]*\): (\d+)"
)


@dataclass(frozen=True)
class Thresholds:
    """Options of the module vram_health; there they are documented."""

    min_free_mib: int = 256
    max_used_percent: float = 98.0
    max_temperature: int = 85
    max_ecc_corrected: int = 100
    max_ecc_uncorrected: int = 0
    xid_max_age: int = 86400
    max_drift_percent: float = 10.0
    require_gpu: bool = False
    require_full_offload: bool = True
    expected_units: Sequence[str] = ()


@dataclass(frozen=True)
class Holder:
    """A process of this machine that has a card's device node open; unit is empty outside of any unit."""

    pid: int
    unit: str


@dataclass
class Facts:
    """What was read. `details` maps a unit to (URL asked, its JSON or None, error)."""

    source: str = "none"  # nvml, nvidia-smi, amdgpu or none
    driver: str = ""
    cuda: str = ""
    devices: list[Device] = field(default_factory=list)
    vendor: str = ""
    trouble: str = ""  # why a card that seems to be there could not be read
    trouble_code: int = 0
    holders: list[Holder] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=dict)  # our units and their ActiveState
    details: dict[str, tuple[str, Any, str]] = field(default_factory=dict)
    kernel_log: Optional[str] = None  # None: not readable here
    uptime: float = 0.0  # seconds, of the clock that the kernel log uses


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    id: str
    severity: str
    what: str
    why: str
    remedy: str


def unit_of_cgroup(text: str) -> str:
    """
    The unit that a process belongs to, from its /proc/<pid>/cgroup, without `.service`; empty if none.

    Of nested units the innermost counts. A process of a container, seen from its host, is
    `<container>:<unit>`.
    """
    chosen = ""
    for line in text.splitlines():
        number, _colon, rest = line.partition(":")
        controllers, _colon, path = rest.partition(":")
        # With both versions of cgroups mounted, systemd may keep to its own hierarchy of the first.
        if path not in ("", "/") and (number == "0" or controllers == "name=systemd"):
            chosen = path
    container, unit = "", ""
    for part in chosen.split("/"):
        if part.startswith("lxc.payload."):
            container, unit = part[len("lxc.payload.") :], ""
        elif part.endswith(".service"):
            unit = part[: -len(".service")]
        elif part.endswith(".scope"):
            unit = part
    return f"{container}:{unit}" if container else unit


def parse_xids(log: str) -> list[dict[str, Any]]:
    """Xid errors in a kernel log as syslog(2) gives it: [{pci, xid, at}], at in seconds since boot."""
    found = []
    for line in log.splitlines():
        match = _XID.match(line)
        if match:
            domain, bus, device = match.group(2).lower().split(":")
            found.append(
                {
                    "pci": f"{int(domain, 16):04x}:{bus}:{device}.0",
                    "xid": int(match.group(3)),
                    "at": int(match.group(1)),
                }
            )
    return found


def _mib(value: Any) -> Optional[int]:
    # bool is an int, and no size.
    return value // MIB if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def models_of(unit: str, details: Any) -> list[dict[str, Any]]:
    """
    The models that a daemon's details name, by the shape of the answer: Ollama's /api/ps has mappings with
    sizes in bytes, Speaches' /api/ps has ids, voicegate's /health is about its one model.
    """
    if not isinstance(details, Mapping):
        return []
    base: dict[str, Any] = {
        "unit": unit, "engine": "", "name": "", "loaded": True, "size_mib": None, "vram_mib": None,
        "offload_percent": None, "context": None, "device": None, "compute_type": None, "state": None,
    }  # fmt: skip
    listed = details.get("models")
    if isinstance(listed, list):
        return [
            _ollama_model(base, item)
            if isinstance(item, Mapping)
            else {**base, "engine": "speaches", "name": str(item)}
            for item in listed
        ]
    if isinstance(details.get("model"), str):
        state = details.get("load_state")
        return [
            {
                **base,
                "engine": str(details.get("engine") or ""),
                "name": details["model"],
                "loaded": state in (None, "loaded"),
                "device": details.get("device"),
                "compute_type": details.get("compute_type"),
                "state": state,
            }
        ]
    return []


def _ollama_model(base: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    size, vram = item.get("size"), item.get("size_vram", 0)
    known = isinstance(size, int) and isinstance(vram, int) and size > 0 and vram >= 0
    return {
        **base,
        "engine": "ollama",
        "name": str(item.get("name") or item.get("model") or "?"),
        "size_mib": _mib(size),
        "vram_mib": _mib(vram),
        # Rounded down: 100 means all of it.
        "offload_percent": min(100, 100 * vram // size) if known else None,
        "context": item.get("context_length"),
    }


def attribute(facts: Facts, models: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """
    (units, notes): how much of which card each unit uses.

    First by the processes that the driver lists. Inside an unprivileged container it lists none, or numbers
    of another PID namespace: what the cards' figures then leave unexplained is given to the units whose
    processes have the card's device node open: all of it if there is one, else Ollama gets what it says
    itself and a single other one gets the rest. Each unit's `source` says which way it went; where the split
    cannot be known, used_mib is None.
    """
    owner = {holder.pid: holder.unit or f"pid {holder.pid}" for holder in facts.holders}
    units: dict[str, dict[str, Any]] = {}
    for name in [*facts.units, *owner.values()]:
        state = facts.units.get(name)
        units[name] = {"name": name, "state": state, "used_mib": 0, "source": "none", "gpus": [], "pids": []}
    notes: list[str] = []
    left: dict[int, int] = {}
    explained: dict[int, set[str]] = {}
    for device in facts.devices:
        if device.error:
            continue
        seen = 0
        for process in device.processes or ():
            if process.pid not in owner or process.used_mib is None:
                continue
            name = owner[process.pid]
            _give(units[name], device.index, process.used_mib, "processes")
            units[name]["pids"].append(process.pid)
            explained.setdefault(device.index, set()).add(name)
            seen += process.used_mib
        idle = IDLE_MIB if device.reserved_mib else IDLE_MIB + int(RESERVED * device.total_mib)
        if device.used_mib - seen > idle:
            left[device.index] = device.used_mib - seen
    for index, amount in left.items():
        candidates = sorted(set(owner.values()) - explained.get(index, set()))
        notes.append(_divide(units, candidates, index, amount, len(left), models))
    return [units[name] for name in sorted(units)], notes


def _give(unit: dict[str, Any], gpu: int, amount: Optional[int], source: str) -> None:
    for entry in unit["gpus"]:
        if entry["gpu"] == gpu and entry["used_mib"] is not None and amount is not None:
            entry["used_mib"] += amount
            break
    else:
        unit["gpus"].append({"gpu": gpu, "used_mib": amount})
    unit["used_mib"] = None if amount is None or unit["used_mib"] is None else unit["used_mib"] + amount
    unit["source"] = source


def _divide(
    units: dict[str, dict[str, Any]],
    candidates: Sequence[str],
    gpu: int,
    amount: int,
    cards: int,
    models: Sequence[Mapping[str, Any]],
) -> str:
    """Give what no process explains on a card to candidates; gives the note that says how."""
    begin = f"GPU {gpu}: the driver shows no process here for {amount} MiB (as in an unprivileged container)"
    if not candidates:
        return f"{begin}, and no process here has the card open: somebody else uses them"
    if len(candidates) == 1:
        _give(units[candidates[0]], gpu, amount, "difference")
        return f"{begin}; by difference they are {candidates[0]}'s"
    told = {
        name: sum(m["vram_mib"] or 0 for m in models if m["unit"] == name)
        for name in candidates
        if any(m["unit"] == name and m["engine"] == "ollama" for m in models)
    }
    others = [name for name in candidates if name not in told]
    # What Ollama tells is of all its cards together.
    if cards == 1 and told and len(others) == 1 and sum(told.values()) <= amount:
        for name, part in told.items():
            _give(units[name], gpu, part, "difference")
        _give(units[others[0]], gpu, amount - sum(told.values()), "difference")
        return f"{begin}; {', '.join(told)} says what is its own, the rest is by difference {others[0]}'s"
    for name in candidates:
        _give(units[name], gpu, None, "unknown")
    return f"{begin}; {', '.join(candidates)} share them, how cannot be told"


def drift_percent(used: int, rest: int, peak: int) -> float:
    """How far used is outside of what is planned between rest and peak: positive above, negative below."""
    if used > peak:
        return round(100.0 * (used - peak) / peak, 1) if peak else 100.0
    if used < rest:
        return round(100.0 * (used - rest) / rest, 1)
    return 0.0


def plan_of(plan: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """
    {unit: (MiB at rest, MiB at peak)} of the option `plan`: {unit: MiB} or {unit: {rest_mib, peak_mib}}.

    Raises ValueError that names the unit.
    """
    found = {}
    for unit, value in plan.items():
        given = value if isinstance(value, Mapping) else {"rest_mib": value, "peak_mib": value}
        try:
            peak = int(given["peak_mib"])
            rest = int(given.get("rest_mib", peak))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"plan: {unit}: give MiB as a number, or rest_mib and peak_mib") from None
        if not 0 <= rest <= peak:
            raise ValueError(f"plan: {unit}: rest_mib ({rest}) must lie between 0 and peak_mib ({peak})")
        found[str(unit)] = (rest, peak)
    return found


def report(facts: Facts, limits: Thresholds, plan: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Everything that the module returns but `changed`; its RETURN gives the shapes."""
    models = [model for unit in sorted(facts.details) for model in models_of(unit, facts.details[unit][1])]
    units, notes = attribute(facts, models)
    for unit in units:
        rest, peak = plan.get(unit["name"], (None, None))
        used = unit["used_mib"]
        unit["plan_rest_mib"], unit["plan_peak_mib"] = rest, peak
        unit["drift_percent"] = (
            None if rest is None or peak is None or used is None else drift_percent(used, rest, peak)
        )
    for name in sorted(facts.details):
        url, body, error = facts.details[name]
        if body is None and url:
            notes.append(f"{name}: its models are not known: {url}: {error or 'no JSON'}")
    xids: Optional[list[dict[str, Any]]] = None
    if facts.vendor == "nvidia":
        xids = None if facts.kernel_log is None else parse_xids(facts.kernel_log)
        if xids is None:
            notes.append("the kernel log is not readable here, so Xid errors are not known: look on the host")
    gpus = [_gpu(device, facts.vendor, xids) for device in facts.devices]
    findings = [
        *_about_reading(facts, limits),
        *(finding for gpu in gpus for finding in _about_gpu(gpu, limits, facts.uptime)),
        *_about_models(models, facts, limits),
        *_about_units(units, models, facts, limits),
    ]
    findings.sort(key=lambda finding: -RANK[finding.severity])
    return {
        "status": max((finding.severity for finding in findings), key=RANK.__getitem__, default=OK),
        "findings": [asdict(finding) for finding in findings],
        "source": facts.source,
        "driver": facts.driver,
        "cuda": facts.cuda,
        "gpus": gpus,
        "units": units,
        "models": models,
        "xid_readable": xids is not None,
        "notes": notes,
    }


def _gpu(device: Device, vendor: str, xids: Optional[list[dict[str, Any]]]) -> dict[str, Any]:
    reasons = device.clock_reasons
    return {
        "index": device.index,
        "vendor": vendor,
        "uuid": device.uuid,
        "pci": device.pci,
        "name": device.name,
        "capability": device.capability,
        "total_mib": device.total_mib,
        "used_mib": device.used_mib,
        "free_mib": device.free_mib,
        "reserved_mib": device.reserved_mib,
        "temperature_c": device.temperature_c,
        "throttling": None if reasons is None else [reason for reason in reasons if reason in THROTTLED],
        "clock_reasons": reasons,
        "ecc_corrected": device.ecc_corrected,
        "ecc_uncorrected": device.ecc_uncorrected,
        "xid": None if xids is None else [
            {"xid": xid["xid"], "at": xid["at"]} for xid in xids if xid["pci"] == device.pci
        ],
        "mig": [asdict(mig) for mig in device.mig],
        "error": device.error,
    }  # fmt: skip


def _about_reading(facts: Facts, limits: Thresholds) -> Iterable[Finding]:
    if facts.trouble_code == LIB_RM_VERSION_MISMATCH:
        yield Finding(
            "driver-mismatch",
            FAIL,
            "the driver's library in this machine does not fit the kernel module of the host",
            facts.trouble,
            "restart the instance, so that it gets the library of the present driver: make apply does it",
        )
    elif facts.trouble:
        yield Finding(
            "gpu-unreadable",
            FAIL,
            "there seems to be a card, but it cannot be read",
            facts.trouble,
            "run nvidia-smi in this machine and on its host; give the instance the driver's libraries"
            " (nvidia.runtime) and restart it",
        )
    elif limits.require_gpu and not facts.devices:
        yield Finding(
            "no-gpu",
            FAIL,
            "no card is here",
            "this machine is meant to have one, but no driver shows any",
            "see which instance has the card: make status; then make apply",
        )


def _about_gpu(gpu: Mapping[str, Any], limits: Thresholds, uptime: float) -> Iterable[Finding]:
    who = f"GPU {gpu['index']} ({gpu['name'] or gpu['pci'] or gpu['uuid'] or 'unknown'})"
    yield from _about_xid(who, gpu, limits, uptime)
    if gpu["error"]:
        yield Finding(
            "gpu-lost",
            FAIL,
            f"{who} cannot be read",
            gpu["error"],
            "look for Xid errors in the host's kernel log (dmesg); reset the card or restart the host",
        )
        return
    yield from _about_room(who, gpu, limits)
    for mig in gpu["mig"]:
        name = f"{who}, MIG slice {mig['uuid']}"
        if mig["error"]:
            yield Finding(
                "mig-unreadable",
                WARN,
                f"{name} cannot be read",
                mig["error"],
                "run nvidia-smi mig -lgi on the host",
            )
        else:
            yield from _about_room(name, mig, limits)
    degrees = gpu["temperature_c"]
    if degrees is not None and degrees > limits.max_temperature:
        yield Finding(
            "temperature",
            WARN,
            f"{who} has {degrees} °C",
            f"more than max_temperature, {limits.max_temperature} °C",
            "look at its fans and the air around it; nvidia-smi --power-limit lowers the heat",
        )
    if gpu["throttling"]:
        yield Finding(
            "throttling",
            WARN,
            f"{who} runs slower than it could: {', '.join(gpu['throttling'])}",
            "heat or power supply makes the card lower its clock",
            "cool it, check its power cables, or lower its limit: nvidia-smi --power-limit",
        )
    corrected, uncorrected = gpu["ecc_corrected"], gpu["ecc_uncorrected"]
    if uncorrected is not None and uncorrected > limits.max_ecc_uncorrected:
        yield Finding(
            "ecc-uncorrected",
            FAIL,
            f"{who} had {uncorrected} uncorrectable memory errors since the driver was loaded",
            f"more than max_ecc_uncorrected, {limits.max_ecc_uncorrected}: what was computed may be wrong",
            "restart the units that use it, reset the card; if it comes again, replace it",
        )
    if corrected is not None and corrected > limits.max_ecc_corrected:
        yield Finding(
            "ecc-corrected",
            WARN,
            f"{who} had {corrected} corrected memory errors since the driver was loaded",
            f"more than max_ecc_corrected, {limits.max_ecc_corrected}: its memory is getting worse",
            "watch whether it grows: nvidia-smi -q -d ECC,ROW_REMAPPER",
        )


def _about_room(who: str, memory: Mapping[str, Any], limits: Thresholds) -> Iterable[Finding]:
    total, free, used = memory["total_mib"], memory["free_mib"], memory["used_mib"]
    if free < limits.min_free_mib:
        yield Finding(
            "low-free",
            FAIL,
            f"{who} has {free} of {total} MiB free",
            f"less than min_free_mib, {limits.min_free_mib}: the next allocation may fail",
            "unload a model (ollama stop NAME), choose a smaller one or less context, and make apply again",
        )
    # What the driver keeps is as little to be had as what is used.
    percent = 100.0 * (used + memory["reserved_mib"]) / total if total else 0.0
    if percent > limits.max_used_percent:
        yield Finding(
            "high-use",
            WARN,
            f"{who} is {percent:.1f} % full",
            f"more than max_used_percent, {limits.max_used_percent:g} %",
            "unload a model (ollama stop NAME), or plan for more room",
        )


def _about_xid(who: str, gpu: Mapping[str, Any], limits: Thresholds, uptime: float) -> Iterable[Finding]:
    recent = [xid for xid in gpu["xid"] or () if uptime - xid["at"] <= limits.xid_max_age]
    if not recent:
        return
    numbers = [xid["xid"] for xid in recent]
    fatal = sorted({number for number in numbers if number in XID_FATAL})
    counted = ", ".join(
        f"{number} ({numbers.count(number)} times)" if numbers.count(number) > 1 else str(number)
        for number in dict.fromkeys(numbers)
    )
    yield Finding(
        "xid",
        FAIL if fatal else WARN,
        f"{who}: Xid {counted} in the last {limits.xid_max_age} s",
        "; ".join(f"Xid {number}: {XID_FATAL[number]}" for number in fatal)
        or "the driver reports an error; most often it is a program's",
        "reset the card or restart the host"
        if fatal
        else "look at the journal of the unit that used the card",
    )


def _about_models(models: Sequence[Mapping[str, Any]], facts: Facts, limits: Thresholds) -> Iterable[Finding]:
    if not limits.require_full_offload or not facts.devices:
        return
    for model in models:
        percent = model["offload_percent"]
        if percent is not None and percent < 100:
            yield Finding(
                "partial-offload",
                FAIL,
                f"{model['unit']}: of {model['name']} only {model['vram_mib']} of {model['size_mib']} MiB"
                f" ({percent} %) are in VRAM",
                "the rest runs on the CPU, and stays there until the model is unloaded",
                f"make room, then unload it (ollama stop {model['name']}); less context needs less room",
            )
        if model["engine"] not in ("ollama", "speaches") and model["loaded"] and model["device"] == "cpu":
            yield Finding(
                "stt-on-cpu",
                WARN,
                f"{model['unit']}: {model['name']} runs on the CPU",
                "there is a card here, but the daemon does not use it",
                f"see why in its journal (journalctl -u {model['unit']}); or set stt_server_device: cpu and"
                " require_full_offload: false if it is meant so",
            )


def _about_units(
    units: Sequence[Mapping[str, Any]],
    models: Sequence[Mapping[str, Any]],
    facts: Facts,
    limits: Thresholds,
) -> Iterable[Finding]:
    by_name = {unit["name"]: unit for unit in units}
    for name in limits.expected_units:
        state = by_name[name]["state"] if name in by_name else None
        if state != "active":
            yield Finding(
                "unit-missing",
                FAIL,
                f"{name} should use the card, but is {state or 'not here'}",
                "it is among expected_units",
                f"systemctl status {name}; make apply starts it",
            )
    for unit in units:
        used = unit["used_mib"]
        name = unit["name"]
        if (
            limits.expected_units
            and name not in limits.expected_units
            and (used or unit["source"] == "unknown")
        ):
            yield Finding(
                "unit-unexpected",
                WARN,
                f"{name} uses {used if used is not None else 'some'} MiB of VRAM",
                f"only {', '.join(limits.expected_units)} should (expected_units)",
                f"stop {name}, or name it in expected_units and in the plan",
            )
        drift = unit["drift_percent"]
        copies = _copies(unit, models)
        if copies:
            yield Finding("two-copies", WARN, f"{name} seems to hold two copies of its model", copies,
                          f"systemctl restart {name}")  # fmt: skip
        elif drift is not None and drift > limits.max_drift_percent:
            yield Finding(
                "drift",
                WARN,
                f"{name} uses {used} MiB, {drift:g} % over its planned peak of {unit['plan_peak_mib']} MiB",
                f"more than max_drift_percent, {limits.max_drift_percent:g} %",
                f"see what it has loaded; systemctl restart {name} brings it back to the plan",
            )


def _copies(unit: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> str:
    """Why a Speaches unit is thought to hold a model twice; empty if it is not."""
    names = [m["name"] for m in models if m["unit"] == unit["name"] and m["engine"] == "speaches"]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        return f"it lists {', '.join(twice)} twice"
    used, rest, peak = unit["used_mib"], unit["plan_rest_mib"], unit["plan_peak_mib"]
    if len(names) == 1 and used and rest and used - peak >= SECOND_COPY * rest:
        return (
            f"it uses {used} MiB, {used - peak} more than planned at its peak, and lists one model"
            " (unloading while busy leaves a second copy behind)"
        )
    return ""

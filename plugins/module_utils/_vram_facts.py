# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read what _vram_health judges: cards, processes, units, the daemons' own words, the kernel log."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Optional

from ansible_collections.sottovoce.stack.plugins.module_utils import _nvidia_smi as smi
from ansible_collections.sottovoce.stack.plugins.module_utils import _service_health as health
from ansible_collections.sottovoce.stack.plugins.module_utils._nvml import (
    DRIVER_NOT_LOADED,
    MIB,
    Device,
    NvmlError,
    NvmlMissing,
    open_nvml,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_health import (
    DEVICE_NODES,
    Facts,
    Holder,
    unit_of_cgroup,
)


def in_parallel(jobs: Mapping[str, tuple[Callable[[], Any], float]]) -> dict[str, Any]:
    """
    What the jobs give, by name. jobs: name to (job, seconds); one that is not done by then is missing. An
    exception of a job is raised here. A job that hangs (a driver that does not answer) holds up no other.
    """
    done: dict[str, Any] = {}
    failed: list[Exception] = []

    def run(name: str, job: Callable[[], Any]) -> None:
        try:
            done[name] = job()
        except Exception as error:
            failed.append(error)

    begin = time.monotonic()
    started = []
    for name, (job, seconds) in jobs.items():
        thread = threading.Thread(target=run, args=(name, job), daemon=True)
        thread.start()
        started.append((thread, begin + seconds))
    for thread, deadline in started:
        thread.join(max(0.0, deadline - time.monotonic()))
    if failed:
        raise failed[0]
    return dict(done)


def run_program(argv: list[str], timeout: float) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a program that may take timeout seconds; -1 if it took longer."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return -1, "", f"no answer within {timeout:g} s"
    except OSError as error:
        return -1, "", str(error)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def read_nvml(path: Optional[str] = None) -> Facts:
    """Facts with the cards that NVML shows; raises NvmlMissing or NvmlError."""
    with open_nvml(path) as nvml:
        return Facts(
            source="nvml",
            vendor="nvidia",
            driver=nvml.driver_version(),
            cuda=nvml.cuda_version(),
            devices=nvml.devices(),
        )


def read_smi(program: str, timeout: float) -> Facts:
    """Facts with the cards that nvidia-smi shows; raises SmiGarbage, also where it fails."""
    out = err = ""
    for fields in (smi.FULL, smi.BASE):
        rc, out, err = run_program([program, *smi.query(fields)], timeout)
        if rc == 0:
            devices, driver = smi.parse(out, fields)
            return Facts(source="nvidia-smi", vendor="nvidia", driver=driver, devices=devices)
        if "not a valid field" not in out + err:
            break
    raise smi.SmiGarbage(f"{program} failed: {(err or out).strip()[:300] or 'without a word'}")


def _read(*path: str) -> str:
    try:
        with open(os.path.join(*path), encoding="utf-8", errors="replace") as handle:
            return handle.read().strip()
    except OSError:
        return ""


def read_amd(drm: str) -> list[Device]:
    """Cards of the amdgpu driver under drm (/sys/class/drm), with their memory and edge temperature."""
    found: list[Device] = []
    entries = os.listdir(drm) if os.path.isdir(drm) else []
    for entry in sorted(name for name in entries if name.startswith("card") and name[4:].isdigit()):
        folder = os.path.join(drm, entry, "device")
        total, used = (_read(folder, f"mem_info_vram_{word}") for word in ("total", "used"))
        if not total:
            continue
        device = Device(len(found), uuid=_read(folder, "unique_id"))
        device.pci = os.path.basename(os.path.realpath(folder))
        device.name = _read(folder, "product_name") or "AMD GPU"
        if total.isdigit() and used.isdigit():
            device.total_mib, device.used_mib = int(total) // MIB, int(used) // MIB
            device.free_mib = device.total_mib - device.used_mib
        else:
            device.error = f"{folder}/mem_info_vram_* hold no numbers"
        device.temperature_c = _amd_temperature(os.path.join(folder, "hwmon"))
        found.append(device)
    return found


def _amd_temperature(hwmon: str) -> Optional[int]:
    for name in sorted(os.listdir(hwmon)) if os.path.isdir(hwmon) else []:
        text = _read(hwmon, name, "temp1_input")  # thousandths of a degree
        if text.lstrip("-").isdigit():
            return int(text) // 1000
    return None


def read_cards(program: Optional[str], timeout: float, root: str = "/") -> Facts:
    """
    The cards by the first way that works: NVML, nvidia-smi, sysfs of amdgpu. Without a card, empty Facts;
    with `trouble` where the kernel has the NVIDIA driver, or nvidia-smi is installed, and neither way works.
    """
    try:
        return read_nvml()
    except NvmlMissing as error:
        trouble, code = f"NVML: {error}", 0
    except NvmlError as error:
        trouble, code = f"NVML: {error}", error.code
    if program:
        try:
            return read_smi(program, timeout)
        except smi.SmiGarbage as error:
            trouble = f"{trouble}; {error}"
    amd = read_amd(os.path.join(root, "sys/class/drm"))
    if amd:
        version = _read(root, "sys/module/amdgpu/version")
        return Facts(source="amdgpu", vendor="amd", driver=version, devices=amd)
    # The library alone, on a machine whose kernel has no such driver, is no sign of a card.
    present = os.path.exists(os.path.join(root, "dev/nvidiactl")) or (
        os.path.exists(os.path.join(root, "proc/driver/nvidia/version")) and code != DRIVER_NOT_LOADED
    )
    return Facts(trouble=trouble, trouble_code=code) if present else Facts()


def find_holders(listed: Iterable[int], proc: str = "/proc") -> list[Holder]:
    """
    The processes below proc that have a card's device node open, with their units.

    A number that NVML lists may be one of another PID namespace, and here be a process that has nothing to
    do with the card: open files tell. Where they may not be read, the number is believed.
    """
    believed = set(listed)
    found = []
    for entry in os.listdir(proc):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            uses = _uses_card(os.path.join(proc, entry, "fd"))
        except PermissionError:
            uses = int(entry) in believed
        except OSError:
            continue  # it has ended
        if uses:
            found.append(Holder(int(entry), unit_of_cgroup(_read(proc, entry, "cgroup"))))
    return sorted(found, key=lambda holder: holder.pid)


def _uses_card(folder: str) -> bool:
    for name in os.listdir(folder):
        try:
            if DEVICE_NODES.fullmatch(os.readlink(os.path.join(folder, name))):
                return True
        except FileNotFoundError:
            continue
    return False


def read_kernel_log() -> Optional[str]:
    """The kernel's log as dmesg shows it, or None where this process may not read it."""
    libc = ctypes.CDLL(None)
    read_all, size_of_buffer = 3, 10
    size = libc.klogctl(size_of_buffer, None, 0)
    if size <= 0:
        return None
    buffer = ctypes.create_string_buffer(size)
    length = libc.klogctl(read_all, buffer, size)
    return None if length < 0 else buffer.raw[:length].decode("utf-8", "replace")


def read_states(units: Iterable[health.Unit], timeout: float) -> dict[str, str]:
    """ActiveState of each unit, by name; empty where systemd does not answer."""
    command = ["systemctl", "show", "--property=Id,ActiveState", "--"]
    _rc, out, _err = run_program([*command, *(f"{unit.name}.service" for unit in units)], timeout)
    return {name: shown.get("ActiveState", "unknown") for name, shown in health.parse_show(out).items()}


def read_facts(unit_path: str, program: Optional[str], timeout: float, gpu_timeout: float) -> Facts:
    """
    Everything, with the slow parts side by side.

    unit_path: folder of unit files; program: nvidia-smi or None; timeout: seconds for each daemon's answer;
    gpu_timeout: seconds for the cards (a driver that has to wake one may take a while).
    """
    units = health.find_units(unit_path) if os.path.isdir(unit_path) else []
    urls = {unit.name: unit.details_url or unit.health_url for unit in units}

    def ask(url: str) -> Callable[[], Any]:
        return lambda: health.fetch_json(url, timeout)

    jobs: dict[str, tuple[Callable[[], Any], float]] = {
        "cards": (lambda: read_cards(program, gpu_timeout), gpu_timeout),
        "log": (read_kernel_log, gpu_timeout),
    }
    if units:
        jobs["states"] = (lambda: read_states(units, gpu_timeout), gpu_timeout)
    # The time limit of a fetch is for each of its steps; the whole gets two of them.
    jobs.update({f"unit {name}": (ask(url), 2 * timeout) for name, url in urls.items() if url})
    done = in_parallel(jobs)
    facts: Facts = done.get("cards") or Facts(trouble=f"the driver did not answer within {gpu_timeout:g} s")
    facts.kernel_log = done.get("log")
    states = done.get("states", {})
    for name, url in urls.items():
        facts.units[name] = states.get(name, "unknown")
        if url and facts.units[name] == "active":
            silent = (None, None, f"no answer within {timeout:g} s")
            facts.details[name] = (url, *done.get(f"unit {name}", silent)[1:])
    if facts.devices:
        listed = [process.pid for device in facts.devices for process in device.processes or ()]
        facts.holders = find_holders(listed)
    facts.uptime = time.monotonic()
    return facts

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How much memory (MiB) a process uses, read again and again: from NVML, or from /proc without a card."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.vram import collection

collection.importable()

from ansible_collections.sottovoce.stack.plugins.module_utils._nvml import Device, Nvml

INTERVAL = 0.01
PROCESS, DIFFERENCE, MEMORY = "process", "difference", "process memory"


class Sampler:
    """Reads in a thread until it is stopped; `mark` begins a new phase, and each phase keeps its highest."""

    def __init__(self, read: Callable[[], float], interval: float = INTERVAL) -> None:
        self._read, self._interval = read, interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.samples: list[tuple[str, float, float]] = []  # phase, seconds, MiB
        self.phase = "start"
        self.error: Exception | None = None

    def _run(self) -> None:
        while not self._ended.is_set():
            phase = self.phase
            try:
                self.samples.append((phase, time.monotonic(), self._read()))
            except Exception as error:
                self.error = error
                return
            self._ended.wait(self._interval)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def peak(self) -> float:
        return max((mib for _phase, _at, mib in self.samples), default=0.0)

    def last(self, phase: str) -> float:
        """The last sample of a phase: what was there when the next began."""
        found = [mib for name, _at, mib in self.samples if name == phase]
        return found[-1] if found else 0.0


class Card:
    """One card through NVML, and whose memory it is."""

    def __init__(self, nvml: Nvml, index: int) -> None:
        self._nvml, self._index = nvml, index
        first = self.device()
        self.name, self.total_mib, self.reserved_mib = first.name, first.total_mib, first.reserved_mib
        self.before_mib = first.used_mib
        self.driver, self.cuda = nvml.driver_version(), nvml.cuda_version()
        self.source = DIFFERENCE

    def device(self) -> Device:
        device = self._nvml.devices()[self._index]
        if device.error:
            raise RuntimeError(f"GPU {self._index}: {device.error}")
        return device

    def used_by(self, pid: int) -> float:
        """
        Of a process as the driver lists it; where it does not list it (in a container), by difference to what
        was used before. That is right as long as nobody else uses the card.
        """
        device = self.device()
        for process in device.processes or ():
            if process.pid == pid and process.used_mib is not None:
                self.source = PROCESS
                return float(process.used_mib)
        if self.source == PROCESS:
            return 0.0
        return float(max(0, device.used_mib - self.before_mib))


def memory_of(pid: int) -> float:
    """Resident memory of a process."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0.0


def described(card: Card | None) -> dict[str, Any]:
    if card is None:
        return {"device": "cpu"}
    return {
        "device": "cuda",
        "name": card.name,
        "total_mib": card.total_mib,
        "reserved_mib": card.reserved_mib,
        "driver": card.driver,
        "cuda": card.cuda,
    }

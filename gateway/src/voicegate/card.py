"""The card's memory, as NVML tells it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pynvml

MIB = 1024 * 1024


@dataclass(frozen=True)
class Card:
    name: str
    total_mib: int
    used_mib: int
    free_mib: int


def read(index: int) -> Card | None:
    """None where there is no card, no driver or no answer: nothing is decided by what is not known.

    Blocks for a millisecond or so: call it in a thread.
    """
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, OSError):
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = pynvml.nvmlDeviceGetName(handle)
    except pynvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return Card(str(name), memory.total // MIB, memory.used // MIB, memory.free // MIB)

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Cards out of nvidia-smi's CSV, for machines where NVML's library cannot be loaded. Pure."""

from __future__ import annotations

from typing import Optional

from ansible_collections.sottovoce.stack.plugins.module_utils._nvml import Device, reason_names

BASE = ("index", "uuid", "pci.bus_id", "name", "driver_version", "memory.total", "memory.used", "memory.free")
# Older programs refuse the whole query for one field that they do not know, so there are two.
FULL = (
    *BASE,
    "compute_cap",
    "temperature.gpu",
    "ecc.errors.corrected.volatile.total",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.active",
)
# What stands in a field that has no value. "[GPU is lost]" and the like are a card's error.
_ABSENT = ("n/a", "not supported", "not available", "insufficient permissions")


class SmiGarbage(Exception):
    """What nvidia-smi printed is not the table that was asked for; str() names the line."""


def query(fields: tuple[str, ...]) -> list[str]:
    """Arguments of nvidia-smi that print fields as parse() reads them."""
    return [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def normal_bus_id(text: str) -> str:
    """`00000000:01:00.0` as the kernel writes it, 0000:01:00.0."""
    domain, colon, rest = text.strip().lower().partition(":")
    if not colon:
        raise ValueError(text)
    return f"{int(domain, 16):04x}:{rest}"


def parse(text: str, fields: tuple[str, ...]) -> tuple[list[Device], str]:
    """
    (cards, driver version) out of the output of query(fields).

    A card that lacks its memory gets an error of its own; SmiGarbage is raised for what is no such table.
    """
    devices, driver = [], ""
    for line in text.splitlines():
        if not line.strip() or line.strip().rstrip(".").lower() == "no devices were found":
            continue
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(fields):
            raise SmiGarbage(
                f"nvidia-smi printed a line of {len(cells)} fields, not {len(fields)}: {line[:120]!r}"
            )
        row = {field: cells[place] for place, field in enumerate(fields)}
        try:
            device = _device(row)
        except ValueError as error:
            raise SmiGarbage(
                f"nvidia-smi printed what is not understood ({error}): {line[:120]!r}"
            ) from error
        devices.append(device)
        driver = driver or _text(row["driver_version"])
    return devices, driver


def _bracketed(value: str) -> str:
    return value[1:-1] if value.startswith("[") and value.endswith("]") else ""


def _text(value: str) -> str:
    return "" if _bracketed(value) else value


def _number(value: str) -> Optional[int]:
    """A field as a number, None where the card does not tell; ValueError for anything else."""
    if (_bracketed(value) or value).lower() in _ABSENT:
        return None
    number = int(value, 16) if value.lower().startswith("0x") else int(value)
    if number < 0:
        raise ValueError(f"{value} is negative")
    return number


def _device(row: dict[str, str]) -> Device:
    index = _number(row["index"])
    if index is None:
        raise ValueError("a card without an index")
    device = Device(index, _text(row["uuid"]), name=_text(row["name"]))
    if _text(row["pci.bus_id"]):
        device.pci = normal_bus_id(row["pci.bus_id"])
    for key in ("memory.total", "memory.used", "memory.free"):
        trouble = _bracketed(row[key])
        if trouble and trouble.lower() not in _ABSENT:
            device.error = f"nvidia-smi says of its memory: {trouble}"
            return device
    total, used, free = (_number(row[f"memory.{key}"]) for key in ("total", "used", "free"))
    if total is None or used is None:
        device.error = "the driver tells nothing of its memory"
        return device
    if used > total:
        raise ValueError(f"{used} of {total} MiB used")
    device.total_mib, device.used_mib = total, used
    device.free_mib = total - used if free is None else min(free, total - used)
    device.reserved_mib = total - used - device.free_mib
    device.capability = _text(row.get("compute_cap", ""))
    device.temperature_c = _soft(row, "temperature.gpu")
    device.ecc_corrected = _soft(row, "ecc.errors.corrected.volatile.total")
    device.ecc_uncorrected = _soft(row, "ecc.errors.uncorrected.volatile.total")
    mask = _soft(row, "clocks_throttle_reasons.active")
    device.clock_reasons = None if mask is None else reason_names(mask)
    return device


def _soft(row: dict[str, str], key: str) -> Optional[int]:
    """A figure that a card need not have: also None for a bracketed trouble."""
    value = row.get(key, "n/a")
    return None if _bracketed(value) else _number(value)

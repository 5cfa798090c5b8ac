# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A storage pool for a host that has none; one that is there is adopted as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import typing as t
from collections.abc import Mapping
from urllib.parse import quote

from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    IncusClient,
    IncusConflict,
    IncusError,
    IncusNotFound,
)

GIB = 1 << 30
SMALLEST, LARGEST = 5, 200


@dataclasses.dataclass(frozen=True)
class Plan:
    """What would be created, and what to do instead if that fails."""

    driver: str
    config: dict[str, str]
    note: str = ""


def drivers_of(server: Mapping[str, t.Any]) -> set[str]:
    """Storage drivers that the daemon can use on this host."""
    listed = (server.get("environment") or {}).get("storage_supported_drivers") or []
    return {str(item.get("Name") or item.get("name")) for item in listed}


def loop_size(free: int) -> str:
    """Size of a loop file on a file system with `free` bytes: it must never fill that up."""
    gib = min(int(free * 0.6) // GIB, LARGEST)
    return f"{gib}GiB" if gib >= SMALLEST else ""


def plan_pool(
    driver: str,
    size: str,
    source: str,
    config: Mapping[str, str],
    supported: set[str],
    free: int | None,
) -> Plan:
    """Driver and configuration for a new pool. `auto` means btrfs in a loop file, else dir."""
    wanted = dict(config)
    if source:
        wanted["source"] = source
    note = ""
    if driver == "auto":
        driver = "btrfs"
        if supported and "btrfs" not in supported:
            driver = "dir"
            note = (
                "btrfs cannot be used on this host (its kernel lacks it, or btrfs-progs is missing): the pool"
                " is a plain directory, in which every new machine is a full copy of its image."
            )
    if driver == "dir":
        return Plan(driver, wanted, note)
    if size:
        wanted["size"] = size
    elif not source and free is not None and (computed := loop_size(free)):
        wanted["size"] = computed
    return Plan(driver, wanted, note)


def free_space(folder: str) -> int | None:
    try:
        stat = os.statvfs(folder)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


def find_pool(client: IncusClient, name: str) -> dict[str, t.Any] | None:
    try:
        return t.cast("dict[str, t.Any]", client.get(f"/1.0/storage-pools/{quote(name, safe='')}").metadata)
    except IncusNotFound:
        return None


def create_pool(
    client: IncusClient,
    name: str,
    plan: Plan,
    *,
    description: str = "",
    fallback: bool = False,
    timeout: float = 120.0,
) -> Plan:
    """Create it; with `fallback`, a plain directory where the planned driver fails. Gives what was made."""
    body = {"name": name, "driver": plan.driver, "description": description, "config": plan.config}
    try:
        client.request("POST", "/1.0/storage-pools", body=body, timeout=timeout)
        return plan
    except IncusConflict:
        raise
    except IncusError as error:
        if not fallback or plan.driver == "dir" or error.code is None:
            raise
        _forget(client, name)
        kept = {key: value for key, value in plan.config.items() if key not in ("size", "source")}
        reserve = Plan(
            "dir",
            kept,
            f"{plan.driver} could not be made here ({error}): the pool is a plain directory, in which every"
            " new machine is a full copy of its image.",
        )
        client.request(
            "POST", "/1.0/storage-pools", body={**body, "driver": "dir", "config": kept}, timeout=timeout
        )
        return reserve


def _forget(client: IncusClient, name: str) -> None:
    """A pool whose creation failed may stay behind in the database."""
    with contextlib.suppress(IncusError):
        client.request("DELETE", f"/1.0/storage-pools/{quote(name, safe='')}")

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Units of this collection on one machine: which there are, what systemd and their health URLs say."""

from __future__ import annotations

import configparser
import http.client
import json
import os
import time
import urllib.parse
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

SECTION = "X-Sottovoce"
PROPERTIES = ("Id", "ActiveState", "SubState", "UnitFileState", "MemoryCurrent", "NRestarts", "MainPID")
MIB = 1024 * 1024


@dataclass(frozen=True)
class Unit:
    """A unit file with our section: its name and the URLs that it gives."""

    name: str
    health_url: str
    details_url: str


def parse_unit(name: str, text: str) -> Unit | None:
    """Return the Unit that a unit file's text describes, or None when it is not one of ours."""
    if f"[{SECTION}]" not in text:
        return None
    parser = configparser.ConfigParser(strict=False, interpolation=None, allow_no_value=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    ours = parser[SECTION]
    return Unit(name, ours.get("Health") or "", ours.get("Details") or "")


def find_units(folder: str) -> list[Unit]:
    """Return the units of ours whose files lie in folder, by name."""
    units = []
    for entry in sorted(os.listdir(folder)):
        path = os.path.join(folder, entry)
        if entry.endswith(".service") and os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as handle:
                unit = parse_unit(entry.removesuffix(".service"), handle.read())
            if unit:
                units.append(unit)
    return units


def parse_show(text: str) -> dict[str, dict[str, str]]:
    """Return the blocks of `systemctl show` by unit name (without .service)."""
    found: dict[str, dict[str, str]] = {}
    for block in text.strip().split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" in values:
            found[values["Id"].removesuffix(".service")] = values
    return found


def memory_mib(value: str | None) -> int | None:
    """MemoryCurrent of systemd in MiB; None where it is not accounted."""
    if not value or not value.isdigit() or int(value) >= 2**63:
        return None
    return int(value) // MIB


def parse_meminfo(text: str) -> dict[str, int]:
    """Total and available memory in MiB out of /proc/meminfo."""
    values = {}
    for line in text.splitlines():
        key, _colon, rest = line.partition(":")
        if key in ("MemTotal", "MemAvailable"):
            values[key] = int(rest.split()[0]) // 1024
    return {"total_mib": values.get("MemTotal", 0), "available_mib": values.get("MemAvailable", 0)}


def fetch_json(url: str, timeout: float) -> tuple[int | None, Any, str]:
    """
    GET url and return (status, decoded JSON or None, error text); never raises for what a server does.

    Straight to the server, because daemons of this machine are not asked through a proxy; timeout is in
    seconds, for each step of it.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=timeout)
    except (ValueError, http.client.HTTPException) as error:
        return None, None, str(error)
    try:
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request("GET", path, headers={"Accept": "application/json"})
        reply = connection.getresponse()
        status, body = reply.status, reply.read(1 << 20)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return None, None, str(error) or type(error).__name__
    finally:
        connection.close()
    if status >= 400:
        return status, None, f"HTTP {status}"
    try:
        return status, json.loads(body), ""
    except ValueError:
        return status, None, ""


def describe(
    unit: Unit,
    shown: Mapping[str, str],
    fetch: Callable[[str], tuple[int | None, Any, str]],
) -> dict[str, Any]:
    """Put together what systemd and the daemon itself say of one unit."""
    active = shown.get("ActiveState", "unknown")
    result: dict[str, Any] = {
        "name": unit.name,
        "state": active,
        "sub_state": shown.get("SubState", "unknown"),
        "enabled": shown.get("UnitFileState", "") == "enabled",
        "restarts": int(shown["NRestarts"]) if shown.get("NRestarts", "").isdigit() else 0,
        "memory_mib": memory_mib(shown.get("MemoryCurrent")),
        "health": "stopped" if active in ("inactive", "failed") else "unknown",
        "details": {},
    }
    if active == "failed":
        result["health"] = "failed"
    if active != "active" or not unit.health_url:
        return result
    status, body, error = fetch(unit.health_url)
    result["health"] = "ok" if status == 200 else (error or f"HTTP {status}")
    details = body
    if unit.details_url and status == 200:
        details = fetch(unit.details_url)[1]
    if isinstance(details, dict):
        result["details"] = details
    return result


@dataclass(frozen=True)
class Outcome:
    """How waiting for a daemon ended: problem is empty when it is healthy."""

    problem: str = ""
    health: dict[str, Any] = field(default_factory=dict)


def wait_healthy(
    *,
    fetch: Callable[[], tuple[int | None, Any, str]],
    unit_state: Callable[[], str],
    expected: Collection[int],
    timeout: float,
    interval: float = 0.25,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """
    Ask until an expected status comes, the unit has failed, or timeout seconds are over.

    fetch gives (status, decoded JSON, error) of the health URL; unit_state gives systemd's ActiveState, which
    is asked only while the URL does not answer as it should.
    """
    deadline = clock() + timeout
    while True:
        status, body, error = fetch()
        if status in expected:
            return Outcome(health=body if isinstance(body, dict) else {})
        if unit_state() == "failed":
            return Outcome("the unit has failed")
        if clock() >= deadline:
            return Outcome(
                f"no healthy answer within {timeout:g} s, the last was: {error or f'HTTP {status}'}"
            )
        sleep(interval)

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A daemon's files, and what its unit needs to run with them: a pure decision over `systemctl show`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

PROPERTIES = ("LoadState", "ActiveState", "UnitFileState", "NeedDaemonReload", "ExecMainStartTimestamp")


@dataclass(frozen=True)
class File:
    """A file that a process was started from, and when it was last written (seconds since 1970)."""

    path: str
    written: float


@dataclass(frozen=True)
class Stored:
    """A text file as it is on the disk: owner and group by number."""

    text: str
    mode: int
    owner: int
    group: int


@dataclass
class Plan:
    """Verbs of systemctl in their order, why a restart is among them, and whether there is no such unit."""

    actions: list[str] = field(default_factory=list)
    why: str = ""
    missing: bool = False


def newest(paths: Iterable[str]) -> File | None:
    """The file that was written last; of a link its own time counts, and missing files are left out."""
    found = []
    for path in paths:
        try:
            found.append(File(path, os.lstat(path).st_mtime))
        except FileNotFoundError:
            continue
    return max(found, key=lambda file: file.written, default=None)


def look(path: str) -> Stored | None:
    """The file at path, None without one."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            status = os.fstat(stream.fileno())
            return Stored(stream.read(), stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
    except FileNotFoundError:
        return None


def store(path: str, wanted: Stored) -> None:
    """Write it whole or not at all, and never readable for others, not even for a moment."""
    scratch = f"{path}.new"
    if os.path.lexists(scratch):
        os.unlink(scratch)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(wanted.text)
        stream.flush()
        os.fchown(descriptor, wanted.owner, wanted.group)
        os.fchmod(descriptor, wanted.mode)
        os.fsync(descriptor)
    os.replace(scratch, path)


def file_diff(path: str, found: Stored | None, wanted: Stored, *, hidden: bool) -> dict[str, str]:
    """Before and after of one file for Ansible; hidden says only that it changes."""
    texts = (
        ("(hidden)\n" if found else "", "(hidden, changed)\n")
        if hidden
        else (found.text if found else "", wanted.text)
    )
    return {"before_header": path, "after_header": path, "before": texts[0], "after": texts[1]}


def started_at(text: str) -> float | None:
    """Seconds since 1970 out of systemd's `us+utc` timestamp ("Fri 2026-11-20 23:45:09.123456 UTC")."""
    parts = text.split()
    if len(parts) != 4:
        return None
    moment = datetime.strptime(f"{parts[1]} {parts[2]}", "%Y-%m-%d %H:%M:%S.%f")
    return moment.replace(tzinfo=UTC).timestamp()


def decide(
    shown: Mapping[str, str], *, enabled: bool, restart: bool, newest: File | None, check_mode: bool = False
) -> Plan:
    """
    Return what to do so that the unit is as wanted.

    shown: properties of `systemctl show --timestamp=us+utc`; newest: the last written of the files that the
    process was started from. In check mode a unit that is not there yet counts as one about to be written.
    """
    plan = Plan()
    present = shown.get("LoadState") != "not-found"
    is_enabled = shown.get("UnitFileState") == "enabled"
    running = shown.get("ActiveState") in ("active", "activating", "reloading")
    if not present and enabled and not check_mode:
        # systemd has not read a file that was written a moment ago.
        plan.missing = shown.get("NeedDaemonReload") != "yes" and newest is None
    if shown.get("NeedDaemonReload") == "yes" or (not present and enabled and not check_mode):
        plan.actions.append("daemon-reload")
    if not enabled:
        plan.actions += ["disable"] if is_enabled else []
        plan.actions += ["stop"] if running or shown.get("ActiveState") == "deactivating" else []
        # Reading unit files again is no change to a service that is off.
        return plan if plan.actions != ["daemon-reload"] else Plan()
    plan.actions += [] if is_enabled else ["enable"]
    if not running:
        plan.actions.append("start")
        return plan
    started = started_at(shown.get("ExecMainStartTimestamp", ""))
    if restart:
        plan.why = "asked for"
    elif newest and started is not None and newest.written > started:
        plan.why = f"{newest.path} is newer than the process"
    if plan.why:
        plan.actions.append("restart")
    return plan


def describe(shown: Mapping[str, str]) -> str:
    """State as one line for a diff."""
    if shown.get("LoadState") == "not-found":
        return "absent\n"
    return f"{shown.get('UnitFileState') or 'disabled'}, {shown.get('ActiveState')}\n"


def wanted(enabled: bool) -> str:
    """The state that is asked for, as one line for a diff."""
    return "enabled, active\n" if enabled else "disabled, inactive\n"

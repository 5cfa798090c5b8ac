# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a machine can run Incus, where its daemon is, and how it is installed here."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import typing as t
from collections.abc import Callable, Mapping, Sequence

DAEMONS = ("/usr/libexec/incus/incusd", "/usr/lib/incus/incusd", "/opt/incus/bin/incusd")
# A container needs 65536 ids of its own beside those of the host.
IDS_NEEDED = 2 * 65536
TRIAL_TIMEOUT = 10.0

Trial = Callable[[Sequence[str]], tuple[bool, str]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something without which containers cannot run here."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


@dataclasses.dataclass(frozen=True)
class Install:
    """How Incus gets onto this distribution."""

    supported: bool
    backports: str = ""
    why: str = ""


def find_daemon(exists: Callable[[str], bool] = os.path.exists) -> str:
    """Path of incusd, or empty."""
    for path in DAEMONS:
        if exists(path):
            return path
    return shutil.which("incusd") or ""


def init_system(root: str = "/") -> str:
    """`systemd` if it is PID 1, else `sysvinit` (what `service` starts)."""
    return "systemd" if os.path.isdir(os.path.join(root, "run/systemd/system")) else "sysvinit"


def _version(text: str) -> tuple[int, ...]:
    parts = []
    for part in text.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def install_plan(os_release: Mapping[str, str]) -> Install:
    """Which archive of the distribution has Incus."""
    name = os_release.get("ID", "")
    version = _version(os_release.get("VERSION_ID", ""))
    codename = os_release.get("VERSION_CODENAME", "")
    if name == "debian":
        if version[:1] == (12,):
            return Install(True, backports=f"{codename or 'bookworm'}-backports")
        # Testing and unstable have no number.
        if not version or version >= (13,):
            return Install(True)
    elif name == "ubuntu" and version >= (24, 4):
        return Install(True)
    label = os_release.get("PRETTY_NAME") or name or "This system"
    return Install(
        False,
        why=f"{label} is none of Debian 12, Debian 13 and Ubuntu 24.04 (or later), whose archives have Incus."
        " Install Incus 6.0 or later in your distribution's way, start it, and run again: it is then"
        " used as it is.",
    )


# Can this kernel run it?


def trial(argv: Sequence[str]) -> tuple[bool, str]:
    """Run a harmless command; a missing tool proves nothing and counts as success."""
    if shutil.which(argv[0]) is None:
        return True, ""
    try:
        answer = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TRIAL_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return False, str(error)
    said = (answer.stderr or answer.stdout).strip().splitlines()
    return answer.returncode == 0, said[-1] if said else f"exit status {answer.returncode}"


def _read(root: str, path: str) -> str:
    try:
        with open(os.path.join(root, path), encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def kernel_problems(
    *,
    root: str = "/",
    is_root: bool | None = None,
    run: Trial = trial,
    which: Callable[[str], t.Any] = shutil.which,
) -> list[Problem]:
    """Why this kernel (or the container around us) cannot run Incus; empty if nothing is in the way.

    As root, bridges, firewall tables and mounts are tried in namespaces of their own, which leave nothing.
    """
    if not sys.platform.startswith("linux"):
        return [Problem("This is no Linux", "Incus runs on Linux; name a remote one or use another machine")]
    found = []
    mounts = [line.split() for line in _read(root, "proc/self/mounts").splitlines()]
    if not any(len(m) > 2 and m[2] in ("cgroup", "cgroup2") for m in mounts):
        found.append(
            Problem(
                "No cgroup hierarchy is mounted", "mount -t cgroup2 none /sys/fs/cgroup, or boot with systemd"
            )
        )
    if not os.path.exists(os.path.join(root, "proc/self/ns/user")):
        found.append(Problem("The kernel has no user namespaces", "use a kernel with CONFIG_USER_NS"))
    else:
        limit = _read(root, "proc/sys/user/max_user_namespaces").strip()
        if limit.isdigit() and int(limit) == 0:
            found.append(
                Problem("User namespaces are switched off", "sysctl -w user.max_user_namespaces=15000")
            )
    ids = 0
    for line in _read(root, "proc/self/uid_map").splitlines():
        ids += int(line.split()[2])
    if 0 < ids < IDS_NEEDED:
        found.append(
            Problem(
                f"This machine is a container with only {ids} user ids",
                "give it more (Incus: security.idmap.size=1000000 and security.nesting=true on it)",
            )
        )
    if is_root if is_root is not None else os.geteuid() == 0:
        found += _trials(run, which)
    return found


def _trials(run: Trial, which: Callable[[str], t.Any]) -> list[Problem]:
    found = []
    ok, why = run(["unshare", "--mount", "true"])
    if not ok:
        return [
            Problem(
                f"Root may not make namespaces here ({why})",
                "this is a restricted container or sandbox; run it with more rights or use another machine",
            )
        ]
    ok, why = run(["unshare", "--user", "true"])
    if not ok:
        found.append(
            Problem(f"User namespaces cannot be made ({why})", "allow them in the kernel's settings")
        )
    apart = ["unshare", "--net", "--"]
    if which("ip"):
        ok, why = run([*apart, "ip", "link", "add", "name", "probe0", "type", "bridge"])
        if not ok:
            found.append(
                Problem(f"The kernel cannot make a bridge ({why})", "load or build the module bridge")
            )
        ok, why = run(
            [*apart, "ip", "link", "add", "name", "probe0", "type", "veth", "peer", "name", "probe1"]
        )
        if not ok:
            found.append(
                Problem(f"The kernel cannot make a veth pair ({why})", "load or build the module veth")
            )
    if which("nft"):
        rules = "add table ip probe; add chain ip probe c { type nat hook postrouting priority 100; };"
        rules += " add rule ip probe c ip saddr 192.0.2.0/24 masquerade"
        ok, why = run([*apart, "nft", rules])
        if not ok:
            found.append(
                Problem(
                    f"The kernel's nftables cannot masquerade ({why})", "load or build nf_tables and nft_masq"
                )
            )
    return found

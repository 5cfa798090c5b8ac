#!/usr/bin/env python3
"""
An Incus daemon of its own for tests: own folder, socket, database, pool and log, beside any other daemon.

incusd.py probe                      says whether this machine can run Incus, and if not, why (exit status 1)
incusd.py run [options] -- COMMAND   runs COMMAND with INCUS_DIR set to a fresh daemon, then removes it all
incusd.py start [options]            starts one that stays, and prints what to export
incusd.py stop FOLDER                removes that one
incusd.py clean                      removes what test runs that were killed left behind

Options: --pool auto|btrfs|dir|none, --size 30GiB, --image (imports the image that incus_host builds), --gpu N
(the daemon sees N NVIDIA cards that are not there; `probe --gpu` says whether that can be done here).

Two daemons share the kernel, so the names of bridges and their subnets must differ. COMMAND finds in
SOTTOVOCE_TEST_OCTET the first of eight second octets (10.<n>.0.0 to 10.<n+7>.255.255) that nothing else
here uses, and in SOTTOVOCE_TEST_ID four letters of its own to put into names. With --gpu, also
SOTTOVOCE_TEST_GPU_DIR, the folder through which simulated_gpu.py changes the cards, and SOTTOVOCE_HOST_ROOT,
which shows the host preflight the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import simulated_gpu

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / ".collections") not in sys.path:
    sys.path.insert(0, str(ROOT / ".collections"))

from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_host as incus_host
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_pool as incus_pool
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    Endpoint,
    IncusClient,
    IncusError,
    IncusForbidden,
)

PREFIX = "sottovoce-incusd-"
READY_TIMEOUT = 60.0
# Chains that Incus makes per network in its table, which all daemons of a host share.
CHAINS = ("aclin", "aclout", "aclfwd", "acl", "fwd", "in", "out", "pstrt", "prert")


class DaemonError(Exception):
    """str() is the message for a person."""


def probe() -> list[str]:
    """Why no private daemon can run here; empty if one can."""
    reasons = []
    if not incus_host.find_daemon():
        reasons.append("Incus is not installed (playbooks/host.yml installs it)")
    if os.geteuid() != 0:
        reasons.append("not root: a daemon of its own mounts, makes bridges and starts containers")
    reasons += [str(problem) for problem in incus_host.kernel_problems()]
    return reasons


def _started(pid: int) -> str:
    """Start time of a process, so that a number used again is not taken for it; empty if it is gone."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _quiet(*argv: str, timeout: float = 30.0) -> bool:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )
        return done.returncode == 0
    return False


def base_folder() -> Path:
    # Not /tmp: that is memory on many systems, and pools lie below.
    return Path(os.environ.get("SOTTOVOCE_TEST_DIR") or "/var/tmp")


@dataclass
class Daemon:
    """One private daemon. `folder` holds everything of it."""

    folder: Path

    @property
    def incus_dir(self) -> Path:
        return self.folder / "incus"

    @property
    def log(self) -> Path:
        return self.folder / "incusd.log"

    @property
    def cards(self) -> simulated_gpu.Cards | None:
        """Its simulated cards, if it was started with some (or with none, but with a way to add them)."""
        folder = self.folder / "gpu"
        return simulated_gpu.Cards(folder) if folder.is_dir() else None

    @property
    def record(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / "owner.json").read_text(encoding="utf-8"))
            return found
        except (OSError, ValueError):
            return {}

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to talk to this daemon and to no other."""
        record = self.record
        found = {
            "INCUS_DIR": str(self.incus_dir),
            "INCUS_SOCKET": str(self.incus_dir / "unix.socket"),
            "INCUS_CONF": str(self.folder / "conf"),
            "SOTTOVOCE_TEST_ID": str(record.get("id", "")),
            "SOTTOVOCE_TEST_OCTET": str(record.get("octet", "")),
        }
        if self.cards:
            found["SOTTOVOCE_TEST_GPU_DIR"] = str(self.cards.folder)
            found["SOTTOVOCE_HOST_ROOT"] = str(self.cards.host.root)
        return found

    def client(self, timeout: float = 30.0) -> IncusClient:
        return IncusClient(Endpoint(socket=str(self.incus_dir / "unix.socket")), timeout=timeout)

    def log_tail(self, lines: int = 20) -> str:
        try:
            return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"

    # Start

    def command(self, argv: list[str]) -> list[str]:
        """What runs the daemon, under the same process id, where it finds its machine as it should."""
        return self.cards.command(argv) if self.cards else argv

    def launch(self) -> None:
        daemon = incus_host.find_daemon()
        if not daemon:
            raise DaemonError("Incus is not installed.")
        self.incus_dir.mkdir(mode=0o711, exist_ok=True)
        (self.folder / "conf").mkdir(mode=0o700, exist_ok=True)
        env = {key: value for key, value in os.environ.items() if not key.startswith("INCUS_")}
        env["INCUS_DIR"] = str(self.incus_dir)
        env["PATH"] = f"{Path(daemon).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command([daemon, "--logfile", str(self.log)]),
                env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True,
            )  # fmt: skip
        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (1 << 20, 1 << 20))
        self._note(daemon_pid=process.pid, daemon_started=_started(process.pid))
        deadline = time.monotonic() + READY_TIMEOUT
        while True:
            try:
                with self.client(timeout=10) as client:
                    client.get("/internal/ready")
                return
            except IncusForbidden:
                return
            except IncusError as error:
                if process.poll() is not None:
                    raise DaemonError(
                        f"The daemon ended ({process.returncode}):\n{self.log_tail()}"
                    ) from None
                if time.monotonic() > deadline:
                    raise DaemonError(f"The daemon is not ready: {error}\n{self.log_tail()}") from None
            time.sleep(0.05)

    def reboot(self) -> None:
        """What a reboot of the host is to Incus: instances shut down, the daemon ends and starts again."""
        self._again(signal.SIGPWR)

    def restart(self) -> None:
        """The daemon ends and starts again; instances go on running. No instance may be just stopping."""
        self._again(signal.SIGTERM)

    def _again(self, number: signal.Signals) -> None:
        pid = int(self.record["daemon_pid"])
        started = _started(pid)
        os.kill(pid, number)
        deadline = time.monotonic() + READY_TIMEOUT
        while _started(pid) == started:
            if time.monotonic() > deadline:
                raise DaemonError(f"The daemon does not end:\n{self.log_tail()}")
            time.sleep(0.02)
        if number == signal.SIGPWR:
            self.wait_for_bridges()
        self.launch()

    def wait_for_bridges(self) -> None:
        """Wait until no instance is on a bridge: Incus does not start one whose interfaces just vanish."""
        deadline = time.monotonic() + 10
        folders = [Path("/sys/class/net") / name / "brif" for name in self._networks_on_disk()]
        while any(folder.is_dir() and any(folder.iterdir()) for folder in folders):
            if time.monotonic() > deadline:
                raise DaemonError("Interfaces of instances that have ended are still there.")
            time.sleep(0.02)

    def _note(self, **values: Any) -> None:
        fresh = self.folder / "owner.json.new"
        fresh.write_text(json.dumps({**self.record, **values}), encoding="utf-8")
        fresh.replace(self.folder / "owner.json")

    def make_pool(self, driver: str, size: str) -> None:
        with self.client() as client:
            free = incus_pool.free_space(str(self.folder))
            supported = incus_pool.drivers_of(client.server())
            plan = incus_pool.plan_pool(driver, size, "", {}, supported, free)
            incus_pool.create_pool(client, "default", plan, fallback=driver == "auto")

    def import_image(self, alias: str = "", release: str = "") -> str:
        """
        The image that incus_host builds, from the cache of this user if it was built before.

        The cache keeps one image per alias, so another release needs an alias of its own.
        """
        import yaml
        from ansible_collections.sottovoce.stack.plugins.module_utils import _apt_sources as apt
        from ansible_collections.sottovoce.stack.plugins.module_utils import _image_build as image_build

        text = (ROOT / "roles/incus_host/defaults/main.yml").read_text(encoding="utf-8")
        given = {key.removeprefix("incus_host_image_"): value for key, value in yaml.safe_load(text).items()}
        release, alias = release or str(given["release"]), alias or str(given["alias"])
        architecture = subprocess.run(
            ["dpkg", "--print-architecture"], capture_output=True, text=True, check=True
        ).stdout.strip()
        recipe = image_build.Recipe(
            given["distribution"],
            release,
            architecture,
            tuple(given["packages"]),
            tuple(given["components"]),
            tuple(apt.image_sources(apt.read_sources(), release, given["components"])),
        )
        built = image_build.obtain(recipe, alias, max_age=given["max_age"])
        with self.client() as client:
            image_build.import_image(client, built, alias)
        return alias

    # Stop

    def remove(self) -> None:
        """Everything of it: instances, bridges, processes, mounts, loop files, the folder."""
        record = self.record
        networks = self._networks_on_disk()
        pid = int(record.get("daemon_pid") or 0)
        alive = bool(pid) and _started(pid) == record.get("daemon_started")
        if alive:
            with contextlib.suppress(IncusError, OSError):
                networks |= self._empty()
            self._end(pid)
        self._end_helpers()
        holder = int(record.get("holder_pid") or 0)
        if holder and _started(holder) == record.get("holder_started"):
            self._end(holder)
        for name in sorted(networks):
            self._drop_network(name)
        self._unmount()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            raise DaemonError(
                f"{self.folder} could not be removed whole; look for mounts or processes in it."
            )

    def _networks_on_disk(self) -> set[str]:
        with contextlib.suppress(OSError):
            return {path.name for path in (self.incus_dir / "networks").iterdir()}
        return set()

    def _empty(self) -> set[str]:
        """Delete instances and networks through the API; gives the names of the bridges."""
        bridges: set[str] = set()
        with self.client(timeout=30) as client:
            found = client.get("/1.0/instances", query={"recursion": 1, "all-projects": True}).metadata or []
            for item in found:
                with contextlib.suppress(IncusError):
                    self._delete_instance(client, item)
            projects = [str(url).rpartition("/")[2] for url in client.get("/1.0/projects").metadata or []]
            for project in projects:
                # A profile that uses a network keeps it from being deleted.
                for profile in self._names(client, "/1.0/profiles", project):
                    path = f"/1.0/profiles/{quote(profile, safe='')}"
                    with contextlib.suppress(IncusError):
                        client.request("PUT", path, project=project, body={"config": {}, "devices": {}})
            for project in projects:
                for network in (
                    client.get("/1.0/networks", project=project, query={"recursion": 1}).metadata or []
                ):
                    if not network.get("managed") or network.get("project", project) != project:
                        continue
                    bridges.add(str(network["name"]))
                    with contextlib.suppress(IncusError):
                        client.run(
                            "DELETE", f"/1.0/networks/{quote(network['name'], safe='')}", project=project
                        )
        return bridges

    @staticmethod
    def _names(client: IncusClient, path: str, project: str) -> list[str]:
        return [
            str(url).partition("?")[0].rpartition("/")[2]
            for url in client.get(path, project=project).metadata or []
        ]

    @staticmethod
    def _delete_instance(client: IncusClient, item: dict[str, Any]) -> None:
        path = f"/1.0/instances/{quote(item['name'], safe='')}"
        project = str(item.get("project") or "default")
        if item.get("status_code") != 102:
            body = {"action": "stop", "force": True, "timeout": 30}
            with contextlib.suppress(IncusError):
                client.run("PUT", f"{path}/state", project=project, body=body, wait_timeout=60)
        if (item.get("config") or {}).get("security.protection.delete") == "true":
            client.run(
                "PATCH", path, project=project, body={"config": {"security.protection.delete": "false"}}
            )
        with contextlib.suppress(IncusError):
            client.run("DELETE", path, project=project, wait_timeout=60)

    @staticmethod
    def _end(pid: int, patience: float = 20.0) -> None:
        started = _started(pid)
        for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + wait
            while time.monotonic() < deadline:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
                if _started(pid) != started:
                    return
                time.sleep(0.05)

    def _end_helpers(self) -> None:
        """dnsmasq, monitors, file servers: whatever names our folder in its command line, with children."""
        mark = str(self.incus_dir).encode() + b"/"
        parents: dict[int, list[int]] = {}
        ours = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                line = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            parents.setdefault(parent, []).append(int(entry.name))
            program = line.partition(b"\0")[0].rpartition(b"/")[2]
            if mark in line and (
                program.startswith((b"incusd", b"dnsmasq")) or line.startswith(b"[lxc monitor]")
            ):
                ours.append(int(entry.name))
        for pid in ours:
            # The only children of a monitor are its container's first process and what it just forks.
            for victim in [*parents.get(pid, ()), pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while any(_started(pid) for pid in ours) and time.monotonic() < deadline:
            time.sleep(0.05)

    @staticmethod
    def _drop_network(name: str) -> None:
        """What is left of a network whose daemon could not delete it."""
        link = Path("/sys/class/net") / name
        if not (link / "bridge").is_dir():
            return
        _quiet("ip", "link", "delete", "dev", name)
        for chain in CHAINS:
            _quiet("nft", "flush", "chain", "inet", "incus", f"{chain}.{name}")
            _quiet("nft", "delete", "chain", "inet", "incus", f"{chain}.{name}")

    def _unmount(self) -> None:
        prefix = f"{self.folder}/"
        for _again in range(3):
            lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
            points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
            inside = [point for point in points if point.startswith(prefix)]
            if not inside:
                break
            for point in reversed(inside):
                # Normally all at rest; a lazy unmount for what a dying process still holds.
                if not _quiet("umount", point):
                    _quiet("umount", "-l", point)
        for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):
                if backing.read_text(encoding="utf-8").startswith(prefix):
                    _quiet("losetup", "-d", f"/dev/{backing.parts[3]}")


def leftovers() -> list[Daemon]:
    """Daemons whose test run is gone."""
    found = []
    for folder in sorted(base_folder().glob(f"{PREFIX}*")):
        daemon = Daemon(folder)
        record = daemon.record
        owner = int(record.get("owner_pid") or 0)
        try:
            fresh = not record and time.time() - folder.stat().st_mtime < 60
            mine = folder.stat().st_uid == os.geteuid()
        except OSError:
            continue
        if (
            mine
            and not fresh
            and not record.get("stays")
            and _started(owner) != record.get("owner_started", "?")
        ):
            found.append(daemon)
    return found


def _used_octets() -> set[int]:
    """Second octets of 10.0.0.0/8 that routes, or other test daemons, use."""
    used: set[int] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]:
            destination, mask = int(line.split()[1], 16), int(line.split()[7], 16)
            if destination & 0xFF != 10:
                continue
            free_bits = bin(~(mask >> 8) & 0xFF).count("1") if mask & 0xFF else 8
            first = destination >> 8 & 0xFF
            used |= set(range(first, first + (1 << free_bits)))
    for folder in base_folder().glob(f"{PREFIX}*"):
        start = Daemon(folder).record.get("octet")
        if isinstance(start, int):
            used |= set(range(start, start + 8))
    return used


def create(
    *,
    pool: str = "auto",
    size: str = "30GiB",
    image: bool = False,
    gpu: int | None = None,
    stays: bool = False,
    make: Callable[[Path], Daemon] = Daemon,
) -> Daemon:
    """Start a daemon in a fresh folder and wait until it is ready. gpu: how many cards it sees."""
    reasons = probe()
    if reasons:
        raise DaemonError(
            "No Incus daemon can run here:\n" + "\n".join(f"  - {reason}" for reason in reasons)
        )
    for old in leftovers():
        old.remove()
    if len(str(base_folder())) > 48:
        raise DaemonError(
            f"{base_folder()} is too long a path for the sockets below it; set SOTTOVOCE_TEST_DIR."
        )
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base_folder()))
    daemon = make(folder)
    try:
        # Containers' users must be able to reach their files below.
        folder.chmod(0o711)
        used = _used_octets()
        octets = [n for n in range(136, 249, 8) if not used & set(range(n, n + 8))]
        if not octets:
            raise DaemonError("All of 10.136.0.0 to 10.255.255.255 is in use here.")
        daemon._note(
            owner_pid=os.getpid(),
            owner_started=_started(os.getpid()),
            stays=stays,
            id="".join(secrets.choice("abcdefghijkmnpqrstuvwxyz") for _ in range(4)),
            octet=octets[0],
        )
        if gpu is not None:
            cards = simulated_gpu.Cards(folder / "gpu")
            cards.create(gpu)
            holder = cards.hold()
            daemon._note(holder_pid=holder.pid, holder_started=_started(holder.pid))
        daemon.launch()
        if pool != "none":
            daemon.make_pool(pool, size)
        if image:
            daemon.import_image()
    except BaseException:
        daemon.remove()
        raise
    return daemon


@contextlib.contextmanager
def running(**options: Any) -> Iterator[Daemon]:
    """A daemon for the time of a with block (or a pytest fixture)."""
    daemon = create(**options)
    try:
        yield daemon
    finally:
        daemon.remove()


def run(command: list[str], **options: Any) -> int:
    """Run a command beside a daemon of its own; gives the command's exit status."""

    def stop(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    with running(**options) as daemon:
        process = subprocess.Popen(command, env={**os.environ, **daemon.environment})
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The terminal told the command too; let it end in its own way.
            with contextlib.suppress(KeyboardInterrupt):
                process.wait(30)
            return 130
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="action", required=True)
    sub = commands.add_parser("probe", help="say whether this machine can run Incus")
    sub.add_argument("--gpu", action="store_true", help="and whether a card can be simulated")
    for name in ("run", "start"):
        sub = commands.add_parser(name)
        sub.add_argument("--pool", choices=["auto", "btrfs", "dir", "none"], default="auto")
        sub.add_argument("--size", default="30GiB", help="of the pool's (sparse) loop file")
        sub.add_argument("--image", action="store_true", help="import the image that incus_host builds")
        sub.add_argument("--gpu", type=int, metavar="N", help="let it see N simulated NVIDIA cards")
        if name == "run":
            sub.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    commands.add_parser("stop").add_argument("folder", type=Path)
    commands.add_parser("clean")
    arguments = parser.parse_args(argv)
    names = ("pool", "size", "image", "gpu")
    options = {key: getattr(arguments, key) for key in names if hasattr(arguments, key)}
    try:
        if arguments.action == "probe":
            reasons = probe()
            if arguments.gpu and not reasons and (reason := simulated_gpu.probe()):
                reasons = [reason]
            print("\n".join(reasons) or f"Incus can run here ({incus_host.find_daemon()}).")
            return int(bool(reasons))
        if arguments.action == "run":
            command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
            if not command:
                parser.error("run needs a command after --")
            return run(command, **options)
        if arguments.action == "start":
            daemon = create(**options, stays=True)
            print("\n".join(f"export {key}={value}" for key, value in daemon.environment.items()))
            return 0
        if arguments.action == "stop":
            folder = arguments.folder.resolve()
            folder = folder.parent if folder.name == "incus" else folder
            if not folder.name.startswith(PREFIX) or not (folder / "owner.json").is_file():
                raise DaemonError(f"{folder} is no folder of a test daemon.")
            Daemon(folder).remove()
            return 0
        for daemon in leftovers():
            print(f"removing {daemon.folder}")
            daemon.remove()
        return 0
    except (DaemonError, simulated_gpu.SimulationError, IncusError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

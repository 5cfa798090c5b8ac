"""
NVIDIA cards that are not there, for a private Incus daemon on a machine without any. For tests only.

The daemon runs in a mount namespace of its own in which /sys/bus/pci/devices and /proc/driver show what lies
in the control folder, /dev has the driver's nodes, and nvidia-container-cli is a stand-in. Nothing of it is
visible outside, and it is gone with the last process in it. What is real: Incus, LXC and its nvidia hook, the
device nodes and their permissions. What is not: the driver behind the nodes, so opening one fails with ENXIO.

Incus answers GET /1.0/resources from a cache: for 10 seconds, and for ever before 6.0.6, where the test of
its age is the wrong way round. So after a change of the hardware the daemon has to be started again
(`reboot` or `restart` of incusd.Daemon).

The control folder (SOTTOVOCE_TEST_GPU_DIR) holds

    state.json   cards, version of the driver's kernel half and userland, whether nvidia-uvm is there
    root/        the same as files of a host: what the daemon sees, and SOTTOVOCE_HOST_ROOT of the preflight
    pid          of a process in the namespace

Class Cards changes both, and the nodes in the namespace, while the daemon runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from host_root import Host

DRIVER = "570.86.15"
CUDA = "12.8"
# Addresses that no machine here has: a bus of its own for each card.
ADDRESSES = [f"0000:{bus:02x}:00.0" for bus in range(0x81, 0x90)]
CLI = Path(__file__).with_name("nvidia_container_cli.py")
TRIPLET = f"{platform.machine()}-linux-gnu"
TOOL = "usr/bin/nvidia-container-cli"
CTL, UVM_MAJOR, MAJOR = 255, 511, 195


class SimulationError(Exception):
    """str() is the message for a person."""


class Cards:
    """The control folder of one daemon, and ways to change what that daemon sees."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = Host(folder / "root")

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        return found

    @property
    def addresses(self) -> list[str]:
        return sorted(self.state["cards"])

    # Changes

    def create(self, count: int) -> None:
        """A sound host with `count` cards. Nothing may be in the folder yet."""
        # Root of a container, who is nobody here, runs the tools.
        self.folder.mkdir(mode=0o755)
        for name in ("sys", "proc", "empty"):
            (self.folder / name).mkdir()
        folders = ["sys/bus/pci/devices", "proc/driver/nvidia/gpus", "dev", "run/systemd/system", "usr/bin"]
        # Where the role gpu_host writes.
        folders += ["usr/local/sbin", "etc/apt/apt.conf.d"]
        for path in folders:
            (self.host.root / path).mkdir(parents=True)
        for real in Path("/sys/bus/pci/devices").iterdir():
            with contextlib.suppress(OSError):
                if not (real / "class").read_text(encoding="ascii").startswith("0x03"):
                    self.host.link(f"sys/bus/pci/devices/{real.name}", str(real.resolve()))
        self.host.write("usr/share/lxc/hooks/nvidia")
        self.host.unit()
        self._write(
            {"cards": {}, "driver": DRIVER, "library": DRIVER, "cuda": CUDA, "uvm": True, "tools": True}
        )
        for _each in range(count):
            self.add()

    def add(self, pci: str = "", name: str = "NVIDIA GeForce RTX 3090", capability: str = "8.6") -> str:
        """A further card; gives its address."""
        state = self.state
        pci = pci or next(address for address in ADDRESSES if address not in state["cards"])
        minors = {card["minor"] for card in state["cards"].values()}
        state["cards"][pci] = {
            "minor": next(number for number in range(16) if number not in minors),
            "name": name,
            "brand": name.removeprefix("NVIDIA ").split()[0],
            # Of a card and not of a test run: it is the same when the card comes back.
            "uuid": f"GPU-{uuid.uuid5(uuid.NAMESPACE_URL, pci)}",
            "capability": capability,
        }
        self._write(state)
        return pci

    def remove(self, pci: str) -> None:
        state = self.state
        del state["cards"][pci]
        self._write(state)

    def change(self, pci: str, **values: str) -> None:
        """name, brand, uuid, capability of a card."""
        state = self.state
        state["cards"][pci].update(values)
        self._write(state)

    def driver(self, version: str, library: str | None = None) -> None:
        """Version of the loaded kernel module and of the userland library (None: the same)."""
        self._write({**self.state, "driver": version, "library": version if library is None else library})

    def uvm(self, there: bool) -> None:
        self._write({**self.state, "uvm": there})

    def tools(self, there: bool) -> None:
        """nvidia-container-cli."""
        self._write({**self.state, "tools": there})

    def reset(self, count: int) -> None:
        """A sound host with the first `count` cards again."""
        self._write(
            {**self.state, "cards": {}, "driver": DRIVER, "library": DRIVER, "uvm": True, "tools": True}
        )
        for _each in range(count):
            self.add()

    def _write(self, state: dict[str, Any]) -> None:
        fresh = self.folder / "state.json.new"
        fresh.write_text(json.dumps(state, indent=1), encoding="utf-8")
        fresh.replace(self.folder / "state.json")
        self._write_host(state)
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.folder / "pid").read_text(encoding="ascii"))
            self.sync(Path(f"/proc/{pid}/root"))

    def _write_host(self, state: dict[str, Any]) -> None:
        host = self.host
        host.write("proc/driver/nvidia/version")
        host.driver(state["driver"])
        host.write("sys/bus/pci/drivers/nvidia/module/version", f"{state['driver']}\n")
        gpus = host.root / "proc/driver/nvidia/gpus"
        bus = host.root / "sys/bus/pci/devices"
        shutil.rmtree(gpus)
        gpus.mkdir()
        for pci in set(ADDRESSES) - set(state["cards"]):
            shutil.rmtree(bus / pci, ignore_errors=True)
        for pci, card in state["cards"].items():
            host.card(pci=pci)
            host.write(f"sys/bus/pci/devices/{pci}/numa_node", "-1\n")
            # Not relative: the folder is seen in two places.
            host.link(f"sys/bus/pci/devices/{pci}/driver", str(host.root / "sys/bus/pci/drivers/nvidia"))
            text = f"Model: \t\t {card['name']}\nDevice Minor: \t {card['minor']}\n"
            host.write(f"proc/driver/nvidia/gpus/{pci}/information", text)
        libraries = host.root / "usr/lib" / TRIPLET
        shutil.rmtree(libraries, ignore_errors=True)
        for name in ("libcuda", "libnvidia-ml"):
            host.write(f"usr/lib/{TRIPLET}/{name}.so.{state['library']}")
        shutil.rmtree(host.root / "dev")
        (host.root / "dev").mkdir()
        for name in self.nodes(state):
            host.write(f"dev/{name}")
        tool = host.root / TOOL
        if not state["tools"]:
            tool.unlink(missing_ok=True)
        else:
            shutil.copyfile(CLI, tool)
            tool.chmod(0o755)

    @staticmethod
    def nodes(state: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """The driver's nodes, with major and minor."""
        found = {f"nvidia{card['minor']}": (MAJOR, int(card["minor"])) for card in state["cards"].values()}
        if found:
            found["nvidiactl"] = (MAJOR, CTL)
        if found and state["uvm"]:
            found["nvidia-uvm"], found["nvidia-uvm-tools"] = (UVM_MAJOR, 0), (UVM_MAJOR, 1)
        return found

    def sync(self, root: Path) -> None:
        """Make nodes and tools below the daemon's `/` what the state says."""
        wanted, dev = self.nodes(self.state), root / "dev"
        for there in dev.glob("nvidia*"):
            if there.name not in wanted:
                there.unlink()
        for name, (major, minor) in wanted.items():
            if not (dev / name).exists():
                os.mknod(dev / name, stat.S_IFCHR | 0o600, os.makedev(major, minor))
                # Open to all, as the driver makes them.
                (dev / name).chmod(0o666)
        # LXC's hook does not get the daemon's PATH: the tool must be where every PATH leads.
        ours, tool = self.host.root / TOOL, root / TOOL
        if not ours.exists():
            tool.unlink(missing_ok=True)
        elif not tool.exists():
            # A script of one line: what it runs finds its state beside itself.
            tool.write_text(f'#!/bin/sh\nexec {ours} "$@"\n', encoding="utf-8")
            tool.chmod(0o755)

    # The daemon's namespace

    def hold(self) -> subprocess.Popen[bytes]:
        """A process that keeps the namespace for as long as it lives, whether the daemon runs or not."""
        me = [sys.executable, str(Path(__file__).resolve()), str(self.folder)]
        holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", *me],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while not (self.folder / "pid").exists():
            if holder.poll() is not None or time.monotonic() > deadline:
                holder.kill()
                said = holder.communicate()[1].decode("utf-8", "replace").splitlines()
                # The rest is the traceback of this file.
                why = [line for line in said if line.startswith(("mount", "unshare"))] or said[-1:]
                raise SimulationError(f"no card can be simulated: {'; '.join(why) or 'no answer'}")
            time.sleep(0.01)
        return holder

    def command(self, argv: list[str]) -> list[str]:
        """The command that runs argv, under the same process id, where these cards are."""
        pid = (self.folder / "pid").read_text(encoding="ascii")
        return ["nsenter", f"--mount=/proc/{pid}/ns/mnt", *argv]

    def enter(self) -> None:
        """Change this process's mounts. It must be in a mount namespace of its own already."""
        root, folder = self.host.root, self.folder
        # A container may mount its own sysfs and proc only where one is seen that nothing is mounted over.
        _mount("-t", "sysfs", "sysfs", str(folder / "sys"))
        _mount("-t", "proc", "proc", str(folder / "proc"))
        _mount("--bind", str(root / "sys/bus/pci/devices"), "/sys/bus/pci/devices")
        _mount("--bind", str(root / "proc/driver"), "/proc/driver")
        if Path("/sys/class/drm").is_dir():
            _mount("--bind", str(folder / "empty"), "/sys/class/drm")
        # Over the kernel's /dev, so that loop devices that it makes later are there, too.
        for target in ("/dev", "/usr/bin"):
            _overlay(target, folder / "overlay" / target[1:])
        self.sync(Path("/"))
        fresh = folder / "pid.new"
        fresh.write_text(str(os.getpid()), encoding="ascii")
        fresh.replace(folder / "pid")


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", "-n", *arguments], check=True)


def _overlay(target: str, scratch: Path) -> None:
    """Make a folder writable for this namespace alone, with what is mounted below it."""
    scratch.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(scratch))
    for name in ("upper", "work", "merged"):
        (scratch / name).mkdir(mode=0o755)
    options = f"lowerdir={target},upperdir={scratch}/upper,workdir={scratch}/work"
    _mount("-t", "overlay", "-o", options, "overlay", str(scratch / "merged"))
    for point in _mounts_below(target):
        _mount("--rbind", f"{target}/{point}", str(scratch / "merged" / point))
    _mount("--move", str(scratch / "merged"), target)


def _mounts_below(folder: str) -> Iterator[str]:
    """Of what is mounted below, the uppermost, as paths relative to folder."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    seen: list[str] = []
    for point in sorted({line.split()[4] for line in lines}):
        if point.startswith(f"{folder}/") and not any(point.startswith(f"{other}/") for other in seen):
            seen.append(point)
            yield point.removeprefix(f"{folder}/")


def probe() -> str:
    """Why no card can be simulated here; empty if it can. Tries all of it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        cards = Cards(Path(folder) / "gpu")
        cards.create(1)
        try:
            with cards.hold() as holder:
                seen = cards.command(["stat", "/dev/nvidia0", f"/sys/bus/pci/devices/{ADDRESSES[0]}/driver/"])
                done = subprocess.run(seen, capture_output=True, text=True, timeout=30, check=False)
                holder.kill()
        except SimulationError as error:
            return str(error)
    return f"no card can be simulated: {done.stderr.strip()}" if done.returncode else ""


if __name__ == "__main__":
    Cards(Path(sys.argv[1])).enter()
    # Standard error is the pipe of who waits for us.
    os.close(2)
    while True:
        signal.pause()

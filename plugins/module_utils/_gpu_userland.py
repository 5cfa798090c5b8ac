# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""
What a container needs to use its GPU: device nodes, and a userland that matches the driver of the host.

The kernel module of the host and the libraries in the container must be of exactly the same version. They
are mounted (nvidia.runtime), copied from the host, or installed from packages. Paths are below a root, so
that tests can make one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils._nvidia_driver import loaded_driver

HOME = "opt/nvidia"
STAMP = f"{HOME}/userland.json"
# Before the distribution's own folders: ours counts when both hold a library.
LOADER = "etc/ld.so.conf.d/000-sottovoce-nvidia.conf"
PROGRAM = "usr/local/bin/nvidia-smi"
# CUDA's driver interface, NVML, and the compiler of PTX, which cards newer than a program need.
REQUIRED = ("libcuda", "libnvidia-ml", "libnvidia-ptxjitcompiler")
# What those load themselves, in drivers that have it (nvvm: from 470, gpucomp: from 535).
OPTIONAL = ("libnvidia-nvvm", "libnvidia-gpucomp")
MACHINES = {"x86_64": (62, "x86_64-linux-gnu"), "aarch64": (183, "aarch64-linux-gnu")}
_VERSION = r"\d+\.\d+(?:\.\d+)?"
_NODE = re.compile(r"nvidia(?:\d+|ctl|-uvm)")


class UserlandError(Exception):
    """str() is the message for the user."""


def boot_id(root: Path) -> str:
    """Return what tells kernels apart: a container has that of its host."""
    try:
        return (root / "proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def nodes(root: Path) -> dict[str, int]:
    """Return the device nodes of GPUs, path to permission bits."""
    found = {}
    for pattern in ("dev/nvidia*", "dev/kfd", "dev/dri/renderD*"):
        for path in sorted(root.glob(pattern)):
            if not path.is_dir():
                found[f"/{path.relative_to(root)}"] = stat.S_IMODE(path.stat().st_mode)
    return found


def folders(root: Path, machine: str, extra: Iterable[str] = ()) -> list[Path]:
    """Return the folders that may hold the driver's libraries, each once."""
    triplet = MACHINES.get(machine, (0, f"{machine}-linux-gnu"))[1]
    names = [
        f"usr/lib/{triplet}",
        f"lib/{triplet}",
        "usr/lib64",
        "usr/lib",
        "usr/local/lib",
        # Debian's alternatives, and NixOS.
        f"usr/lib/{triplet}/nvidia/current",
        "run/opengl-driver/lib",
        *(str(name).lstrip("/") for name in extra),
    ]
    found: dict[Path, None] = {}
    for name in names:
        path = root / name
        if path.is_dir():
            found.setdefault(path.resolve())
    return list(found)


def _mounted(root: Path) -> set[str]:
    """Return the mount points, as in proc/self/mountinfo."""
    try:
        lines = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {fields[4] for fields in (line.split() for line in lines) if len(fields) > 4}


def libraries(root: Path, machine: str) -> list[dict[str, Any]]:
    """Return libcuda and NVML of the system, not ours: name, path, version, mounted."""
    mounts = _mounted(root)
    found = []
    for folder in folders(root, machine):
        for path in sorted(folder.iterdir()):
            match = re.fullmatch(rf"(libcuda|libnvidia-ml)\.so\.({_VERSION})", path.name)
            if match:
                shown = f"/{path.relative_to(root.resolve())}"
                found.append(
                    {"name": match[1], "path": shown, "version": match[2], "mounted": shown in mounts}
                )
    return found


def own_version(root: Path) -> str:
    """Return the version of the userland that we put here, if it is whole; else nothing."""
    try:
        version = os.readlink(root / HOME / "current")
        sizes = json.loads((root / HOME / version / "files.json").read_text(encoding="utf-8"))
        whole = all((root / HOME / version / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return ""
    return version if whole and (root / LOADER).exists() else ""


def recorded(root: Path) -> dict[str, str]:
    """Return {driver, source} of the last run; empty before the first."""
    try:
        found = json.loads((root / STAMP).read_text(encoding="utf-8"))
        return {"driver": str(found["driver"]), "source": str(found["source"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def look(root: Path, machine: str, driver: str = "") -> dict[str, Any]:
    """Return everything that the decision needs. driver: what is said of it; empty means to read it."""
    return {
        "nodes": nodes(root),
        "driver": driver or loaded_driver(str(root))[0],
        "machine": machine,
        "libraries": libraries(root, machine),
        "own": own_version(root),
        "recorded": recorded(root),
        "boot_id": boot_id(root),
    }


def _node_problems(found: Mapping[str, int], instance: str, restart: str) -> list[str]:
    """Return what is wrong with NVIDIA's device nodes."""
    problems = []
    for name in ("nvidiactl", "nvidia-uvm"):
        if f"/dev/{name}" not in found:
            problems.append(
                f"There is no /dev/{name}, which CUDA opens; Incus passes only the nodes that are there when "
                f"the instance starts. On the host: nvidia-modprobe -u -c 0, then {restart}."
            )
    closed = [
        path
        for path, mode in found.items()
        if _NODE.fullmatch(path.rpartition("/")[2]) and mode & 0o006 != 0o006
    ]
    if closed:
        problems.append(
            f"Services run under users of their own, who may not open {', '.join(closed)} "
            f'(mode {found[closed[0]]:04o}). Set mode: "0666" on the gpu device of {instance}: '
            f"incus config device set {instance} <device> mode 0666"
        )
    return problems


def decide(found: Mapping[str, Any], instance: str, project: str = "") -> dict[str, Any]:
    """
    Return {vendor, source, problems, notes, install, remove} from what look() returned.

    source: mounted, packages or copied when a userland matches, else empty. install: one has to be put here.
    remove: ours is not needed any more.
    """
    paths = found["nodes"]
    restart = f"incus restart {instance}" + (f" --project {project}" if project else "")
    result: dict[str, Any] = {
        "vendor": "",
        "source": "",
        "problems": [],
        "notes": [],
        "install": False,
        "remove": False,
    }
    if not any(re.fullmatch(r"/dev/nvidia\d+", path) for path in paths):
        result["vendor"] = "amd" if "/dev/kfd" in paths else "other" if paths else ""
        if "/dev/kfd" in paths:
            result["notes"].append(
                "an AMD card is here; its userland (ROCm) comes with the programs that use it"
            )
        elif paths:
            result["notes"].append(f"only {', '.join(paths)} is here, no NVIDIA card; CUDA is not available")
        else:
            result["problems"].append(
                "There is no device node of a GPU here (/dev/nvidia0, /dev/kfd, /dev/dri). Either the "
                f"instance has no gpu device, or the host's driver was not loaded when {instance} started: "
                f"nvidia-smi on the host must answer, then {restart}."
            )
        return result
    result["vendor"] = "nvidia"
    result["problems"] = _node_problems(paths, instance, restart)
    driver = found["driver"]
    if not driver:
        result["notes"].append(
            "the version of the host's driver cannot be read here (/proc/driver/nvidia/version), "
            "so the libraries were not compared with it"
        )
        return result
    names = {"libcuda", "libnvidia-ml"}
    matching = [item for item in found["libraries"] if item["version"] == driver]
    stale = [item for item in found["libraries"] if item["version"] != driver and item["mounted"]]
    if stale:
        result["problems"].append(
            f"The driver of the host is {driver}, but nvidia.runtime mounted {stale[0]['path']} when "
            f"{instance} started. Have the present one mounted: {restart}."
        )
    elif {item["name"] for item in matching} == names:
        result["source"] = "mounted" if all(item["mounted"] for item in matching) else "packages"
        result["remove"] = bool(found["own"])
    elif found["own"] == driver:
        result["source"] = "copied"
    else:
        result["install"] = True
    before = str(found["recorded"].get("driver") or "")
    if before and before != driver and not result["problems"]:
        result["notes"].append(
            f"the driver of the host went from {before} to {driver}; the libraries followed"
        )
    return result


def elf_machine(path: Path) -> int:
    """Return the machine number of a 64-bit little-endian ELF file, or 0."""
    with path.open("rb") as handle:
        head = handle.read(20)
    if len(head) < 20 or head[:6] != b"\x7fELF\x02\x01":
        return 0
    return int.from_bytes(head[18:20], "little")


def controller_files(
    driver: str, machine: str, kernel: str, library_path: str, cached: str = "", program: str = ""
) -> dict[str, Path]:
    """
    Return the controller's files for a container, as host_files does.

    kernel: boot id that the container sees; library_path: a folder that was named, empty means those of the
    system, which count only on the host of the container.
    """
    root = Path("/")
    if library_path:
        if not os.path.isdir(library_path):
            raise UserlandError(f"there is no folder {library_path} on the controller")
        return host_files(Path("/nonexistent"), driver, machine, extra=[Path(library_path)])
    if not kernel or kernel != boot_id(root):
        raise UserlandError("the instance is not on this machine, so nothing can be copied from here")
    return host_files(root, driver, machine, cached, program)


def host_files(
    root: Path, driver: str, machine: str, cached: str = "", program: str = "", extra: Sequence[Path] = ()
) -> dict[str, Path]:
    """
    Return the files of the host's own userland of this driver: name to path.

    cached: what `ldconfig -p` prints; program: path of nvidia-smi; extra: further folders.
    UserlandError names what is missing.
    """
    if machine not in MACHINES:
        raise UserlandError(f"there is no NVIDIA userland for {machine}")
    known = [line.partition("=> ")[2].strip() for line in cached.splitlines() if "=> " in line]
    found: dict[str, Path] = {}
    wrong: list[str] = []
    own = folders(root, machine, dict.fromkeys(os.path.dirname(path) for path in known))
    for folder in [*extra, *own]:
        for base in (*REQUIRED, *OPTIONAL):
            path = folder / f"{base}.so.{driver}"
            if path.name in found or not path.is_file():
                continue
            if elf_machine(path) == MACHINES[machine][0]:
                found[path.name] = path.resolve()
            else:
                wrong.append(str(path))
    missing = [f"{base}.so.{driver}" for base in REQUIRED if f"{base}.so.{driver}" not in found]
    if missing:
        raise UserlandError(
            f"the controller has no {', '.join(missing)} for {machine}"
            + (f" ({', '.join(wrong)} is for another machine or no library)" if wrong else "")
        )
    if program:
        path = Path(program).resolve()
        if elf_machine(path) == MACHINES[machine][0] and driver.encode() in path.read_bytes():
            found["nvidia-smi"] = path
    return found


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        whole = hashlib.sha256()
        for block in iter(lambda: handle.read(1 << 20), b""):
            whole.update(block)
    return whole.hexdigest()


def _link(target: str, link: Path) -> None:
    """Point a link somewhere in one step."""
    scratch = link.with_name(f".{link.name}.new")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target)
    os.replace(scratch, link)


def install(root: Path, driver: str, source: Path, digests: Mapping[str, str]) -> list[str]:
    """
    Put the files in source at opt/nvidia/<driver>, make them current, and return the versions removed.

    digests: name to sha256, to which every file is held. The caller runs ldconfig.
    """
    home = root / HOME
    home.mkdir(mode=0o755, parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=home))
    try:
        sizes = {}
        for name, digest in digests.items():
            if os.path.basename(name) != name:
                raise UserlandError(f"{name} is no name of a file")
            target = scratch / name
            shutil.move(str(source / name), target)
            if sha256(target) != digest:
                raise UserlandError(f"{name} arrived with other contents than it was sent with")
            target.chmod(0o755 if name == "nvidia-smi" else 0o644)
            sizes[name] = target.stat().st_size
        # Programs load libcuda.so.1 or libcuda.so; ldconfig makes the former.
        for base in ("libcuda", "libnvidia-ml"):
            (scratch / f"{base}.so").symlink_to(f"{base}.so.1")
        (scratch / "files.json").write_text(json.dumps(sizes), encoding="utf-8")
        scratch.chmod(0o755)
        final = home / driver
        if final.exists():
            shutil.rmtree(final)
        scratch.rename(final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _link(driver, home / "current")
    loader = root / LOADER
    loader.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    loader.write_text(f"/{HOME}/current\n", encoding="utf-8")
    loader.chmod(0o644)
    program = root / PROGRAM
    if "nvidia-smi" in digests and (program.is_symlink() or not program.exists()):
        program.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _link(f"/{HOME}/current/nvidia-smi", program)
    return _prune(home, keep=driver)


def _prune(home: Path, keep: str) -> list[str]:
    old = [path for path in sorted(home.iterdir()) if re.fullmatch(_VERSION, path.name) and path.name != keep]
    for path in old:
        shutil.rmtree(path)
    return [path.name for path in old]


def remove(root: Path) -> list[str]:
    """Take our copy away, where another userland matches; return its versions. The caller runs ldconfig."""
    (root / LOADER).unlink(missing_ok=True)
    program = root / PROGRAM
    if program.is_symlink() and os.readlink(program).startswith(f"/{HOME}/"):
        program.unlink()
    (root / HOME / "current").unlink(missing_ok=True)
    return _prune(root / HOME, keep="") if (root / HOME).is_dir() else []


def record(root: Path, driver: str, source: str) -> bool:
    """Note what is in use; daemons are restarted when this file is newer than they are. Was it news?"""
    wanted = {"driver": driver, "source": source}
    if recorded(root) == wanted:
        return False
    path = root / STAMP
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
    path.chmod(0o644)
    return True


def package_sets(driver: str) -> list[list[str]]:
    """Return the names of packages that bring the userland: Debian's and NVIDIA's, Ubuntu's."""
    major = driver.split(".", 1)[0]
    return [
        ["libcuda1", "libnvidia-ml1", "libnvidia-ptxjitcompiler1"],
        [f"libnvidia-compute-{major}"],
        [f"libnvidia-compute-{major}-server"],
    ]


def choose_packages(driver: str, madison: str) -> list[str]:
    """
    Return name=version of the packages of exactly this driver, from the output of `apt-cache madison`.

    UserlandError names the versions that there are.
    """
    offered: dict[str, list[str]] = {}
    for line in madison.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) >= 3:
            offered.setdefault(cells[0], []).append(cells[1])
    for names in package_sets(driver):
        exact = {
            name: next(
                (
                    v
                    for v in offered.get(name, [])
                    if re.fullmatch(rf"(?:\d+:)?{re.escape(driver)}[-+~].*", v)
                ),
                "",
            )
            for name in names
        }
        if all(exact.values()):
            return [f"{name}={version}" for name, version in exact.items()]
    others = sorted({f"{name} {version}" for name, versions in offered.items() for version in versions})
    raise UserlandError(
        f"its package sources have no userland of exactly {driver} "
        f"({'they have ' + ', '.join(others) if others else 'none at all'})"
    )


def remedies(driver: str, instance: str) -> str:
    """Return what to do when no userland of this version can be had."""
    return (
        f"CUDA cannot start in {instance} without libcuda and NVML {driver}. One of these mends it: install "
        "nvidia-container-toolkit on the host (Incus then mounts them with nvidia.runtime); apply from the "
        f"host itself, which then copies its own; or give {instance} a package source that has {driver}, "
        "such as NVIDIA's."
    )


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fact gpu_userland_summary from the module's results, of which the last that ran counts."""
    result = [item for item in results if "vendor" in item][-1]
    packages = [name for item in results for name in item.get("install") or []]
    ways = {
        "mounted": "mounted from the host",
        "copied": "copied from the host",
        "packages": "from packages",
    }
    vendor = str(result.get("vendor") or "")
    driver = str(result.get("driver") or "")
    source = ways.get(str(result.get("source") or ""), "")
    device = {"nvidia": "NVIDIA GPU", "amd": "AMD GPU", "other": "GPU"}.get(vendor, "no GPU")
    skipped = [{"what": "GPU", "why": problem} for problem in result.get("problems") or []]
    return {
        "device": device,
        "version": f"driver {driver}" + (f", libraries {source}" if source else "") if driver else "",
        "skipped": skipped,
        "notes": [*(result.get("notes") or []), *(f"installed {name}" for name in packages)],
    }

#!/usr/bin/env python3
"""
A stand-in for nvidia-container-cli on a machine without a card (see simulated_gpu.py), for tests only.

It answers what Incus and LXC's nvidia hook ask: `info --csv`, and `configure … <rootfs>`, which hands
the nodes and the driver's userland files to a container by bind mounts. The files are empty stand-ins with
the right names; a missing nvidia-uvm is passed over, two driver versions are an error, as with the real tool.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def fail(message: str) -> int:
    print(f"nvidia-container-cli: {message}", file=sys.stderr)
    return 1


def info(state: dict[str, Any]) -> None:
    print("NVRM version,CUDA version")
    print(f"{state['driver']},{state['cuda']}")
    print()
    print("Device Index,Device Minor,Model,Brand,GPU UUID,Bus Location,Architecture")
    for index, (pci, card) in enumerate(sorted(state["cards"].items())):
        values = [index, card["minor"], card["name"], card["brand"], card["uuid"], f"0000{pci}"]
        print(",".join(str(value) for value in [*values, card["capability"]]))


def bind(source: Path, rootfs: Path, target: str) -> None:
    at = rootfs / target
    at.parent.mkdir(parents=True, exist_ok=True)
    at.touch()
    subprocess.run(["mount", "-n", "--bind", str(source), str(at)], check=True)


def configure(arguments: list[str]) -> None:
    rootfs = Path(arguments[-1])
    nodes = ["nvidiactl"]
    libraries = []
    if "--utility" in arguments:
        libraries.append("libnvidia-ml.so.")
    if "--compute" in arguments:
        nodes += ["nvidia-uvm", "nvidia-uvm-tools"]
        libraries.append("libcuda.so.")
    for node in nodes:
        if os.path.exists(f"/dev/{node}"):
            bind(Path("/dev") / node, rootfs, f"dev/{node}")
    for folder in (ROOT / "usr/lib").glob("*-linux-gnu"):
        for file in folder.iterdir():
            if file.name.startswith(tuple(libraries)):
                bind(file, rootfs, f"usr/lib/{folder.name}/{file.name}")


def main(arguments: list[str]) -> int:
    state = json.loads((ROOT.parent / "state.json").read_text(encoding="utf-8"))
    if not state["driver"]:
        return fail("initialization error: nvml error: driver not loaded")
    if state["driver"] != state["library"]:
        return fail("initialization error: nvml error: driver/library version mismatch")
    words = [word for word in arguments if not word.startswith("-")]
    if words[:1] == ["info"] and "--csv" in arguments:
        info(state)
        return 0
    if words[:1] == ["configure"]:
        configure(arguments)
        return 0
    return fail(f"the stand-in does not know: {' '.join(arguments)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The stand-in for NVML (nvml/nvml_standin.c): compile it, and write what it plays."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

SOURCE = Path(__file__).parent / "nvml" / "nvml_standin.c"
NO_COMPILER = "no C compiler here (apt install gcc libc6-dev), so the stand-in for NVML cannot be built"

DRIVER = "driver 570.86.15\ncuda 12080\n"


def has_compiler() -> bool:
    return shutil.which("cc") is not None


def build(folder: Path, *, old_driver: bool = False) -> Path:
    """Compile the library into folder; old_driver leaves out the symbols that old drivers lack."""
    target = folder / ("libnvidia-ml-old.so.1" if old_driver else "libnvidia-ml.so.1")
    options = ["-DOLD_DRIVER"] if old_driver else []
    subprocess.run(
        [
            "cc",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            *options,
            "-o",
            str(target),
            str(SOURCE),
        ],
        check=True,
    )
    return target


def card(
    index: int = 0, *lines: str, memory: str = "24564 451 0", more: Mapping[str, str] | None = None
) -> str:
    """The lines of a card: 24 GB and nothing amiss but for what lines say."""
    given = {
        "uuid": f"GPU-{index:08d}-0000-0000-0000-000000000000",
        "name": "NVIDIA RTX A5000",
        "pci": f"0000:{index + 1:02x}:00.0",
        "capability": "8.6",
        "memory": memory,
        "temperature": "41",
        "reasons": "0x1",
        **(more or {}),
    }
    return "\n".join(["card", *(f"{key} {value}" for key, value in given.items()), *lines, ""])


def environment(library: Path, folder: Path, text: str) -> dict[str, str]:
    """What to put into a process's environment so that it sees the cards that text describes."""
    described = folder / "cards.txt"
    described.write_text(text, encoding="utf-8")
    return {**os.environ, "SOTTOVOCE_NVML": str(library), "SOTTOVOCE_NVML_STANDIN": str(described)}

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which NVIDIA driver the kernel has loaded; a container sees its host's."""

from __future__ import annotations

import os
import re


def _text(root: str, path: str) -> str:
    try:
        with open(os.path.join(root, path), encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def loaded_driver(root: str) -> tuple[str, str]:
    """Version and kind of the kernel module that is loaded; both empty if none is."""
    text = _text(root, "proc/driver/nvidia/version")
    line = next((line for line in text.splitlines() if line.startswith("NVRM version:")), "")
    number = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", f"{line} ")
    version = number[1] if number else _text(root, "sys/module/nvidia/version").strip()
    if not line:
        return version, ""
    return version, "open" if "Open Kernel Module" in line else "proprietary"

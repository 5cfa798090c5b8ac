#!/usr/bin/env python3
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A cold apply of the local stack against the hand-written script, and an apply with nothing to do.

    .venv/bin/python bench/apply.py [--runs 1]

Incus and the image must be there, and Ollama's program in its cache: what is measured starts at the
finished image. It makes machines of its own (project bench-ai) on the Incus of this machine and removes them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
INFRA = """---
project_name: bench
global:
  addressing: {base_octet: 10, zone_base: 215}
domains:
  bench-ai:
    ephemeral: true
    machines:
      bench-speech: {roles: [base_system, ollama_server, stt_server]}
      bench-webui: {roles: [base_system, open_webui]}
"""


def timed(command: list[str]) -> float:
    """Seconds that a command takes; its output is shown when it fails."""
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--image", default="sottovoce/debian/12", help="image of the script and the apply")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inventory = Path(folder)
        (inventory / "infra.yml").write_text(INFRA, encoding="utf-8")
        (inventory / "group_vars").mkdir()
        (inventory / "group_vars/all.yml").write_text(
            f"stt_server_fallback_model: {ROOT}/demo/whisper-demo\n"
            f"sottovoce_image_fallback: {options.image}\n",
            encoding="utf-8",
        )
        play = [str(BIN / "ansible-playbook"), "-i", folder]
        apply, destroy = [*play, "playbooks/apply.yml"], [*play, "playbooks/destroy.yml", "-e", "confirm=yes"]
        times: dict[str, list[float]] = {"script": [], "cold apply": [], "nothing to do": []}
        os.environ.setdefault("ANSIBLE_NOCOLOR", "1")
        for _ in range(options.runs):
            times["script"].append(timed(["bench/floor.sh", options.image]))
            try:
                times["cold apply"].append(timed(apply))
                times["nothing to do"].append(timed(apply))
            finally:
                timed(destroy)
    floor = statistics.median(times["script"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:15} {median:6.1f} s   {median / floor:5.2f} x the script")


if __name__ == "__main__":
    main()

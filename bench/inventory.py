#!/usr/bin/env python3
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long a large infra.yml takes: the parser alone, and ansible-inventory as a whole process.

Beside it the same number of hosts in Ansible's own YAML format, with three variables each: what
Ansible itself needs for that many hosts, whoever reads the file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def infra(count: int) -> str:
    """`count` machines, 99 to a domain, as a user writes them."""
    lines = ["project_name: bench", "global:", "  default_os_image: images:debian/13", "domains:"]
    for first in range(0, count, 99):
        lines += [f"  d{first // 99:04d}:", f"    description: Domain {first // 99}", "    machines:"]
        for number in range(first, min(first + 99, count)):
            lines += [
                f"      m{number:05d}:",
                f"        description: Machine {number}",
                "        type: lxc",
                "        roles: [base_system, ollama_server]",
                "        config:",
                "          limits.cpu: '2'",
            ]
    return "\n".join(lines) + "\n"


def plain(count: int) -> str:
    return "all:\n  hosts:\n" + "".join(f"    m{n:05d}: {{a: x, b: y, c: z}}\n" for n in range(count))


def timed(action: Callable[[], object], runs: int) -> dict[str, float]:
    """Wall time, and the time of this process and its children: the first depends on what else runs."""
    wall, cpu = [], []
    for _ in range(runs):
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        start = time.perf_counter()
        action()
        wall.append(time.perf_counter() - start)
        after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu.append(
            sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(usage, after, strict=True))
        )
    return {"wall_s": round(statistics.median(wall), 2), "cpu_s": round(statistics.median(cpu), 2)}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--machines", type=int, default=10_000)
    options.add_argument("--runs", type=int, default=3)
    given = options.parse_args()
    sys.path.insert(0, str(ROOT / ".collections"))
    from ansible_collections.sottovoce.stack.plugins.module_utils._infra_model import load

    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "infra.yml", Path(folder) / "plain.yml"
        ours.write_text(infra(given.machines))
        theirs.write_text(plain(given.machines))
        environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}

        def inventory(source: Path, *what: str) -> None:
            subprocess.run(
                [
                    str(BIN / "ansible-inventory"),
                    "-i",
                    str(source),
                    *what,
                    "--output",
                    str(Path(folder) / "out"),
                ],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                check=True,
            )

        result = {
            "machines": given.machines,
            "bytes": ours.stat().st_size,
            "load average": round(os.getloadavg()[0], 1),
            "parser and model, in process": timed(lambda: load(str(ours)), given.runs),
            "ansible-inventory --graph": timed(lambda: inventory(ours, "--graph"), given.runs),
            "ansible-inventory --list": timed(lambda: inventory(ours, "--list"), given.runs),
            "plain YAML --graph": timed(lambda: inventory(theirs, "--graph"), given.runs),
            "plain YAML --list": timed(lambda: inventory(theirs, "--list"), given.runs),
        }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

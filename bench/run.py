#!/usr/bin/env python3
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""All benchmarks one after the other, on an Incus daemon of their own.

    make bench                          everything
    make bench ARGS='infra overhead'    only these

    inventory   loading infra.yml with 10,000 machines, against plain YAML
    infra       the infrastructure play: cold, and with nothing to do; requests counted
    connection  the cost of a task over our connection plugin, against community.general.incus
    overhead    voicegate over HTTP against faster-whisper in the same process
    apply       the whole apply against the hand-written script floor.sh

They print; nothing passes or fails. Run them on an idle machine: what counts are the ratios in one run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INCUSD = ["tests/support/incusd.py", "run", "--image", "--"]
BENCHES = {
    "inventory": ["bench/inventory.py"],
    "infra": [*INCUSD, sys.executable, "bench/infra.py", "--image", "sottovoce/debian/12"],
    "connection": [*INCUSD, sys.executable, "bench/connection.py", "--image", "sottovoce/debian/12"],
    "overhead": ["gateway/bench/overhead.py"],
    "apply": [*INCUSD, sys.executable, "bench/apply.py"],
}


def main() -> int:
    wanted = sys.argv[1:] or list(BENCHES)
    unknown = [name for name in wanted if name not in BENCHES]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    failed = 0
    for name in wanted:
        print(f"\n== {name} ==", flush=True)
        command = [sys.executable, *BENCHES[name]]
        failed |= subprocess.run(command, cwd=ROOT, env=os.environ, check=False).returncode
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())

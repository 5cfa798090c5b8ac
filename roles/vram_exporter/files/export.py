# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write who uses the VRAM of this machine as a textfile for Prometheus' node exporter.

Usage: export.py [--plan PLAN.json] FILE. The file is replaced in one step, so nobody reads half of it.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import sys
import time

# Python's isolated mode leaves out the folder of the program.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from ansible_collections.sottovoce.stack.plugins.module_utils._vram_facts import read_facts
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_health import Thresholds, plan_of, report
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_metrics import exposition


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=pathlib.Path)
    parser.add_argument("--unit-path", default="/etc/systemd/system")
    parser.add_argument("file", type=pathlib.Path)
    given = parser.parse_args()
    plan = plan_of(json.loads(given.plan.read_text(encoding="utf-8"))) if given.plan else {}
    begin = time.monotonic()
    facts = read_facts(given.unit_path, shutil.which("nvidia-smi"), timeout=0.3, gpu_timeout=10)
    result = report(facts, Thresholds(), plan)
    text = exposition(result, duration=time.monotonic() - begin, now=int(time.time()))
    fresh = given.file.with_name(f".{given.file.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.chmod(0o644)
    fresh.replace(given.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())

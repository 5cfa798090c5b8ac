# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write who uses the VRAM of this machine as a textfile for Prometheus' node exporter.

Usage: export.py [--plan PLAN.json] [--relief RELIEF.json --state STATE.json] FILE

The file is replaced in one step, so nobody reads half of it. RELIEF.json is {"reserve_mib": MIB, "keep":
[MODEL]}: when less is free, an idle model of Ollama is unloaded; with {} none is. STATE.json counts them.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import sys
import time
import urllib.parse
from typing import Any

# Python's isolated mode leaves out the folder of the program.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_relief as relief
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_facts import read_facts
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_health import (
    Facts,
    Thresholds,
    plan_of,
    report,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_metrics import exposition

OLLAMA = "ollama"  # its unit
GONE = 5.0  # seconds that Ollama has to give the VRAM back


def replace(path: pathlib.Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.chmod(0o644)
    fresh.replace(path)


def kept(path: pathlib.Path | None) -> relief.State:
    """What earlier readings left; after damage to the file the counting begins anew, and says so."""
    if path is None or not path.exists():
        return relief.State()
    try:
        return relief.state_of(path.read_text(encoding="utf-8"))
    except ValueError as error:
        print(f"{path}: {error}; it is begun anew", file=sys.stderr)
        return relief.State()


def ollama_of(facts: Facts) -> tuple[str, list[relief.Loaded] | None]:
    """URL of the Ollama here, and what it has in VRAM; None where it does not answer."""
    url, body, _error = facts.details.get(OLLAMA, ("", {}, ""))
    return url, None if body is None else relief.loaded_models(body)


class Reading:
    """One run."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.plan = plan_of(json.loads(given.plan.read_text(encoding="utf-8"))) if given.plan else {}
        settings = json.loads(given.relief.read_text(encoding="utf-8")) if given.relief else {}
        self.rules = relief.rules_of(settings)
        self.state = kept(given.state)
        self.look()

    def look(self) -> None:
        self.facts = read_facts(self.given.unit_path, shutil.which("nvidia-smi"), timeout=0.3, gpu_timeout=10)
        self.result = report(self.facts, Thresholds(), self.plan)

    def free(self) -> list[int]:
        return [gpu["free_mib"] for gpu in self.result["gpus"] if not gpu["error"]]

    def relieve(self, rules: relief.Rules) -> None:
        """Raises ReliefError."""
        url, models = ollama_of(self.facts)
        port = urllib.parse.urlsplit(url).port or 0
        count = relief.connections(port) if port else 0
        step = relief.decide(self.result["gpus"], models, count, rules, self.state.low, time.time())
        self.state.low = step.low
        if not step.model:
            if step.why:
                print(step.why)
            return
        before = self.free()
        relief.unload(url, step.model)
        self.state = relief.counted(self.state, OLLAMA, step.model, relief.LOW_FREE)
        deadline = time.monotonic() + GONE
        while True:
            self.look()
            there = any(model.name == step.model for model in ollama_of(self.facts)[1] or ())
            if not there or time.monotonic() >= deadline:
                break
            time.sleep(0.2)
        print(f"{step.why} and was unloaded: {before} MiB were free, now {self.free()}")

    def more(self) -> list[tuple[str, dict[str, Any], float]]:
        """Samples beside those of the report."""
        found: list[tuple[str, dict[str, Any], float]] = []
        evictions = dict(self.state.evictions)
        if self.rules:
            found.append(("reserve_bytes", {}, self.rules.reserve_mib << 20))
            # From zero on, so that increase() sees the first.
            for model in ollama_of(self.facts)[1] or ():
                evictions.setdefault((OLLAMA, model.name, relief.LOW_FREE), 0)
        for (unit, model_name, reason), count in sorted(evictions.items()):
            found.append(("evictions_total", {"unit": unit, "model": model_name, "reason": reason}, count))
        return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=pathlib.Path)
    parser.add_argument("--relief", type=pathlib.Path)
    parser.add_argument("--state", type=pathlib.Path)
    parser.add_argument("--unit-path", default="/etc/systemd/system")
    parser.add_argument("file", type=pathlib.Path)
    given = parser.parse_args()
    begin = time.monotonic()
    reading = Reading(given)
    failed = 0
    if reading.rules:
        try:
            reading.relieve(reading.rules)
        except relief.ReliefError as error:
            print(error, file=sys.stderr)
            failed = 1
        if given.state:
            replace(given.state, relief.text_of(reading.state))
    text = exposition(reading.result, reading.more(), duration=time.monotonic() - begin, now=int(time.time()))
    replace(given.file, text)
    return failed


if __name__ == "__main__":
    sys.exit(main())

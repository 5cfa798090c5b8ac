# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""
The planner's predictions against what a card really uses.

    python3 -m bench.vram --out FOLDER                  all models and compute types, on the first card
    python3 -m bench.vram --out FOLDER --models large-v3-turbo,medium --compute-types float16
    python3 -m bench.vram --out FOLDER --device cpu --models tiny --compute-types int8 --seconds 30

Run it in the checkout. It needs Python 3.11 or later with faster-whisper and its wheels, and for a card the
libraries of CUDA where CTranslate2 finds them (nvidia-cublas-cu12, nvidia-cudnn-cu12 and LD_LIBRARY_PATH).
It needs no network, no Incus and no weights: models of the true shapes are made with random ones. Each run is
a process of its own. Nobody else should use the card.

Writes vram.json, vram.md and vram.svg into FOLDER. Without a card the memory of the process is measured, to
try the way; nothing is compared then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.vram import collection, models, report, sampler

collection.importable()

from ansible_collections.sottovoce.stack.plugins.module_utils._nvml import NvmlError, NvmlMissing, open_nvml
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_footprint import ENGINE_BATCH

MODELS = ("tiny", "base", "small", "medium", "distil-large-v3", "large-v3-turbo", "large-v3")
TYPES = ("float16", "int8_float16", "int8")


def engine_of(batch: int) -> str:
    """Who works so: voicegate takes one window after the other, Speaches eight at once."""
    return next((name for name, size in ENGINE_BATCH.items() if size == batch), "faster-whisper")


def run(
    folder: Path, row: report.Row, device: str, seconds: float, used_by: Callable[[int], float]
) -> tuple[report.Row, dict[str, str]]:
    """One row with its figures, and the versions that made them. used_by gives the MiB of a process."""
    command = [
        sys.executable, "-m", "bench.vram.worker", "--model", str(folder), "--device", device,
        "--compute-type", row.compute_type, "--batch", str(row.batch), "--seconds", str(seconds),
    ]  # fmt: skip
    told: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            command, cwd=collection.ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints,
            text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        with process, sampler.Sampler(lambda: used_by(process.pid)) as samples:
            for line in process.stdout or ():
                with contextlib.suppress(ValueError):
                    said = json.loads(line)
                    told[said["at"]] = said
                    samples.phase = said["at"]
        complaints.seek(0)
        last = complaints.read().strip().splitlines()[-1:]
    if samples.error:
        raise samples.error
    given = vars(row)
    if process.returncode or "done" not in told:
        return report.Row(**{**given, "error": (last or [f"exit status {process.returncode}"])[0][:200]}), {}
    return (
        report.Row(
            **{
                **given,
                "rest_mib": round(samples.last("loaded"), 1),
                "peak_mib": round(samples.peak(), 1),
                "after_mib": round(samples.last("done"), 1),
                "load_s": told["loaded"]["seconds"],
                "work_s": told["done"]["seconds"],
                "effective": told["loaded"]["compute_type"],
                "comparable": device != "cpu",
            }
        ),
        dict(told["start"]["versions"]),
    )


@contextlib.contextmanager
def card_of(device: str, index: int) -> Iterator[sampler.Card | None]:
    """The card, or None for a CPU. Exits with a message where there is none to measure."""
    if device == "cpu":
        yield None
        return
    try:
        with open_nvml() as nvml:
            yield sampler.Card(nvml, index)
    except (NvmlMissing, NvmlError, IndexError) as error:
        raise SystemExit(f"No card to measure: {error}. Without one: --device cpu --models tiny") from error


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--compute-types", default=",".join(TYPES))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="length of the recording; 240 fill a batch of 8"
    )
    parser.add_argument(
        "--models-folder", type=Path, help="keep the made models here (up to 10 GB) for the next run"
    )
    given = parser.parse_args()
    names, kinds = given.models.split(","), given.compute_types.split(",")
    unknown = sorted(set(names) - set(models.SHAPES))
    if unknown:
        parser.error(f"no shapes are known of {', '.join(unknown)}; known: {', '.join(models.SHAPES)}")
    given.out.mkdir(parents=True, exist_ok=True)
    rows: list[report.Row] = []
    versions: dict[str, str] = {}
    scratch = given.models_folder or Path(tempfile.mkdtemp(prefix="models-", dir=given.out))
    try:
        with card_of(given.device, given.gpu) as card:
            for name in names:
                folder = models.write(name, scratch)
                for kind in kinds:
                    for batch in map(int, given.batches.split(",")):
                        asked = report.Row(
                            engine_of(batch), name, kind, batch, source="" if card else sampler.MEMORY
                        )
                        used_by = card.used_by if card else sampler.memory_of
                        row, tools = run(folder, asked, given.device, given.seconds, used_by)
                        versions.update(tools)
                        if card:
                            row = report.Row(**{**vars(row), "source": card.source})
                        rows.append(row)
                        print(report.line(row), flush=True)
                if not given.models_folder:
                    shutil.rmtree(folder)
            machine = sampler.described(card)
    finally:
        if not given.models_folder:
            shutil.rmtree(scratch, ignore_errors=True)
    data = report.as_data(rows, machine, versions)
    (given.out / "vram.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (given.out / "vram.md").write_text(report.markdown(rows, machine, versions), encoding="utf-8")
    title = f"VRAM: measured and planned, {machine.get('name', 'CPU')}"
    (given.out / "vram.svg").write_text(report.plot(rows, title), encoding="utf-8")
    print(report.markdown(rows, machine, versions))
    return 0


if __name__ == "__main__":
    sys.exit(main())

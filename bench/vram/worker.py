# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One measured run: load a model, work on it, and say when. Started by bench.vram in a process of its own.

Prints one JSON object a line, {"at": "start" | "loaded" | "work" | "done", …}. Between them it rests, so that
what stays can be told from the peak.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

REST = 0.5  # seconds
RATE = 16000
WINDOW = 30


def say(at: str, **more: Any) -> None:
    print(json.dumps({"at": at, **more}), flush=True)


def sound(seconds: float) -> Any:
    """Noise and two tones, the same each time; float32 at 16 kHz."""
    import numpy as np

    time_axis = np.arange(int(seconds * RATE), dtype=np.float32) / RATE
    noise = np.random.default_rng(0).standard_normal(time_axis.size).astype(np.float32)
    tones = np.sin(2 * np.pi * 220 * time_axis) + np.sin(2 * np.pi * 1330 * time_axis)
    return (0.1 * noise + 0.2 * tones).astype(np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compute-type", required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()

    import ctranslate2
    import faster_whisper

    versions = {"ctranslate2": ctranslate2.__version__, "faster-whisper": faster_whisper.__version__}
    audio = sound(given.seconds)
    say("start", versions=versions)
    time.sleep(REST)
    begin = time.monotonic()
    model = faster_whisper.WhisperModel(
        given.model, device=given.device, compute_type=given.compute_type, local_files_only=True
    )
    say("loaded", seconds=round(time.monotonic() - begin, 2), compute_type=model.model.compute_type)
    time.sleep(REST)
    say("work")
    begin = time.monotonic()
    # As the engines ask: beams of five, no voice detection in the way of the windows' number.
    options = {"language": "en", "beam_size": 5, "temperature": 0.0}
    if given.batch > 1:
        clips = [
            {"start": start, "end": min(start + WINDOW, given.seconds)}
            for start in range(0, int(given.seconds), WINDOW)
        ]
        pipeline = faster_whisper.BatchedInferencePipeline(model)
        segments, _info = pipeline.transcribe(
            audio, batch_size=given.batch, vad_filter=False, clip_timestamps=clips, **options
        )
    else:
        segments, _info = model.transcribe(
            audio, vad_filter=False, condition_on_previous_text=False, **options
        )
    count = sum(1 for _segment in segments)
    say("done", seconds=round(time.monotonic() - begin, 2), segments=count)
    time.sleep(REST)
    return 0


if __name__ == "__main__":
    sys.exit(main())

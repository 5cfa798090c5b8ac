"""Stands in for pyannote.audio 4, which needs torch and weights: as much of its API as voicegate calls."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loudness_standin


@dataclass
class Segment:
    start: float
    end: float


class Annotation:
    def __init__(self, turns: list[tuple[float, float, str]]) -> None:
        self._turns = turns

    def itertracks(self, yield_label: bool = False) -> Iterator[tuple[Segment, int, str]]:
        if not yield_label:
            raise NotImplementedError
        for number, (start, end, speaker) in enumerate(self._turns):
            yield Segment(start, end), number, speaker


@dataclass
class DiarizeOutput:
    exclusive_speaker_diarization: Annotation


class Pipeline:
    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config

    @classmethod
    def from_pretrained(cls, checkpoint: Path) -> Pipeline:
        """`config.yaml` is JSON here; `broken`, `seconds` and `die` are what a test wants of it."""
        if os.environ["PYANNOTE_METRICS_ENABLED"] != "false":
            raise RuntimeError("its authors would be told")
        config = json.loads((checkpoint / "config.yaml").read_text("utf-8"))
        if "broken" in config:
            raise ValueError(config["broken"])
        return cls(config)

    def __call__(self, file: dict[str, Any]) -> DiarizeOutput:
        waveform = file["waveform"]
        if waveform.ndim != 2 or waveform.shape[0] > waveform.shape[1]:
            raise ValueError("'waveform' must be provided as a (channel, time) torch Tensor.")
        time.sleep(self._config.get("seconds", 0))
        if "die" in self._config:
            os._exit(9)
        return DiarizeOutput(Annotation(list(loudness_standin.turns(waveform[0], file["sample_rate"]))))

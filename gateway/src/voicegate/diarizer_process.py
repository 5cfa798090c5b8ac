"""The process of pyannote.audio: `python -m voicegate.diarizer_process DESCRIPTOR`, started by `diarizer`.

It speaks as the engine's process does (see `wire`): `load` is answered by `loaded` or `failed`, and each
`diarize`, which brings the audio as an open file, by `turns` or `error`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from voicegate import audio, errors, logs, speech, wire
from voicegate.decoder import Decoder
from voicegate.engine import Turn
from voicegate.engine_process import connect
from voicegate.errors import ApiError


def main() -> None:
    channel = connect()
    load = channel.commands.get()
    settings = wire.settings_from(load["value"])
    logs.configure(settings.log_level, settings.log_format)
    # Its authors are told of every use, unless this is set before it is imported.
    os.environ["PYANNOTE_METRICS_ENABLED"] = "false"
    try:
        pipeline = _open(Path(load["folder"]))
    except Exception as error:  # whatever torch and its friends do not like
        channel.send("failed", f"{type(error).__name__}: {error}")
        return
    channel.send("loaded")
    decoder = Decoder(settings)
    while True:
        command = channel.commands.get()
        logs.request_id.set(command["request_id"])
        try:
            with os.fdopen(channel.files.popleft(), "rb") as source:
                turns = find(pipeline, source, decoder)
        except ApiError as error:
            channel.send("error", wire.error_to(error), command["number"])
        except Exception:
            logs.logger.exception("diarization_failed")
            channel.send("error", wire.error_to(errors.internal()), command["number"])
        else:
            channel.send("turns", [dataclasses.asdict(turn) for turn in turns], command["number"])


def _open(folder: Path) -> Any:
    from pyannote.audio import Pipeline

    return Pipeline.from_pretrained(folder)


def find(pipeline: Any, source: BinaryIO, decoder: Decoder) -> list[Turn]:
    """The turns in the audio that `source` holds. ApiError (400) says what is wrong with it."""
    import torch

    decoded = decoder.decode(source, lambda: False)
    if decoded is None:
        raise errors.internal()
    samples = speech.floats(np.frombuffer(decoded, np.int16))
    waveform = torch.from_numpy(samples)[None]  # channels, samples
    output = pipeline({"waveform": waveform, "sample_rate": audio.RATE})
    # The one where nobody talks over another, which pyannote.audio makes for transcripts.
    tracks = output.exclusive_speaker_diarization.itertracks(yield_label=True)
    return [Turn(float(turn.start), float(turn.end), str(speaker)) for turn, _unused, speaker in tracks]


if __name__ == "__main__":
    main()

"""What the server and its engine's process say to each other: one JSON object a line over a Unix socket.

To the engine: `load`, then any number of `transcribe` (each brings the audio as an open file), `step` and
`cancel`, with the transcription's number. From it: `loaded` or `failed`; for each `transcribe` one `info`
once it is prepared; for each `step` one `segment` or `end`; an `error` in place of any of these.
JSON and not pickle: the other side works on what strangers uploaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from voicegate.engine import Info, Options, Segment, Turn, Word
from voicegate.errors import ApiError
from voicegate.settings import SECRETS, Settings

# A segment of 30 seconds with all its words and tokens is far below that.
LINE_LIMIT = 16 * 1024 * 1024


def pack(kind: str, value: Any = None, **more: Any) -> bytes:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.dumps({"kind": kind, "value": value, **more}, separators=(",", ":")).encode() + b"\n"


def unpack(line: bytes) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(line)
    return message


def settings_to(settings: Settings) -> dict[str, Any]:
    """Without the keys: the engine has no use for them."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in SECRETS}


def settings_from(value: Mapping[str, Any]) -> Settings:
    return Settings(**value)


def options_from(value: Mapping[str, Any]) -> Options:
    return Options(**value)


def info_from(value: Mapping[str, Any]) -> Info:
    turns = value.get("turns")
    return Info(**{**value, "turns": None if turns is None else turns_from(turns)})


def turns_from(values: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
    return tuple(Turn(**value) for value in values)


def segment_from(value: Mapping[str, Any]) -> Segment:
    words = tuple(Word(**word) for word in value["words"])
    return Segment(**{**value, "tokens": tuple(value["tokens"]), "words": words})


def error_to(error: ApiError) -> dict[str, Any]:
    return {"status": error.status, "message": error.message, "type": error.type, "param": error.param,
            "code": error.code, "headers": error.headers}  # fmt: skip


def error_from(value: Mapping[str, Any]) -> ApiError:
    return ApiError(
        value["status"], value["message"], type=value["type"], param=value["param"], code=value["code"],
        headers=dict(value["headers"]),
    )  # fmt: skip

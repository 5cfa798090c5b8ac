"""What the server and its ears say to each other: frames of a JSON object and bytes over a Unix socket.

To the ears: `audio` with bytes, `snapshot`, `flush`, `clear`, `turn` (how utterances are found from now on)
and `end`. From them: `started`, `utterance` with samples, `dropped`, `snapshot` with samples, `flushed`,
`error`, `ended`. Samples are 16-bit, little-endian, mono, `RATE`.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

RATE = 16000  # Hz
# What a client may send, and how: samples (`pcm16`, `g711_*`), an Opus packet in each message (`opus`), or
# the pieces of a file as a recorder makes them (`webm`, `ogg`).
FORMATS = ("pcm16", "opus", "webm", "ogg", "g711_ulaw", "g711_alaw")
PCM_RATES = range(8000, 48_001)  # Hz

HEAD = struct.Struct("!II")  # bytes of JSON, bytes of data


@dataclass(frozen=True)
class Turn:
    """How a session finds its utterances. Times in milliseconds, but `longest`, in seconds."""

    threshold: float = 0.5  # probability from which a window is speech
    silence: int = 500  # after so much of it the utterance has ended
    prefix: int = 300  # kept from before the beginning
    longest: float = 24.0  # a Whisper window is 30 s, with what is kept around

    @property
    def release(self) -> float:
        """Below it a window is silence; between the two it goes on as it was."""
        return max(0.01, self.threshold - 0.15)


def pack(kind: str, value: Any = None, data: bytes = b"") -> bytes:
    text = json.dumps({"kind": kind, "value": value}, separators=(",", ":")).encode()
    return HEAD.pack(len(text), len(data)) + text + data


def unpack(text: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found

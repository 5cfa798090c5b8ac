"""The head of a WAV file, for audio that did not come as a file."""

from __future__ import annotations

import struct

HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")


def wav_header(rate: int, width: int, channels: int, size: int) -> bytes:
    """`rate` in Hz, `width` of a sample and `size` of the PCM in bytes."""
    frame = width * channels
    return HEADER.pack(
        b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, channels, rate, rate * frame, frame, 8 * width, b"data",
        size,
    )  # fmt: skip

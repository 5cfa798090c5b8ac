# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The metadata at the head of a GGUF file, without reading the weights (format: ggml's docs/gguf.md)."""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO

MAGIC = b"GGUF"
# Bounds against files that only look like one: pairs, bytes of a text, levels of arrays.
MOST_PAIRS, MOST_TEXT, MOST_DEPTH = 100_000, 64 * 2**20, 4
# Vocabularies are hundreds of thousands of texts, which nobody asks for: longer arrays are only skipped.
KEPT_ARRAY = 4096
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


class GgufError(ValueError):
    """The file is no GGUF, or broken; the message is for the user."""


class _Reader:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size = stream, size
        self.order = "<"

    def take(self, count: int) -> bytes:
        data = self.stream.read(count) if 0 <= count <= self.size else b""
        if len(data) != count:
            raise GgufError("it ends in the middle of its metadata")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(self.order + code, self.take(struct.calcsize("<" + code)))[0]

    def skip(self, count: int) -> None:
        if count < 0 or self.stream.tell() + count > self.size:
            raise GgufError("it ends in the middle of its metadata")
        self.stream.seek(count, os.SEEK_CUR)

    def text(self, keep: bool = True) -> str:
        length = self.number("Q")
        if length > MOST_TEXT:
            raise GgufError(f"a text of {length} bytes stands in its metadata")
        if not keep:
            self.skip(length)
            return ""
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int, keep: bool = True, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text(keep)
        if kind != _ARRAY or depth >= MOST_DEPTH:
            raise GgufError(f"its metadata has a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS and (count > KEPT_ARRAY or not keep):
            self.skip(struct.calcsize("<" + _SCALARS[inner]) * count)
            return []
        if count > self.size:  # each entry takes a byte at least
            raise GgufError(f"an array of {count} entries stands in its metadata")
        kept = keep and count <= KEPT_ARRAY
        found = []
        for _unused in range(count):
            item = self.value(inner, kept, depth + 1)
            if kept:
                found.append(item)
        return found


def read_metadata(path: str) -> dict[str, Any]:
    """
    Key to value as the file has them, for example `llama.block_count`; arrays of more than 4096 entries
    (vocabularies) come back empty. Raises GgufError, and OSError as open() does.
    """
    with open(path, "rb") as stream:
        reader = _Reader(stream, os.fstat(stream.fileno()).st_size)
        if stream.read(4) != MAGIC:
            raise GgufError(f"{path} is no GGUF file")
        try:
            version = reader.number("I")
            if version & 0xFFFF == 0:
                reader.order, version = ">", int.from_bytes(struct.pack("<I", version), "big")
            if version not in (2, 3):
                raise GgufError(f"its version {version} is not known (2 and 3 are)")
            reader.number("Q")  # tensors
            pairs = reader.number("Q")
            if pairs > MOST_PAIRS:
                raise GgufError(f"{pairs} pairs stand in its metadata")
            found: dict[str, Any] = {}
            for _unused in range(pairs):
                key = reader.text()
                found[key] = reader.value(reader.number("I"))
            return found
        except GgufError as error:
            raise GgufError(f"{path} is no whole GGUF file: {error}") from None

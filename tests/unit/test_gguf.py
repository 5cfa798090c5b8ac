# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Heads of GGUF files: whole ones are read, broken ones are GgufError and nothing else."""

from __future__ import annotations

import contextlib
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _gguf
from hypothesis import given
from hypothesis import strategies as st


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value(entry: Any) -> bytes:
    """Type and value, as a GGUF file has them."""
    if isinstance(entry, bool):
        return struct.pack("<I?", 7, entry)
    if isinstance(entry, int):
        return struct.pack("<IQ", 10, entry)
    if isinstance(entry, float):
        return struct.pack("<Id", 12, entry)
    if isinstance(entry, str):
        return struct.pack("<I", 8) + text(entry)
    items = b"".join(value(item)[4:] for item in entry)
    kind = value(entry[0])[:4] if entry else struct.pack("<I", 4)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(entry)) + items


def gguf(pairs: dict[str, Any], version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, 7, len(pairs))
    return head + b"".join(text(key) + value(entry) for key, entry in pairs.items())


PAIRS = {
    "general.architecture": "llama",
    "llama.block_count": 32,
    "llama.rope.freq_base": 500000.0,
    "flag": True,
    "heads": [8, 8, 0, 8],
    "tokenizer.ggml.tokens": [f"t{n}" for n in range(5000)],
    "tokenizer.ggml.scores": [0.5] * 5000,
    "after": "the vocabulary",
}


def test_a_whole_head(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(PAIRS) + b"weights")
    found = _gguf.read_metadata(str(path))
    kept = {key: entry for key, entry in PAIRS.items() if not key.startswith("tokenizer")}
    assert {key: found[key] for key in kept} == kept
    # Vocabularies are passed over.
    assert found["tokenizer.ggml.tokens"] == found["tokenizer.ggml.scores"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no GGUF"),
        (b"GGML....", "no GGUF"),
        (gguf(PAIRS, version=9), "version 9"),
        (gguf(PAIRS)[:100], "in the middle"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40), "pairs"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 50), "text of"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<I", 99), "type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", 9, 8, 1 << 60), "array of"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(_gguf.GgufError, match=message) as error:
        _gguf.read_metadata(str(path))
    assert str(path) in str(error.value)


@given(st.binary(max_size=300), st.integers(0, 60))
def test_garbage_is_never_more_than_a_gguf_error(garbage: bytes, keep: int) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(gguf({"a": 1, "b": "x", "c": [1, 2]})[:keep] + garbage)
        file.flush()
        with contextlib.suppress(_gguf.GgufError):
            _gguf.read_metadata(file.name)

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The real Ollama server on loopback, where one was built, and models small enough to be made on the spot."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ansible_collections.sottovoce.stack.plugins.module_utils import _ollama_source
from ansible_collections.sottovoce.stack.plugins.module_utils._ollama import OllamaError, OllamaServer

NOT_BUILT = "no Ollama in $OLLAMA_TEST_BINARY, and none built yet (ollama_server with ollama_source: go)"


def program() -> str | None:
    found = sorted(_ollama_source.cache_folder("").glob("*/ollama"))
    return os.environ.get("OLLAMA_TEST_BINARY") or (str(found[-1]) if found else None)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def serving(path: str, home: Path, more: Mapping[str, str] | None = None) -> Iterator[str]:
    """Its URL. All it writes is below `home`: models, and a log. `more`: of its environment."""
    url = f"http://127.0.0.1:{free_port()}"
    own = {"HOME": str(home), "OLLAMA_HOST": url, "OLLAMA_MODELS": str(home / "models")}
    environ = {**os.environ, **own, **(more or {})}
    with (
        (home / "log").open("w") as log,
        subprocess.Popen([path, "serve"], env=environ, stdout=log, stderr=log) as process,
    ):
        try:
            for _try in range(100):
                with contextlib.suppress(OllamaError):
                    assert OllamaServer(url).version()
                    break
                time.sleep(0.1)
            else:
                raise AssertionError(f"the server did not start:\n{(home / 'log').read_text()[-2000:]}")
            yield url
        finally:
            process.terminate()
            process.wait(timeout=10)


def tiny_gguf(number: int, more: Mapping[str, str | int] | None = None) -> bytes:
    """A model of 32 numbers: enough for the server to take it in. `more`: of its metadata."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def pair(key: str, value: str | int) -> bytes:
        if isinstance(value, str):
            return text(key) + struct.pack("<I", 8) + text(value)
        return text(key) + struct.pack("<II", 4, value)

    pairs: dict[str, str | int] = {
        "general.architecture": "llama",
        "general.name": f"tiny {number}",
        "general.file_type": 0,
        "llama.block_count": 1,
        "llama.context_length": 32,
        "llama.embedding_length": 8,
        "llama.attention.head_count": 1,
        **(more or {}),
    }
    data = b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs)) + b"".join(pair(*item) for item in pairs.items())
    data += text("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 4, 0, 0)
    data += bytes(-len(data) % 32)
    return data + struct.pack("<32f", *([float(number)] * 32))

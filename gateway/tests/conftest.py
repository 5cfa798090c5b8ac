"""Servers for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import nvml_standin
import openai
import pytest
from standins import OllamaStandIn
from voicegate_support import MODEL, Server


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start servers that this test needs for itself."""
    servers: list[Server] = []

    def start(*arguments: str, ready: bool = True, env: dict[str, str] | None = None) -> Server:
        if "--model" not in arguments and "VOICEGATE_MODEL" not in (env or {}):
            arguments = ("--model", str(MODEL), *arguments)
        server = Server(*arguments, env=env)
        servers.append(server)
        if ready:
            server.wait_ready()
        return server

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server for all that need nothing special."""
    instance = Server("--model", str(MODEL), "--compute-type", "float16")
    try:
        instance.wait_ready()
        yield instance
    finally:
        instance.stop()


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not nvml_standin.has_compiler():
        pytest.skip(nvml_standin.NO_COMPILER)
    return nvml_standin.build(tmp_path_factory.mktemp("nvml")).parent


@pytest.fixture
def ollama(tmp_path: Path) -> Iterator[OllamaStandIn]:
    stand_in = OllamaStandIn(tmp_path)
    yield stand_in
    stand_in.close()

"""The description at /openapi.json, held against the real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from voicegate_support import CLIPS, Server, environment

CLIP = CLIPS / "D009.wav"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_whatever_is_asked_the_answer_is_as_described(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve("--data-dir", str(tmp_path / "jobs"))
    command = Path(sys.executable).with_name("schemathesis")
    run = subprocess.run(
        [
            str(command), "run", f"{server.url}/openapi.json", "--checks", CHECKS, "--max-examples", "5",
            "--phases", "examples,coverage,fuzzing", "--generation-database", "none", "--no-color",
            "--suppress-health-check", "all", "--seed", "1",
        ],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr


@pytest.fixture(scope="module")
def description(server: Server) -> dict[str, Any]:
    description: dict[str, Any] = json.loads(server.request("GET", "/openapi.json")[2])
    return description


def conforms(description: dict[str, Any], name: str, value: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": description["components"]}
    jsonschema_rs.validate(schema, value)


@pytest.mark.parametrize(
    ("path", "name"),
    [("/health", "Health"), ("/ready", "Ready"), ("/status", "Status"), ("/v1/models", "Models")],
)
def test_what_the_server_says_of_itself(
    server: Server, description: dict[str, Any], path: str, name: str
) -> None:
    status, _headers, body = server.request("GET", path)
    assert status == 200
    conforms(description, name, json.loads(body))


@pytest.mark.parametrize(
    ("kind", "name"), [("json", "Transcription"), ("verbose_json", "VerboseTranscription")]
)
def test_transcripts(server: Server, description: dict[str, Any], kind: str, name: str) -> None:
    parts = [('name="file"', CLIP.read_bytes()), ('name="response_format"', kind.encode()),
             ('name="timestamp_granularities[]"', b"word,segment")]  # fmt: skip
    status, _headers, body = server.post("/v1/audio/transcriptions", parts)
    assert status == 200
    conforms(description, name, json.loads(body))


def test_events(server: Server, description: dict[str, Any]) -> None:
    parts = [('name="file"', CLIP.read_bytes()), ('name="stream"', b"true"),
             ('name="timestamp_granularities[]"', b"word")]  # fmt: skip
    body = server.post("/v1/audio/transcriptions", parts)[2].decode()
    found = [json.loads(line.removeprefix("data: ")) for line in body.strip().split("\n\n")]
    for event in found:
        conforms(description, "StreamEvent", event)
    assert [word["word"] for word in found[0]["words"]] == ["Turn", "up", "the", "volume."]

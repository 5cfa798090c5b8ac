"""Units, systemctl's output and health answers, from texts and a stubbed fetch."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _service_health as health

UNIT = """[Unit]
Description=x
After=a
After=b
[Service]
Environment=A=%h/100%
ExecStart=/bin/x --y=1
[X-Sottovoce]
Health=http://127.0.0.1:1/health
Details=
"""


def test_find_units_takes_only_files_with_our_section(tmp_path: Path) -> None:
    (tmp_path / "mine.service").write_text(UNIT)
    (tmp_path / "other.service").write_text("[Unit]\nDescription=y\n")
    (tmp_path / "mine.timer").write_text(UNIT)
    (tmp_path / "gone.service").symlink_to(tmp_path / "nowhere")
    assert health.find_units(str(tmp_path)) == [health.Unit("mine", "http://127.0.0.1:1/health", "")]


def test_parse_show_splits_blocks_and_keeps_equal_signs() -> None:
    shown = health.parse_show("Id=a.service\nActiveState=active\n\nId=b.service\nExecStart=x=y\n")
    assert shown["a"]["ActiveState"] == "active"
    assert shown["b"]["ExecStart"] == "x=y"


def test_memory_mib_knows_the_values_that_mean_not_accounted() -> None:
    assert health.memory_mib("10485760") == 10
    assert health.memory_mib("[not set]") is None
    assert health.memory_mib(str(2**64 - 1)) is None
    assert health.memory_mib(None) is None


def describe(
    shown: dict[str, str], answers: dict[str, tuple[int | None, Any, str]], details: str = ""
) -> dict[str, Any]:
    unit = health.Unit("x", "http://h", details)
    return health.describe(unit, shown, lambda url: answers[url])


def test_describe_active_and_healthy() -> None:
    shown = {
        "ActiveState": "active",
        "UnitFileState": "enabled",
        "NRestarts": "2",
        "MemoryCurrent": "1048576",
    }
    told = describe(shown, {"http://h": (200, {"model": "tiny"}, "")})
    assert (told["health"], told["details"], told["restarts"], told["memory_mib"]) == (
        "ok",
        {"model": "tiny"},
        2,
        1,
    )


def test_describe_prefers_the_details_url() -> None:
    answers: dict[str, tuple[int | None, Any, str]] = {
        "http://h": (200, {"version": "1"}, ""),
        "http://d": (200, {"models": []}, ""),
    }
    assert describe({"ActiveState": "active"}, answers, "http://d")["details"] == {"models": []}


def test_describe_tells_errors_stopped_and_failed() -> None:
    assert describe({"ActiveState": "active"}, {"http://h": (503, None, "HTTP 503")})["health"] == "HTTP 503"
    assert describe({"ActiveState": "active"}, {"http://h": (None, None, "refused")})["health"] == "refused"
    assert describe({"ActiveState": "inactive"}, {})["health"] == "stopped"
    assert describe({"ActiveState": "failed"}, {})["health"] == "failed"
    assert describe({}, {})["health"] == "unknown"


class Clock:
    """Time that passes only by sleeping."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def wait(
    answers: list[tuple[int | None, Any, str]], states: list[str], timeout: float = 1.0
) -> health.Outcome:
    clock = Clock()
    return health.wait_healthy(
        fetch=lambda: answers.pop(0) if len(answers) > 1 else answers[0],
        unit_state=lambda: states.pop(0) if len(states) > 1 else states[0],
        expected=[200],
        timeout=timeout,
        clock=lambda: clock.now,
        sleep=clock.sleep,
    )


def test_wait_goes_on_until_the_status_is_expected() -> None:
    answers = [(None, None, "refused"), (503, None, "HTTP 503"), (200, {"model": "tiny"}, "")]
    assert wait(answers, ["active"]) == health.Outcome(health={"model": "tiny"})


def test_wait_ends_at_once_when_the_unit_has_failed() -> None:
    assert wait([(None, None, "refused")], ["activating", "failed"], 3600).problem == "the unit has failed"


def test_wait_ends_in_time_and_tells_the_last_answer() -> None:
    assert wait([(503, None, "HTTP 503")], ["active"]).problem == (
        "no healthy answer within 1 s, the last was: HTTP 503"
    )


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = {"/ok?a=1": b'{"a": 1}', "/text": b"fine"}.get(self.path)
        self.send_response(503 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"{}")

    def log_message(self, *_arguments: Any) -> None:
        """Quiet."""


def test_fetch_json_never_raises_for_what_a_server_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert health.fetch_json(f"{url}/ok?a=1", 5) == (200, {"a": 1}, "")
        assert health.fetch_json(f"{url}/text", 5) == (200, None, "")
        assert health.fetch_json(f"{url}/broken", 5) == (503, None, "HTTP 503")
        server.shutdown()
    status, body, error = health.fetch_json(url, 5)
    assert (status, body, bool(error)) == (None, None, True)
    for wrong in ("http://[::1", "http://127.0.0.1:port/", "nonsense"):
        assert health.fetch_json(wrong, 1)[:2] == (None, None)

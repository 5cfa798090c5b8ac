# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What systemd waits for after the start of speech-to-text, against servers that do it well and ill."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "roles/stt_server/files/ready.py"
Answers = dict[str, tuple[int, str]]


@contextlib.contextmanager
def server(answers: Answers) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A server with these answers by "METHOD /path"; gives its URL and what it was asked with which key."""
    asked: list[tuple[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            what = f"{self.command} {self.path}"
            asked.append((what, self.headers.get("Authorization", "")))
            status, text = answers.get(what, (404, ""))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = answer

        def log_message(self, *_arguments: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{it.server_port}", asked
        it.shutdown()


def ready(*arguments: str, key: str = "") -> subprocess.CompletedProcess[str]:
    # As systemd runs it: alone, without what is installed beside Python.
    return subprocess.run(
        [sys.executable, "-I", "-S", str(PROGRAM), *arguments],
        env={**os.environ, **({"API_KEY": key} if key else {})},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_it_waits_until_the_model_is_loaded() -> None:
    answers: Answers = {"GET /health": (503, '{"status": "loading"}')}
    with server(answers) as (url, _asked):
        threading.Timer(0.8, lambda: answers.update({"GET /health": (200, '{"status": "ok"}')})).start()
        begin = time.monotonic()
        done = ready("--seconds", "20", url)
    assert done.returncode == 0, done.stderr
    assert 0.7 < time.monotonic() - begin < 10
    assert done.stdout.startswith("speech-to-text is ready after ")


def test_speaches_is_asked_to_load_with_its_key() -> None:
    load = "POST /api/ps/deepdml/faster-whisper-large-v3-turbo-ct2"
    for status, code in ((201, 0), (409, 0), (500, 1)):
        with server({"GET /health": (200, "OK"), load: (status, "no such file")}) as (url, asked):
            done = ready("--load", load.removeprefix("POST /api/ps/"), url, key="k1")
        assert done.returncode == code, done.stderr
        assert asked[-1] == (load, "Bearer k1")
    assert "does not load: 500 no such file" in done.stderr
    assert "k1" not in done.stdout + done.stderr


def test_a_model_that_is_broken_is_not_waited_for() -> None:
    begin = time.monotonic()
    with server({"GET /health": (503, '{"status": "error", "error": "no model.bin"}')}) as (url, _asked):
        done = ready(url)
    assert (done.returncode, done.stderr) == (1, "speech-to-text is not ready: no model.bin\n")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("gone", ["", "4194305"])
def test_a_server_that_has_ended_is_not_waited_for(gone: str) -> None:
    answers: Answers = {"GET /health": (503, '{"status": "loading"}')}
    with server(answers) as (url, _asked):
        begin = time.monotonic()
        done = ready(f"--process={gone}", url)
        assert (done.returncode, done.stderr) == (1, "speech-to-text is not ready: its process has ended\n")
        assert time.monotonic() - begin < 10
        assert "not within 0.5 s" in ready(f"--process={os.getpid()}", "--seconds=0.5", url).stderr


def test_a_server_that_never_answers_costs_its_time_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
    begin = time.monotonic()
    done = ready("--seconds", "1", url)
    assert done.returncode == 1
    assert "not within 1 s" in done.stderr
    assert time.monotonic() - begin < 10

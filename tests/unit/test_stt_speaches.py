"""The client of Speaches' API against a small server that answers as Speaches does."""

from __future__ import annotations

import json
import threading
import time
import wave
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any
from urllib.parse import unquote

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _stt_speaches
from ansible_collections.sottovoce.stack.plugins.module_utils._stt_speaches import ApiError, Speaches, State

MODEL = "Systran/faster-whisper-tiny"


class Fake(ThreadingHTTPServer):
    """The behaviour read in Speaches 0.9.0-rc.3: ids are not resolved here, but statuses are the same."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = {MODEL}
        self.disk: set[str] = set()
        self.listed: set[str] = set()
        self.broken: set[str] = set()
        self.key = ""
        self.delay = 0.0
        self.log: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is part of a test."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, body: Any) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fake, path = self.server, unquote(self.path)
        fake.log.append(f"{self.command} {path}")
        time.sleep(fake.delay)
        if path == "/health":
            return self.reply(200, {"message": "OK"})
        if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
            return self.reply(403, {"detail": "Invalid API key. The provided API key is incorrect."})
        if path == "/api/ps":
            return self.reply(200, {"models": sorted(fake.listed)})
        if path == "/v1/audio/transcriptions":
            model = next(name for name in fake.hub | fake.disk if name.encode() in body)
            return self.reply(500, "boom") if model in fake.broken else self.reply(200, {"text": ""})
        kind, name = path.removeprefix("/").split("/", 2)[1:]
        if kind == "models":
            return self.models(name)
        return self.loaded(name)

    def models(self, name: str) -> None:
        fake = self.server
        match self.command:
            case "GET" if name in fake.disk:
                self.reply(200, {"id": name})
            case "POST" if name in fake.disk:
                self.reply(201, f"Model '{name}' already exists")
            case "POST" if name in fake.hub:
                fake.disk.add(name)
                self.reply(200, f"Model '{name}' downloaded")
            case "DELETE" if name in fake.disk:
                fake.disk.remove(name)
                self.reply(200, {"detail": "deleted"})
            case _:
                self.reply(404, {"detail": f"Model '{name}' not found"})

    def loaded(self, name: str) -> None:
        fake = self.server
        if self.command == "DELETE":
            status = 409 if name in fake.broken else 200 if name in fake.listed else 404
            fake.listed.discard(name)
            return self.reply(status, {"message": "unloaded"})
        if name in fake.listed:
            return self.reply(409, {"message": f"Model '{name}' is already loaded."})
        if name not in fake.disk:
            return self.reply(404, {"detail": "not installed locally"})
        fake.listed.add(name)  # before loading: a failure leaves it listed
        return self.reply(500, "Internal Server Error") if name in fake.broken else self.reply(201, {})

    do_GET = do_POST = do_DELETE = handle_any


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join(5)
    server.server_close()


def run(fake: Fake, state: str, model: str = MODEL, **options: Any) -> tuple[State, State]:
    server = Speaches(fake.url + "/v1/", **options)
    before = _stt_speaches.observe(server, model)
    _stt_speaches.converge(server, model, state, before)
    return before, _stt_speaches.observe(server, model)


def test_downloads_only_when_missing_and_loads(fake: Fake) -> None:
    before, after = run(fake, "loaded")
    assert (before, after) == (State(False, False), State(True, True))
    fake.log.clear()
    before, after = run(fake, "loaded")
    assert before == after == State(True, True)
    assert not [entry for entry in fake.log if entry.startswith("POST")]


def test_present_does_not_load_or_unload(fake: Fake) -> None:
    assert run(fake, "present")[1] == State(True, False)
    fake.listed.add(MODEL)
    assert run(fake, "present")[1] == State(True, True)


def test_absent(fake: Fake) -> None:
    run(fake, "loaded")
    assert run(fake, "absent")[1] == State(False, False)
    assert run(fake, "absent") == (State(False, False), State(False, False))


def test_unknown_model(fake: Fake) -> None:
    with pytest.raises(ApiError, match="the model hub has no x/y"):
        run(fake, "loaded", "x/y")


def test_a_failed_load_is_an_error_on_the_next_run_too(fake: Fake) -> None:
    fake.broken.add(MODEL)
    for _unused in range(2):
        with pytest.raises(ApiError, match=r"loading .* gave HTTP 500"):
            run(fake, "loaded")


def test_listed_by_someone_else_is_tried_out(fake: Fake) -> None:
    fake.disk.add(MODEL)
    fake.listed.add(MODEL)
    server = Speaches(fake.url)
    server.load(MODEL)
    fake.broken.add(MODEL)
    with pytest.raises(ApiError, match="does not load"):
        server.load(MODEL)


def test_key(fake: Fake) -> None:
    fake.key = "s3cret"
    with pytest.raises(ApiError, match="refused the API key"):
        run(fake, "loaded", api_key="wrong")
    assert run(fake, "loaded", api_key="s3cret")[1].loaded


def test_no_server() -> None:
    with pytest.raises(ApiError, match="cannot be reached"):
        Speaches("http://127.0.0.1:9").present(MODEL)


def test_slow_server(fake: Fake) -> None:
    fake.delay = 0.6
    with pytest.raises(ApiError, match=r"did not answer within 0\.2 s"):
        Speaches(fake.url, timeout=0.2).present(MODEL)


def test_waits_until_up_but_not_for_ever(fake: Fake) -> None:
    _stt_speaches.wait_until_up(Speaches(fake.url), 5)
    ticks = iter(range(100))
    slept: list[float] = []
    with pytest.raises(ApiError, match="Speaches is not up"):
        _stt_speaches.wait_until_up(
            Speaches("http://127.0.0.1:9"), 3, clock=lambda: float(next(ticks)), sleep=slept.append
        )
    assert len(slept) == 2


def test_silence_is_a_wav_file() -> None:
    with wave.open(BytesIO(_stt_speaches.silence()), "rb") as audio:
        assert audio.getframerate() == 16000
        assert set(audio.readframes(audio.getnframes())) == {0}

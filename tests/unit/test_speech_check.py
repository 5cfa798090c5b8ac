"""Comparison of sentences, and the requests of speech_check against a small server."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _speech_check as speech


@pytest.mark.parametrize(
    ("expected", "heard", "rate"),
    [
        ("Lock the door.", "lock the door", 0.0),
        ("Lock the door.", "Lock a door", 1 / 3),
        ("Lock the door.", "", 1.0),
        ("Lock the door.", "please lock the front door", 2 / 3),
        ("", "", 0.0),
        ("", "something", 1.0),
        ("Übermäßig laut!", "übermässig laut", 0.0),
    ],
)
def test_word_error_rate(expected: str, heard: str, rate: float) -> None:
    assert speech.word_error_rate(expected, heard) == pytest.approx(rate)


class Handler(http.server.BaseHTTPRequestHandler):
    seen: ClassVar[list[tuple[str, str, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, self.headers.get("Authorization", ""), body))
        code, answer = 200, b'{"text": " Hello. "}'
        if self.path.endswith("signin"):
            answer = b'{"token": "abc"}'
        elif self.path.startswith("/broken"):
            code, answer = 500, b'{"detail": "no engine"}'
        elif self.path.startswith("/html"):
            answer = b"<html>"
        self.send_response(code)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.seen.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def test_transcribe_sends_a_form_and_returns_the_text(server: str) -> None:
    assert speech.sign_in(server, "a@b", "secret", 5) == "abc"
    text = speech.transcribe(f"{server}/t", b"RIFFdata", token="abc", fields={"language": "en"}, timeout=5)
    assert text == "Hello."
    signin, upload = Handler.seen
    assert json.loads(signin[2]) == {"email": "a@b", "password": "secret"}
    assert upload[1] == "Bearer abc"
    assert b'name="language"\r\n\r\nen\r\n' in upload[2]
    assert b'filename="sentence.wav"\r\nContent-Type: audio/wav\r\n\r\nRIFFdata\r\n' in upload[2]


@pytest.mark.parametrize(("path", "words"), [("/broken", ["500", "no engine"]), ("/html", ["no JSON"])])
def test_transcribe_says_what_the_server_said(server: str, path: str, words: list[str]) -> None:
    with pytest.raises(speech.SpeechCheckError) as caught:
        speech.transcribe(server + path, b"x", token="", fields={}, timeout=5)
    assert all(word in str(caught.value) for word in words)


def test_unreachable_server_is_named() -> None:
    with pytest.raises(speech.SpeechCheckError, match=r"127\.0\.0\.1:9"):
        speech.transcribe("http://127.0.0.1:9/x", b"x", token="", fields={}, timeout=2)

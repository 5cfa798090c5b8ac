"""A voicegate in front of another server with OpenAI's API."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from voicegate import errors, upstream
from voicegate.engine import Info, Options, Segment, Word
from voicegate.errors import ApiError
from voicegate_support import CLIPS, MODEL, Server, clips, long_audio

Serve = Callable[..., Server]
CLIP = CLIPS / "D009.wav"
TEXT = "Turn up the volume."


@pytest.fixture(scope="module")
def front(server: Server) -> Iterator[Server]:
    """In front of the server that the other tests use."""
    instance = Server("--model", str(MODEL), "--upstream", server.url)
    try:
        instance.wait_ready()
        yield instance
    finally:
        instance.stop()


class Broken:
    """A server that answers every transcription as told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.status, self.body, self.headers = 200, b"{}", dict[str, str]()
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.gate: threading.Semaphore | None = None  # one release for each answer
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(200, b'{"object": "list", "data": []}', {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                owner.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                if owner.gate is not None:
                    owner.gate.acquire(timeout=20)
                self._answer(owner.status, owner.body, owner.headers)

            def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def broken() -> Iterator[Broken]:
    instance = Broken()
    yield instance
    instance.close()


def ask(server: Server, audio: Path | bytes = CLIP, **more: Any) -> Any:
    file = audio if isinstance(audio, Path) else ("a.wav", audio)
    options: dict[str, Any] = {"model": "whisper-1", "language": "en", **more}
    return server.client().audio.transcriptions.create(file=file, **options)


def test_every_clip_says_the_same_through_it(front: Server) -> None:
    for clip in clips("D"):
        assert ask(front, clip.path, language=clip.language).text == clip.text, clip.file


@pytest.mark.parametrize("kind", ["text", "srt", "vtt"])
def test_every_form_is_the_same_through_it(front: Server, server: Server, kind: str) -> None:
    assert ask(front, response_format=kind) == ask(server, response_format=kind)


def test_all_of_verbose_json_comes_through(front: Server, server: Server) -> None:
    more = {"response_format": "verbose_json", "timestamp_granularities": ["segment", "word"]}
    audio = long_audio(3)
    assert ask(front, audio, **more).model_dump() == ask(server, audio, **more).model_dump()


def test_translations_and_detected_languages(front: Server, server: Server) -> None:
    found = []
    for one in (front, server):
        found.append(one.client().audio.translations.create(file=CLIP, model="whisper-1").text)
        create = one.client().audio.transcriptions.create
        assert create(file=CLIP, model="whisper-1", response_format="verbose_json").language == "english"
    assert found[0] == found[1] != ""


def test_a_stream_of_events(front: Server) -> None:
    events = list(ask(front, long_audio(2), stream=True))
    assert [event.type for event in events][-1] == "transcript.text.done"
    assert events[-1].text == f"{TEXT} {TEXT}"
    assert len(events) == 3


def test_large_files_go_through_piece_by_piece(front: Server) -> None:
    audio = long_audio(1, pause=60)  # more than stays in memory here, and than one piece
    assert len(audio) > 1024 * 1024
    assert ask(front, audio).text == TEXT


def test_bad_audio_is_told_in_the_engines_words(front: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(front, b"no audio at all")
    assert caught.value.code == "engine_refused"
    assert "could not be read as audio" in str(caught.value)


def test_health_names_the_engine(front: Server, server: Server) -> None:
    status, body = front.health()
    assert (status, body["engine"], body["load_state"]) == (200, f"upstream {server.url}", "loaded")


def test_a_client_that_leaves_stops_the_engine(serve: Serve) -> None:
    engine = serve()
    front = serve("--upstream", engine.url)
    with pytest.raises(openai.APITimeoutError):
        front.client().with_options(timeout=1).audio.transcriptions.create(
            file=("a.wav", long_audio(200)), model="whisper-1", language="en"
        )
    for one in (front, engine):
        one.wait_health(lambda body: body["queue"]["running"] == 0, 10)


def test_an_engine_that_is_not_there_and_comes(serve: Serve) -> None:
    engine = serve()
    port = engine.port
    front = serve("--upstream", engine.url + "/v1")
    assert ask(front).text == TEXT
    engine.stop()
    started = time.monotonic()
    with pytest.raises(openai.InternalServerError) as caught:
        ask(front)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_unreachable")
    assert upstream.PATIENCE <= time.monotonic() - started < upstream.PATIENCE + 5
    assert front.health()[0] == 503
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(ask(front).text))
    asking.start()  # it waits for the engine
    serve("--port", str(port))
    asking.join(20)
    assert answers == [TEXT]
    assert front.health()[0] == 200
    assert "Traceback" not in front.log


def test_a_front_that_starts_before_its_engine(serve: Serve, broken: Broken) -> None:
    broken.close()
    front = serve("--upstream", broken.url, ready=False)
    front.wait_listening()
    front.wait_health(lambda body: body["load_state"] == "failed")
    assert broken.url in front.health()[1]["error"]
    assert front.stop() == 0


def test_keys(serve: Serve, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret-of-the-engine\n")
    engine = serve("--api-key-file", str(key))
    front = serve("--upstream", engine.url, "--upstream-api-key-file", str(key))
    assert ask(front).text == TEXT
    other = serve("--upstream", engine.url, env={"VOICEGATE_UPSTREAM_API_KEY": "wrong"}, ready=False)
    other.wait_listening()
    other.wait_health(lambda body: "refuses the key" in body.get("error", ""))
    with pytest.raises(openai.InternalServerError) as caught:
        ask(other)
    assert caught.value.code == "engine_key"
    assert "secret-of-the-engine" not in front.log + engine.log
    assert "wrong" not in other.log


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (404, {"error": {"message": "no such model"}}, (503, "engine_model_missing")),
        (500, {"detail": "CUDA failed with error out of memory"}, (503, "out_of_memory")),
        (500, {"detail": "oh"}, (503, "engine_failed")),
        (422, {"detail": [{"msg": "field required"}]}, (400, "engine_refused")),
        (429, {}, (429, "engine_busy")),
        (200, [], (502, "engine_answer")),
        (200, {"text": "a", "segments": [{"start": "x"}]}, (502, "engine_answer")),
    ],
)
def test_failures_of_the_engine(
    serve: Serve, broken: Broken, status: int, body: Any, expected: tuple[int, str]
) -> None:
    broken.status, broken.body = status, json.dumps(body).encode()
    front = serve("--upstream", broken.url)
    with pytest.raises(openai.APIStatusError) as caught:
        ask(front)
    assert (caught.value.status_code, caught.value.code) == expected
    assert "Traceback" not in front.log


def test_what_is_asked_of_it(serve: Serve, broken: Broken) -> None:
    broken.body = json.dumps({"text": " Guten Tag. ", "language": "german", "duration": 1.5}).encode()
    front = serve("--upstream", broken.url, "--upstream-model", "their/name")
    answer = ask(front, language="de", prompt="Hallo", temperature=0.5, response_format="verbose_json")
    assert (answer.text, answer.language, answer.duration) == ("Guten Tag.", "german", 1.5)
    [(path, headers, body)] = broken.asked
    assert path == "/v1/audio/transcriptions"
    assert headers["x-request-id"].startswith("req_")
    for name, value in (("model", "their/name"), ("language", "de"), ("prompt", "Hallo"),
                        ("temperature", "0.5"), ("response_format", "verbose_json")):  # fmt: skip
        assert f'name="{name}"\r\n\r\n{value}\r\n'.encode() in body
    assert CLIP.read_bytes() in body


def test_what_it_does_not_do_itself_goes_to_the_engine(front: Server, server: Server) -> None:
    for one in (front, server):
        assert one.client().models.list().data[0].id == MODEL.name
        assert one.client().models.retrieve("whisper-1").id == MODEL.name
        with pytest.raises(openai.NotFoundError) as caught:
            one.client().audio.speech.create(model="tts-1", voice="alloy", input="Hallo")
        assert caught.value.code == "unknown_url"


def test_speech_output_is_passed_on(serve: Serve, broken: Broken) -> None:
    broken.body, broken.headers = bytes(range(256)) * 1000, {"content-type": "audio/mpeg", "x-more": "1"}
    front = serve("--upstream", broken.url, env={"VOICEGATE_UPSTREAM_API_KEY": "theirs"})
    with front.client("mine").audio.speech.with_streaming_response.create(
        model="tts", voice="alloy", input="Hallo", extra_query={"a": "b c"}
    ) as answer:
        assert (answer.headers["content-type"], answer.headers["x-more"]) == ("audio/mpeg", "1")
        assert answer.read() == broken.body
    [(path, headers, body)] = broken.asked
    assert path == "/v1/audio/speech?a=b+c"
    assert headers["authorization"] == "Bearer theirs"
    assert json.loads(body)["input"] == "Hallo"
    broken.status, broken.body = 418, b"{}"
    assert front.request("POST", "/api/x/y%2Fz", b"")[0] == 418
    assert broken.asked[-1][0] == "/api/x/y%2Fz"
    broken.close()
    status, _unused, answered = front.request("GET", "/v1/voices")
    assert (status, json.loads(answered)["error"]["code"]) == (503, "engine_unreachable")
    assert front.request("GET", "/elsewhere")[0] == 404


def test_other_models_of_the_engine(serve: Serve, broken: Broken, front: Server) -> None:
    broken.body = json.dumps({"text": "x"}).encode()
    other = serve("--upstream", broken.url)
    assert ask(other, model="another/model").text == "x"
    assert b"\r\n\r\nanother/model\r\n" in broken.asked[0][2]
    with pytest.raises(openai.NotFoundError) as caught:
        ask(front, model="another/model")
    assert caught.value.code == "model_not_found"


def test_several_at_once_to_an_engine_that_takes_them(serve: Serve, broken: Broken) -> None:
    broken.body = json.dumps({"text": "x"}).encode()
    broken.gate = threading.Semaphore(0)
    front = serve("--upstream", broken.url, "--upstream-parallel", "3")
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(ask(front).text)) for _ in range(5)]
    for thread in threads:
        thread.start()
    front.wait_health(lambda body: (body["queue"]["running"], body["queue"]["waiting"]) == (3, 2))
    deadline = time.monotonic() + 10
    while len(broken.asked) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(broken.asked) == 3
    broken.gate.release(5)
    for thread in threads:
        thread.join(20)
    assert texts == ["x"] * 5


def test_words_find_their_segments() -> None:
    segments = [Segment(0, 1, " a b"), Segment(1, 2, " c"), Segment(5, 6, " d")]
    words = [Word(0, 0.4, " a", 0), Word(0.5, 0.9, " b", 0), Word(0.95, 1.4, " c", 0), Word(5, 6, " d", 0)]
    found = upstream.give_words(segments, words)
    assert [[word.word for word in segment.words] for segment in found] == [[" a", " b"], [" c"], [" d"]]


def test_an_answer_with_only_text() -> None:
    info, segment = upstream.read_answer({"text": "hm"}, Options(language="en"))
    assert info == Info("transcribe", "en", 0.0, 0.0)
    assert segment == Segment(0.0, 0.0, "hm")
    assert len(upstream.read_answer({"text": " "}, Options())) == 1


def test_wrong_settings(capsys: pytest.CaptureFixture[str]) -> None:
    from voicegate.cli import EXIT_SETTINGS, main

    assert main(["serve", "--model", str(MODEL), "--upstream", "localhost:8000"]) == EXIT_SETTINGS
    assert "--upstream: 'localhost:8000' is no URL" in capsys.readouterr().err


def test_messages_of_any_shape() -> None:
    for body in (b'{"error": {"message": "m"}}', b'{"detail": "m"}', b"m", b'"m"', b'{"message": " m\\n "}'):
        assert "m" in upstream.refused(400, body, "x", None).message
    assert isinstance(upstream.refused(500, b"", "x", None), ApiError)
    assert errors.engine_down().code == "engine_down"

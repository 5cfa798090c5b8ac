"""The API as the official client sees it, against a live server with the demo model."""

from __future__ import annotations

import http.client
import io
import json
import re
import threading
import time
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import openai
import pytest
from voicegate_support import CLIPS, MODEL, MODEL_EN, Clip, Server, clips, long_audio

CLIP = CLIPS / "D009.wav"
TEXT = "Turn up the volume."

HEAD = (
    "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=xyz\r\n"
)

Serve = Callable[..., Server]


@pytest.mark.parametrize("clip", clips("AD"), ids=lambda clip: clip.file)
def test_exact_text(client: openai.OpenAI, clip: Clip) -> None:
    answer = client.audio.transcriptions.create(file=clip.path, model="whisper-1", language="en")
    assert answer.text == clip.text
    assert answer.usage is not None
    assert answer.usage.type == "duration"


@pytest.mark.parametrize("clip", clips("DF"), ids=lambda clip: clip.file)
def test_language_is_detected(client: openai.OpenAI, clip: Clip) -> None:
    answer = client.audio.transcriptions.create(
        file=clip.path, model="whisper-1", response_format="verbose_json"
    )
    assert (answer.text, answer.language) == (clip.text, {"en": "english", "de": "german"}[clip.language])


def test_an_answer_does_not_wait_for_an_acknowledgement(server: Server) -> None:
    """Head and body leave at once: else each answer on a kept connection would take 40 ms more."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        seconds.append(time.perf_counter() - started)
    connection.close()
    assert sorted(seconds)[5] < 0.03  # a quarter of them, however busy the machine is


def test_one_encoding_is_as_good_as_two(client: openai.OpenAI) -> None:
    """Detecting the language from the encoding that is transcribed changes no token of the result."""
    found = []
    for language in (openai.omit, "en"):
        answer = client.audio.transcriptions.create(
            file=CLIP, model="whisper-1", response_format="verbose_json", language=language
        )
        assert answer.segments is not None
        found.append([(s.tokens, s.start, s.end, s.avg_logprob) for s in answer.segments])
    assert found[0] == found[1]


@pytest.mark.parametrize("clip", clips("S"), ids=lambda clip: clip.file)
def test_silence_is_empty(client: openai.OpenAI, clip: Clip) -> None:
    create = client.audio.transcriptions.create
    assert create(file=clip.path, model="whisper-1").text == ""
    verbose = create(file=clip.path, model="whisper-1", response_format="verbose_json")
    assert (verbose.text, verbose.segments, verbose.duration) == ("", [], 3.0)
    assert create(file=clip.path, model="whisper-1", response_format="srt") == ""
    assert create(file=clip.path, model="whisper-1", response_format="vtt") == "WEBVTT\n\n"
    events = list(create(file=clip.path, model="whisper-1", stream=True))
    assert [(event.type, getattr(event, "text", None)) for event in events] == [("transcript.text.done", "")]


def test_response_formats(server: Server, client: openai.OpenAI) -> None:
    def create(response_format: Any) -> Any:
        return client.audio.transcriptions.create(
            file=CLIP, model="whisper-1", response_format=response_format, language="en"
        )

    assert create("json").text == TEXT
    assert create("text") == TEXT + "\n"
    times = r"00:00:00{0}\d\d\d --> 00:00:01{0}\d\d\d"
    assert re.fullmatch(rf"1\n{times.format(',')}\n{re.escape(TEXT)}\n\n", create("srt"))
    assert re.fullmatch(rf"WEBVTT\n\n{times.format('[.]')}\n{re.escape(TEXT)}\n\n", create("vtt"))
    verbose = create("verbose_json")
    assert (verbose.text, verbose.language, verbose.task) == (TEXT, "english", "transcribe")
    assert verbose.duration == pytest.approx(1.408, abs=0.01)
    assert verbose.words is None
    [segment] = verbose.segments
    assert (segment.id, segment.text, segment.temperature) == (0, f" {TEXT}", 0.0)
    assert segment.start < segment.end <= verbose.duration
    assert segment.tokens
    assert segment.avg_logprob < 0
    types = {"json": "application/json", "text": "text/plain", "vtt": "text/vtt"}
    for response_format, kind in types.items():
        parts = [('name="file"', CLIP.read_bytes()), ('name="response_format"', response_format.encode())]
        assert server.post("/v1/audio/transcriptions", parts)[1]["content-type"].startswith(kind)


def test_word_timestamps(client: openai.OpenAI) -> None:
    def create(*granularities: Any) -> Any:
        return client.audio.transcriptions.create(
            file=CLIP, model="whisper-1", response_format="verbose_json",
            timestamp_granularities=list(granularities),
        )  # fmt: skip

    only = create("word")
    assert only.segments is None
    assert [word.word for word in only.words] == TEXT.split()
    for word, following in zip(only.words, only.words[1:], strict=False):
        assert 0 <= word.start <= word.end <= following.end <= only.duration
    both = create("word", "segment")
    assert len(both.words) == 4
    assert len(both.segments) == 1


def test_stream(server: Server, client: openai.OpenAI) -> None:
    events = list(client.audio.transcriptions.create(file=CLIP, model="whisper-1", stream=True))
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert deltas
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == "".join(deltas) == TEXT
    assert events[-1].usage
    assert events[-1].usage.total_tokens == events[-1].usage.input_tokens + events[-1].usage.output_tokens > 0
    parts = [('name="file"', CLIP.read_bytes()), ('name="stream"', b"true")]
    status, headers, body = server.post("/v1/audio/transcriptions", parts)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert all(line.startswith(b"data: {") for line in body.strip().split(b"\n\n"))


def test_stream_of_bad_audio_has_a_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="could not be read as audio"):
        client.audio.transcriptions.create(file=b"garbage", model="whisper-1", stream=True)


def test_prompt_and_temperature_are_taken(client: openai.OpenAI) -> None:
    answer = client.audio.transcriptions.create(
        file=CLIP, model="whisper-1", temperature=0.2, language="en", response_format="verbose_json",
        prompt="Turn on the light.",
    )  # fmt: skip
    assert answer.segments is not None
    assert answer.segments[0].temperature == 0.2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # OpenAI's client means their models
def test_translations(client: openai.OpenAI) -> None:
    """The demo model never learned to translate: what counts is the form."""
    german = clips("F")[0].path
    assert isinstance(client.audio.translations.create(file=german, model="whisper-1").text, str)
    verbose: Any = client.audio.translations.create(
        file=german, model="whisper-1", response_format="verbose_json"
    )
    assert (verbose.task, verbose.language) == ("translate", "english")
    assert isinstance(verbose.segments, list)
    assert "WEBVTT" in client.audio.translations.create(file=german, model="whisper-1", response_format="vtt")


# -- what people upload


def _encoded(container: str, codec: str, rate: int, layout: str = "mono") -> bytes:
    target = io.BytesIO()
    with av.open(str(CLIP)) as source, av.open(target, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(
            format=stream.codec_context.format, layout=layout, rate=rate,
            frame_size=stream.codec_context.frame_size or 1024,
        )  # fmt: skip
        for frame in (*source.decode(audio=0), None):
            for piece in resampler.resample(frame):
                output.mux(stream.encode(piece))
        output.mux(stream.encode(None))
    return target.getvalue()


@pytest.mark.parametrize(
    ("container", "codec", "rate", "layout"),
    [
        ("webm", "libopus", 48000, "mono"),  # what browsers record
        ("ogg", "libopus", 48000, "stereo"),
        ("mp3", "libmp3lame", 44100, "stereo"),
        ("mp4", "aac", 44100, "mono"),  # needs seeking: its index is at the end
        ("flac", "flac", 22050, "mono"),
        ("wav", "pcm_s16le", 8000, "mono"),
    ],
)
def test_containers(client: openai.OpenAI, container: str, codec: str, rate: int, layout: str) -> None:
    content = _encoded(container, codec, rate, layout)
    # No file name: the content says what it is.
    answer = client.audio.transcriptions.create(file=content, model="whisper-1", language="en")
    assert answer.text == TEXT


@pytest.mark.parametrize(
    "head",
    ['name="file"', 'name="file"; filename=""', 'name="file"; filename="x.txt"\r\nContent-Type: text/plain'],
)
def test_upload_without_name_or_type(server: Server, head: str) -> None:
    status, _, body = server.post("/v1/audio/transcriptions", [(head, CLIP.read_bytes())])
    assert (status, json.loads(body)["text"]) == (200, TEXT)


def test_fields_after_the_file_count(server: Server) -> None:
    parts = [
        ('name="file"', CLIP.read_bytes()),
        ('name="response_format"', b"text"),
        ('name="unknown"', b"1"),
    ]
    assert server.post("/v1/audio/transcriptions", parts)[2].decode() == TEXT + "\n"


# -- refusals


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "2"}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"response_format": "docx"}, "response_format"),
        ({"timestamp_granularities[]": "phoneme"}, "timestamp_granularities"),
        ({"language": "klingon"}, "language"),
        ({"stream": "perhaps"}, "stream"),
        ({"stream": "true", "response_format": "srt"}, "response_format"),
    ],
)
def test_invalid_parameters(server: Server, fields: dict[str, str], param: str) -> None:
    parts = [('name="file"', CLIP.read_bytes())]
    parts += [(f'name="{name}"', value.encode()) for name, value in fields.items()]
    status, headers, body = server.post("/v1/audio/transcriptions", parts)
    error = json.loads(body)["error"]
    assert (status, headers["content-type"]) == (400, "application/json")
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert next(iter(fields.values())) in error["message"] or param in error["message"]


def test_missing_empty_and_garbage_file(server: Server, client: openai.OpenAI) -> None:
    status, _, body = server.post("/v1/audio/transcriptions", [('name="model"', b"whisper-1")])
    assert (status, json.loads(body)["error"]["param"]) == (400, "file")
    for content in (b"", b"no audio at all " * 5000, CLIP.read_bytes()[:30]):
        with pytest.raises(openai.BadRequestError) as caught:
            client.audio.transcriptions.create(file=("a.wav", content), model="whisper-1")
        assert (caught.value.code, caught.value.param) == ("invalid_audio", "file")
    # and goes on
    assert client.audio.transcriptions.create(file=CLIP, model="whisper-1").text == TEXT


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("whisper-demo", "model", "local")
    for name in ("whisper-demo", "whisper-1", str(MODEL)):
        assert client.models.retrieve(name).id == "whisper-demo"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("Systran/faster-whisper-tiny")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("name", ["", "whisper-1", "whisper-demo", str(MODEL)])
def test_model_is_meant_by(client: openai.OpenAI, name: str) -> None:
    assert client.audio.transcriptions.create(file=CLIP, model=name, language="en").text == TEXT


@pytest.mark.parametrize("name", ["large-v3", "gpt-4o-transcribe", "Systran/faster-whisper-tiny"])
def test_unknown_model(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match=r"serves 'whisper-demo'") as caught:
        client.audio.transcriptions.create(file=CLIP, model=name)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_unknown_url_and_method(server: Server) -> None:
    for method, path, status in [("GET", "/v2/x", 404), ("GET", "/v1/audio/transcriptions", 405)]:
        code, _, body = server.request(method, path)
        assert code == status
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_request_id(server: Server) -> None:
    assert server.request("GET", "/health", headers={"X-Request-ID": "abc-1"})[1]["x-request-id"] == "abc-1"
    made = server.request("GET", "/health", headers={"X-Request-ID": "a b\tc"})[1]["x-request-id"]
    assert made.startswith("req_")


def test_health(server: Server) -> None:
    status, body = server.health()
    assert status == 200
    assert body["compute_type_requested"] == "float16"
    assert {name: body[name] for name in ("status", "model", "device", "compute_type", "load_state")} == {
        "status": "ok",
        "model": "whisper-demo",
        "device": "cpu",
        "compute_type": "int8",
        "load_state": "loaded",
    }
    assert body["queue"] == {"waiting": 0, "running": 0, "limit": 16}
    assert re.search(r"compute_type_replaced .*requested=float16 effective=int8", server.log)


# -- servers with settings of their own


def test_key(serve: Serve, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    server = serve("--api-key-file", str(key), "--language", "en", "--log-level", "debug")
    answer = server.client("sesame").audio.transcriptions.with_raw_response.create(
        file=CLIP, model="whisper-1", extra_headers={"X-Request-ID": "my-id"}
    )
    assert answer.parse().text == TEXT
    assert answer.headers["x-request-id"] == "my-id"
    for wrong in ("Sesame", "sesame2", "x"):
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client(wrong).models.list()
        assert caught.value.code == "invalid_api_key"
    status, headers, body = server.request("GET", "/v1/models")
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert server.health()[0] == 200
    assert server.stop() == 0
    # The log tells what happened, in one line each, and neither what was said nor the key.
    assert re.search(
        r"Z INFO request .*status=200 seconds=\S+ key=default request_id=my-id$", server.log, re.MULTILINE
    )
    assert "volume" not in server.log
    assert "sesame" not in server.log.lower()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\S+Z [A-Z]+ \w+", line) for line in server.lines)


def test_too_large(serve: Serve) -> None:
    server = serve("--max-upload-mib", "1")
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().audio.transcriptions.create(file=("a.wav", b"\0" * 3_000_000), model="whisper-1")
    assert (caught.value.status_code, caught.value.code) == (413, "file_too_large")
    # Refused by its length before a byte of it is sent.
    with server.connect() as connection:
        connection.sendall(f"{HEAD}Content-Length: 99999999999\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    # Without a length: as soon as it is too much, while the rest has not been sent.
    piece = b"x" * 65536
    with server.connect() as connection:
        connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        first = b'--xyz\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
        connection.sendall(b"%x\r\n%s\r\n" % (len(first), first))
        for _ in range(17):
            connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    assert server.client().audio.transcriptions.create(file=CLIP, model="whisper-1").text == TEXT


def test_audio_too_long(serve: Serve) -> None:
    server = serve("--max-audio-minutes", "1")
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\0\0" * 8000 * 61)
    with pytest.raises(openai.BadRequestError, match="longer than this server takes") as caught:
        server.client().audio.transcriptions.create(file=("a.wav", target.getvalue()), model="whisper-1")
    assert caught.value.code == "audio_too_long"


def test_default_language(serve: Serve) -> None:
    client = serve(env={"VOICEGATE_LANGUAGE": "de"}).client()

    def language(given: Any = openai.omit) -> str:
        return client.audio.transcriptions.create(
            file=CLIP, model="whisper-1", response_format="verbose_json", language=given
        ).language

    assert language() == "german"
    assert language("en") == "english"
    assert language("auto") == "english"


def test_english_only_model(serve: Serve) -> None:
    server = serve("--model", str(MODEL_EN))
    assert server.client().audio.transcriptions.create(file=CLIP, model="whisper-demo-en").text == TEXT
    with pytest.raises(openai.BadRequestError, match="knows only English") as caught:
        server.client().audio.transcriptions.create(file=CLIP, model="whisper-demo-en", language="de")
    assert caught.value.param == "language"


@pytest.mark.parametrize("ttl", ["0", "1"])
def test_idle_unload_and_reload(serve: Serve, ttl: str) -> None:
    server = serve("--ttl", ttl)
    for _ in range(2):
        server.wait_health(lambda body: body["load_state"] == "unloaded")
        assert server.health()[0] == 200
        assert server.client().audio.transcriptions.create(file=CLIP, model="whisper-1").text == TEXT
    assert server.log.count(" model_loaded ") == 3


def test_starting(serve: Serve) -> None:
    """While the model loads, /health says 503 and requests wait for it."""
    server = serve(ready=False)
    server.wait_listening()
    answer = server.client().audio.transcriptions.create(file=CLIP, model="whisper-1")
    assert answer.text == TEXT
    statuses = re.findall(r"path=/health status=(\d+)", server.log)
    assert set(statuses) <= {"503"}


class Slow(threading.Thread):
    """A long transcription, streamed; `stop` closes the connection in the middle."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.client = server.client()
        self.times: list[float] = []
        self.first = threading.Event()
        self.leave = threading.Event()
        self.audio = long_audio(40)

    def run(self) -> None:
        stream = self.client.audio.transcriptions.create(
            file=("a.wav", self.audio), model="whisper-1", language="en", stream=True
        )
        with stream:
            for event in stream:
                self.times.append(time.monotonic())
                self.first.set()
                if event.type == "transcript.text.done" or self.leave.is_set():
                    break


def test_busy_server(serve: Serve) -> None:
    """In the middle of a long transcription: health answers at once, the queue is bounded, and a client
    that leaves stops the work between two segments."""
    server = serve("--queue-limit", "0")
    slow = Slow(server)
    slow.start()
    server.wait_health(lambda body: body["queue"]["running"] == 1)

    with pytest.raises(openai.RateLimitError) as caught:
        server.client().audio.transcriptions.create(file=CLIP, model="whisper-1")
    assert caught.value.code == "queue_full"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60

    waits = []
    while not slow.first.is_set():
        started = time.monotonic()
        assert server.health()[0] == 200
        waits.append(time.monotonic() - started)
        time.sleep(0.02)
    assert len(waits) > 5
    assert sorted(waits)[len(waits) // 2] < 0.1, waits
    assert max(waits) < 1, waits

    assert server.health()[1]["queue"]["running"] == 1  # the first segments came before the end
    left = time.monotonic()
    slow.leave.set()
    slow.join(20)
    server.wait_health(lambda body: body["queue"]["running"] == 0)
    assert time.monotonic() - left < 10
    assert not re.search(r"status=200 .*transcriptions", server.log)
    assert server.client().audio.transcriptions.create(file=CLIP, model="whisper-1").text == TEXT
    assert server.stop() == 0
    assert " 499 " in server.log or "status=499" in server.log
    assert "Traceback" not in server.log


def test_waiting_request_of_a_client_that_left_is_dropped(serve: Serve) -> None:
    server = serve("--queue-limit", "4")
    slow = Slow(server)
    slow.start()
    server.wait_health(lambda body: body["queue"]["running"] == 1)
    body = (
        b'--xyz\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
        + CLIP.read_bytes()
        + b"\r\n--xyz--\r\n"
    )
    with server.connect() as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.wait_health(lambda body: body["queue"]["waiting"] == 1)
    server.wait_health(lambda body: body["queue"]["waiting"] == 0)
    assert server.health()[1]["queue"]["running"] == 1
    slow.leave.set()
    slow.join(20)
    server.wait_health(lambda body: body["queue"]["running"] == 0)
    assert "transcribed" not in server.log


def test_ordered_queue_answers_everybody(server: Server) -> None:
    texts: list[str] = []

    def ask() -> None:
        texts.append(server.client().audio.transcriptions.create(file=CLIP, model="whisper-1").text)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert texts == [TEXT] * 6

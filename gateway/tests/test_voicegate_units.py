"""What needs no server: forms of output, names, settings, the queue, the reader of forms."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from voicegate import __version__, audio, errors, formats, languages, logs, models, uploads, wire
from voicegate.engine import Info, Options, Rank, Segment, Word
from voicegate.errors import ApiError, ModelUnavailable, SettingsError
from voicegate.settings import Settings
from voicegate.whisper import effective_compute_type
from voicegate.worker import Job, Worker, stream
from voicegate_support import CLIPS, MODEL, ROOT, form

SEGMENTS = [
    Segment(0.0, 1.5, " Turn on the light.", tokens=(1, 2), words=(Word(0.0, 0.4, " Turn", 0.9),)),
    Segment(3661.0004, 3662.25, " R&D --> a < b\n\nend", tokens=(3,)),
]
INFO = Info("transcribe", "de", 3.2, 2.0)


def test_srt() -> None:
    assert formats.as_srt(SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:01,500\nTurn on the light.\n\n"
        "2\n01:01:01,000 --> 01:01:02,250\nR&D -> a < b end\n\n"
    )
    assert formats.as_srt([]) == ""


def test_vtt() -> None:
    assert formats.as_vtt(SEGMENTS) == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:00:01.500\nTurn on the light.\n\n"
        "01:01:01.000 --> 01:01:02.250\nR&amp;D -> a &lt; b end\n\n"
    )
    assert formats.as_vtt([]) == "WEBVTT\n\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00:00.000"), (59.9996, "00:01:00.000"), (3599.9999, "01:00:00.000"), (360000, "100:00:00.000"),
     (-0.2, "00:00:00.000")],
)  # fmt: skip
def test_timestamp(seconds: float, text: str) -> None:
    assert formats.timestamp(seconds, ".") == text


def test_json_and_text() -> None:
    assert formats.as_json(SEGMENTS[:1], INFO) == {
        "text": "Turn on the light.",
        "usage": {"type": "duration", "seconds": 4},
    }
    assert formats.as_text(SEGMENTS[:1]) == "Turn on the light.\n"
    assert formats.as_json([], INFO)["text"] == ""


def test_verbose_json() -> None:
    body = formats.as_verbose_json(SEGMENTS[:1], INFO, with_words=True)
    assert body["language"] == "german"
    assert body["duration"] == 3.2
    assert body["words"] == [{"word": "Turn", "start": 0.0, "end": 0.4}]
    assert set(body["segments"][0]) == {
        "id", "seek", "start", "end", "text", "tokens", "temperature", "avg_logprob", "compression_ratio",
        "no_speech_prob",
    }  # fmt: skip
    assert "segments" not in formats.as_verbose_json(SEGMENTS, INFO, with_segments=False, with_words=True)
    assert "words" not in formats.as_verbose_json(SEGMENTS, INFO)
    assert formats.as_verbose_json([], Info("translate", "de", 1, 1))["language"] == "english"
    assert formats.as_verbose_json([], Info("transcribe", None, 1, 0))["language"] == ""


def test_server_sent_event_is_one_line() -> None:
    assert formats.sse({"a": "x\ny ü"}) == 'data: {"a":"x\\ny ü"}\n\n'.encode()


@pytest.mark.parametrize(
    ("given", "code"),
    [("de", "de"), ("DE", "de"), ("de-CH", "de"), ("zh_TW", "zh"), ("German", "de"), ("ger", "de"),
     ("haitian creole", "ht"), ("yue", "yue"), ("xx", None), ("klingon", None), ("", None)],
)  # fmt: skip
def test_language_codes(given: str, code: str | None) -> None:
    assert languages.code_of(given) == code


def test_languages_are_those_of_the_engine() -> None:
    from faster_whisper.tokenizer import _LANGUAGE_CODES

    assert set(languages.NAMES) == set(_LANGUAGE_CODES)


def test_model_names_are_those_of_the_engine() -> None:
    from faster_whisper.utils import _MODELS

    for name, repository in _MODELS.items():
        assert models.resolve(name).repository == repository


@pytest.mark.parametrize(
    ("configured", "requested"),
    [
        ("turbo", "large-v3-turbo"),
        ("large-v3-turbo", "turbo"),
        ("large-v3-turbo", "mobiuslabsgmbh/faster-whisper-large-v3-turbo"),
        ("mobiuslabsgmbh/faster-whisper-large-v3-turbo", "Turbo"),
        ("tiny", "openai/whisper-tiny"),
        ("tiny", "whisper-tiny"),
        ("large", "large-v3"),
        ("distil-large-v3", "distil-whisper/distil-large-v3"),
        ("Systran/faster-distil-whisper-large-v3", "distil-large-v3"),
        ("someone/some-whisper", "Someone/some-whisper"),
        ("small", "whisper-1"),
        ("small", ""),
        (str(MODEL), "whisper-demo"),
        (str(MODEL), str(MODEL)),
        (str(MODEL) + "/", str(MODEL)),
    ],
)
def test_model_matches(configured: str, requested: str) -> None:
    assert models.resolve(configured).matches(requested)


@pytest.mark.parametrize(
    ("configured", "requested"),
    [
        ("tiny", "tiny.en"),
        ("tiny", "base"),
        ("tiny", "gpt-4o-transcribe"),
        (str(MODEL), "tiny"),
        ("a/b", "a/c"),
    ],
)
def test_model_does_not_match(configured: str, requested: str) -> None:
    assert not models.resolve(configured).matches(requested)


def test_unknown_model_name() -> None:
    with pytest.raises(ModelUnavailable, match=r"did you mean large-v3\?.*tiny, tiny\.en, base"):
        models.resolve("lage-v3")
    with pytest.raises(ModelUnavailable, match="does not exist"):
        models.resolve("./nowhere")


def test_relative_folder_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert models.resolve("demo/whisper-demo").folder == MODEL


def test_locate_names_what_is_absent(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match=r"has no model\.bin, tokenizer\.json"):
        models.locate(models.resolve(str(tmp_path)))


def test_settings_order(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    environ = {
        "VOICEGATE_PORT": "9",
        "VOICEGATE_TTL": "0",
        "VOICEGATE_VAD": "no",
        "VOICEGATE_API_KEY": "other",
        "VOICEGATE_LANGUAGE": "German",
        "VOICEGATE_DEVICE": "CPU",
    }
    settings = Settings.load({"model": "tiny", "port": "10", "api_key_file": str(key)}, environ)
    assert (settings.port, settings.ttl, settings.vad, settings.api_key) == (10, 0, False, "sesame")
    assert (settings.language, settings.device, settings.queue_limit) == ("de", "cpu", 16)
    assert "sesame" not in repr(settings)
    assert Settings.load({}, {}).model == "large-v3-turbo"
    assert Settings.load({"language": "auto"}, {}).language == ""


def test_settings_name_every_problem() -> None:
    given = {"port": "70000", "compute_type": "float12", "model": "huge", "ttl": "-2", "language": "klingon"}
    with pytest.raises(SettingsError) as caught:
        Settings.load(given, {"VOICEGATE_CPU_THREADS": "many", "VOICEGATE_API_KEY_FILE": "/nowhere/key"})
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 7
    assert "--port: 70000 is more than 65535" in text
    assert "--compute-type: 'float12' is not one of auto, int8," in text
    assert "VOICEGATE_CPU_THREADS: 'many' is not a whole number" in text


def test_version_is_the_package_s() -> None:
    assert f'version = "{__version__}"' in (ROOT / "gateway" / "pyproject.toml").read_text()


def test_lock_names_no_registry() -> None:
    for lock in (ROOT / "gateway").glob("requirements*.lock"):
        text = lock.read_text()
        assert "://" not in text
        assert "--hash=sha256:" in text


@pytest.mark.parametrize(
    ("requested", "device", "supported", "effective"),
    [
        ("float16", "cpu", {"int8", "float32", "int8_float32"}, "int8"),
        ("int8_float16", "cpu", {"int8", "float32"}, "int8"),
        ("float32", "cpu", {"int8", "float32"}, "float32"),
        ("auto", "cpu", {"int8", "float32"}, "int8"),
        ("float16", "cpu", {"float32"}, "float32"),
        ("auto", "cuda", {"int8", "float16", "float32"}, "float16"),
        ("int8_float16", "cuda", {"int8", "int8_float32", "float32"}, "int8_float32"),
        ("bfloat16", "cuda", {"float16", "float32"}, "float16"),
    ],
)
def test_compute_type(requested: str, device: str, supported: set[str], effective: str) -> None:
    assert effective_compute_type(requested, device, supported) == effective


def test_log_lines() -> None:
    record = logging.LogRecord("voicegate", logging.INFO, "", 0, "request", None, None)
    record.fields = {"path": "/a b", "seconds": 0.25, "none": None, "text": "two\nlines"}
    line = logs.LineFormatter().format(record)
    assert line.endswith('Z INFO request path="/a b" seconds=0.250 text="two\\nlines"')


# -- audio


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF",
        b"not audio at all " * 100,
        # A playlist would make a decoder open other files or addresses: never followed.
        f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{CLIPS}/D000.wav\n#EXT-X-ENDLIST\n".encode(),
        f"ffconcat version 1.0\nfile '{CLIPS}/D000.wav'\n".encode(),
    ],
)
def test_no_audio(content: bytes) -> None:
    with pytest.raises(ApiError, match="could not be read as audio") as caught:
        audio.decode(io.BytesIO(content), io.BytesIO())
    assert caught.value.status == 400


def test_too_long_audio() -> None:
    with pytest.raises(ApiError, match="longer than this server takes"):
        audio.decode(io.BytesIO((CLIPS / "D009.wav").read_bytes()), io.BytesIO(), max_seconds=1)


# -- forms


FORM = "multipart/form-data; boundary=xyz"


def content_of(upload: uploads.Upload) -> bytes:
    with os.fdopen(os.dup(upload.descriptor()), "rb") as file:
        return file.read()


async def _read(body: bytes, content_type: str, size: int = 7, limit: int = 1) -> uploads.Form:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    return await uploads.read_form(content_type, "", chunks(), limit_mib=limit)


def test_form_in_small_pieces() -> None:
    body, content_type = form(
        [
            ('name="model"', b"tiny"),
            ('name="timestamp_granularities[]"', b"word"),
            ('name="file"', b"\r\n--xy\0"),
            ('name="timestamp_granularities[]"', b"segment"),
            ('name="prompt"', "Küche".encode()),
        ]
    )
    result = asyncio.run(_read(body, content_type, size=3))
    assert result.get("model") == "tiny"
    assert result.get("prompt") == "Küche"
    assert result.list("timestamp_granularities") == ["word", "segment"]
    assert result.upload is not None
    assert content_of(result.upload) == b"\r\n--xy\0"


def test_large_upload_goes_to_the_disk_without_a_name(tmp_path: Path) -> None:
    async def fill() -> uploads.Upload:
        upload = uploads.Upload(10, str(tmp_path))
        for _ in range(50):
            upload.feed(b"x" * 65536)
            await upload.flush()
        assert len(upload._pending) < uploads.IN_MEMORY
        return upload

    upload = asyncio.run(fill())
    assert upload._file is not None
    assert list(tmp_path.iterdir()) == []
    assert len(content_of(upload)) == 50 * 65536
    upload.close()


@pytest.mark.parametrize(
    ("body", "content_type", "status", "message"),
    [
        (b"{}", "application/json", 400, "multipart/form-data"),
        (b"", "", 400, "multipart/form-data"),
        (b"x", "multipart/form-data", 400, "boundary"),
        (b"garbage", FORM, 400, "cannot be read"),
        (b'--xyz\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc', FORM, 400, "ends before"),
        (form([("x=y", b"a")])[0], FORM, 400, "no name"),
        (form([('name="file"', b"a")] * 2)[0], FORM, 400, "more than one file"),
        (form([('name="prompt"', b"a" * 70000)])[0], FORM, 400, "too long"),
        (form([('name="file"', b"a" * 1048577)])[0], FORM, 413, "larger than"),
    ],
)
def test_bad_forms(body: bytes, content_type: str, status: int, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        asyncio.run(_read(body, content_type, size=65536))
    assert caught.value.status == status


# -- the queue


class Piece:
    """Work of given steps; `run` is awaited at each and may emit."""

    def __init__(self, run: Callable[[], Awaitable[None]], steps: int = 1) -> None:
        self._run = run
        self._left = steps
        self.closed = 0

    async def prepare(self) -> None: ...

    async def step(self) -> bool:
        await self._run()
        self._left -= 1
        return self._left > 0

    def close(self) -> None:
        self.closed += 1


async def _turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_worker_order_limit_and_cancel() -> None:
    async def scenario() -> None:
        worker = Worker(limit=1)
        release = asyncio.Event()
        done: list[str] = []

        def say(word: str) -> Callable[[Job[str]], Piece]:
            def make(job: Job[str]) -> Piece:
                async def run() -> None:
                    if word == "slow":
                        await release.wait()
                    done.append(word)
                    job.emit(word)

                return Piece(run)

            return make

        first = stream(worker, say("slow"))
        pending = asyncio.ensure_future(anext(first))
        await _turns()
        stored = worker.submit(say("stored"), Rank.JOB)
        second = worker.submit(say("second"))
        assert (worker.running, worker.waiting) == (1, 1)
        with pytest.raises(ApiError) as caught:
            worker.submit(say("refused"))
        assert caught.value.status == 429
        assert int(caught.value.headers["Retry-After"]) >= 1
        with pytest.raises(ApiError):
            worker.check_room()
        worker.cancel(second)  # it never runs, and makes room
        await _turns()
        third = worker.submit(say("third"))
        live = worker.submit(say("live"), Rank.LIVE)  # has a limit of its own
        own = worker.submit(say("own"), Rank.SERVER)
        await _turns()
        release.set()
        assert await pending == "slow"
        assert await stored.next() == "stored"
        assert await live.next() == "live"
        assert await third.next() == "third"
        assert await third.next() is None
        assert await own.next() == "own"
        assert done == ["slow", "own", "live", "third", "stored"]
        await worker.close()
        with pytest.raises(ApiError, match="shutting down"):
            worker.submit(say("late"))

    asyncio.run(scenario())


def test_worker_hands_errors_over_and_goes_on() -> None:
    async def scenario() -> None:
        worker = Worker(limit=2)

        def broken(job: Job[int]) -> Piece:
            async def run() -> None:
                job.emit(1)
                raise ValueError("no")

            return Piece(run)

        items = stream(worker, broken)
        assert await anext(items) == 1
        with pytest.raises(ValueError, match="no"):
            await anext(items)

        def whole(job: Job[int]) -> Piece:
            async def run() -> None:
                job.emit(2)

            return Piece(run)

        assert [item async for item in stream(worker, whole)] == [2]
        await worker.close()

    asyncio.run(scenario())


def test_closing_the_stream_ends_the_work_after_its_step() -> None:
    async def scenario() -> None:
        worker = Worker(limit=2)
        pieces: list[Piece] = []

        def endless(job: Job[int]) -> Piece:
            async def run() -> None:
                job.emit(1)
                await asyncio.sleep(0)

            pieces.append(Piece(run, 1 << 60))
            return pieces[-1]

        items = stream(worker, endless)
        assert await anext(items) == 1
        await items.aclose()
        await _turns(10)
        assert pieces[0].closed == 1
        assert (worker.running, worker.waiting) == (0, 0)
        await worker.close()

    asyncio.run(scenario())


def test_cancelled_at_any_moment_nothing_is_left() -> None:
    async def scenario() -> None:
        for moment in range(6):
            worker = Worker(limit=2)
            job: Job[int] = worker.submit(lambda job: Piece(lambda: asyncio.sleep(0), 3))
            await _turns(moment)
            worker.cancel(job)
            assert await asyncio.wait_for(job.next(), 5) is None
            assert (worker.running, worker.waiting) == (0, 0)
            await asyncio.wait_for(worker.close(), 5)

    asyncio.run(scenario())


def test_closing_the_worker_refuses_what_waits() -> None:
    async def scenario() -> None:
        worker = Worker(limit=2)

        def endless(job: Job[int]) -> Piece:
            return Piece(job.cancelled.wait, 2)  # type: ignore[arg-type]

        running, waiting = worker.submit(endless), worker.submit(endless)
        await _turns()
        await asyncio.wait_for(worker.close(), 5)
        assert await running.next() is None
        with pytest.raises(ApiError, match="shutting down"):
            await waiting.next()

    asyncio.run(scenario())


# -- between the server and its engine


def test_what_goes_over_the_wire_comes_back() -> None:
    for segment in SEGMENTS:
        assert wire.segment_from(wire.unpack(wire.pack("segment", segment))["value"]) == segment
    assert wire.info_from(wire.unpack(wire.pack("info", INFO))["value"]) == INFO
    options = Options("translate", "de", "Küche\n", 0.5, words=True)
    assert wire.options_from(wire.unpack(wire.pack("transcribe", options))["value"]) == options
    error = wire.error_from(wire.error_to(errors.queue_full(3, 7)))
    assert (error.body(), error.status, error.headers) == (
        errors.queue_full(3, 7).body(), 429, {"Retry-After": "7"},
    )  # fmt: skip
    settings = Settings.load({"model": "tiny", "port": "9"}, {"VOICEGATE_API_KEY": "sesame"})
    assert b"sesame" not in wire.pack("load", wire.settings_to(settings))
    assert wire.settings_from(wire.settings_to(settings)) == dataclasses.replace(settings, api_key="")

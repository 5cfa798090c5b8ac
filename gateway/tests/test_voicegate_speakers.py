"""Who said what: words merged with turns, and every way to get the turns."""

from __future__ import annotations

import http.server
import io
import itertools
import json
import re
import threading
import time
import urllib.error
import urllib.request
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import loudness_standin
import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.audio import TranscriptionDiarized
from voicegate import diarizer, formats, speakers, wire
from voicegate.engine import Info, Segment, Turn, Word
from voicegate.errors import ApiError
from voicegate_support import CLIPS, MODEL, PYANNOTE_STANDIN, Server, conversation, run

Serve = Callable[..., Server]
UP = CLIPS / "D009.wav"
SAID = [("A", "Turn up the volume."), ("B", "Good morning."), ("A", "Lock the front door.")]
INFO = Info("transcribe", "en", 9.0, 9.0)


# -- merging


def words(*given: tuple[float, float, str]) -> tuple[Word, ...]:
    return tuple(Word(start, end, word, 1.0) for start, end, word in given)


def said(segments: list[Segment], turns: list[Turn]) -> list[tuple[str, str]]:
    return [(item.speaker, item.text) for item in speakers.merge(segments, turns)]


def test_a_segment_is_cut_where_the_speaker_changes() -> None:
    segment = Segment(
        0, 4, " Yes. No, never.", words=words((0, 1, " Yes."), (2, 3, " No,"), (3, 4, " never."))
    )
    [yes, no] = speakers.merge([segment], [Turn(0, 1.5, "x"), Turn(1.9, 4, "y")])
    assert yes == speakers.Utterance(0, 1, "Yes.", "A")
    assert no == speakers.Utterance(2, 4, "No, never.", "B")


def test_words_outside_all_turns_go_to_the_nearest() -> None:
    segment = Segment(0, 9, " a b c", words=words((0, 1, " a"), (4, 4.4, " b"), (8, 9, " c")))
    assert said([segment], [Turn(2, 3, "x"), Turn(6, 7, "y")]) == [("A", "a b"), ("B", "c")]


def test_a_turn_within_a_longer_one_takes_what_it_covers_more_of() -> None:
    segment = Segment(0, 9, " a b", words=words((0, 2, " a"), (4, 6, " b")))
    assert said([segment], [Turn(0, 4.5, "long"), Turn(4, 6, "short")]) == [("A", "a"), ("B", "b")]


def test_without_times_of_words_segments_are_not_cut() -> None:
    segments = [Segment(0, 2, " a b"), Segment(2, 4, " c"), Segment(4, 6, " ")]
    assert said(segments, [Turn(0, 2, "x"), Turn(2, 4, "y")]) == [("A", "a b"), ("B", "c")]


def test_where_nobody_was_found_there_is_one_speaker() -> None:
    assert said([Segment(0, 2, " a"), Segment(2, 4, " b")], []) == [("A", "a b")]
    assert said([], [Turn(0, 1, "x")]) == []


@pytest.mark.parametrize(
    ("text", "given", "cut"),
    [
        (' He said: "Go!" Why?', ["He", "said", "Go", "Why"], [" He", " said:", ' "Go!"', " Why?"]),
        ("開けて。はい。", ["開けて", "はい"], ["開けて。", "はい。"]),
        (" ten men", ["10", "men"], [" ten men"]),
        (" a b", [" a", " b"], [" a", " b"]),
        (" x", [" ", "nothing"], [" x"]),
    ],
)
def test_words_as_engines_write_them(text: str, given: list[str], cut: list[str]) -> None:
    timed = tuple(Word(n, n + 1, word, 1.0) for n, word in enumerate(given))
    assert [piece.text for piece in speakers.pieces(Segment(0, 9, text, words=timed))] == cut


def test_labels() -> None:
    assert [speakers.label(n) for n in (0, 25, 26, 51, 52, 701, 702)] == [
        "A",
        "Z",
        "AA",
        "AZ",
        "BA",
        "ZZ",
        "AAA",
    ]


TIMES = st.integers(0, 40).map(lambda n: n / 4)
SPANS = st.tuples(TIMES, TIMES).map(lambda pair: (min(pair), max(pair)))


@st.composite
def segments_of_words(draw: st.DrawFn) -> list[Segment]:
    segments = []
    for start, end in draw(st.lists(SPANS, max_size=5)):
        found = draw(st.lists(st.tuples(SPANS, st.text("ab.", min_size=1, max_size=3)), max_size=8))
        timed = words(*((*span, text) for span, text in found))
        text = "".join(f" {word.word}" for word in timed) + draw(st.sampled_from(["", " c"]))
        segments.append(Segment(start, end, text, words=timed))
    return segments


SEGMENTS = segments_of_words()
TURNS = st.lists(st.tuples(SPANS, st.sampled_from("xyz")), max_size=12).map(
    lambda found: [Turn(start, end, who) for (start, end), who in found]
)


@given(SEGMENTS, TURNS)
def test_no_word_is_lost_or_moved(segments: list[Segment], turns: list[Turn]) -> None:
    merged = speakers.merge(segments, turns)
    assert " ".join(item.text for item in merged).split() == formats.full_text(segments).split()
    assert all(one.speaker != other.speaker for one, other in itertools.pairwise(merged))
    first_seen = list(dict.fromkeys(item.speaker for item in merged))
    assert first_seen == [speakers.label(n) for n in range(len(first_seen))]
    assert len(first_seen) <= max(1, len({turn.speaker for turn in turns}))


@given(SPANS, st.lists(SPANS, min_size=1, max_size=30))
def test_each_piece_has_a_turn_that_none_overlaps_more(
    span: tuple[float, float], spans: list[tuple[float, float]]
) -> None:
    turns = [Turn(*given, str(number)) for number, given in enumerate(spans)]
    piece = speakers.Piece(*span, "x")
    found = turns[int(speakers.TurnIndex(turns).speaker(piece))]
    assert speakers.overlap(piece, found) == max(speakers.overlap(piece, turn) for turn in turns)


@given(SEGMENTS)
def test_pieces_are_the_whole_text(segments: list[Segment]) -> None:
    for segment in segments:
        assert "".join(piece.text for piece in speakers.pieces(segment)) == segment.text


def test_long_recordings_are_merged_quickly() -> None:
    timed = tuple(Word(n, n + 0.5, f" w{n}", 1.0) for n in range(20_000))
    segment = Segment(0, 20_000, "".join(word.word for word in timed), words=timed)
    turns = [Turn(n, n + 5, str(n % 3)) for n in range(0, 20_000, 5)]
    started = time.monotonic()
    assert len(speakers.merge([segment], turns)) == len(turns)
    assert time.monotonic() - started < 2


def test_turns_are_kept_with_a_result() -> None:
    turns = (Turn(0, 1, "x"),)
    for kept in (None, (), turns):
        value = json.loads(wire.pack("info", Info("transcribe", "en", 1.0, 1.0, kept)))["value"]
        assert wire.info_from(value).turns == kept
    del value["turns"]  # of a job that was stored before there were any
    assert wire.info_from(value).turns is None


# -- the answer


def check(answer: TranscriptionDiarized) -> None:
    assert isinstance(answer, TranscriptionDiarized)
    assert [(item.speaker, item.text) for item in answer.segments] == SAID
    assert answer.text == " ".join(text for _unused, text in SAID)
    assert (answer.task, answer.segments[0].type) == ("transcribe", "transcript.text.segment")
    assert len({item.id for item in answer.segments}) == 3
    first, second, third = answer.segments
    assert 0 <= first.start < first.end < second.start < second.end < third.start < third.end
    assert third.end <= answer.duration == pytest.approx(11.3, abs=0.5)
    assert answer.usage is not None
    assert answer.usage.type == "duration"


def ask(server: Server, audio: bytes | None = None, **more: Any) -> Any:
    options: dict[str, Any] = {"response_format": "diarized_json", "language": "en", **more}
    return server.client().audio.transcriptions.create(
        file=("a.wav", audio or conversation()), model="whisper-1", **options
    )


def refusal(server: Server, audio: bytes | None = None, **more: Any) -> tuple[int, str | None]:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server, audio, **more)
    assert "Traceback" not in server.log
    return caught.value.status_code, caught.value.code


# -- Speaches


class Speaches:
    """Stands in for Speaches: its diarization endpoint, and all else from a real voicegate behind it."""

    def __init__(self, behind: str) -> None:
        self.answer: tuple[int, bytes] | None = None  # in place of turns
        self.asked: list[dict[str, str]] = []
        self.gone = threading.Event()
        self.hangs = False
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._pass_on(None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.path != "/v1/audio/diarization":
                    self._pass_on(body)
                    return
                owner.asked.append({name.lower(): value for name, value in self.headers.items()})
                if owner.hangs:
                    self.connection.settimeout(20)
                    if self.connection.recv(1) == b"":
                        owner.gone.set()
                    return
                self._answer(*(owner.answer or (200, self._turns(body))))

            def _turns(self, body: bytes) -> bytes:
                head, _unused, rest = body.partition(b'name="file"; filename="audio"')
                assert b'name="response_format"\r\n\r\njson\r\n' in head
                with wave.open(io.BytesIO(rest.partition(b"\r\n\r\n")[2])) as file:
                    samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32)
                    found = list(loudness_standin.turns(samples / np.float32(32768), file.getframerate()))
                    duration = file.getnframes() / file.getframerate()
                segments = [{"start": start, "end": end, "speaker": who} for start, end, who in found]
                return json.dumps({"duration": duration, "segments": segments}).encode()

            def _pass_on(self, body: bytes | None) -> None:
                headers = {"content-type": self.headers["content-type"]} if body else {}
                request = urllib.request.Request(behind + self.path, body, headers)  # noqa: S310
                try:
                    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
                        self._answer(response.status, response.read())
                except urllib.error.HTTPError as error:
                    with error:
                        self._answer(error.code, error.read())

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def engine(server: Server) -> Iterator[Speaches]:
    instance = Speaches(server.url)
    yield instance
    instance.close()


@pytest.fixture
def speaches(engine: Speaches) -> Speaches:
    engine.answer, engine.hangs = None, False
    engine.asked.clear()
    return engine


@pytest.fixture(scope="module")
def front(engine: Speaches, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    instance = Server(
        "--model", str(MODEL), "--upstream", engine.url, "--diarization", "upstream",
        "--data-dir", str(tmp_path_factory.mktemp("jobs")),
        env={"VOICEGATE_UPSTREAM_API_KEY": "theirs"},
    )  # fmt: skip
    try:
        instance.wait_ready()
        yield instance
    finally:
        instance.stop()


def test_turns_of_speaches(front: Server, speaches: Speaches) -> None:
    check(ask(front))
    description = json.loads(front.request("GET", "/openapi.json")[2])
    schema = {"$ref": "#/components/schemas/DiarizedTranscription", "components": description["components"]}
    parts = [('name="file"', conversation()), ('name="response_format"', b"diarized_json")]
    jsonschema_rs.validate(schema, json.loads(front.post("/v1/audio/transcriptions", parts)[2]))
    headers = speaches.asked[0]
    assert headers["authorization"] == "Bearer theirs"
    assert headers["x-request-id"].startswith("req_")
    assert "diarized turns=3 speakers=2" in front.log


def test_silence_has_no_speakers_and_is_not_sent_on(front: Server, speaches: Speaches) -> None:
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(b"\0" * 32000)
    answer = ask(front, target.getvalue())
    assert (answer.text, answer.segments, speaches.asked) == ("", [], [])


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (415, {"detail": "Failed to decode audio."}, (400, "diarization_refused")),
        (403, {"detail": "Invalid API key."}, (503, "diarization_key")),
        (404, {"detail": "Model 'x/y' is not installed locally."}, (503, "diarization_model_missing")),
        (404, {"detail": "Not Found"}, (503, "diarization_unsupported")),
        (500, {"detail": "boom"}, (503, "diarization_failed")),
        (200, {"duration": 1}, (502, "diarization_answer")),
        (200, {"segments": [{"start": 3, "end": 2, "speaker": "x"}]}, (502, "diarization_answer")),
    ],
)
def test_failures_of_speaches(
    front: Server, speaches: Speaches, status: int, body: dict[str, Any], expected: tuple[int, str]
) -> None:
    speaches.answer = status, json.dumps(body).encode()
    assert refusal(front) == expected


@pytest.mark.parametrize(
    "body", [b"no JSON", b"[]", b'{"segments": [{"start": NaN, "end": 1, "speaker": "x"}]}']
)
def test_answers_that_are_none(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        diarizer.read_turns(body)
    assert caught.value.code == "diarization_answer"


def test_bad_audio_is_the_transcriptions_to_tell(front: Server, speaches: Speaches) -> None:
    assert refusal(front, b"no audio") == (400, "engine_refused")
    assert speaches.asked == []


def test_a_client_that_leaves_is_told_to_speaches(front: Server, speaches: Speaches) -> None:
    speaches.hangs = True
    with pytest.raises(openai.APITimeoutError):
        front.client().with_options(timeout=3).audio.transcriptions.create(
            file=("a.wav", conversation()), model="whisper-1", response_format="diarized_json", language="en"
        )
    assert speaches.gone.wait(10)
    speaches.hangs = False
    check(ask(front))


def test_what_does_not_go_with_speakers(front: Server, server: Server) -> None:
    assert refusal(front, stream=True) == (400, "invalid_value")
    for extra in (
        {"known_speaker_names[]": "Ann"},
        {"known_speaker_references[]": "data:audio/wav;base64,AA"},
    ):
        assert refusal(front, extra_body=extra) == (400, "known_speakers_unsupported")
    with pytest.raises(openai.BadRequestError, match="Supported values are: 'json'"):
        front.client().audio.translations.create(
            file=UP,
            model="whisper-1",
            response_format="diarized_json",  # type: ignore[call-overload]
        )
    assert refusal(server) == (400, "diarization_unavailable")


def test_jobs(front: Server, speaches: Speaches) -> None:
    audio = ('name="audio"; filename="a.wav"', conversation())
    language, diarized = ('name="language"', b"en"), ('name="response_format"', b"diarized_json")
    plain = finished(front, [audio, language])
    status, _unused, body = front.request("GET", f"/jobs/{plain}/result?format=diarized_json")
    assert (status, json.loads(body)["error"]["code"]) == (400, "not_diarized")
    job = finished(front, [audio, language, diarized, ('name="timestamp_granularities"', b"segment")])
    check(TranscriptionDiarized.model_validate_json(front.request("GET", f"/jobs/{job}/result")[2]))
    text = front.request("GET", f"/jobs/{job}/result?format=txt")[2].decode()
    assert text == "Turn up the volume. Good morning. Lock the front door.\n"
    assert front.post("/jobs", [audio, diarized, ('name="task"', b"translate")])[0] == 400


def test_a_job_waits_for_models_of_speaches(front: Server, speaches: Speaches) -> None:
    speaches.answer = 404, json.dumps({"detail": "Model 'x/y' is not installed locally."}).encode()
    parts = [('name="audio"; filename="a.wav"', conversation()), ('name="language"', b"en"),
             ('name="response_format"', b"diarized_json")]  # fmt: skip
    status, _unused, body = front.post("/jobs", parts)
    assert status == 202
    deadline = time.monotonic() + 15
    while "diarization_model_missing decision=wait" not in front.log:
        assert time.monotonic() < deadline, front.log
        time.sleep(0.05)
    speaches.answer = None
    check(
        TranscriptionDiarized.model_validate_json(
            front.request("GET", f"/jobs/{wait_for(front, json.loads(body)['id'])}/result")[2]
        )
    )


def finished(server: Server, parts: list[tuple[str, bytes]]) -> str:
    status, _unused, body = server.post("/jobs", parts)
    assert status == 202, body
    return wait_for(server, json.loads(body)["id"])


def wait_for(server: Server, id: str) -> str:
    deadline = time.monotonic() + 30
    while (job := json.loads(server.request("GET", f"/jobs/{id}")[2]))["status"] != "done":
        assert job["status"] in ("queued", "running"), job
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)
    return id


# -- pyannote.audio


class Pyannote:
    """Servers with the stand-in for pyannote.audio."""

    def __init__(self, serve: Serve, folder: Path) -> None:
        self._serve = serve
        self.folder = folder
        self.configure()

    def configure(self, **config: Any) -> None:
        (self.folder / "config.yaml").write_text(json.dumps(config))

    def serve(self, *arguments: str) -> Server:
        return self._serve(
            "--diarization", "pyannote", "--diarization-model", str(self.folder), *arguments,
            env=PYANNOTE_STANDIN,
        )  # fmt: skip


@pytest.fixture
def pyannote(serve: Serve, tmp_path: Path) -> Pyannote:
    return Pyannote(serve, tmp_path)


def test_turns_of_pyannote(pyannote: Pyannote) -> None:
    server = pyannote.serve()
    assert "diarizer_started" not in server.log
    for _unused in range(2):
        check(ask(server))
    assert refusal(server, b"no audio") == (400, "invalid_audio")
    [pid] = re.findall(r"diarizer_started pid=(\d+)", server.log)
    assert Path(f"/proc/{pid}").exists()
    server.stop()
    assert not Path(f"/proc/{pid}").exists()


def test_pyannote_goes_when_idle_and_comes_back(pyannote: Pyannote) -> None:
    server = pyannote.serve("--ttl", "0")
    for count in (1, 2):
        check(ask(server))
        deadline = time.monotonic() + 5
        while server.log.count("diarizer_unloaded") < count:
            assert time.monotonic() < deadline, server.log
            time.sleep(0.02)
    assert server.log.count("diarizer_started") == 2


def test_failures_of_pyannote_cost_one_request(pyannote: Pyannote) -> None:
    pyannote.configure(broken="no such weights")
    server = pyannote.serve()
    assert refusal(server) == (503, "diarization_not_loaded")
    assert 'error="ValueError: no such weights"' in server.log
    pyannote.configure(die=True)
    assert refusal(server) == (503, "diarization_down")
    pyannote.configure()
    check(ask(server))


def test_a_client_that_leaves_stops_pyannote(pyannote: Pyannote) -> None:
    pyannote.configure(seconds=60)
    server = pyannote.serve()
    with pytest.raises(openai.APITimeoutError):
        server.client().with_options(timeout=4).audio.transcriptions.create(
            file=("a.wav", conversation()), model="whisper-1", response_format="diarized_json", language="en"
        )
    assert "diarizer_started" in server.log
    pyannote.configure()
    check(ask(server))  # does not wait for the first one


# -- told at the start


def test_what_cannot_work_is_told_at_the_start(tmp_path: Path) -> None:
    cases: tuple[tuple[list[str], dict[str, str], str], ...] = (
        (["--diarization", "upstream"], {}, "--diarization: upstream needs --upstream"),
        (["--diarization", "some"], {}, "--diarization: 'some' is not one of off, upstream, pyannote"),
        (["--diarization", "pyannote"], {}, "pip install 'pyannote-audio>=4,<5'"),
        (
            ["--diarization", "pyannote"],
            PYANNOTE_STANDIN,
            "voicegate fetch --diarization-model pyannote/speaker-diarization",
        ),
        (
            ["--diarization", "pyannote", "--diarization-model", str(tmp_path)],
            PYANNOTE_STANDIN,
            "has no config.yaml",
        ),
        (
            ["--diarization", "pyannote", "--diarization-model", "/none"],
            PYANNOTE_STANDIN,
            "neither a folder here nor",
        ),
    )
    for arguments, env, message in cases:
        env = env | {"HF_HOME": str(tmp_path / "hf")}
        done = run("serve", "--model", str(MODEL), "--port", "0", *arguments, env=env)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr

"""`/ws/transcribe` on a real server: formats, partial texts, cut-off clients, full ones, and silence."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from socket import SHUT_RDWR
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from voicegate import keys, live
from voicegate.ears_wire import FORMATS, Turn
from voicegate.engine import Engine, Info, Options, Rank, Segment, Source
from voicegate.live_sessions import LiveSessions
from voicegate.settings import Settings
from voicegate_support import CLIPS, MODEL_EN, Server, encoded, long_audio, samples_of
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Response
from websockets.sync.client import connect
from websockets.sync.connection import Connection
from websockets.typing import Subprotocol

CLIP = "D011.wav"
TEXT = "Set a timer for eight seconds."
SECOND = np.zeros(16000, np.int16)

Serve = Callable[..., Server]


def said(*names: str) -> NDArray[np.int16]:
    """Clips with a second of silence around each."""
    return np.concatenate([SECOND, *(part for name in names for part in (samples_of(CLIPS / name), SECOND))])


@contextmanager
def open_live(server: Server, query: str = "", **options: Any) -> Iterator[Connection]:
    with connect(f"ws://127.0.0.1:{server.port}/ws/transcribe?{query}", open_timeout=20, **options) as socket:
        yield socket


def refusal(server: Server, query: str = "", **options: Any) -> Response:
    """The answer in place of a connection."""
    with pytest.raises(InvalidStatus) as refused, open_live(server, query, **options):
        pass
    response: Response = refused.value.response
    return response


def send(socket: Connection, samples: NDArray[np.int16], form: str = "pcm16") -> None:
    for piece in encoded(samples, form):
        socket.send(piece)


def messages(socket: Connection, until: str = "") -> Iterator[dict[str, Any]]:
    """What comes, up to a message of the type `until` or the end of the connection."""
    while True:
        try:
            message: dict[str, Any] = json.loads(socket.recv(timeout=20))
        except ConnectionClosed:
            return
        yield message
        if message["type"] == until:
            return


def of(kind: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in found if message["type"] == kind]


def end(socket: Connection) -> list[dict[str, Any]]:
    socket.send(json.dumps({"type": "end"}))
    return list(messages(socket))


def wait_for_no_session(server: Server) -> None:
    deadline = time.monotonic() + 10
    while "voicegate_live_sessions 0.0" not in server.request("GET", "/metrics")[2].decode():
        assert time.monotonic() < deadline, server.log
        time.sleep(0.1)


def hang_up(socket: Connection) -> None:
    """Without a goodbye."""
    socket.socket.shutdown(SHUT_RDWR)


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_said_comes_back(server: Server, form: str) -> None:
    with open_live(server, f"format={form}&language=en&words=true") as socket:
        send(socket, said(CLIP), form)
        found = end(socket)
        assert socket.close_code == 1000
    kinds = [message["type"] for message in found if message["type"] != "partial"]
    assert kinds == ["session", "speech_started", "speech_stopped", "final", "ended"]
    (final,) = of("final", found)
    if not form.startswith("g711"):  # of the telephone's band the little model makes what it can
        assert final["text"] == TEXT
        assert " ".join(word["word"] for word in final["words"]) == TEXT
    assert final["language"] == "en"
    assert 0.9 < final["start"] < 1.3
    assert final["start"] < final["end"] < 3.3
    assert of("ended", found)[0]["seconds"] == pytest.approx(3.92, abs=0.06)
    assert [message["seq"] for message in found if "seq" in message] == [1, 2, 3, 4]


def test_utterances_come_in_order(server: Server) -> None:
    with open_live(server, "language=en&partials=0") as socket:
        send(socket, said("D000.wav", "D026.wav", CLIP))
        found = end(socket)
    assert [message["text"] for message in of("final", found)] == [
        "Turn on the heater.",
        "Good morning.",
        TEXT,
    ]
    assert [message["utterance"] for message in of("final", found)] == [1, 2, 3]
    assert not of("partial", found)


def test_words_come_while_they_are_spoken(server: Server) -> None:
    with open_live(server, "language=en&partials=0.2") as socket:
        audio = said(CLIP)
        for first in range(0, audio.shape[0], 1600):  # as fast as one speaks
            socket.send(audio[first : first + 1600].tobytes())
            time.sleep(0.1)
        found = end(socket)
    partials = of("partial", found)
    assert partials
    assert all(message["utterance"] == 1 for message in partials)
    assert all(TEXT.startswith(message["text"][: message["stable"]].rstrip(".")) for message in partials)
    kinds = [message["type"] for message in found]
    assert kinds.index("partial") > kinds.index("speech_started")
    assert kinds.index("partial") < kinds.index("speech_stopped")
    assert "partial" not in kinds[kinds.index("final") :]
    assert of("final", found)[0]["text"] == TEXT


def test_silence_never_reaches_the_engine(serve: Serve) -> None:
    server = serve()
    hiss = np.random.default_rng(0).normal(0, 200, 20 * 16000).astype(np.int16)
    with open_live(server) as socket:
        send(socket, hiss)
        send(socket, np.zeros(20 * 16000, np.int16))
        found = end(socket)
    assert [message["type"] for message in found] == ["session", "ended"]
    numbers = server.request("GET", "/metrics")[2].decode()
    assert "voicegate_queue_wait_seconds_count 0.0" in numbers
    wait_for_no_session(server)


def test_flush_and_clear(server: Server) -> None:
    audio = samples_of(CLIPS / CLIP)
    with open_live(server, "language=en&partials=0") as socket:
        send(socket, np.concatenate([SECOND, audio]))  # nobody waits for silence
        socket.send(json.dumps({"type": "flush"}))
        found = list(messages(socket, "final"))
        assert of("flushed", found)[0]["utterances"] == 1
        assert of("final", found)[0]["text"] == TEXT
        socket.send(json.dumps({"type": "flush"}))
        assert list(messages(socket, "flushed"))[-1]["utterances"] == 0
        send(socket, np.concatenate([SECOND, audio]))
        list(messages(socket, "speech_started"))
        socket.send(json.dumps({"type": "clear"}))
        found = end(socket)
        assert [message["type"] for message in found] == ["dropped", "ended"]


def test_the_client_may_cut(server: Server) -> None:
    with open_live(server, "language=en&vad=false") as socket:
        send(socket, said("D026.wav"))
        socket.send(json.dumps({"type": "flush"}))
        found = list(messages(socket, "final"))
    assert of("final", found)[0]["text"] == "Good morning."
    assert not of("partial", found)


def test_messages_that_are_none(server: Server) -> None:
    with open_live(server, "language=en&partials=0") as socket:
        for text in ("no json", "[]", '{"type": "dance"}', "5"):
            socket.send(text)
            error = list(messages(socket, "error"))[-1]["error"]
            assert error["code"] == "invalid_message"
        send(socket, said(CLIP))  # and it goes on
        assert of("final", end(socket))[0]["text"] == TEXT


def test_audio_that_is_none(server: Server) -> None:
    with open_live(server, "format=webm") as socket:
        for _piece in range(50):
            socket.send(os.urandom(400))
        found = end(socket)
        assert socket.close_code == 1008
    assert found[-1]["error"]["code"] == "invalid_audio"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("format=mp3", "format"),
        ("rate=5", "rate"),
        ("language=klingon", "language"),
        ("model=gpt-9", "model"),
        ("silence_ms=1", "silence_ms"),
        ("partials=-1", "partials"),
        ("after=x", "after"),
        ("session=nobodys", "session"),
        ("threshold=nan", "threshold"),
    ],
)
def test_what_is_wrong_is_told_before_it_begins(server: Server, query: str, param: str) -> None:
    response = refusal(server, query)
    assert response.status_code in (400, 404)
    assert json.loads(response.body or b"")["error"]["param"] == param
    assert "x-request-id" in response.headers


# -- connections that break


def test_a_client_that_was_cut_off_goes_on(serve: Serve) -> None:
    """Cut anywhere, again and again: each final once, in order, and no audio twice."""
    server = serve("--live-resume-seconds", "20")
    names = ["D000.wav", "D026.wav", CLIP]
    data = said(*names).astype("<i2").tobytes()
    finals: list[str] = []
    session, after, position = "", 0, 0
    for cut in [0.2, 0.5, 0.55, 0.8, 1.0]:
        query = f"session={session}&after={after}" if session else "language=en&partials=0.2"
        with open_live(server, query) as socket:
            hello = json.loads(socket.recv(timeout=10))
            assert hello["resumed"] is bool(session)
            session, position = hello["session"], hello["received"]
            last = int(cut * len(data)) // 2 * 2
            while position < last:
                socket.send(data[position : min(last, position + 6400)])
                position = min(last, position + 6400)
                time.sleep(0.01)
            if cut == 1.0:
                found = end(socket)
            else:
                time.sleep(0.3)
                found = []
                while True:
                    try:
                        found.append(json.loads(socket.recv(timeout=0.01)))
                    except TimeoutError:
                        break
                hang_up(socket)
        after = max([after, *(message["seq"] for message in found if "seq" in message)])
        finals += [message["text"] for message in of("final", found)]
    assert finals == ["Turn on the heater.", "Good morning.", TEXT]
    assert of("ended", found)[0]["seconds"] == pytest.approx(len(data) / 32000, abs=0.01)
    assert refusal(server, f"session={session}").status_code == 404


def test_a_second_connection_takes_over(server: Server) -> None:
    with open_live(server, "language=en&partials=0") as first:
        session = json.loads(first.recv(timeout=10))["session"]
        send(first, said("D026.wav"))
        list(messages(first, "final"))
        with open_live(server, f"session={session}&after=0") as second:
            found = end(second)
            assert of("final", found)[0]["text"] == "Good morning."
        assert list(messages(first)) == []
        assert first.close_code == 1008


def test_who_does_not_come_back_is_given_up(serve: Serve) -> None:
    server = serve("--live-resume-seconds", "1")
    with open_live(server) as socket:
        session = json.loads(socket.recv(timeout=10))["session"]
        hang_up(socket)
    deadline = time.monotonic() + 10
    wait_for_no_session(server)
    response = refusal(server, f"session={session}")
    assert response.status_code == 404
    # And the process that listened went with the last session.
    (pid,) = [int(line.split("pid=")[1].split()[0]) for line in server.lines if "ears_started" in line]
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_too_many_sessions(serve: Serve) -> None:
    server = serve("--live-limit", "2")
    with open_live(server) as one, open_live(server) as two:
        assert json.loads(one.recv())["type"] == json.loads(two.recv())["type"] == "session"
        response = refusal(server)
        assert response.status_code == 429
        assert "Retry-After" in response.headers
        end(one)
        with open_live(server):
            pass


class BusyEngine:
    """A stand-in that works on nothing until it is let."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def transcribe(
        self, source: Source, options: Options, rank: Rank = Rank.LIVE, client: str = ""
    ) -> AsyncGenerator[Info | Segment, None]:
        await self.go.wait()
        yield Info(options.task, "en", 1.0, 1.0)
        yield Segment(0.0, 1.0, " Good morning.")


def test_who_sends_too_much_waits() -> None:
    """Three minutes in a breath: taken as they are worked on, in bounded memory, and all of them."""
    audio = [said("D026.wav").tobytes()] * 80
    engine = BusyEngine()
    found: list[live.Happened] = []

    async def run() -> None:
        sessions = LiveSessions(Settings(), cast(Engine, engine))
        asked = live.Asked(partials=0.0)
        async with sessions.open("", asked, "pcm16", 16000, Turn(), found.append) as session:
            taken = 0

            async def give() -> None:
                nonlocal taken
                for piece in audio:
                    await session.audio(piece)
                    taken += 1
                await session.end()

            giving = asyncio.create_task(give())
            await asyncio.wait({giving}, timeout=5)
            assert not giving.done()
            assert taken < 70
            engine.go.set()
            async with asyncio.timeout(20):
                while not isinstance(found[-1], live.Ended):
                    await asyncio.sleep(0.05)
            await giving
        await sessions.stop()

    asyncio.run(run())
    assert [item.utterance for item in found if isinstance(item, live.Final)] == list(range(1, 81))


# -- what breaks beside it


def test_the_engine_ends_in_the_middle(serve: Serve) -> None:
    """An utterance is heard all the same: its audio is still there."""
    server = serve("--language", "en")
    with open_live(server, "partials=0") as socket:
        json.loads(socket.recv())
        for _time in range(3):
            started = [line for line in server.lines if "engine_started" in line][-1]
            send(socket, said("D026.wav"))
            list(messages(socket, "speech_stopped"))
            os.kill(int(started.split("pid=")[1].split()[0]), signal.SIGKILL)
            assert list(messages(socket, "final"))[-1]["text"] == "Good morning."
            server.wait_ready()


def test_the_ears_end_in_the_middle(serve: Serve) -> None:
    server = serve("--language", "en")
    with open_live(server) as socket:
        json.loads(socket.recv())
        (started,) = [line for line in server.lines if "ears_started" in line]
        os.kill(int(started.split("pid=")[1].split()[0]), signal.SIGKILL)
        found = list(messages(socket))
        assert found[-1]["error"]["code"] == "ears_down"
        assert socket.close_code == 1011
    with open_live(server, "partials=0") as socket:  # the next one has new ones
        send(socket, said("D026.wav"))
        assert of("final", end(socket))[0]["text"] == "Good morning."


def test_somebody_speaks_while_a_long_file_is_worked_on(serve: Serve) -> None:
    server = serve("--language", "en", "--cpu-threads", "1")
    done: list[float] = []

    def ask() -> None:
        answer = server.post("/v1/audio/transcriptions", [('name="file"; filename="a.wav"', long_audio(40))])
        assert answer[0] == 200
        done.append(time.monotonic())

    thread = threading.Thread(target=ask)
    thread.start()
    server.wait_health(lambda body: body["queue"]["running"] == 1)
    with open_live(server, "partials=0") as socket:
        send(socket, said("D026.wav"))
        assert of("final", end(socket))[0]["text"] == "Good morning."
        heard = time.monotonic()
    thread.join(60)
    assert done
    assert heard < done[0]


def test_the_small_model_drafts_and_the_large_one_says(serve: Serve) -> None:
    server = serve("--language", "en", "--live-model", str(MODEL_EN), "--ttl", "4")
    assert sum("model_loaded" in line for line in server.lines) == 2
    with open_live(server, "partials=0.2") as socket:
        audio = said(CLIP)
        for first in range(0, audio.shape[0], 1600):
            socket.send(audio[first : first + 1600].tobytes())
            time.sleep(0.1)
        found = end(socket)
    assert of("partial", found)
    assert of("final", found)[0]["text"] == TEXT
    # Both go with the process.
    server.wait_health(lambda body: body["load_state"] == "unloaded")
    assert sum("engine_started" in line for line in server.lines) == 1


def test_a_small_model_that_is_not_there(serve: Serve) -> None:
    server = serve("--live-model", "tiny", ready=False, env={"HF_HOME": "/nonexistent"})
    assert server.process.wait(20) == 2
    assert "--live-model: model tiny" in server.log


def test_in_front_of_another_server(serve: Serve, server: Server) -> None:
    gateway = serve("--upstream", server.url, "--language", "en")
    with open_live(gateway, "partials=0.2&words=true") as socket:
        send(socket, said(CLIP))
        found = end(socket)
    assert of("final", found)[0]["text"] == TEXT


# -- who may


def test_keys(serve: Serve, tmp_path: Any) -> None:
    key, line = keys.create("phone")
    other, other_line = keys.create("desk")
    (tmp_path / "keys").write_text(f"{line}:concurrent=1\n{other_line}\n")
    server = serve("--api-keys-file", str(tmp_path / "keys"))
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        response = refusal(server, additional_headers=headers)
        assert response.status_code == 401
    offered = [Subprotocol("voicegate"), Subprotocol(f"openai-insecure-api-key.{key}")]
    with open_live(server, subprotocols=offered) as socket:
        assert socket.subprotocol == "voicegate"
        session = json.loads(socket.recv())["session"]
        response = refusal(server, additional_headers={"Authorization": f"Bearer {key}"})  # its limit
        assert response.status_code == 429
        response = refusal(
            server, f"session={session}", additional_headers={"Authorization": f"Bearer {other}"}
        )  # another's session
        assert response.status_code == 404
    assert key not in server.log


def test_pages_of_other_sites(serve: Serve) -> None:
    server = serve("--cors-origins", "https://mine.example")
    response = refusal(server, origin="https://evil.example")
    assert response.status_code == 403
    for origin in ("https://mine.example", f"http://127.0.0.1:{server.port}"):
        with open_live(server, origin=origin) as socket:
            assert json.loads(socket.recv())["type"] == "session"


def test_the_server_ends(serve: Serve) -> None:
    server = serve()
    with open_live(server) as socket:
        json.loads(socket.recv())
        assert server.stop() == 0
        assert list(messages(socket)) == []
        assert socket.close_code == 1012
    assert "Traceback" not in server.log
    assert "Task was destroyed" not in server.log

"""The Wyoming protocol, spoken by its own client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from voicegate.audio_file import wav_header
from voicegate_support import CLIPS, MODEL, Server, clips
from wyoming import asr, audio, error, event, info, ping
from wyoming.client import AsyncTcpClient

Serve = Callable[..., Server]
CLIP = CLIPS / "D009.wav"
TEXT = "Turn up the volume."


@pytest.fixture(scope="module")
def home() -> Iterator[Server]:
    instance = Server("--model", str(MODEL), "--wyoming-port", "0")
    try:
        instance.wait_ready()
        yield instance
    finally:
        instance.stop()


def port_of(server: Server) -> int:
    found = re.search(r" listening_wyoming .*\bport=(\d+)", server.log)
    assert found, server.log
    return int(found[1])


async def talk(server: Server, *said: event.Eventable, until: type[event.Eventable]) -> list[event.Event]:
    """What the server answers, up to and with the first of that kind (or the end)."""
    heard: list[event.Event] = []
    async with asyncio.timeout(20), AsyncTcpClient("127.0.0.1", port_of(server)) as client:
        # A server that has refused hears no more; what it said is still to be read.
        with contextlib.suppress(ConnectionError):
            for one in said:
                await client.write_event(one.event())
        while (received := await client.read_event()) is not None:
            heard.append(received)
            if until.is_type(received.type):
                break
    return heard


def spoken(clip: Path, block: int = 1024) -> list[event.Eventable]:
    """Audio as a satellite sends it."""
    with wave.open(str(clip)) as file:
        rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
        result: list[event.Eventable] = [audio.AudioStart(rate, width, channels)]
        while data := file.readframes(block):
            result.append(audio.AudioChunk(rate, width, channels, data))
    return [*result, audio.AudioStop()]


def hear(server: Server, clip: Path, **asked: Any) -> asr.Transcript:
    heard = asyncio.run(talk(server, asr.Transcribe(**asked), *spoken(clip), until=asr.TranscriptStop))
    kinds = [one.type for one in heard]
    assert kinds[0] == "transcript-start"
    assert kinds[-2:] == ["transcript", "transcript-stop"]
    pieces = "".join(one.data["text"] for one in heard if asr.TranscriptChunk.is_type(one.type))
    transcript = asr.Transcript.from_event(heard[-2])
    assert pieces.strip() == transcript.text
    return transcript


def test_it_says_what_it_can(home: Server) -> None:
    [answer] = asyncio.run(talk(home, info.Describe(), until=info.Info))
    [program] = info.Info.from_event(answer).asr
    assert program.supports_transcript_streaming
    [model] = program.models
    assert model.name == MODEL.name
    assert {"en", "de"} <= set(model.languages)


def test_every_clip_is_heard(home: Server) -> None:
    for clip in clips("D"):
        heard = hear(home, clip.path, language=clip.language)
        assert (heard.text, heard.language) == (clip.text, clip.language), clip.file


def test_language_is_found_where_none_is_named(home: Server) -> None:
    assert hear(home, CLIP, name="whisper-1", transcript_names=["volume"]).language == "en"


def test_several_on_one_connection_and_several_connections(home: Server) -> None:
    async def twice() -> list[event.Event]:
        heard: list[event.Event] = []
        async with asyncio.timeout(20), AsyncTcpClient("127.0.0.1", port_of(home)) as client:
            await client.write_event(ping.Ping("x").event())
            for _ in range(2):
                for one in [asr.Transcribe(language="en"), *spoken(CLIP)]:
                    await client.write_event(one.event())
            while len([one for one in heard if one.type == "transcript-stop"]) < 2:
                received = await client.read_event()
                assert received is not None
                heard.append(received)
        return heard

    async def at_once() -> list[list[event.Event]]:
        return await asyncio.gather(*(twice() for _ in range(5)))

    for heard in asyncio.run(at_once()):
        assert heard[0].type == "pong"
        assert [one.data["text"] for one in heard if one.type == "transcript"] == [TEXT, TEXT]


def test_no_start_of_audio_is_needed(home: Server) -> None:
    _start, *rest = spoken(CLIP)
    heard = asyncio.run(talk(home, asr.Transcribe(language="en"), *rest, until=asr.Transcript))
    assert heard[-1].data["text"] == TEXT


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ([asr.Transcribe(language="klingon"), *spoken(CLIP)], "unsupported_language"),
        ([asr.Transcribe(name="no-such-model"), *spoken(CLIP)], "model_not_found"),
        ([audio.AudioStop()], "invalid_audio"),
        ([audio.AudioStart(1, 2, 1)], "invalid_audio"),
        ([audio.AudioStart(16000, 9, 1)], "invalid_audio"),
    ],
)
def test_what_cannot_be_done_is_said(home: Server, said: list[event.Eventable], code: str) -> None:
    heard = asyncio.run(talk(home, *said, until=error.Error))
    assert error.Error.from_event(heard[-1]).code == code
    assert "Traceback" not in home.log


@pytest.mark.parametrize(
    "raw",
    [
        b"no json\n",
        b"[]\n",
        b'{"type": 5}\n',
        b'{"type": "audio-chunk", "payload_length": 99999999999}\n',
        b'{"type": "audio-chunk", "payload_length": -5}\n',
        b'{"type": "audio-start", "data": {}}\n',
        b'{"type": "ping", "data_length": 3}\nxyz',
        b"x" * 200_000,
    ],
)
def test_nonsense_ends_only_its_own_connection(home: Server, raw: bytes) -> None:
    answer = b""
    # A server that hangs up before it has read everything resets the connection.
    with (
        socket.create_connection(("127.0.0.1", port_of(home)), timeout=10) as connection,
        contextlib.suppress(OSError),
    ):
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    if answer:
        assert json.loads(answer.splitlines()[0])["type"] == "error"
    assert "Traceback" not in home.log
    assert hear(home, CLIP, language="en").text == TEXT


def test_too_much_audio(serve: Serve) -> None:
    server = serve("--wyoming-port", "0", "--max-upload-mib", "1")
    second = audio.AudioChunk(16000, 2, 1, bytes(32000))
    heard = asyncio.run(talk(server, *[second] * 40, until=error.Error))
    assert heard[-1].data["code"] == "file_too_large"


def test_a_port_that_is_taken(serve: Serve, home: Server) -> None:
    server = serve("--wyoming-port", str(port_of(home)), ready=False)
    assert server.process.wait(20) == 1
    assert "cannot_listen" in server.log
    assert "Traceback" not in server.log


def test_it_is_off_if_not_asked_for(server: Server) -> None:
    assert "listening_wyoming" not in server.log


def test_the_header_is_a_wav_files(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(wav_header(22050, 2, 2, 400) + bytes(400))
    with wave.open(str(path)) as file:
        assert file.getparams()[:4] == (2, 2, 22050, 100)

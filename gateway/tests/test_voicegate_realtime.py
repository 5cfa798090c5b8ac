"""`/v1/realtime` with the official client, and what it is told when it asks for what is not there."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from openai.resources.realtime.realtime import RealtimeConnection
from voicegate import models
from voicegate.errors import ApiError
from voicegate.realtime_api import Config, configured
from voicegate.settings import Settings
from voicegate_support import CLIPS, MODEL, Server, encoded, samples_of
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

CLIP = CLIPS / "D011.wav"
TEXT = "Set a timer for eight seconds."
DONE = "conversation.item.input_audio_transcription.completed"


def said(rate: int = 24000) -> NDArray[np.int16]:
    silence = np.zeros(rate, np.int16)
    return np.concatenate([silence, samples_of(CLIP, rate), silence])


def append(connection: RealtimeConnection, samples: NDArray[np.int16]) -> None:
    data = samples.astype("<i2").tobytes()
    for first in range(0, len(data), 4800):
        piece = base64.b64encode(data[first : first + 4800]).decode()
        connection.input_audio_buffer.append(audio=piece)


def events(connection: RealtimeConnection, until: str) -> list[Any]:
    found = []
    for event in connection:
        found.append(event)
        if event.type == until:
            return found
    raise AssertionError(f"the connection ended before {until}: {[event.type for event in found]}")


def ask(connection: RealtimeConnection, **audio_input: Any) -> None:
    session: Any = {"type": "transcription", "audio": {"input": audio_input}}
    connection.session.update(session=session)


def update(connection: RealtimeConnection, **audio_input: Any) -> Any:
    ask(connection, **audio_input)
    return events(connection, "session.updated")[-1].session


@pytest.fixture
def connection(client: openai.OpenAI) -> Iterator[RealtimeConnection]:
    with client.realtime.connect(model="whisper-1", extra_query={"intent": "transcription"}) as made:
        yield made


def test_the_server_finds_the_turns(connection: RealtimeConnection) -> None:
    created = events(connection, "session.created")[-1].session
    assert created.type == "transcription"
    assert created.audio.input.format.rate == 24000
    session = update(
        connection,
        transcription={"model": "whisper-1", "language": "en", "prompt": "Timers."},
        turn_detection={"type": "server_vad", "silence_duration_ms": 400},
    )
    assert session.audio.input.turn_detection.silence_duration_ms == 400
    assert session.audio.input.transcription.language == "en"
    append(connection, said())
    found = events(connection, DONE)
    kinds = [event.type for event in found]
    deltas = "conversation.item.input_audio_transcription.delta"
    assert [kind for kind in kinds if kind != deltas] == [
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
        DONE,
    ]
    assert found[-1].transcript == TEXT
    assert found[-1].usage.type == "duration"
    assert "".join(event.delta for event in found if event.type == deltas) == TEXT
    assert 900 <= found[0].audio_start_ms <= 1300
    stopped = next(event for event in found if event.type == "input_audio_buffer.speech_stopped")
    assert 2400 <= stopped.audio_end_ms <= 3200
    items = {getattr(event, "item_id", None) or event.item.id for event in found}
    assert len(items) == 1
    # The next item follows this one.
    append(connection, said())
    committed = [event for event in events(connection, DONE) if event.type == "input_audio_buffer.committed"]
    assert committed[0].previous_item_id in items


def test_the_client_commits(connection: RealtimeConnection) -> None:
    update(connection, transcription={"model": "whisper-1", "language": "en"}, turn_detection=None)
    append(connection, said())
    connection.input_audio_buffer.commit()
    found = events(connection, DONE)
    assert found[-1].transcript == TEXT
    assert not [event for event in found if "speech" in event.type]
    connection.input_audio_buffer.commit()
    error = events(connection, "error")[-1].error
    assert error.code == "input_audio_buffer_commit_empty"
    append(connection, said())
    connection.input_audio_buffer.clear()
    events(connection, "input_audio_buffer.cleared")
    connection.input_audio_buffer.commit()
    assert events(connection, "error")[-1].error.code == "input_audio_buffer_commit_empty"


@pytest.mark.parametrize(
    ("kind", "form", "rate"), [("audio/pcm", "pcm16", 16000), ("audio/pcmu", "g711_ulaw", 8000)]
)
def test_other_formats(connection: RealtimeConnection, kind: str, form: str, rate: int) -> None:
    described = {"type": kind} | ({"rate": rate} if kind == "audio/pcm" else {})
    session = update(
        connection,
        format=described,
        transcription={"model": "whisper-1", "language": "en"},
        turn_detection=None,
    )
    assert session.audio.input.format.type == kind
    for piece in encoded(said(16000), form):
        connection.input_audio_buffer.append(audio=base64.b64encode(piece).decode())
    connection.input_audio_buffer.commit()
    transcript = events(connection, DONE)[-1].transcript
    assert transcript == TEXT if form == "pcm16" else transcript
    connection.session.update(
        session={
            "type": "transcription",
            "audio": {"input": {"format": {"type": "audio/pcm", "rate": 24000}}},
        }
    )
    assert events(connection, "error")[-1].error.code == "cannot_update_format"


def test_the_beta_interface(server: Server) -> None:
    with connect(
        f"ws://127.0.0.1:{server.port}/v1/realtime?intent=transcription",
        additional_headers={"OpenAI-Beta": "realtime=v1"},
    ) as socket:
        assert json.loads(socket.recv())["type"] == "transcription_session.created"
        asked = {
            "input_audio_format": "pcm16",
            "input_audio_transcription": {"model": "whisper-1", "language": "en"},
            "turn_detection": {"type": "server_vad", "threshold": 0.6},
        }
        socket.send(json.dumps({"type": "transcription_session.update", "session": asked}))
        updated = json.loads(socket.recv())
        assert updated["type"] == "transcription_session.updated"
        assert updated["session"]["turn_detection"]["threshold"] == 0.6
        audio = base64.b64encode(said().astype("<i2").tobytes()).decode()
        socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
        kinds: list[str] = []
        while not kinds or kinds[-1] != DONE:
            message = json.loads(socket.recv(timeout=20))
            kinds.append(message["type"])
        assert "conversation.item.created" in kinds
        assert message["transcript"] == TEXT


def test_what_is_no_event(connection: RealtimeConnection) -> None:
    events(connection, "session.created")
    for message, code in (
        ("no json", "invalid_json"),
        ("[1]", "invalid_type"),
        ('{"type": "response.create", "event_id": "mine"}', "invalid_value"),
        ('{"type": "input_audio_buffer.append", "audio": "%"}', "invalid_value"),
        ('{"type": "input_audio_buffer.append", "audio": 5}', "invalid_value"),
        ('{"type": "session.update", "session": {"type": "realtime"}}', "invalid_value"),
        ('{"type": "session.update", "session": []}', "invalid_type"),
    ):
        connection._connection.send(message)
        error = events(connection, "error")[-1].error
        assert error.code == code, message
        assert error.event_id == ("mine" if "mine" in message else None)


@pytest.mark.parametrize(
    ("session", "code"),
    [
        ({"audio": {"input": {"format": {"type": "audio/mp3"}}}}, "invalid_value"),
        ({"audio": {"input": {"format": {"type": "audio/pcm", "rate": 7}}}}, "invalid_value"),
        ({"audio": {"input": {"transcription": {"model": "gpt-4o-transcribe"}}}}, "model_not_found"),
        ({"audio": {"input": {"transcription": {"language": "xx"}}}}, "unsupported_language"),
        ({"audio": {"input": {"turn_detection": {"type": "magic"}}}}, "invalid_value"),
        ({"audio": {"input": {"turn_detection": {"threshold": 7}}}}, "invalid_value"),
        ({"audio": {"input": {"turn_detection": {"silence_duration_ms": True}}}}, "invalid_value"),
        ({"audio": {"input": {"turn_detection": {"type": "semantic_vad", "eagerness": 1}}}}, "invalid_value"),
        ({"audio": 5}, "invalid_type"),
        ({"input_audio_format": "mp3"}, "invalid_value"),
    ],
)
def test_settings_that_cannot_be(session: dict[str, Any], code: str) -> None:
    before = Config()
    with pytest.raises(ApiError) as refused:
        configured(before, session, models.resolve(str(MODEL)), Settings())
    assert refused.value.code == code


def test_semantic_turns_are_pauses_here() -> None:
    asked = {"audio": {"input": {"turn_detection": {"type": "semantic_vad", "eagerness": "low"}}}}
    config = configured(Config(), asked, models.resolve(str(MODEL)), Settings())
    assert config.turn is not None
    assert config.turn.silence == 1500
    described = config.described(beta=False)["audio"]["input"]
    assert described["turn_detection"] == {"type": "semantic_vad", "eagerness": "low"}


def test_a_model_that_is_not_there(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(InvalidStatus) as refused:
        client.realtime.connect(model="gpt-9").enter()
    assert refused.value.response.status_code == 404
    assert json.loads(refused.value.response.body or b"")["error"]["code"] == "model_not_found"


def test_the_key_and_the_end(serve: Callable[..., Server]) -> None:
    server = serve(env={"VOICEGATE_API_KEY": "sesame"})
    with pytest.raises(InvalidStatus) as refused:
        server.client("wrong").realtime.connect(model="whisper-1").enter()
    assert refused.value.response.status_code == 401
    with server.client("sesame").realtime.connect(model="whisper-1") as connection:
        events(connection, "session.created")
        assert server.stop() == 0
        with pytest.raises(ConnectionClosed):
            connection.recv()
    assert "Traceback" not in server.log

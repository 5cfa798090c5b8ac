"""Metrics, keys, limits of decoding, and the built-in page in a real browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import time
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import browser
import numpy as np
import openai
import pytest
from selenium.webdriver.common.by import By
from voicegate import audio, cli, keys
from voicegate.errors import ApiError
from voicegate_support import CLIPS, Server, long_audio, samples_of

CLIP = CLIPS / "D009.wav"
TEXT = "Turn up the volume."
Serve = Callable[..., Server]


def test_metrics_count_what_happened(serve: Serve) -> None:
    server = serve()
    server.client().audio.transcriptions.create(file=CLIP, model="whisper-1")
    server.post("/v1/audio/transcriptions", [('name="file"', b"no audio")])
    text = server.request("GET", "/metrics")[2].decode()
    route = 'method="POST",route="/v1/audio/transcriptions"'
    assert f'voicegate_requests_total{{{route},status="200"}} 1.0' in text
    assert f'voicegate_requests_total{{{route},status="400"}} 1.0' in text
    assert 'voicegate_errors_total{code="invalid_audio"} 1.0' in text
    assert 'voicegate_engine_events_total{event="start"} 1.0' in text
    for name in ("queue_wait_seconds", "transcription_seconds", "real_time_factor"):
        assert f"voicegate_{name}_count 1.0" in text
    assert "voicegate_audio_seconds_total 1.4" in text
    assert "voicegate_queue_waiting 0.0" in text


def test_keys_of_a_file_have_names_and_limits(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in ("one", "two")]
    file.write_text(f"# ours\nalice:{digests[0]}:per_minute=1\nbob:{digests[1]}\n")
    server = serve("--api-keys-file", str(file), "--log-format", "json")

    def ask(key: str) -> Any:
        return server.client(key).audio.transcriptions.create(file=CLIP, model="whisper-1")

    assert ask("one").text == ask("two").text == ask("two").text == TEXT
    with pytest.raises(openai.RateLimitError) as caught:
        ask("one")
    assert caught.value.code == "key_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    with pytest.raises(openai.AuthenticationError):
        ask("three")
    for path in ("/", "/docs", "/ready", "/health", "/openapi.json"):
        assert server.request("GET", path)[0] == 200
    for path in ("/metrics", "/status", "/v1/models"):
        assert server.request("GET", path)[0] == 401
    metrics = server.request("GET", "/metrics", headers={"Authorization": "Bearer two"})[2].decode()
    assert 'voicegate_key_requests_total{key="alice"} 2.0' in metrics
    lines = [json.loads(line) for line in server.lines]
    assert {line.get("key") for line in lines if line["event"] == "request"} >= {"alice", "bob"}
    assert TEXT not in server.log


def test_bad_lines_of_keys_are_named() -> None:
    with pytest.raises(ValueError, match=r"line 1: .*64 hex digits.*line 2: 'speed=3' is no limit"):
        keys.parse(f"alice:abc\nbob:{'0' * 64}:speed=3")


def test_concurrent_requests_of_a_key() -> None:
    key = keys.Key("alice", "0" * 64, concurrent=1)
    known = keys.Keys((key,))
    with known.work(key), pytest.raises(ApiError, match="1 requests at the same time"), known.work(key):
        pass
    with known.work(key):
        pass


def test_new_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["key", "alice"]) == 0
    key, line = (text.rpartition(" ")[2] for text in capsys.readouterr().out.splitlines())
    found = keys.Keys(keys.parse(line)).find(f"Bearer {key}".encode())
    assert found is not None
    assert found.name == "alice"
    assert key not in line


def test_cors_and_text_in_the_log_only_where_set(server: Server, serve: Serve) -> None:
    origin = {"Origin": "https://a.example"}
    assert "access-control-allow-origin" not in server.request("GET", "/health", headers=origin)[1]
    other = serve("--cors-origins", "https://a.example", "--log-text")
    assert (
        other.request("GET", "/health", headers=origin)[1]["access-control-allow-origin"] == origin["Origin"]
    )
    other.client().audio.transcriptions.create(file=CLIP, model="whisper-1")
    assert TEXT in other.log


def test_hotwords_and_what_openai_s_client_may_send(client: openai.OpenAI) -> None:
    answer = client.audio.transcriptions.create(
        file=CLIP, model="whisper-1", include=["logprobs"], chunking_strategy="auto",
        extra_body={"hotwords": "volume", "unknown": "field"},
    )  # fmt: skip
    assert answer.text == TEXT


def test_speakers_need_somebody_who_tells_them_apart(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(file=CLIP, model="whisper-1", response_format="diarized_json")
    assert caught.value.code == "diarization_unavailable"


def test_text_comes_while_the_file_is_decoded(server: Server, client: openai.OpenAI) -> None:
    events = client.audio.transcriptions.create(
        file=("long.wav", long_audio(20)), model="whisper-1", language="en", stream=True
    )
    first = next(iter(events))
    assert first.type == "transcript.text.delta"
    assert server.health()[1]["queue"]["running"] == 1
    rest = list(events)
    assert rest[-1].type == "transcript.text.done"
    deltas = [event.delta for event in (first, *rest) if event.type == "transcript.text.delta"]
    assert len(deltas) > 1
    assert rest[-1].text == "".join(deltas)


def silence(hours: float) -> bytes:
    """Hours of silence in a few MiB."""
    target = io.BytesIO()
    with av.open(target, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=8000, layout="mono")
        block = np.zeros((1, 8000 * 600), np.int16)
        for _ in range(round(hours * 6)):
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()


def test_a_bomb_harms_its_own_request_only(serve: Serve) -> None:
    server = serve("--max-audio-minutes", "5")
    bomb = silence(5)
    assert len(bomb) < 4 * 1024 * 1024
    create = server.client().audio.transcriptions.create
    started = time.monotonic()
    with pytest.raises(openai.BadRequestError) as caught:
        create(file=("bomb.flac", bomb), model="whisper-1")
    assert caught.value.code == "audio_too_long"
    assert time.monotonic() - started < 10
    assert create(file=CLIP, model="whisper-1").text == TEXT
    assert sum("engine_started" in line for line in server.lines) == 1


def test_decoding_ends_in_time() -> None:
    with pytest.raises(ApiError) as caught:
        audio.decode(io.BytesIO(CLIP.read_bytes()), io.BytesIO(), timeout=0)
    assert caught.value.code == "decode_timeout"


@pytest.mark.parametrize(("place", "value"), [(24, 2**31 - 1), (24, 1), (22, 1000)])
def test_absurd_shapes_are_refused(place: int, value: int) -> None:
    content = bytearray(CLIP.read_bytes())
    size = 4 if place == 24 else 2  # of a WAV header: rate, channels
    content[place : place + size] = value.to_bytes(size, "little")
    with pytest.raises(ApiError) as caught:
        audio.decode(io.BytesIO(bytes(content)), io.BytesIO())
    assert caught.value.code == "invalid_audio"


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
def test_page(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret")
    server = serve("--api-key-file", str(file))
    with browser.chromium(width=1000) as driver:
        driver.get(server.url)
        driver.find_element(By.ID, "file").send_keys(str(CLIP))

        def wait(good: Callable[[], Any]) -> None:
            deadline = time.monotonic() + 15
            while not good():
                said = driver.find_element(By.ID, "say").text
                assert time.monotonic() < deadline, (said, driver.get_log("browser"))  # type: ignore[no-untyped-call]
                time.sleep(0.05)

        wait(driver.find_element(By.ID, "key-form").is_displayed)
        driver.find_element(By.ID, "key").send_keys("secret\n")
        wait(lambda: driver.find_element(By.ID, "say").text == "Done.")
        assert driver.find_element(By.ID, "text").text == TEXT
        assert driver.execute_script("return sessionStorage.getItem('key')") == "secret"
        driver.execute_script("document.querySelectorAll('#text span')[1].click()")
        wait(lambda: driver.find_elements(By.CSS_SELECTOR, "#text .lit"))
        assert driver.find_element(By.ID, "take").is_displayed()
        driver.get(server.url + "/docs")
        wait_docs = time.monotonic() + 10
        while "POST /v1/audio/transcriptions" not in driver.page_source:
            assert time.monotonic() < wait_docs
            time.sleep(0.05)


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
def test_page_hears_a_microphone_and_takes_what_is_dropped(serve: Serve, tmp_path: Path) -> None:
    """The browser's own stand-in for a microphone plays a clip; its words are there before it has ended."""
    file = tmp_path / "key"
    file.write_text("secret")
    server = serve("--api-key-file", str(file), "--language", "en")
    silence = np.zeros(48000, np.int16)
    microphone = tmp_path / "microphone.wav"
    with wave.open(str(microphone), "wb") as spoken:
        spoken.setparams((1, 2, 48000, 0, "NONE", ""))
        parts = [silence, samples_of(CLIPS / "D011.wav", 48000), silence, silence]
        spoken.writeframes(np.concatenate(parts).astype("<i2").tobytes())
    flags = (
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
    )
    with browser.chromium(1000, 1000, *flags) as driver:

        def wait(good: Callable[[], Any]) -> None:
            deadline = time.monotonic() + 20
            while not good():
                said = driver.find_element(By.ID, "say").text
                assert time.monotonic() < deadline, (said, driver.get_log("browser"))  # type: ignore[no-untyped-call]
                time.sleep(0.05)

        driver.get(server.url)
        driver.execute_script("sessionStorage.setItem('key', 'secret')")
        record = driver.find_element(By.ID, "record")
        record.click()
        live = driver.find_element(By.ID, "live")
        # It is played again and again: some words are grey first, and all are there while it goes on.
        wait(lambda: live.is_displayed() and "eight seconds." in driver.find_element(By.ID, "sure").text)
        assert record.get_attribute("aria-pressed") == "true"
        record.click()
        wait(lambda: driver.find_element(By.ID, "say").text == "Done.")
        assert not live.is_displayed()
        assert "for eight seconds" in driver.find_element(By.ID, "text").text

        content = base64.b64encode(CLIP.read_bytes()).decode()
        driver.execute_script(
            "const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));"
            "const data = new DataTransfer(); data.items.add(new File([bytes], 'dropped.wav'));"
            "for (const kind of ['dragover', 'drop'])"
            "  document.getElementById('drop').dispatchEvent("
            "    new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));",
            content,
        )
        wait(lambda: driver.find_element(By.ID, "name").text == "dropped.wav")
        wait(lambda: driver.find_element(By.ID, "say").text == "Done.")
        assert driver.find_element(By.ID, "text").text == TEXT
        assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]  # type: ignore[no-untyped-call]
    assert "secret" not in server.log

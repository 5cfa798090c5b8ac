"""The engine's process: it may end at any time, and the server goes on."""

from __future__ import annotations

import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from voicegate_support import CLIPS, MODEL, Server, long_audio

CLIP = CLIPS / "D009.wav"
TEXT = "Turn up the volume."

Serve = Callable[..., Server]


def engines(server: Server) -> list[int]:
    """Process ids of the engines that were started, the present one last."""
    return [int(pid) for pid in re.findall(r" engine_started pid=(\d+)", server.log)]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def say(server: Server, audio: bytes | Path = CLIP) -> str:
    file = audio if isinstance(audio, Path) else ("a.wav", audio)
    return server.client().audio.transcriptions.create(file=file, model="whisper-1", language="en").text


def test_killed_in_the_middle_of_a_request(serve: Serve) -> None:
    server = serve()
    [first] = engines(server)
    failures: list[openai.APIError] = []
    begun = threading.Event()

    def ask() -> None:
        try:
            with server.client().audio.transcriptions.create(
                file=("a.wav", long_audio(40)), model="whisper-1", language="en", stream=True
            ) as events:
                for _ in events:
                    begun.set()
        except openai.APIError as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert begun.wait(20)
    os.kill(first, signal.SIGKILL)
    # Whoever waited behind it, and whoever comes at once, is served by the next process.
    assert say(server) == TEXT
    asking.join(20)
    [failure] = failures
    assert (failure.code, failure.type) == ("engine_down", "server_error")
    assert not alive(first)
    assert len(engines(server)) == 2
    assert re.search(rf" engine_ended pid={first} how=\"was ended by signal 9\"", server.log)
    assert "Traceback" not in server.log


def test_killed_before_the_first_step_the_request_is_handed_on(serve: Serve) -> None:
    """Whatever was only prepared, or waited prepared, is answered by the next process."""
    server = serve()
    [first] = engines(server)
    os.kill(first, signal.SIGSTOP)  # it takes the requests and computes nothing
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(say(server))) for _ in range(3)]
    for thread in threads:
        thread.start()
    server.wait_health(lambda body: body["queue"]["running"] + body["queue"]["waiting"] == 3)
    os.kill(first, signal.SIGKILL)
    for thread in threads:
        thread.join(20)
    assert texts == [TEXT] * 3
    assert "Traceback" not in server.log


def test_killed_while_idle_it_comes_back_by_itself(serve: Serve) -> None:
    server = serve()
    for _ in range(2):
        os.kill(engines(server)[-1], signal.SIGKILL)
        before = len(engines(server))
        wait_until(lambda: len(engines(server)) > before)  # noqa: B023
        server.wait_health(lambda body: body["load_state"] == "loaded")
    assert say(server) == TEXT


def test_unloading_ends_the_process(serve: Serve) -> None:
    server = serve("--ttl", "0")
    server.wait_health(lambda body: body["load_state"] == "unloaded")
    [first] = engines(server)
    assert not alive(first)
    assert say(server) == TEXT
    assert len(engines(server)) == 2


def test_out_of_memory_is_told_and_all_of_it_returned(serve: Serve) -> None:
    """The kernel refuses the engine memory, as a GPU would: an error of its own, and a fresh process."""
    server = serve()
    [first] = engines(server)
    pages = int(Path(f"/proc/{first}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 64 * 1024 * 1024
    resource.prlimit(first, resource.RLIMIT_AS, (limit, limit))
    with pytest.raises(openai.InternalServerError) as caught:
        say(server, long_audio(400))
    assert (caught.value.status_code, caught.value.code) == (503, "out_of_memory")
    assert not alive(first)
    assert say(server) == TEXT


def test_it_ends_with_the_server(serve: Serve) -> None:
    for number, seconds in ((signal.SIGKILL, 10), (signal.SIGTERM, 10)):
        server = serve()
        [engine] = engines(server)
        server.process.send_signal(number)
        server.process.wait(seconds)
        wait_until(lambda: not alive(engine))  # noqa: B023


def test_ends_at_once_while_it_loads(serve: Serve) -> None:
    server = serve(ready=False)
    server.wait_listening()
    wait_until(lambda: bool(engines(server)))
    assert server.stop() == 0
    assert "Traceback" not in server.log


def test_model_that_went_away(serve: Serve, tmp_path: Path) -> None:
    """A model that can no longer be loaded is told, and needs no restart once it is back."""
    folder = tmp_path / "model"
    folder.mkdir()
    for item in MODEL.iterdir():
        (folder / item.name).symlink_to(item)
    server = serve("--model", str(folder), "--ttl", "0")
    server.wait_health(lambda body: body["load_state"] == "unloaded")
    folder.rename(tmp_path / "away")
    with pytest.raises(openai.InternalServerError) as caught:
        say(server)
    assert (caught.value.status_code, caught.value.code) == (503, "model_load_failed")
    assert server.health()[0] == 503
    (tmp_path / "away").rename(folder)
    assert say(server) == TEXT

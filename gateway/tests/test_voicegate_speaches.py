"""Peace on the card with a Speaches behind: it loads and lets go as voicegate says, and no request is lost.

Stand-ins: the card (tests/support/nvml), the memory of Ollama and of Speaches (`standins`); a voicegate with
the demo model does the hearing for the latter.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from standins import OllamaStandIn, SpeachesStandIn
from voicegate.idle import Idle
from voicegate.peace import Peace
from voicegate.settings import Settings
from voicegate.speaches import SpeachesTenant
from voicegate_support import CLIPS, Server

Serve = Callable[..., Server]
Shared = Callable[..., Server]
CLIP, TEXT = CLIPS / "D009.wav", "Turn up the volume."
NEED, KEPT = SpeachesStandIn.NEED, SpeachesStandIn.KEPT
MODEL = SpeachesStandIn.MODEL


@pytest.fixture
def speaches(ollama: OllamaStandIn, server: Server) -> Iterator[SpeachesStandIn]:
    stand_in = SpeachesStandIn(ollama, server.url)
    yield stand_in
    stand_in.close()


@pytest.fixture
def shared(serve: Serve, library: Path, ollama: OllamaStandIn, speaches: SpeachesStandIn) -> Shared:
    def start(policy: str, *arguments: str) -> Server:
        return serve(
            "--device", "auto", "--vram-policy", policy, "--vram-need-mib", str(NEED),
            "--vram-kept-mib", str(KEPT), "--vram-wait", "2", "--ollama-url", ollama.url,
            "--upstream", speaches.url, "--upstream-model", MODEL, *arguments,
            env={"LD_LIBRARY_PATH": str(library), "SOTTOVOCE_NVML_STANDIN": str(ollama.cards)},
        )  # fmt: skip

    return start


def say(server: Server, model: str = "whisper-1", **options: Any) -> str:
    client = server.client().with_options(**options)
    return client.audio.transcriptions.create(file=CLIP, model=model, language="en").text


def until(good: Callable[[], bool], server: Server, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < deadline, server.log
        time.sleep(0.02)


def decisions(server: Server) -> list[dict[str, str]]:
    """The lines `vram step=…` of the log."""
    lines = [line.partition(" vram ")[2] for line in server.lines if " vram step=" in line]
    return [dict(part.split("=", 1) for part in line.split()) for line in lines]


def test_exclusive_loads_when_the_others_have_gone_and_goes_when_idle(
    shared: Shared, ollama: OllamaStandIn, speaches: SpeachesStandIn
) -> None:
    ollama.load("llm", 11_000)
    server = shared("exclusive")
    server.wait_health(lambda body: body["load_state"] == "unloaded")
    assert speaches.log == []
    assert say(server) == TEXT
    until(lambda: speaches.log == [f"load {MODEL}", f"unload {MODEL}"], server)
    assert ollama.log == ["load llm", "unload llm"]
    assert speaches.vram == KEPT
    ollama.load("llm", 11_000)
    assert say(server) == TEXT
    assert "llm" not in ollama.models
    steps = decisions(server)
    assert [step["step"] for step in steps] == ["unload", "proceed", "unload", "proceed"]
    # What stayed is not asked for again.
    assert [step["need_mib"] for step in steps] == [str(NEED)] * 2 + [str(NEED - KEPT)] * 2
    numbers = server.request("GET", "/metrics")[2].decode()
    assert 'voicegate_vram_evictions_total{model="llm"} 2.0' in numbers
    assert 'voicegate_vram_decisions_total{step="unload"} 2.0' in numbers
    assert 'voicegate_engine_events_total{event="unload"}' in numbers


def test_exclusive_lets_go_of_what_it_finds_loaded(shared: Shared, speaches: SpeachesStandIn) -> None:
    assert speaches.load(MODEL)[0] == 201
    server = shared("exclusive")
    until(lambda: speaches.log[-1] == f"unload {MODEL}", server)
    server.wait_health(lambda body: body["load_state"] == "unloaded")


def test_yield_stays_until_ollama_needs_the_room(
    shared: Shared, ollama: OllamaStandIn, speaches: SpeachesStandIn
) -> None:
    ollama.load("small", 3000)
    ollama.load("big", 8000)
    server = shared("yield")
    until(lambda: speaches.log == [f"load {MODEL}"], server)  # without a request, as it is to stay
    assert ollama.log[2:] == ["unload small"]
    for _ in range(3):
        assert say(server) == TEXT
    assert speaches.log == [f"load {MODEL}"]
    ollama.let_go("big")
    ollama.load("llm", 11_000)
    assert ollama.models["llm"]["vram"] < 11_000
    until(lambda: " ollama_mended " in server.log, server)
    assert ollama.models["llm"]["vram"] == 11_000
    assert speaches.log == [f"load {MODEL}", f"unload {MODEL}"]
    assert say(server) == TEXT  # takes its turn again: the model is idle
    assert "llm" not in ollama.models
    assert 'voicegate_vram_repairs_total{model="llm"} 1.0' in server.request("GET", "/metrics")[2].decode()


def test_what_it_works_on_is_waited_for(
    shared: Shared, ollama: OllamaStandIn, speaches: SpeachesStandIn
) -> None:
    speaches.gate = threading.Semaphore(0)
    server = shared("yield")
    texts: list[str] = []
    asking = threading.Thread(target=lambda: texts.append(say(server)))
    asking.start()
    until(lambda: any(model.used for model in speaches.every), server)
    ollama.load("llm", 11_000)
    time.sleep(6)  # longer than between two looks
    assert speaches.log == [f"load {MODEL}"]
    speaches.gate.release()
    asking.join(20)
    assert texts == [TEXT]
    until(lambda: " ollama_mended " in server.log, server)


def test_a_client_that_leaves_does_not_leave_a_second_copy(shared: Shared, speaches: SpeachesStandIn) -> None:
    """Speaches works on: unloading before it has ended would have the next request load it beside itself."""
    speaches.gate = threading.Semaphore(0)
    server = shared("exclusive", "--upstream-parallel", "2")
    with pytest.raises(openai.APITimeoutError):
        say(server, timeout=1)
    server.wait_health(lambda body: body["queue"]["running"] == 0)
    time.sleep(0.5)
    assert speaches.log == [f"load {MODEL}"]
    speaches.gate.release(2)
    assert say(server) == TEXT
    until(lambda: speaches.log[-1].startswith("unload"), server)
    assert speaches.most == NEED


def test_a_client_that_leaves_while_it_loads_does_not_either(
    shared: Shared, speaches: SpeachesStandIn
) -> None:
    server = shared("exclusive")
    speaches.load_seconds = 2.0
    with pytest.raises(openai.APITimeoutError):
        say(server, timeout=0.5)
    assert say(server) == TEXT
    until(lambda: speaches.log[-1].startswith("unload"), server)
    assert speaches.log == [f"load {MODEL}", f"unload {MODEL}"]
    assert speaches.most == NEED


def test_who_waits_for_a_turn_keeps_the_model_there(shared: Shared, speaches: SpeachesStandIn) -> None:
    speaches.gate = threading.Semaphore(0)
    server = shared("exclusive")
    texts: list[str] = []
    asking = [threading.Thread(target=lambda: texts.append(say(server))) for _ in range(3)]
    for thread in asking:
        thread.start()
    server.wait_health(lambda body: body["queue"]["waiting"] == 2)
    for done in range(1, 4):
        speaches.gate.release()
        until(lambda done=done: len(texts) == done, server)  # type: ignore[misc]
    until(lambda: speaches.vram == KEPT, server)
    assert speaches.log == [f"load {MODEL}", f"unload {MODEL}"]


def test_other_models_of_it_under_the_names_it_knows(
    shared: Shared, ollama: OllamaStandIn, speaches: SpeachesStandIn
) -> None:
    ollama.load("llm", 11_000)
    server = shared("exclusive")
    assert say(server, "small") == TEXT
    until(lambda: speaches.log == ["load org/small", "unload org/small"], server)
    assert ollama.log[-1] == "unload llm"
    ollama.load("llm", 11_000)
    with pytest.raises(openai.NotFoundError) as caught:
        say(server, "org/none")
    assert caught.value.code == "model_not_found"
    assert "llm" in ollama.models  # nobody goes for a model that there is not


def test_what_did_not_load_is_tried_with_more_room(
    shared: Shared, ollama: OllamaStandIn, speaches: SpeachesStandIn
) -> None:
    """It was restarted unseen: its context is not there any more, and there is room but for that."""
    server = shared("exclusive")
    assert say(server) == TEXT
    until(lambda: speaches.vram == KEPT, server)
    speaches.context = False
    speaches.unseen = ollama.TOTAL - NEED + KEPT // 2
    ollama.write()

    def leave() -> None:
        speaches.unseen = 0
        ollama.write()

    threading.Timer(1.0, leave).start()
    assert say(server) == TEXT
    assert speaches.log[2] == f"no room for {MODEL}"
    assert [step["need_mib"] for step in decisions(server)[-2:]] == [str(NEED)] * 2
    assert "model_load_failed" in server.log


def test_what_cannot_load_is_an_error_and_not_held_against_the_next(
    shared: Shared, ollama: OllamaStandIn, speaches: SpeachesStandIn
) -> None:
    speaches.unseen = ollama.TOTAL
    ollama.write()
    server = shared("exclusive")
    with pytest.raises(openai.InternalServerError) as caught:
        say(server)
    assert (caught.value.status_code, caught.value.code) == (503, "model_load_failed")
    speaches.unseen = 0
    ollama.write()
    assert say(server) == TEXT


def test_a_model_that_failed_is_loaded_anew(shared: Shared, speaches: SpeachesStandIn) -> None:
    """Speaches lists one whose loading failed as loaded: after a failure that is not believed."""
    server = shared("yield")
    until(lambda: speaches.log == [f"load {MODEL}"], server)
    speaches.fail_once = True
    with pytest.raises(openai.InternalServerError) as caught:
        say(server)
    assert caught.value.code == "engine_failed"
    assert say(server) == TEXT
    assert say(server) == TEXT
    assert speaches.log == [f"load {MODEL}", f"unload {MODEL}", f"load {MODEL}"]


def test_one_that_went_and_came_has_nothing_on_the_card(
    shared: Shared, ollama: OllamaStandIn, server: Server, speaches: SpeachesStandIn
) -> None:
    front = shared("yield")
    assert say(front) == TEXT
    speaches.close()
    texts: list[str] = []
    asking = threading.Thread(target=lambda: texts.append(say(front)))
    asking.start()
    until(lambda: front.health()[1]["load_state"] == "failed", front)
    again = SpeachesStandIn(ollama, server.url, speaches.port)
    asking.join(20)
    assert texts == [TEXT]
    assert again.log == [f"load {MODEL}"]
    assert [step["need_mib"] for step in decisions(front)] == [str(NEED)] * 2
    again.close()
    assert "Traceback" not in front.log


def test_an_upstream_without_that_api_is_told_of_once(serve: Serve, server: Server) -> None:
    front = serve("--upstream", server.url, "--device", "auto", "--vram-policy", "exclusive",
                  "--vram-need-mib", "5000", "--ollama-url", "http://127.0.0.1:9")  # fmt: skip
    for _ in range(3):
        assert say(front) == TEXT
    assert [line.split()[2] for line in front.lines].count("speaches_failed") == 1
    assert decisions(front) == []


def test_mixed_requests_lose_nothing(
    shared: Shared, ollama: OllamaStandIn, speaches: SpeachesStandIn
) -> None:
    """Speech and chats in turns on a card that holds only one of them."""
    ollama.load("llm", 11_000)
    server = shared("exclusive", "--upstream-parallel", "2")
    heard: list[str] = []
    stop = threading.Event()

    def chat() -> None:
        while not stop.is_set():
            if "llm" not in ollama.models:
                ollama.load("llm", busy=True)
                time.sleep(0.05)
                ollama.finish("llm")
            time.sleep(0.2)

    chatting = threading.Thread(target=chat)
    chatting.start()
    for _ in range(6):
        speaking = [threading.Thread(target=lambda: heard.append(say(server))) for _ in range(5)]
        for thread in speaking:
            thread.start()
            time.sleep(random.uniform(0, 0.3))  # noqa: S311
        for thread in speaking:
            thread.join(60)
        until(lambda: speaches.vram == KEPT, server)
    stop.set()
    chatting.join(10)
    assert heard == [TEXT] * 30
    assert speaches.log.count(f"load {MODEL}") >= 6
    assert speaches.most == NEED  # never twice
    assert "Traceback" not in server.log


def test_what_is_at_work_is_not_let_go(ollama: OllamaStandIn, speaches: SpeachesStandIn) -> None:
    async def run() -> None:
        settings = Settings(vram_need_mib=NEED, vram_policy="yield", upstream=speaches.url)
        peace = Peace(settings, None, lambda _index: None)
        async with httpx2.AsyncClient(base_url=speaches.url) as client:
            tenant = SpeachesTenant(settings, peace, client, MODEL)
            assert not await tenant.on_card()
            async with tenant.using(MODEL):
                await tenant.unload()
                assert await tenant.on_card()
            assert speaches.log == [f"load {MODEL}"]
            with tenant.at_work():  # waits for its turn
                await tenant.unload()
            assert not tenant.away
            await tenant.unload()
            assert tenant.away
            assert speaches.log == [f"load {MODEL}", f"unload {MODEL}"]
            await tenant.stop()

    asyncio.run(run())


def test_idle_is_counted_from_the_end_of_the_last() -> None:
    async def run() -> None:
        expired: list[float] = []

        async def expire() -> None:
            expired.append(it.active)

        it = Idle(0, expire)
        with it.at_work():
            with it.at_work():
                pass
            await asyncio.sleep(0.01)
            assert expired == []
        with it.at_work():  # in time
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        assert expired == [0]
        it.stop()
        it.rest()
        await asyncio.sleep(0.01)
        never = Idle(-1, expire)
        never.rest()
        await asyncio.sleep(0.01)
        assert expired == [0]

    asyncio.run(run())


def test_what_it_loads_is_not_set_here(capsys: pytest.CaptureFixture[str]) -> None:
    from voicegate.cli import EXIT_SETTINGS, main

    told = ["serve", "--upstream", "http://127.0.0.1:9", "--vram-fallback", "cpu"]
    assert main(told) == EXIT_SETTINGS
    assert "--vram-fallback" in capsys.readouterr().err

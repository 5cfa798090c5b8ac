"""Peace on the card: decisions as a table and as properties, and the whole over stand-ins.

Stand-ins: the card (tests/support/nvml) and Ollama's memory (`OllamaStandIn`): there is no GPU to fill.
"""

from __future__ import annotations

import asyncio
import datetime
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standins import OllamaStandIn
from voicegate import card, peace
from voicegate.fallback import Fallback, fallbacks
from voicegate.ollama import Loaded, Ollama, OllamaError, read_loaded
from voicegate.peace import Peace, Situation, Step, decide, fewest
from voicegate.settings import Settings
from voicegate_support import CLIPS, Server, environment

Serve = Callable[..., Server]
CLIP, TEXT = CLIPS / "D009.wav", "Turn up the volume."
NEED = 2500


def model(name: str, vram: int, remaining: float = 300.0, on_cpu: int = 0) -> Loaded:
    return Loaded(name, "", vram + on_cpu, vram, remaining)


def situation(policy: str, free: int | None, *models: Loaded, **more: Any) -> Situation:
    values: dict[str, Any] = {"need_mib": NEED, "reserve_mib": 0, "waited": 0.0, "patience": 30.0, **more}
    return Situation(policy, free, models=models, **values)


BIG, SMALL, BUSY = model("big", 8000), model("small", 3000), model("busy", 8000, remaining=-1)
PINNED = model("kept", 8000, remaining=math.inf)
INT8 = [Fallback("int8", 1500), Fallback("cpu", 0)]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (situation("resident", 3000, BIG), Step("proceed")),
        (situation("resident", None), Step("proceed")),
        (situation("resident", 2600, reserve_mib=200), Step("wait")),
        (situation("resident", 100, BIG), Step("wait")),
        (situation("resident", 100, BIG, waited=30.0), Step("try")),
        (situation("yield", 3000, BIG), Step("proceed")),
        (situation("yield", 100, BIG, SMALL), Step("unload", ("small",))),
        (situation("yield", 100, BUSY, SMALL), Step("unload", ("small",))),
        (situation("yield", 100, BUSY), Step("wait")),
        (situation("yield", 100, PINNED), Step("wait")),
        (situation("yield", 100, BIG, pinned=frozenset({"big"})), Step("wait")),
        (situation("yield", 100, BIG, asked_to_go=frozenset({"big"})), Step("wait")),
        (situation("yield", 100, BUSY, waited=31.0), Step("try")),
        (situation("yield", 1600, BUSY, waited=31.0, fallbacks=INT8), Step("fall_back", fallback=INT8[0])),
        (situation("yield", 100, BUSY, waited=31.0, fallbacks=INT8), Step("fall_back", fallback=INT8[1])),
        (situation("exclusive", 20000, BIG, SMALL), Step("unload", ("small", "big"))),
        (situation("exclusive", 20000, BUSY), Step("wait")),
        (situation("exclusive", 20000, BUSY, waited=31.0), Step("wait")),
        (situation("exclusive", 20000, BUSY, waited=301.0), Step("refuse")),
        (situation("exclusive", 20000, PINNED), Step("refuse")),
        (situation("exclusive", 20000, PINNED, fallbacks=INT8), Step("fall_back", fallback=INT8[1])),
        (situation("exclusive", 20000, model("on-cpu", 0, on_cpu=5000)), Step("proceed")),
        (situation("exclusive", 20000), Step("proceed")),
        (situation("exclusive", 100), Step("wait")),
    ],
)
def test_decisions(now: Situation, expected: Step) -> None:
    found = decide(now)
    assert (found.kind, sorted(found.models), found.fallback) == (
        expected.kind, sorted(expected.models), expected.fallback
    )  # fmt: skip


loaded = st.builds(
    model,
    name=st.sampled_from("abcdef"),
    vram=st.integers(0, 20_000),
    remaining=st.sampled_from([-5.0, 0.0, 10.0, 300.0, math.inf]),
)
situations = st.builds(
    Situation,
    policy=st.sampled_from(["resident", "yield", "exclusive"]),
    free_mib=st.none() | st.integers(0, 30_000),
    need_mib=st.integers(1, 20_000),
    reserve_mib=st.integers(0, 2_000),
    models=st.lists(loaded, max_size=5, unique_by=lambda one: one.name),
    waited=st.floats(0, 60),
    patience=st.floats(0, 60),
    pinned=st.frozensets(st.sampled_from("abc")),
    asked_to_go=st.frozensets(st.sampled_from("abcdef")),
    fallbacks=st.sampled_from([[], INT8, INT8[1:]]),
)


@given(situations)
def test_what_no_decision_does(now: Situation) -> None:
    step = decide(now)
    there = {one.name: one for one in now.models}
    for name in step.models:
        assert name not in now.pinned
        assert not there[name].busy
        assert not math.isinf(there[name].remaining)
        assert name not in now.asked_to_go
    if step.kind == "unload":
        assert now.policy != "resident"
    if step.kind == "proceed":
        assert now.fits(now.need_mib)
    if step.kind in ("proceed", "try") and now.policy == "exclusive":
        assert not any(one.vram_mib for one in now.models)
    if step.kind == "wait":
        assert now.waited < now.patience * (peace.LAST if now.policy == "exclusive" else 1)
    if step.kind in ("try", "refuse"):
        assert all(one.need_mib for one in now.fallbacks)  # the CPU always is one
    if step.fallback is not None:
        assert step.fallback in now.fallbacks


@given(st.lists(loaded, unique_by=lambda one: one.name), st.integers(1, 40_000))
def test_as_few_models_go_as_will_do(models: list[Loaded], missing: int) -> None:
    going = fewest(models, missing)
    given_back = sum(one.vram_mib for one in going)
    if given_back < missing:
        assert len(going) == len(models)
    else:
        smallest = min(one.vram_mib for one in going)
        assert given_back - smallest < missing  # none of them in vain
        if any(one.vram_mib >= missing for one in models):
            assert len(going) == 1


def test_fallbacks_are_read_or_refused() -> None:
    assert fallbacks(" int8=1500, cpu ") == INT8
    assert fallbacks("") == []
    for wrong in ("gpu", "int8", "int8=x", "cpu=5", "int8=0"):
        with pytest.raises(ValueError, match="neither cpu nor"):
            fallbacks(wrong)


def test_what_ollama_says_is_read() -> None:
    now = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)
    item = {"name": "m:latest", "digest": "d", "size": 10 * 2**30, "size_vram": 8 * 2**30}
    found = read_loaded({**item, "expires_at": "2026-01-01T13:05:00.123456789+01:00"}, now)
    assert (found.size_mib, found.vram_mib, found.on_cpu_mib) == (10240, 8192, 2048)
    assert found.remaining == pytest.approx(300.1, abs=0.1)
    assert math.isinf(read_loaded({**item, "expires_at": "2318-01-01T00:00:00Z"}, now).remaining)
    assert read_loaded({**item, "expires_at": "2026-01-01T11:59:59Z"}, now).busy
    assert peace.movable(found, frozenset())
    assert not peace.movable(found, frozenset({"m"}))


# -- the whole, with stand-ins for the card and for Ollama's memory


@pytest.fixture
def shared(serve: Serve, library: Path, ollama: OllamaStandIn) -> Callable[..., Server]:
    def start(policy: str, *arguments: str) -> Server:
        return serve(
            "--device", "auto", "--vram-policy", policy, "--vram-need-mib", str(NEED), "--vram-wait", "2",
            "--ollama-url", ollama.url, *arguments,
            env={"LD_LIBRARY_PATH": str(library), "SOTTOVOCE_NVML_STANDIN": str(ollama.cards)},
        )  # fmt: skip

    return start


def say(server: Server) -> str:
    return server.client().audio.transcriptions.create(file=CLIP, model="whisper-1", language="en").text


def steps(server: Server) -> list[str]:
    return [line.partition(" step=")[2].split()[0] for line in server.lines if " vram step=" in line]


def test_the_card_is_read(library: Path, ollama: OllamaStandIn) -> None:
    ollama.load("llm", 5000)
    script = "from voicegate import card; print(card.read(0).free_mib, card.read(1))"
    env = environment({"LD_LIBRARY_PATH": str(library), "SOTTOVOCE_NVML_STANDIN": str(ollama.cards)})
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7000", "None"]


def test_yield_takes_room_from_an_idle_model(shared: Callable[..., Server], ollama: OllamaStandIn) -> None:
    ollama.load("small", 3000)
    ollama.load("big", 8000)
    server = shared("yield")
    assert ollama.log[2:] == ["unload small"]
    assert steps(server) == ["unload", "proceed"]
    assert say(server) == TEXT
    numbers = server.request("GET", "/metrics")[2].decode()
    assert 'voicegate_vram_evictions_total{model="small"} 1.0' in numbers
    assert 'voicegate_vram_decisions_total{step="unload"} 1.0' in numbers
    assert re.search(r'voicegate_gpu_memory_bytes\{gpu=".+",kind="free"\} \d', numbers)


def test_a_busy_model_is_waited_for(shared: Callable[..., Server], ollama: OllamaStandIn) -> None:
    ollama.load("llm", 11_000, busy=True)
    threading.Timer(1.0, ollama.finish, ["llm"]).start()
    server = shared("exclusive")
    assert "llm" not in ollama.models
    assert steps(server)[-1] == "proceed"
    assert say(server) == TEXT


def test_exclusive_refuses_beside_a_pinned_model_and_goes_on_without_it(
    shared: Callable[..., Server], ollama: OllamaStandIn
) -> None:
    ollama.load("kept", 2000, keep=-1)
    server = shared("exclusive")
    with pytest.raises(openai.InternalServerError) as caught:
        say(server)
    assert (caught.value.status_code, caught.value.code) == (503, "vram_busy")
    assert caught.value.response.headers["retry-after"] == "10"
    ollama.let_go("kept")
    assert say(server) == TEXT
    assert "Traceback" not in server.log


def test_a_fallback_is_taken_and_left_again(shared: Callable[..., Server], ollama: OllamaStandIn) -> None:
    ollama.load("llm", 11_000, busy=True)
    server = shared("yield", "--vram-fallback", "cpu")
    assert steps(server) == ["unload", "wait", "fall_back"] or steps(server) == ["wait", "fall_back"]
    assert say(server) == TEXT
    ollama.let_go("llm")
    ollama.finish("llm")
    deadline = time.monotonic() + 20
    while steps(server)[-1] != "proceed":
        assert time.monotonic() < deadline, server.log
        time.sleep(0.1)
    assert " vram_back " in server.log
    assert say(server) == TEXT


def test_layers_on_the_cpu_are_mended(shared: Callable[..., Server], ollama: OllamaStandIn) -> None:
    server = shared("yield")
    [pid] = re.findall(r" engine_started pid=(\d+)", server.log)
    ollama.speech = lambda: NEED if Path(f"/proc/{pid}").exists() else 0  # as on a real card
    ollama.load("llm", 11_000)
    assert ollama.models["llm"]["vram"] < 11_000
    deadline = time.monotonic() + 20
    while " ollama_mended " not in server.log:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)
    assert ollama.models["llm"]["vram"] == 11_000
    assert say(server) == TEXT  # takes its turn again: the model is idle
    assert "llm" not in ollama.models


def test_resident_moves_nobody(shared: Callable[..., Server], ollama: OllamaStandIn) -> None:
    ollama.load("llm", 11_000)
    server = shared("resident")
    assert steps(server) == ["wait", "try"]
    assert ollama.log == ["load llm"]
    assert say(server) == TEXT


def test_without_a_card_or_ollama_nothing_is_decided(serve: Serve) -> None:
    server = serve("--device", "auto", "--vram-need-mib", "5000", "--vram-policy", "yield",
                   "--ollama-url", "http://127.0.0.1:9")  # fmt: skip
    assert steps(server) == ["proceed"]
    assert say(server) == TEXT


def test_a_hundred_mixed_requests_lose_nothing(shared: Callable[..., Server], ollama: OllamaStandIn) -> None:
    """Speech and chats in turns on a card that holds only one of them: each is served, in its order."""
    ollama.load("llm", 11_000)
    server = shared("exclusive")
    heard: list[tuple[int, int, str]] = []
    stop = threading.Event()

    def chat() -> None:
        while not stop.is_set():
            if "llm" not in ollama.models:
                ollama.load("llm", busy=True)
                time.sleep(0.05)
                ollama.finish("llm")
            time.sleep(0.2)

    def speak(client: int) -> None:
        for number in range(25):
            heard.append((client, number, say(server)))

    chatting = threading.Thread(target=chat)
    speaking = [threading.Thread(target=speak, args=(client,)) for client in range(4)]
    for thread in (chatting, *speaking):
        thread.start()
    for thread in speaking:
        thread.join(120)
    stop.set()
    chatting.join(10)
    assert [text for _client, _number, text in heard] == [TEXT] * 100
    for client in range(4):
        assert [number for one, number, _text in heard if one == client] == list(range(25))
    assert "Traceback" not in server.log


# -- carrying out, with a clock of our own


class Quiet:
    def __init__(self) -> None:
        self.loaded, self.log = True, list[str]()
        self.busy = self.stays = False

    def idle(self) -> bool:
        return not self.busy

    async def on_card(self) -> bool:
        return self.loaded

    async def unload(self) -> None:
        self.loaded = self.stays
        self.log.append("unload")

    async def start(self) -> None:
        self.loaded = True
        self.log.append("start")


def make(url: str, free: Callable[[], int], **settings: Any) -> Peace:
    base = Settings(vram_need_mib=NEED, vram_policy="yield", ollama_url=url, ttl=0)
    asked = replace(base, **settings)
    return Peace(
        asked, Ollama(asked.ollama_url), lambda _index: card.Card("", 12_000, 12_000 - free(), free())
    )


def test_what_went_comes_back_when_asked(ollama: OllamaStandIn) -> None:
    async def run() -> None:
        ollama.embedders = {"llm"}  # and one that only embeds is loaded in another way
        ollama.load("llm", 11_000, keep=600)
        it = make(ollama.url, lambda: ollama.TOTAL - ollama.used, ollama_reload=True)
        await it.before_load()
        assert "llm" not in ollama.models
        tenant = Quiet()
        await it.look(tenant)
        assert "llm" not in ollama.models  # the speech model is still there
        tenant.loaded, tenant.busy = False, True
        await it.look(tenant)
        assert "llm" not in ollama.models  # it is about to be
        tenant.busy = False
        await it.look(tenant)
        assert 500 < ollama.models["llm"]["until"] - time.time() <= 600
        await it.look(tenant)
        assert ollama.log == ["load llm", "unload llm", "load llm"]
        assert (it.evictions["llm"], it.decisions["unload"]) == (1, 1)
        await it.stop()

    asyncio.run(run())


def test_what_cannot_fit_is_not_tried_again_and_again(ollama: OllamaStandIn) -> None:
    async def run() -> None:
        ollama.load("huge", 20_000)
        it = make(ollama.url, lambda: ollama.TOTAL - ollama.used)
        tenant = Quiet()
        for _ in range(3):
            await it.look(tenant)
        assert ollama.log == ["load huge"]
        assert tenant.log == []
        await it.stop()

    asyncio.run(run())


def test_what_a_request_came_before_is_mended_later(ollama: OllamaStandIn) -> None:
    async def run() -> None:
        ollama.speech = lambda: NEED
        ollama.load("llm", 11_000)
        it = make(ollama.url, lambda: ollama.TOTAL - ollama.used)
        tenant = Quiet()
        tenant.stays = True  # a request between the look and the unloading
        await it.look(tenant)
        assert (ollama.log, tenant.log) == (["load llm"], ["unload"])
        tenant.stays, ollama.speech = False, lambda: NEED if tenant.loaded else 0
        await it.look(tenant)
        assert ollama.log == ["load llm", "unload llm", "load llm"]
        assert it.repairs["llm"] == 1
        await it.stop()

    asyncio.run(run())


def test_what_an_engine_keeps_is_not_room(ollama: OllamaStandIn) -> None:
    async def run() -> None:
        ollama.speech = lambda: NEED
        ollama.load("llm", ollama.TOTAL - 400)  # fits without the engine, and not beside what it keeps
        it = make(ollama.url, lambda: ollama.TOTAL - ollama.used, vram_kept_mib=500)
        tenant = Quiet()
        await it.look(tenant)
        assert (ollama.log, tenant.log) == (["load llm"], [])
        await it.stop()

    asyncio.run(run())


def test_an_ollama_that_is_not_there_is_an_error_of_its_own() -> None:
    async def run() -> None:
        with pytest.raises(OllamaError, match="/api/ps: Connect"):
            await Ollama("http://127.0.0.1:9").loaded()

    asyncio.run(run())

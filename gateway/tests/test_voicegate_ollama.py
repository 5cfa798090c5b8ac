"""Speech, jobs and the real Ollama server in turns on one card that is too small for all.

Stand-ins: the card (tests/support/nvml) and Ollama's llama-server (`llama_server_standin`), as there is
neither a GPU nor weights. Scheduling, loading and unloading are Ollama's own.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import real_ollama
from ansible_collections.sottovoce.stack.plugins.module_utils._ollama import ModelTask, OllamaServer, manage
from llama_server_standin import reply, vector
from standins import SharedCard, engines, model_of, ollama_with_runner, running
from test_voicegate_jobs import accepted, result, wait
from voicegate_support import Clip, Server, clips

REQUESTS = int(os.environ.get("SOTTOVOCE_MIXED_REQUESTS", "100"))
SPEECH, LLM, PINNED = 2500, 7800, 2000  # MiB: the last two fit beside each other, all three do not


@pytest.fixture
def card(tmp_path: Path) -> Iterator[SharedCard]:
    shared = SharedCard(tmp_path, SPEECH)
    yield shared
    shared.close()


@pytest.fixture
def ollama_url(tmp_path: Path, card: SharedCard) -> Iterator[str]:
    program = real_ollama.program()
    if not program:
        pytest.skip(real_ollama.NOT_BUILT)
    with ollama_with_runner(program, tmp_path / "ollama", card) as url:
        for name, model in (("llm", model_of(LLM)), ("embedder", model_of(PINNED, pooling_type=1))):
            file = tmp_path / f"{name}.gguf"
            file.write_bytes(model)
            manage(OllamaServer(url), ModelTask((name,), gguf=str(file)))
        yield url


@pytest.fixture
def start(
    serve: Callable[..., Server], library: Path, card: SharedCard, ollama_url: str, tmp_path: Path
) -> Callable[[], Server]:
    def begin() -> Server:
        server = serve(
            "--device", "auto", "--vram-policy", "yield", "--vram-need-mib", str(SPEECH),
            "--vram-reserve-mib", "200", "--ttl", "0", "--ollama-url", ollama_url,
            "--data-dir", str(tmp_path / "jobs"),
            env={"LD_LIBRARY_PATH": str(library), "SOTTOVOCE_NVML_STANDIN": str(card.cards)}, ready=False,
        )  # fmt: skip
        card.voicegate = server.process.pid
        server.wait_ready()
        return server

    return begin


def say(server: Server, clip: Clip) -> str:
    spoken = server.client().audio.transcriptions
    return spoken.create(file=clip.path, model="whisper-1", language="en").text


def until(good: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not good():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ask(url: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode())  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        return json.load(answer)


def generate(url: str, prompt: str) -> str:
    return str(ask(url, "/api/generate", model="llm", prompt=prompt, stream=False)["response"])


def embed(url: str, text: str) -> list[float]:
    [found] = ask(url, "/api/embed", model="embedder", input=text, keep_alive=-1)["embeddings"]
    return [float(number) for number in found]


class Client(threading.Thread):
    """Asks one thing after the other, a few in a row and then nothing for a while."""

    def __init__(self, questions: Sequence[Any], ask: Callable[[Any], Any], row: int, rest: float) -> None:
        super().__init__(daemon=True)
        self.questions = questions
        self.answers: list[Any] = []
        self._ask, self._row, self._rest = ask, row, rest
        self.start()

    def run(self) -> None:
        for number, question in enumerate(self.questions, 1):
            try:
                self.answers.append(self._ask(question))
            except Exception as error:  # told where the answers are looked at
                self.answers.append(error)
            if not number % self._row:
                time.sleep(self._rest)


def test_a_model_that_answers_goes_when_it_has_answered(
    start: Callable[[], Server], card: SharedCard, ollama_url: str
) -> None:
    embed(ollama_url, "before all others")
    server = start()
    until(lambda: not engines(card.voicegate))
    prompt = " ".join(map(str, range(200)))  # 4 s
    chatting = Client([prompt], lambda text: generate(ollama_url, text), 2, 0)
    until(card.cut_off)
    [llm] = card.cut_off()
    speaking = Client(clips("D")[:1], lambda clip: say(server, clip), 2, 0)
    until(lambda: " step=unload " in server.log)
    assert card.cut_off() == [llm]  # it was asked to go in the middle
    for client in (speaking, chatting):
        client.join(30)
    assert speaking.answers == [clip.text for clip in speaking.questions]
    assert chatting.answers == [reply(prompt)]
    assert card.cut_off() == []
    assert not running(llm)


def test_mixed_requests_lose_nothing(start: Callable[[], Server], card: SharedCard, ollama_url: str) -> None:
    embed(ollama_url, "before all others")
    pinned = set(card.runners())
    generate(ollama_url, "before all others")  # so that voicegate begins without room
    server = start()

    def speak(clip: Clip) -> str:
        return say(server, clip)

    def store(clip: Clip) -> str:
        return accepted(server, clip.path)

    def recordings(part: float) -> list[Clip]:
        return list(itertools.islice(itertools.cycle(clips("D")), round(REQUESTS * part)))

    def texts(part: float, name: str) -> list[str]:
        return [f"{name} {number}" for number in range(round(REQUESTS * part))]

    started = time.monotonic()
    speaking = [Client(recordings(0.2), speak, 10, 1.5) for _client in range(2)]
    storing = Client(recordings(0.1), store, 5, 2)
    chatting = [Client(texts(0.15, name), lambda text: generate(ollama_url, text), 3, 1.5) for name in "ab"]
    embedding = Client(texts(0.2, "c"), lambda text: embed(ollama_url, text), 5, 1)
    clients = [*speaking, storing, *chatting, embedding]
    for client in clients:
        client.join(60 + REQUESTS)
        assert not client.is_alive()

    for client in speaking:
        assert client.answers == [clip.text for clip in client.questions]
    for client in chatting:
        assert client.answers == [reply(text) for text in client.questions]
    assert embedding.answers == [pytest.approx(vector(text), abs=1e-6) for text in embedding.questions]
    ended = [wait(server, job, seconds=60 + REQUESTS) for job in storing.answers]
    heard = [result(server, job).strip() for job in storing.answers]
    assert heard == [clip.text for clip in storing.questions]
    assert ended == sorted(ended, key=lambda job: float(job["finished_at"]))
    seconds = time.monotonic() - started

    steps = [dict(word.split("=", 1) for word in line.split() if "=" in word)
             for line in server.lines if " vram step=" in line]  # fmt: skip
    went = Counter(step["unload"] for step in steps if step["step"] == "unload")
    assert set(went) == {"llm:latest"}  # the pinned model never
    assert all(map(running, pinned))  # nor did its process end
    assert card.cut_off() == []
    assert "Traceback" not in server.log
    loads = [on_cpu for _here, on_cpu in card.runners().values()]
    print(
        f"{sum(len(client.answers) for client in clients)} requests in {seconds:.1f} s;"
        f" Ollama loaded {len(loads)} times, {sum(map(bool, loads))} of them with layers on the CPU;"
        f" asked to go {sum(went.values())}; steps {dict(Counter(step['step'] for step in steps))};"
        f" mended {server.log.count(' ollama_mended ')}; engines {server.log.count(' engine_started ')};"
        f" at most {card.most} of {card.TOTAL} MiB"
    )

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""bench/vram: models of the true shapes, sampling, the table; the whole on a CPU and a stand-in for NVML."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nvml_standin as standin
import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_footprint as footprint
from ansible_collections.sottovoce.stack.plugins.module_utils._nvml import open_nvml

from bench.vram import mix, models, report, sampler

ROOT = Path(__file__).resolve().parents[2]


# --- models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(models.SHAPES))
def test_shapes_have_the_parameters_that_the_planner_counts(name: str) -> None:
    millions = models.parameters(models.SHAPES[name]) / 1e6
    assert millions == pytest.approx(footprint.WHISPER[name].parameters, rel=0.035)


def test_the_planner_and_the_harness_know_the_same_models() -> None:
    english = {f"{name}.en" for name in ("tiny", "base", "small", "medium")}  # one token less, else the same
    assert set(models.SHAPES) == set(footprint.WHISPER) - english


def test_a_made_model_is_as_large_as_its_parameters_say(tmp_path: Path) -> None:
    folder = models.write("tiny", tmp_path)
    size = (folder / "model.bin").stat().st_size
    # Two bytes each, and the names; the projection is not there twice.
    assert size == pytest.approx(2 * models.parameters(models.SHAPES["tiny"]), rel=0.002)
    written = (folder / "model.bin").stat().st_mtime_ns
    assert models.write("tiny", tmp_path) == folder
    assert (folder / "model.bin").stat().st_mtime_ns == written


# --- sampling --------------------------------------------------------------------------------------------


def test_the_sampler_keeps_the_highest_and_what_each_phase_ended_with() -> None:
    values = iter([10.0, 20.0, 500.0, 90.0])
    with sampler.Sampler(lambda: next(values, 90.0), interval=0.001) as samples:
        while len(samples.samples) < 2:
            time.sleep(0.001)
        samples.phase = "done"
        while len(samples.samples) < 20:
            time.sleep(0.001)
    assert samples.peak() == 500
    assert samples.last("done") == 90
    assert samples.last("never") == 0


def test_a_card_that_cannot_be_read_ends_the_sampling_with_its_error() -> None:
    def lost() -> float:
        raise RuntimeError("GPU 0: lost")

    with sampler.Sampler(lost) as samples:
        time.sleep(0.05)
    assert str(samples.error) == "GPU 0: lost"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not standin.has_compiler():
        pytest.skip(standin.NO_COMPILER)
    return standin.build(tmp_path_factory.mktemp("nvml"))


@pytest.mark.parametrize(
    ("lines", "used", "source"),
    [
        (("process 4242 3100 compute", "process 7 900 compute"), 3100, sampler.PROCESS),
        (("hidden",), 0, sampler.DIFFERENCE),
    ],
)
def test_whose_memory_it_is(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    lines: tuple[str, ...], used: int, source: str,
) -> None:  # fmt: skip
    cards = standin.card(0, *lines, memory="24564 451 4100")
    for name, value in standin.environment(library, tmp_path, standin.DRIVER + cards).items():
        monkeypatch.setenv(name, value)
    with open_nvml() as nvml:
        card = sampler.Card(nvml, 0)
        assert card.used_by(4242) == used
        assert (card.source, card.before_mib, card.driver) == (source, 4100, "570.86.15")
        # What came since.
        card.before_mib = 1000
        assert card.used_by(4242) == (used or 3100)


# --- the table -------------------------------------------------------------------------------------------

CARD = {"device": "cuda", "name": "RTX", "total_mib": 24564, "driver": "570", "cuda": "12.8"}


def row(factor: float, **more: Any) -> report.Row:
    """A measurement that is the prediction times factor."""
    asked = report.Row("builtin", "large-v3", "float16", 1)
    return report.Row(**{**vars(asked), "peak_mib": asked.predicted.peak * factor, **more})


def test_rows_beyond_ten_percent_are_flagged_and_failed_ones_say_why() -> None:
    rows = [
        row(1.0),
        row(1.25),
        row(0.92),
        row(1, error="CUDA failed | out of memory"),
        row(1, comparable=False),
    ]
    assert [each.beyond for each in rows] == [False, True, False, False, False]
    text = report.markdown(rows, CARD, {"ctranslate2": "4"})
    assert "**-20.0 %**" in text
    assert "failed: CUDA failed / out of memory" in text
    assert "2 of 3 rows within 10 %." in text
    assert text.startswith("Measured on RTX, 24564 MiB, driver 570, CUDA 12.8; ctranslate2 4.\n")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {12}
    data = report.as_data(rows, CARD, {})
    assert [each["off"] for each in data["rows"]] == [0, -0.2, 0.087, None, None]


def test_the_plot_has_a_point_for_each_row_that_is_compared() -> None:
    rows = [row(1.0), row(1.25), row(1, error="x"), row(1, comparable=False)]
    for shown in (rows, []):
        drawing = ET.fromstring(report.plot(shown, "a <b>"))  # noqa: S314 - our own
        points = [each for each in drawing.iter("{http://www.w3.org/2000/svg}circle") if len(each)]
        assert len(points) == (2 if shown else 0)


# --- the whole -------------------------------------------------------------------------------------------


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_the_whole_on_a_cpu(tmp_path: Path) -> None:
    asked = ("--models", "tiny", "--compute-types", "int8", "--batches", "1,8", "--seconds", "2")
    done = bench("bench.vram", "--out", str(tmp_path), "--device", "cpu", *asked)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vram.json", "vram.md", "vram.svg"]
    data = json.loads((tmp_path / "vram.json").read_text())
    assert data["machine"] == {"device": "cpu"}
    for each, engine in zip(data["rows"], ("builtin", "speaches"), strict=True):
        assert (each["engine"], each["source"], each["error"]) == (engine, "process memory", "")
        # Its weights at least, and more at work.
        assert 35 < each["rest_mib"] < each["peak_mib"]
        assert each["off"] is None


def test_the_whole_where_the_driver_shows_a_card_that_computes_nothing(library: Path, tmp_path: Path) -> None:
    """The table is made all the same; each row says that its run failed."""
    environment = standin.environment(library, tmp_path, standin.DRIVER + standin.card(0))
    asked = ("--models", "tiny", "--compute-types", "float16", "--batches", "1", "--seconds", "1")
    done = bench("bench.vram", "--out", str(tmp_path / "out"), *asked, **environment)
    assert done.returncode == 0, done.stderr
    assert "NVIDIA RTX A5000, 24564 MiB, driver 570.86.15" in done.stdout
    assert "failed: " in (tmp_path / "out/vram.md").read_text()


def test_without_a_card_it_says_what_to_do(tmp_path: Path) -> None:
    done = bench("bench.vram", "--out", str(tmp_path), SOTTOVOCE_NVML=str(tmp_path / "absent.so"))
    assert done.returncode == 1
    assert "--device cpu" in done.stderr
    assert bench("bench.vram", "--out", str(tmp_path), "--models", "whale").returncode == 2


def test_it_runs_in_a_bare_checkout_without_ansible(tmp_path: Path) -> None:
    for name in ("bench", "plugins"):
        shutil.copytree(ROOT / name, tmp_path / name)
    # Without site-packages there is no Ansible.
    script = "from bench.vram import report, sampler, mix"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=tmp_path, env={}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# --- the mix ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (200, '{"text": "out of memory"}', mix.OK),
        (500, "CUDA failed with error out of memory", mix.OUT_OF_MEMORY),
        (503, '{"error": {"message": "CUBLAS_STATUS_ALLOC_FAILED"}}', mix.OUT_OF_MEMORY),
        (500, '{"error":"model requires more system memory (9 GiB) than is available"}', mix.OUT_OF_MEMORY),
        (200, '{"error":"cudaMalloc failed"}', mix.OUT_OF_MEMORY),
        (500, "internal error", mix.FAILED),
        (0, "does not answer", mix.FAILED),
    ],
)
def test_what_an_answer_says(status: int, text: str, kind: str) -> None:
    assert mix.kind_of(status, text) == kind


def test_the_mix_is_even_and_the_same_for_the_same_seed() -> None:
    requests = mix.mixed(1000, [2, 10, 35, 240], [10, 500], 1)
    assert requests == mix.mixed(1000, [2, 10, 35, 240], [10, 500], 1) != mix.mixed(1000, [2, 10], [10], 2)
    for one in {*requests}:
        assert requests.count(one) == (125 if one.service == mix.SPEECH else 250)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def voicegate() -> Iterator[str]:
    """The real speech server of this collection, with the demo model, on the CPU."""
    port = free_port()
    settings = {
        "PYTHONPATH": str(ROOT / "gateway/src"), "VOICEGATE_PORT": str(port), "VOICEGATE_DEVICE": "cpu",
        "VOICEGATE_MODEL": str(ROOT / "demo/whisper-demo"),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "voicegate", "serve"],
        env={**os.environ, **settings}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _try in range(150):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer,
            ):
                if answer.status == 200:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextlib.contextmanager
def ollama(errors: list[str], in_vram: int = 6) -> Iterator[str]:
    """Ollama's answers as it gives them; no weights can be had here. The first ones are `errors`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body: dict[str, Any] = {"models": [{"name": "m:8b", "size": 6, "size_vram": in_vram}]}
            status = 200
            if self.path == "/api/generate":
                error = errors.pop() if errors else ""
                status = 500 if error else 200
                body = {"error": error} if error else {"response": "and then", "done": True}
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = answer

        def log_message(self, *_arguments: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{it.server_port}"
        it.shutdown()


def test_mixed_requests_and_each_way_they_may_fail(tmp_path: Path) -> None:
    target = tmp_path / "mix.json"
    sizes = ("--seconds", "1,2", "--words", "10", "--workers", "3", "--json", str(target), "--llm", "m:8b")
    with voicegate() as speech:
        with ollama([]) as language:
            done = bench("bench.vram.mix", "--stt", speech, "--ollama", language, "--requests", "12", *sizes)
            assert done.returncode == 0, done.stdout + done.stderr
        result = json.loads(target.read_text())
        for service in (mix.SPEECH, mix.LANGUAGE):
            assert result["services"][service][mix.OK] == 6
        with ollama(["CUDA error: out of memory", "boom"], in_vram=3) as language:
            done = bench("bench.vram.mix", "--stt", speech, "--ollama", language, "--requests", "8", *sizes)
        assert done.returncode == 1
        assert "Ollama: 2 ok, 1 out of memory, 1 failed" in done.stdout
        assert "partly on the CPU: m:8b 50 %" in done.stdout
    done = bench("bench.vram.mix", "--stt", speech, "--ollama", language, "--requests", "2", *sizes)
    assert done.returncode == 1
    assert "does not answer" in done.stdout

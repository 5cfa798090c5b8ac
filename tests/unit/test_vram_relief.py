# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which idle model goes when a card is nearly full: the decision, and what it is made from."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_relief as relief
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_relief import Loaded, Rules, Step
from hypothesis import given
from hypothesis import strategies as st

NOW = 1.8e9
LOADED = st.builds(Loaded, st.sampled_from(["a:1", "embed:latest"]), st.integers(1, 9000), st.floats(0, 4e9))
RULES = Rules(512, keep=("embed", "hf.co/a/b:Q4"))
BIG, SMALL = Loaded("big:8b", 6000, NOW + 60), Loaded("small:1b", 900, NOW + 200)


def gpu(free: int, **more: Any) -> dict[str, Any]:
    return {"free_mib": free, "error": "", "mig": [], **more}


def decide(free: int = 100, *models: Loaded, connections: int | None = 0, low: int = 1) -> Step:
    return relief.decide([gpu(free)], models, connections, RULES, low, NOW)


def test_enough_room_is_no_reason_and_ends_the_count() -> None:
    assert decide(512, BIG, low=7) == Step()


def test_one_reading_is_no_reason() -> None:
    assert decide(100, BIG, low=0) == Step(1)
    assert decide(100, BIG, low=1).model == "big:8b"


def test_who_was_not_asked_for_longest_goes_and_of_equals_the_larger() -> None:
    assert decide(100, SMALL, BIG).model == "big:8b"
    assert decide(100, SMALL, Loaded("late:8b", 6000, NOW + 300)).model == "small:1b"
    assert decide(100, SMALL, Loaded("same:8b", 6000, SMALL.expires)).model == "same:8b"


@pytest.mark.parametrize(
    ("models", "connections", "why"),
    [
        ((), 0, "has no model in VRAM"),
        (None, 0, "does not tell what it has loaded"),
        ((BIG,), 2, "may be at work (2 connections)"),
        ((BIG,), None, "cannot be read"),
        ((Loaded("embed:latest", 300, NOW + 60),), 0, "embed:latest is kept"),
        ((Loaded("hf.co/a/b:Q4", 300, NOW + 60),), 0, "hf.co/a/b:Q4 is kept"),
        ((Loaded("big:8b", 6000, NOW + 9e9),), 0, "big:8b stays for ever"),
        ((Loaded("big:8b", 6000, NOW - 1),), 0, "big:8b is not at rest"),
        ((Loaded("big:8b", 6000, 0),), 0, "big:8b is not at rest"),
    ],
)
def test_what_is_in_use_or_kept_stays_and_it_is_said(
    models: tuple[Loaded, ...] | None, connections: int | None, why: str
) -> None:
    step = relief.decide([gpu(100)], models, connections, RULES, 1, NOW)
    assert (step.low, step.model) == (2, "")
    assert "100 MiB of VRAM are free, less than the reserve of 512" in step.why
    assert why in step.why


def test_the_fullest_card_or_slice_counts_and_a_lost_one_does_not() -> None:
    lost = gpu(0, error="lost")
    assert relief.decide([gpu(9000), lost], [BIG], 0, RULES, 1, NOW) == Step()
    assert relief.decide([gpu(9000), gpu(1)], [BIG], 0, RULES, 1, NOW).model
    mig = gpu(1, mig=[{"free_mib": 900, "error": ""}, {"free_mib": 0, "error": "unreadable"}])
    assert relief.decide([mig], [BIG], 0, RULES, 1, NOW) == Step()
    assert relief.decide([], [BIG], 0, RULES, 1, NOW) == Step()


@given(st.integers(0, 2000), st.lists(LOADED), st.one_of(st.none(), st.integers(0, 3)), st.integers(0, 5))
def test_nothing_that_may_not_go_ever_goes(
    free: int, models: list[Loaded], connections: int | None, low: int
) -> None:
    step = decide(free, *models, connections=connections, low=low)
    if step.model:
        assert free < RULES.reserve_mib
        assert connections == 0
        assert low >= 1
        assert step.model != "embed:latest"
        assert any(m.name == step.model and NOW < m.expires <= NOW + relief.FOR_EVER for m in models)


def test_models_as_ollama_lists_them() -> None:
    item = {
        "name": "llama3.1:8b", "size": 6 << 30, "size_vram": 5 << 30,
        "expires_at": "2026-11-21T07:31:14.123456789+01:00",
    }  # fmt: skip
    cpu = {"name": "cpu:1b", "size": 1 << 30, "size_vram": 0, "expires_at": "2318-01-01T00:00:00Z"}
    (found,) = relief.loaded_models(
        {"models": [item, cpu, "Systran/faster-whisper-medium", {"size_vram": "x"}]}
    )
    assert (found.name, found.vram_mib) == ("llama3.1:8b", 5120)
    assert found.expires == pytest.approx(1795242674.123456)
    assert relief.expiry("2318-01-01T00:00:00Z") > NOW + relief.FOR_EVER
    assert [relief.expiry(text) for text in (None, "soon", "")] == [0, 0, 0]
    body: Any
    for body in (None, [], {"models": None}, {"models": {}}):
        assert relief.loaded_models(body) == []


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_connections_are_those_that_are_open_now(family: socket.AddressFamily) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    try:
        server = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"no {host} here")
    with server:
        port = server.getsockname()[1]
        assert relief.connections(port) == 0
        with socket.create_connection((host, port)):
            accepted, _address = server.accept()
            assert relief.connections(port) == 1
        # The client is gone, whatever the server still holds.
        with accepted:
            assert relief.connections(port) == 0


def test_connections_that_cannot_be_read_are_not_none_at_all(tmp_path: Path) -> None:
    assert relief.connections(1, str(tmp_path)) is None
    (tmp_path / "net").mkdir()
    (tmp_path / "net/tcp").write_text("head\n 0: 0100007F:2CAA 0100007F:9C40 01\n 1: junk:xyz 0:0 01\n")
    assert relief.connections(0x2CAA, str(tmp_path)) is None


def test_the_state_counts_on_and_comes_back() -> None:
    state = relief.State(3)
    for model in ("a:1", "b:1", "a:1"):
        state = relief.counted(state, "ollama", model, relief.LOW_FREE)
    assert (state.low, state.evictions["ollama", "a:1", "low-free"]) == (0, 2)
    assert relief.state_of(relief.text_of(state)) == state
    for text in ("", "{}", "[]", '{"low": 1, "evictions": [{}]}', '{"low": "x", "evictions": []}'):
        with pytest.raises(ValueError, match=r".+"):
            relief.state_of(text)


def test_settings_of_the_role() -> None:
    assert relief.rules_of({}) is None
    assert relief.rules_of({"reserve_mib": 600, "keep": ["a"]}) == Rules(600, ("a",))


def test_a_server_that_does_not_answer_or_refuses_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
    with pytest.raises(relief.ReliefError, match=r"idle:latest was not unloaded: .* does not answer"):
        relief.unload(url, "idle:latest")

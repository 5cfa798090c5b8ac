"""
Tests with NVIDIA cards that are not there, on one real Incus daemon: tests/e2e.sh, or

    tests/support/incusd.py run --gpu 1 --image -- pytest tests/gpu

What is real and what is not is said in tests/support/simulated_gpu.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import gpu_site
import incusd
import pytest
from gpu_site import Site
from simulated_gpu import Cards


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    there = os.environ.get("INCUS_DIR") and os.environ.get("SOTTOVOCE_TEST_GPU_DIR")
    for item in items:
        if Path(str(item.fspath)).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            if not there:
                item.add_marker(pytest.mark.skip(reason="no daemon with simulated cards (run tests/e2e.sh)"))


@pytest.fixture
def daemon() -> incusd.Daemon:
    return incusd.Daemon(gpu_site.daemon_folder())


@pytest.fixture
def cards(daemon: incusd.Daemon) -> Iterator[Cards]:
    """One card on a sound host, and no instance, lease or foreign claim. After a change: daemon.restart()."""
    found = daemon.cards
    assert found
    before = found.state
    yield found
    gpu_site.clear()
    if found.state != before:
        found.reset(1)
        daemon.wait_for_bridges()
        daemon.restart()


@pytest.fixture
def site(cards: Cards) -> Site:
    assert cards.addresses
    return Site("a")


@pytest.fixture
def other(cards: Cards) -> Iterator[Site]:
    """The infra.yml of somebody else on the same server."""
    assert cards.addresses
    found = Site("b")
    yield found
    found.remove()

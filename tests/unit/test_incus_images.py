# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_images as images

LAB = {"name": "lab", "type": "container"}


class Probe:
    def __init__(self, answer: str) -> None:
        self.answer, self.calls = answer, 0

    def __call__(self, server: str) -> str:
        self.calls += 1
        return self.answer


def resolve(
    *wanted: str | tuple[str, str],
    aliases: Sequence[dict[str, Any]] = (LAB,),
    fallback: str | None = "lab",
    answer: str = "no route",
) -> tuple[Any, Probe]:
    probe = Probe(answer)
    pairs = [w if isinstance(w, tuple) else (w, "container") for w in wanted]
    found = images.resolve(pairs, list(aliases), server="https://x", fallback=fallback, probe=probe)
    return found, probe


@pytest.mark.parametrize("alias", ["images:debian/13", "debian/13"])
def test_a_local_alias_wins_and_nobody_is_asked(alias: str) -> None:
    found, probe = resolve("images:debian/13", aliases=[LAB, {"name": alias, "type": "container"}])
    image = found["images:debian/13", "container"]
    assert (image.alias, image.remote, probe.calls) == (alias, "", 0)
    assert image.source == {"type": "image", "alias": alias}


def test_an_alias_of_the_other_type_does_not_count() -> None:
    found, _unused = resolve(
        ("images:debian/13", "virtual-machine"),
        aliases=[{"name": "debian/13", "type": "container"}],
        answer="",
    )
    image = found["images:debian/13", "virtual-machine"]
    assert (image.remote, image.alias) == ("debian/13", "debian/13/vm")


def test_a_reachable_server_is_asked_once_for_many_machines() -> None:
    found, probe = resolve(*["images:debian/13"] * 50, "images:alpine/edge", answer="")
    assert len(found) == 2
    assert probe.calls == 1
    assert found["images:debian/13", "container"].remote == "debian/13"


def test_the_fallback_is_named() -> None:
    found, probe = resolve("images:debian/13", "images:debian/12")
    image = found["images:debian/13", "container"]
    assert image.alias == "lab"
    assert "lab is used in place of images:debian/13" in image.note
    assert "no route" in image.note
    assert probe.calls == 1


@pytest.mark.parametrize(
    ("fallback", "text"), [(None, "no image_fallback is set"), ("gone", "'gone' is no local")]
)
def test_no_image_at_all_says_what_to_do(fallback: str | None, text: str) -> None:
    found, _unused = resolve("images:debian/13", fallback=fallback)
    error = found["images:debian/13", "container"].error
    assert text in error
    assert "incus image import" in error


def test_a_misspelt_local_name_is_not_replaced_by_another_system() -> None:
    found, probe = resolve("labb")
    error = found["labb", "container"].error
    assert "local aliases: lab" in error
    assert probe.calls == 0


def test_a_fingerprint() -> None:
    found, _unused = resolve("19f47ea3a6b0")
    assert found["19f47ea3a6b0", "container"].source == {"type": "image", "fingerprint": "19f47ea3a6b0"}


def test_the_probe_refuses_plain_http() -> None:
    assert "https" in images.probe_server("http://127.0.0.1:1")


def test_the_probe_ends_at_its_limit_with_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = threading.Event()
        began = time.monotonic()
        why = images.probe_server(f"https://127.0.0.1:{listener.getsockname()[1]}", timeout=0.5)
        done.set()
    assert why
    assert time.monotonic() - began < 2


def test_the_probe_tells_a_closed_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "refused" in images.probe_server(f"https://127.0.0.1:{port}").lower()

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_gpu as gpu

A, B = "0000:01:00.0", "0000:02:00.0"
RESOURCES = {
    "gpu": {
        "cards": [
            {"pci_address": "0000:00:02.0", "vendor_id": "1a03", "vendor": "ASPEED", "product": "BMC"},
            {"pci_address": "0000:00:03.0", "vendor_id": "8086", "vendor": "Intel", "product": "UHD"},
            {"pci_address": A, "vendor_id": "10de", "nvidia": {"model": "RTX 4090", "uuid": "GPU-aa"}},
            {"pci_address": B, "vendor_id": "10de", "nvidia": {"model": "RTX 3060", "uuid": "GPU-bb"}},
            {"vendor_id": "10de"},
        ]
    }
}
CARDS = gpu.cards_of(RESOURCES)
Obj = dict[str, Any]


def want(name: str, inherited: Obj | None = None, **spec: object) -> Obj:
    return {"project": "p", "name": name, "gpu": {"optional": False, **spec}, "inherited": inherited or {}}


def give(
    *wanted: Obj, cards: list[gpu.Card] | None = None, current: Obj | None = None, **more: object
) -> Obj:
    cards = CARDS if cards is None else cards
    found = gpu.assign(list(wanted), cards, {("p", k): v for k, v in (current or {}).items()}, **more)  # type: ignore[arg-type]
    return {name: assignment for (_p, name), assignment in found.items()}


def test_addresses_are_compared_normalised() -> None:
    assert gpu.normal_pci("0A:00.0") == "0000:0a:00.0"
    assert gpu.normal_pci("0000:0A:00.0") == "0000:0a:00.0"
    assert give(want("m", pci="01:00.0"))["m"].cards == [A]


def test_a_compute_card_is_preferred_and_screens_of_boards_are_none() -> None:
    assert give(want("m"))["m"].devices == {"gpu0": {"type": "gpu", "gputype": "physical", "pci": A}}
    only_bmc = gpu.cards_of({"gpu": {"cards": RESOURCES["gpu"]["cards"][:1]}})
    assert "cannot have its GPU" in give(want("m"), cards=only_bmc)["m"].error


def test_a_machine_keeps_its_card() -> None:
    found = give(want("new"), want("old"), current={"old": [A]})
    assert found["old"].cards == [A]
    assert found["new"].cards == [B]


def test_a_card_that_is_gone_is_replaced() -> None:
    assert give(want("m"), current={"m": ["0000:09:00.0"]})["m"].cards == [A]


def test_a_named_card_goes_to_who_names_it() -> None:
    found = give(want("any"), want("named", uuid="gpu-AA"))
    assert (found["named"].cards, found["any"].cards) == ([A], [B])


def test_two_machines_naming_one_card() -> None:
    found = give(want("a", pci=A), want("b", pci=A))
    assert found["a"].cards == [A]
    assert "belongs to machine a already" in found["b"].error
    assert give(want("a", pci=A), want("b", pci=A), exclusive=False)["b"].cards == [A]


def test_more_cards_than_there_are() -> None:
    assert give(want("m", count=2))["m"].cards == [A, B]
    error = give(want("m", count=4))["m"].error
    assert "asks for 4, and 3 of 3 can be had" in error
    assert A in error
    assert "RTX 3060" in error


def test_optional_goes_on_without() -> None:
    found = give(want("m", optional=True), cards=[])["m"]
    assert (found.devices, found.error) == ({}, "")
    assert "runs without a GPU" in found.note


def test_foreign_cards_are_the_last_choice() -> None:
    assert give(want("m"), foreign=["01:00.0"])["m"].cards == [B]
    nvidia = [c for c in CARDS if c.pci == A]
    assert give(want("m"), cards=nvidia, foreign=[A])["m"].cards == [A]


def test_a_profile_that_hands_over_all_cards_is_narrowed() -> None:
    profile = {"gpu": {"type": "gpu", "gputype": "physical"}}
    assert give(want("m", profile))["m"].devices == {"gpu": {"type": "gpu", "gputype": "physical", "pci": A}}
    hidden = give(want("m", profile, optional=True), cards=[])["m"]
    assert hidden.devices == {"gpu": {"type": "none"}}


def test_a_device_that_names_its_card_is_the_users() -> None:
    assert give(want("m", {"g": {"type": "gpu", "pci": B}}))["m"].devices == {}
    assert give(want("m", {"g": {"type": "gpu", "id": "0"}}))["m"].devices == {}


def test_a_taken_device_name_is_avoided() -> None:
    assert list(give(want("m", {"gpu0": {"type": "disk"}}))["m"].devices) == ["gpu1"]

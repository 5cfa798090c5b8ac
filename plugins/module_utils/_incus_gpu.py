# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which cards of a server go to which machine. Plain dicts only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

# In this order a machine that does not say which card it wants is served. Anything else that
# drives a screen (board management, emulated cards) is handed over only when asked for by address.
_VENDORS = {"10de": "NVIDIA", "1002": "AMD", "8086": "Intel"}


@dataclasses.dataclass(frozen=True)
class Card:
    pci: str
    vendor: str
    name: str
    uuid: str = ""
    location: str = ""

    def __str__(self) -> str:
        return f"{self.pci} {self.name}".strip() + (f" ({self.uuid})" if self.uuid else "")


@dataclasses.dataclass
class Assignment:
    """What a machine gets: devices to add to its own, and what to tell."""

    devices: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    cards: list[str] = dataclasses.field(default_factory=list)
    note: str = ""
    error: str = ""


def normal_pci(address: str) -> str:
    """`01:00.0` and `0000:01:00.0` are one address; Incus compares text."""
    address = address.strip().lower()
    return f"0000:{address}" if address.count(":") == 1 else address


def cards_of(resources: Mapping[str, Any] | None, location: str = "") -> list[Card]:
    found: list[Card] = []
    for card in ((resources or {}).get("gpu") or {}).get("cards") or []:
        pci = card.get("pci_address")
        if not pci:
            continue
        nvidia = card.get("nvidia") or {}
        vendor = str(card.get("vendor_id") or "").lower()
        name = nvidia.get("model") or " ".join(x for x in (card.get("vendor"), card.get("product")) if x)
        name = str(name or _VENDORS.get(vendor, vendor))
        found.append(Card(normal_pci(str(pci)), vendor, name, str(nvidia.get("uuid") or ""), location))
    return found


def held(devices: Mapping[str, Mapping[str, str]] | None) -> list[str]:
    """The PCI addresses that gpu devices of an instance name."""
    return [normal_pci(d["pci"]) for d in (devices or {}).values() if d.get("type") == "gpu" and d.get("pci")]


def described(devices: Mapping[str, Mapping[str, str]] | None) -> list[str]:
    """The cards an instance has, for people: addresses, or `all` for a device that selects none."""
    return held(devices) + ["all"] * bool(_unselected(devices or {}))


def _unselected(devices: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Gpu devices that would hand over every card of the server."""
    selectors = ("pci", "id", "vendorid", "productid", "mdev", "mig.uuid", "mig.gi", "mig.ci")
    return sorted(
        name for name, d in devices.items() if d.get("type") == "gpu" and not any(d.get(k) for k in selectors)
    )


def assign(
    wanted: Iterable[Mapping[str, Any]],
    cards: list[Card],
    current: Mapping[tuple[str, str], list[str]],
    foreign: Iterable[str] = (),
    exclusive: bool = True,
) -> dict[tuple[str, str], Assignment]:
    """Cards for every machine that asks for some.

    `wanted` holds instances with `project`, `name`, `gpu` and `inherited` (the devices it has without
    us: its profiles' and its own); `current` the cards a machine has now, which it keeps if it can;
    `foreign` the cards of machines that are not ours, taken only when nothing else is left.
    """
    by_pci = {card.pci: card for card in cards}
    by_uuid = {card.uuid.lower(): card for card in cards if card.uuid}
    compute = sorted((c for c in cards if c.vendor in _VENDORS), key=lambda c: list(_VENDORS).index(c.vendor))
    known = "; ".join(str(card) for card in cards) or "none"
    busy = {normal_pci(pci) for pci in foreign}
    taken: dict[str, tuple[str, str]] = {}
    result: dict[tuple[str, str], Assignment] = {}

    requests = [(str(w["project"]), str(w["name"]), w) for w in wanted if w.get("gpu")]

    # First who names a card, then who has one, then the rest: nobody's card moves to a newcomer.
    def rank(item: tuple[str, str, Mapping[str, Any]]) -> int:
        spec = item[2]["gpu"]
        if spec.get("pci") or spec.get("uuid"):
            return 0
        return 1 if any(pci in by_pci for pci in current.get(item[:2], ())) else 2

    for project, name, want in sorted(requests, key=rank):
        key = (project, name)
        spec = want["gpu"]
        optional = bool(spec.get("optional"))
        result[key] = out = Assignment()
        inherited = want.get("inherited") or {}
        chosen: list[Card] = []
        problem = ""
        if spec.get("pci") or spec.get("uuid"):
            selector = normal_pci(str(spec["pci"])) if spec.get("pci") else str(spec["uuid"])
            card = by_pci.get(selector) if spec.get("pci") else by_uuid.get(selector.lower())
            if card is None:
                problem = f"there is no card {selector} on the server"
            elif exclusive and card.pci in taken:
                problem = f"card {card} belongs to machine {taken[card.pci][1]} already"
            else:
                chosen = [card]
        else:
            count = int(spec.get("count") or 1)
            mine = [by_pci[pci] for pci in current.get(key, ()) if pci in by_pci]
            order = mine + [c for c in compute if c.pci not in busy] + [c for c in compute if c.pci in busy]
            seen: set[str] = set()
            for card in order:
                if card.pci in seen or (exclusive and card.pci in taken):
                    continue
                seen.add(card.pci)
                if len(chosen) < count:
                    chosen.append(card)
            if len(chosen) < count:
                problem = "the server has no GPU"
                if compute:
                    problem = f"it asks for {count}, and {len(chosen)} of {len(compute)} can be had"
                chosen = []
        all_cards = _unselected(inherited)
        if problem and not optional:
            out.error = (
                f"Machine {name} cannot have its GPU: {problem}. Cards on the server: {known}. Correct `gpu`"
                f" of {name} in infra.yml, or write gpu: {{optional: true}} to go on without."
            )
            continue
        if problem:
            out.note = f"Machine {name} runs without a GPU: {problem}."
            # A profile's gpu device would keep the machine from starting: hide it.
            out.devices = {device: {"type": "none"} for device in all_cards}
            continue
        if not all_cards and any(d.get("type") == "gpu" for d in inherited.values()):
            continue  # the user says by device which card it is
        free_names = (f"gpu{i}" for i in range(len(chosen) + len(inherited)))
        names = all_cards + [n for n in free_names if n not in inherited]
        for device, card in zip(names, chosen, strict=False):
            taken[card.pci] = key
            out.devices[device] = {"type": "gpu", "gputype": "physical", "pci": card.pci}
            out.cards.append(card.pci)
        for device in all_cards[len(chosen) :]:
            out.devices[device] = {"type": "none"}
    return result

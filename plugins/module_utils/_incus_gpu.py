# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which cards of a server go to which machine, and who claims them already. Plain data only."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

# In this order a machine that does not say which card it wants is served. Anything else that
# drives a screen (board management, emulated cards) is handed over only when asked for by address.
_VENDORS = {"10de": "NVIDIA", "1002": "AMD", "8086": "Intel"}
LEASE = "user.sottovoce.gpu."
DRIVER = "user.sottovoce.gpu.driver"
_SELECTORS = ("pci", "id", "vendorid", "productid", "mdev", "mig.uuid", "mig.gi", "mig.ci")
_LEASE_KEY = re.compile(
    re.escape(LEASE)
    + r"(?P<pci>[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])(@(?P<location>[^/]+))?(/(?P<part>.+))?"
)

Key = tuple[str, str]
Devices = Mapping[str, Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Card:
    """`tools`: nvidia-container-cli answered on its host. `drm`: what the device key `id` means."""

    pci: str
    vendor: str
    name: str
    uuid: str = ""
    location: str = ""
    product: str = ""
    drm: str = ""
    capability: str = ""
    driver: str = ""
    tools: bool = False

    def __str__(self) -> str:
        where = f" on {self.location}" if self.location else ""
        return f"{self.pci} {self.name}".strip() + (f" ({self.uuid})" if self.uuid else "") + where

    def summary(self, mig: str = "") -> dict[str, str]:
        vendor = _VENDORS.get(self.vendor, self.vendor).lower()
        return {
            "pci": self.pci,
            "name": self.name,
            "uuid": self.uuid,
            "vendor": vendor,
            "capability": self.capability,
            "driver": self.driver,
            "mig": mig,
        }


@dataclasses.dataclass(frozen=True)
class Claim:
    """One card, or (`part`) a slice of it, that a gpu device asks for. `declared`: by infra.yml."""

    project: str
    name: str
    pci: str
    part: str = ""
    location: str = ""
    status: str = ""
    device: str = ""
    profile: str = ""
    declared: bool = False

    @property
    def key(self) -> Key:
        return self.project, self.name

    @property
    def who(self) -> str:
        how = f"profile {self.profile}, device {self.device}" if self.profile else f"device {self.device}"
        state = f"{self.status.lower()}, " if self.status else ""
        return f"machine {self.name} of project {self.project} ({state}by {how})"

    @property
    def remedy(self) -> str:
        if self.declared:
            return f"take gpu from {self.name} in infra.yml"
        if self.profile:
            return f"incus profile device remove {self.profile} {self.device} --project {self.project}"
        return f"incus config device remove {self.name} {self.device} --project {self.project}"

    def meets(self, card: Card | Claim, part: str) -> bool:
        """Whether it is the same card and, of that, the same slice or the whole."""
        same = self.pci == card.pci and self.location == card.location
        return same and (not self.part or not part or self.part == part)


@dataclasses.dataclass(frozen=True)
class Slice:
    """A MIG slice as `nvidia-smi -L` lists it."""

    card_uuid: str
    profile: str
    uuid: str


@dataclasses.dataclass
class Request:
    """A machine that is to have a card. `spec` is empty where a hand-written device says which.

    `inherited` holds its devices without ours, `fixed` the member it is on, `members` those it may go to.
    """

    project: str
    name: str
    spec: Mapping[str, Any] | None
    inherited: Devices
    current: list[Claim] = dataclasses.field(default_factory=list)
    fixed: str | None = ""
    members: list[str] = dataclasses.field(default_factory=list)
    status: str = ""
    container: bool = True
    by_profile: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.project, self.name


@dataclasses.dataclass
class Assignment:
    """What a machine gets: devices to add to its own, the member it is made on, and what to tell."""

    devices: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    claims: list[Claim] = dataclasses.field(default_factory=list)
    cards: list[dict[str, str]] = dataclasses.field(default_factory=list)
    location: str = ""
    driver: str = ""
    tools: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)
    error: str = ""


def normal_pci(address: str) -> str:
    """`01:00.0` and `0000:01:00.0` are one address; Incus compares text."""
    address = address.strip().lower()
    return f"0000:{address}" if address.count(":") == 1 else address


def normal_mig(device: Mapping[str, str]) -> str:
    """A slice by what tells it from others of its card: its UUID, or its two numbers."""
    uuid = str(device.get("mig.uuid") or "").lower().removeprefix("mig-")
    if "/" in uuid:
        return uuid.split("/", 1)[1]
    return uuid or f"{device.get('mig.gi', '')}/{device.get('mig.ci', '')}"


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
        drm = card.get("drm") or {}
        # Beside nvidia.ko Incus gives the kernel's version for drivers that come with it.
        driver = nvidia.get("nvrm_version") or (card.get("driver_version") if vendor == "10de" else "")
        found.append(
            Card(
                normal_pci(str(pci)),
                vendor,
                name,
                str(nvidia.get("uuid") or ""),
                location,
                str(card.get("product_id") or "").lower(),
                str(drm["id"]) if "id" in drm else "",
                str(nvidia.get("architecture") or ""),
                str(driver or "") if str(card.get("driver") or "nvidia") == "nvidia" else "",
                bool(nvidia.get("cuda_version")),
            )
        )
    return found


def held(devices: Devices | None) -> list[str]:
    """The PCI addresses that gpu devices of an instance name."""
    return [normal_pci(d["pci"]) for d in (devices or {}).values() if d.get("type") == "gpu" and d.get("pci")]


def described(devices: Devices | None) -> list[str]:
    """The cards an instance has, for people: addresses, or `all` for a device that selects none."""
    return held(devices) + ["all"] * bool(unselected(devices or {}))


def unselected(devices: Devices) -> list[str]:
    """Gpu devices that would hand over every card of the server."""
    return sorted(
        name
        for name, d in devices.items()
        if d.get("type") == "gpu" and not any(d.get(k) for k in _SELECTORS)
    )


def uses_gpu(devices: Devices | None) -> bool:
    return any(d.get("type") == "gpu" for d in (devices or {}).values())


def selected(device: Mapping[str, str], cards: Iterable[Card]) -> list[str]:
    """The addresses a gpu device stands for; one that names an address keeps it when the card is gone."""
    if device.get("pci"):
        return [normal_pci(device["pci"])]
    return [
        card.pci
        for card in cards
        if device.get("vendorid", "").lower() in ("", card.vendor)
        and device.get("productid", "").lower() in ("", card.product)
        and device.get("id", "") in ("", card.drm)
    ]


def claims_of(
    project: str,
    name: str,
    devices: Devices | None,
    cards: Iterable[Card],
    *,
    location: str = "",
    status: str = "",
    by_profile: Mapping[str, str] | None = None,
    declared: bool = False,
) -> list[Claim]:
    """What an instance's (expanded) devices claim; `by_profile` names the profile a device comes from."""
    here = [card for card in cards if card.location == location]
    found: list[Claim] = []
    for device_name, device in sorted((devices or {}).items()):
        if device.get("type") == "pci" and device.get("address"):
            # A whole card handed to a virtual machine by another kind of device.
            address = normal_pci(device["address"])
            addresses, part = [address for card in here if card.pci == address], ""
        elif device.get("type") == "gpu":
            kind = device.get("gputype") or "physical"
            addresses = selected(device, here)
            # Virtual functions and mediated devices exist to be many: they meet only the whole card.
            part = {"physical": "", "mig": normal_mig(device)}.get(
                kind, f"{kind} {project}/{name}/{device_name}"
            )
        else:
            continue
        profile = (by_profile or {}).get(device_name, "")
        found += [
            Claim(project, name, pci, part, location, status, device_name, profile, declared)
            for pci in dict.fromkeys(addresses)
        ]
    return found


def parse_slices(listing: str) -> list[Slice]:
    """MIG slices from the output of `nvidia-smi -L`."""
    found: list[Slice] = []
    card = ""
    for line in listing.splitlines():
        if match := re.search(r"\(UUID: (GPU-[^)]+)\)", line):
            card = match.group(1)
        elif match := re.match(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: (MIG-[^)]+)\)", line):
            found.append(Slice(card, match.group(1), match.group(2)))
    return found


# Leases


def lease_key(claim: Claim) -> str:
    """The server's configuration key that says who is being given this card."""
    where = f"@{claim.location}" if claim.location else ""
    return f"{LEASE}{claim.pci}{where}{'/' + claim.part if claim.part else ''}"


def leases_of(config: Mapping[str, Any] | None) -> dict[str, Claim]:
    """The leases in a server's configuration, as the claims they announce."""
    found: dict[str, Claim] = {}
    for key, value in (config or {}).items():
        match = _LEASE_KEY.fullmatch(str(key))
        if match:
            project, _unused, name = str(value).partition("/")
            location, part = match["location"] or "", match["part"] or ""
            found[str(key)] = Claim(project, name, match["pci"], part, location)
    return found


def rivals(claims: Iterable[Claim], leases: Mapping[str, Claim]) -> dict[str, Claim]:
    """The leases of others that stand against `claims`."""
    wanted = list(claims)
    return {
        key: lease
        for key, lease in leases.items()
        if any(lease.key != c.key and lease.meets(c, c.part) for c in wanted)
    }


# Who gets what


class _Assigner:
    def __init__(
        self,
        requests: list[Request],
        cards: list[Card],
        others: list[Claim],
        exclusive: bool,
        slices: list[Slice] | None,
        hint: str = "",
    ) -> None:
        self.hint = hint
        self.requests = requests
        self.cards = cards
        self.others = others
        self.exclusive = exclusive
        self.slices = slices
        self.taken: list[Claim] = []

    def run(self) -> dict[Key, Assignment]:
        result: dict[Key, Assignment] = {}
        for request in sorted(self.requests, key=self._rank):
            result[request.key] = given = self._serve(request)
            self.taken += given.claims
        return {r.key: result[r.key] for r in self.requests}

    def _rank(self, request: Request) -> int:
        """First who names a card, then who has one, then the rest: nobody's card moves to a newcomer.

        Of those, the ones that can do without come last.
        """
        spec = request.spec
        if spec is None or spec.get("pci") or spec.get("uuid") or spec.get("mig") or spec.get("all"):
            return 0
        there = {(c.location, c.pci) for c in self.cards}
        if any((c.location, c.pci) in there for c in request.current):
            return 1
        return 3 if spec.get("optional") else 2

    def _rivals(self, request: Request, card: Card | Claim, part: str = "") -> list[Claim]:
        claims = self.others + self.taken
        return [c for c in claims if c.key != request.key and c.meets(card, part)]

    def _serve(self, request: Request) -> Assignment:
        out = Assignment(location=request.fixed or "")
        places = [request.fixed] if request.fixed is not None else self._by_room(request.members)
        chosen: list[tuple[Card, str, str]] = []
        problems: list[str] = []
        for place in places:
            if request.spec is None:
                out.claims, problem = self._by_hand(request, place)
            else:
                chosen, problem = self._choose(request, place)
            if not problem:
                out.location = place
                break
            problems.append(f"{place}: {problem}" if len(places) > 1 else problem)
        else:
            out.claims = []
            return self._without(request, out, "; ".join(problems) or "no member of the cluster may take it")
        if request.spec is None:
            # The user's own devices say which cards: they are counted, checked, and left as they are.
            for claim in out.claims:
                for card in self.cards:
                    if (card.pci, card.location) == (claim.pci, claim.location):
                        self._add(out, card, claim.part)
            self._share(request, out)
            return out
        gone = [c.pci for c in request.current if not self._exists(c)]
        if gone:
            out.notes.append(
                f"Machine {request.name}: its card {', '.join(gone)} is no longer on the server; it gets"
                f" {', '.join(str(card) for card, _p, _m in chosen)}."
            )
        self._devices(request, out, chosen)
        self._share(request, out)
        return out

    def _exists(self, claim: Claim) -> bool:
        return any(c.pci == claim.pci and c.location == claim.location for c in self.cards)

    def _by_room(self, members: list[str]) -> list[str]:
        """Members with the most free cards first."""

        def free(member: str) -> int:
            mine = [c for c in self._compute() if c.location == member]
            return sum(not any(t.meets(c, "") for t in self.others + self.taken) for c in mine)

        return sorted(members, key=lambda m: (-free(m), m))

    def _compute(self) -> list[Card]:
        known = [c for c in self.cards if c.vendor in _VENDORS]
        return sorted(known, key=lambda c: list(_VENDORS).index(c.vendor))

    def _by_hand(self, request: Request, place: str) -> tuple[list[Claim], str]:
        """What the user's own devices claim there; or what is wrong with that."""
        here = [c for c in self.cards if c.location == place]
        claims = claims_of(
            *request.key,
            request.inherited,
            here,
            location=place,
            status=request.status,
            by_profile=request.by_profile,
            declared=True,
        )
        if place and not request.status:
            there = {c.pci for c in here}
            met = {c.device for c in claims if c.pci in there}
            unmet = sorted(n for n, d in request.inherited.items() if d.get("type") == "gpu" and n not in met)
            if unmet:
                device = request.inherited[unmet[0]]
                wanted = ", ".join(f"{k}: {device[k]}" for k in _SELECTORS if device.get(k)) or "any card"
                return [], f"member {place} has no card for its device {unmet[0]} ({wanted})"
        problems = [p for claim in claims if (p := self._conflict(request, claim, claim.part))]
        return claims, problems[0] if problems else ""

    def _conflict(self, request: Request, card: Card | Claim, part: str = "") -> str:
        rivals = self._rivals(request, card, part)
        if not rivals or not self.exclusive:
            return ""
        told = "; ".join(c.who for c in rivals)
        shown = str(card) if isinstance(card, Card) else card.pci
        return (
            f"card {shown} belongs to {told} already, and gpu_policy is exclusive. To free it:"
            f" {rivals[0].remedy}. To use it together: global.gpu_policy: shared"
        )

    def _choose(self, request: Request, place: str) -> tuple[list[tuple[Card, str, str]], str]:
        """(card, its slice as compared, its slice as Incus is told it) for each; or what is wrong."""
        spec = request.spec or {}
        here = [c for c in self.cards if c.location == place]
        compute = [c for c in self._compute() if c.location == place]
        where = f"member {place}" if place else "the server"
        if spec.get("mig"):
            return self._slice(request, spec, here, where)
        if spec.get("pci") or spec.get("uuid"):
            selector = normal_pci(str(spec["pci"])) if spec.get("pci") else str(spec["uuid"])
            named = [c for c in here if selector.lower() in (c.pci, c.uuid.lower())]
            if not named:
                return [], f"there is no card {selector} on {where}"
            return [(named[0], "", "")], self._conflict(request, named[0])
        if not compute:
            gone = [c.pci for c in request.current if not self._exists(c)]
            return (
                [],
                f"its card {', '.join(gone)} is no longer on {where}" if gone else f"{where} has no GPU",
            )
        if spec.get("all"):
            problems = [p for c in compute if (p := self._conflict(request, c))]
            return [(c, "", "") for c in compute], problems[0] if problems else ""
        count = int(spec.get("count") or 1)
        mine = [c for pci in dict.fromkeys(x.pci for x in request.current) for c in here if c.pci == pci]
        for card in mine[:count]:
            # What it has and somebody else has, too, is for people to settle.
            if self.exclusive and any(o.key != request.key and o.meets(card, "") for o in self.others):
                return [], self._conflict(request, card)
        rest = sorted(compute, key=lambda c: len(self._rivals(request, c)))
        order = [c for c in dict.fromkeys(mine + rest) if not (self.exclusive and self._rivals(request, c))]
        if len(order) >= count:
            return [(c, "", "") for c in order[:count]], ""
        return [], self._too_few(request, compute, count, len(order))

    def _too_few(self, request: Request, compute: list[Card], count: int, free: int) -> str:
        holders = [t for c in compute for t in self._rivals(request, c)]
        asked = f"it asks for {count}, and {free} of {len(compute)} can be had"
        if not holders:
            return asked
        if all(h.declared for h in holders):
            people = list(dict.fromkeys([h.name for h in holders] + [request.name]))
            return (
                f"{asked}; a card belongs to one machine (gpu_policy: exclusive), {len(people)} ask for one:"
                f" {', '.join(people)}; keep it in one of them, or set global.gpu_policy: shared"
            )
        told = "; ".join(f"{h.pci}: {h.who}" for h in holders)
        free_it = next(h for h in holders if not h.declared).remedy
        return f"{asked}; {told}. To free one: {free_it}. To use it together: global.gpu_policy: shared"

    def _slice(
        self, request: Request, spec: Mapping[str, Any], here: list[Card], where: str
    ) -> tuple[list[tuple[Card, str, str]], str]:
        wanted = str(spec["mig"])
        nvidia = [c for c in here if c.vendor == "10de"]
        if spec.get("pci"):
            nvidia = [c for c in nvidia if c.pci == normal_pci(str(spec["pci"]))]
        if not request.container:
            return [], "a MIG slice can be given to a container only (type: lxc)"
        if not nvidia:
            return [], f"there is no NVIDIA card {spec.get('pci') or ''}".rstrip() + f" on {where}"
        if not wanted.upper().startswith("MIG-"):
            return self._slice_of_profile(request, wanted, nvidia, where)
        if len(nvidia) > 1:
            known = [s.card_uuid for s in self.slices or [] if s.uuid.lower() == wanted.lower()]
            nvidia = [c for c in nvidia if c.uuid in known] or nvidia
        if len(nvidia) > 1:
            return (
                [],
                f"{where} has {len(nvidia)} NVIDIA cards: say whose slice it is, gpu: {{mig: …, pci: …}}",
            )
        card, part = nvidia[0], normal_mig({"mig.uuid": wanted})
        return [(card, part, wanted)], self._conflict(request, card, part) or self._no_tools(card)

    def _slice_of_profile(
        self, request: Request, wanted: str, nvidia: list[Card], where: str
    ) -> tuple[list[tuple[Card, str, str]], str]:
        if self.slices is None:
            return [], (
                f"Incus lists no MIG slices, and nvidia-smi of {where} cannot be asked from here: run"
                " `nvidia-smi -L` there and write gpu: {mig: MIG-…}"
            )
        mine = {c.part for c in request.current}
        fitting = [
            (card, normal_mig({"mig.uuid": s.uuid}), s.uuid)
            for card in nvidia
            for s in self.slices
            if s.profile == wanted and s.card_uuid.lower() == card.uuid.lower()
        ]
        if not fitting:
            return [], (
                f"there is no MIG slice of profile {wanted} on {where}; make one: nvidia-smi mig -cgi"
                f" {wanted} -C"
            )
        # The one it has first.
        fitting.sort(key=lambda f: f[1] not in mine)
        for card, part, uuid in fitting:
            if not self._conflict(request, card, part):
                return [(card, part, uuid)], self._no_tools(card)
        return [], self._conflict(request, fitting[0][0], fitting[0][1])

    @staticmethod
    def _no_tools(card: Card) -> str:
        if card.tools:
            return ""
        return "a slice needs nvidia.runtime: install nvidia-container-toolkit on the host"

    def _refusal(self, request: Request, problem: str) -> str:
        if request.spec is None:
            remedy = f"Correct the gpu device of {request.name}, or of its profile"
            otherwise = ""
        else:
            remedy = f"Correct `gpu` of {request.name}"
            otherwise = ", or write gpu: {optional: true} to do without"
        return (
            f"Machine {request.name} cannot have its GPU: {problem}. Cards on the server: {self._table()}."
            f"{self.hint}"
            f" {remedy} in infra.yml{otherwise}."
        )

    def _table(self) -> str:
        """Every card, and who has it."""
        told = []
        for card in self.cards:
            holders = [f"{c.project}/{c.name}" for c in self.others + self.taken if c.meets(card, "")]
            told.append(f"{card}" + (f", with {', '.join(dict.fromkeys(holders))}" if holders else ""))
        return "; ".join(told) or "none"

    def _without(self, request: Request, out: Assignment, problem: str) -> Assignment:
        if not (request.spec or {}).get("optional"):
            out.error = self._refusal(request, problem)
            return out
        out.notes.append(f"Machine {request.name} runs without a GPU: {problem}.")
        # A profile's gpu device would keep the machine from starting: hide it.
        out.devices = {device: {"type": "none"} for device in unselected(request.inherited)}
        return out

    def _add(self, out: Assignment, card: Card, mig: str) -> None:
        out.cards.append(card.summary(mig))
        if card.vendor == "10de":
            out.driver, out.tools = card.driver, card.tools

    def _devices(self, request: Request, out: Assignment, chosen: list[tuple[Card, str, str]]) -> None:
        hidden = unselected(request.inherited)
        free = (f"gpu{i}" for i in range(len(chosen) + len(request.inherited)))
        names = hidden + [n for n in free if n not in request.inherited]
        for name, (card, part, mig) in zip(names, chosen, strict=False):
            device = {"type": "gpu", "gputype": "mig" if mig else "physical", "pci": card.pci}
            if mig:
                device["mig.uuid"] = mig
            elif request.container:
                # As the driver makes the nodes on the host: units that are not root open them, too.
                old = request.inherited.get(name, {})
                device["mode"] = "0666"
                device.update({k: old[k] for k in ("uid", "gid", "mode") if old.get(k)})
            out.devices[name] = device
            out.claims.append(
                Claim(*request.key, card.pci, part, card.location, request.status, name, declared=True)
            )
            self._add(out, card, mig)
        for name in hidden[len(chosen) :]:
            out.devices[name] = {"type": "none"}

    def _share(self, request: Request, out: Assignment) -> None:
        if self.exclusive:
            return
        for claim in out.claims:
            if rivals := self._rivals(request, claim, claim.part):
                told = ", ".join(dict.fromkeys(f"{c.project}/{c.name}" for c in rivals))
                out.notes.append(
                    f"Machine {request.name} shares card {claim.pci} with {told} (gpu_policy: shared)."
                )


def assign(
    requests: list[Request],
    cards: list[Card],
    others: list[Claim],
    exclusive: bool = True,
    slices: list[Slice] | None = None,
    hint: str = "",
) -> dict[Key, Assignment]:
    """Cards for every machine that asks for some.

    `others` are the claims of every instance that stays and is not among `requests`. In exclusive mode no
    two claims, theirs included, meet on a card: who cannot be served gets an error (or runs without).
    `slices` are the MIG slices of the server; None where they cannot be known. `hint` is a sentence for
    refusals.
    """
    return _Assigner(requests, cards, others, exclusive, slices, hint).run()

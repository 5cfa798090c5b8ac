# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_gpu as gpu
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_state as state
from hypothesis import given, settings
from hypothesis import strategies as st

Obj = dict[str, Any]
A, B = "0000:01:00.0", "0000:02:00.0"


def nvidia(pci: str, model: str, uuid: str, **more: Any) -> Obj:
    facts = {"model": model, "uuid": uuid, "cuda_version": "12.8", "nvrm_version": "570.86.15"}
    return {
        "pci_address": pci,
        "vendor_id": "10de",
        "product_id": "2684",
        "driver": "nvidia",
        "nvidia": {**facts, "architecture": "8.6"},
        **more,
    }


RESOURCES = {
    "gpu": {
        "cards": [
            {"pci_address": "0000:00:02.0", "vendor_id": "1a03", "vendor": "ASPEED", "product": "BMC"},
            {"pci_address": "0000:00:03.0", "vendor_id": "8086", "vendor": "Intel", "product": "UHD"},
            nvidia(A, "RTX 4090", "GPU-aa", drm={"id": 1}),
            nvidia(B, "RTX 3060", "GPU-bb", drm={"id": 2}),
            {"vendor_id": "10de"},
        ]
    }
}
CARDS = gpu.cards_of(RESOURCES)
ONE = [c for c in CARDS if c.pci == A]
SMI = """GPU 0: NVIDIA A100 (UUID: GPU-aa)
  MIG 1g.5gb      Device  0: (UUID: MIG-11)
  MIG 1g.5gb      Device  1: (UUID: MIG-22)
  MIG 2g.10gb     Device  2: (UUID: MIG-33)
GPU 1: NVIDIA T4 (UUID: GPU-bb)
"""


def want(
    name: str,
    inherited: Obj | None = None,
    *,
    current: list[str] | None = None,
    fixed: str | None = "",
    members: list[str] | None = None,
    **spec: object,
) -> gpu.Request:
    held = [gpu.Claim("p", name, pci, location=fixed or "") for pci in current or []]
    return gpu.Request("p", name, {"optional": False, **spec}, inherited or {}, held, fixed, members or [])


def by_hand(name: str, **device: str) -> gpu.Request:
    return gpu.Request("p", name, None, {"g": {"type": "gpu", **device}})


def foreign(**device: str) -> list[gpu.Claim]:
    devices = {"card": {"type": "gpu", **device}}
    return gpu.claims_of("other", "box", devices, CARDS, status="Stopped", by_profile={"card": "ai"})


def give(*wanted: gpu.Request, cards: list[gpu.Card] | None = None, **more: Any) -> dict[str, gpu.Assignment]:
    known = CARDS if cards is None else cards
    found = gpu.assign(list(wanted), known, more.pop("others", []), **more)
    return {name: assignment for (_p, name), assignment in found.items()}


def pcis(found: gpu.Assignment) -> list[str]:
    assert found.error == ""
    return [c.pci for c in found.claims]


def test_addresses_are_compared_normalised() -> None:
    assert gpu.normal_pci("0A:00.0") == "0000:0a:00.0"
    assert gpu.normal_pci("0000:0A:00.0") == "0000:0a:00.0"
    assert pcis(give(want("m", pci="01:00.0"))["m"]) == [A]


def test_a_compute_card_is_preferred_and_screens_of_boards_are_none() -> None:
    device = {"type": "gpu", "gputype": "physical", "pci": A, "mode": "0666"}
    found = give(want("m"))["m"]
    assert found.devices == {"gpu0": device}
    assert found.cards == [
        {
            "pci": A,
            "name": "RTX 4090",
            "uuid": "GPU-aa",
            "vendor": "nvidia",
            "capability": "8.6",
            "driver": "570.86.15",
            "mig": "",
        }
    ]
    only_bmc = gpu.cards_of({"gpu": {"cards": RESOURCES["gpu"]["cards"][:1]}})
    assert "cannot have its GPU: the server has no GPU" in give(want("m"), cards=only_bmc)["m"].error


def test_a_virtual_machine_takes_no_mode() -> None:
    vm = dataclasses.replace(want("m"), container=False)
    assert "mode" not in give(vm)["m"].devices["gpu0"]


def test_a_machine_keeps_its_card() -> None:
    found = give(want("new"), want("old", current=[A]))
    assert (pcis(found["old"]), pcis(found["new"])) == ([A], [B])


def test_a_card_that_is_gone_is_replaced_refused_or_done_without() -> None:
    gone = "0000:09:00.0"
    found = give(want("m", current=[gone]))["m"]
    assert pcis(found) == [A]
    assert f"its card {gone} is no longer on the server" in found.notes[0]
    assert (
        f"its card {gone} is no longer on the server" in give(want("m", current=[gone]), cards=[])["m"].error
    )
    optional = give(want("m", current=[gone], optional=True), cards=[])["m"]
    assert (optional.devices, optional.error) == ({}, "")
    assert f"runs without a GPU: its card {gone} is no longer" in optional.notes[0]


def test_a_named_card_goes_to_who_names_it() -> None:
    found = give(want("any"), want("named", uuid="gpu-AA"))
    assert (pcis(found["named"]), pcis(found["any"])) == ([A], [B])


def test_two_machines_naming_one_card() -> None:
    found = give(want("a", pci=A), want("b", pci=A))
    assert pcis(found["a"]) == [A]
    assert "belongs to machine a of project p" in found["b"].error
    shared = give(want("a", pci=A), want("b", pci=A), exclusive=False)["b"]
    assert pcis(shared) == [A]
    assert shared.notes == [f"Machine b shares card {A} with p/a (gpu_policy: shared)."]


def test_more_machines_than_cards() -> None:
    error = give(want("a"), want("b"), cards=ONE)["b"].error
    assert "a card belongs to one machine (gpu_policy: exclusive), 2 ask for one: a, b" in error


def test_more_cards_than_there_are() -> None:
    assert pcis(give(want("m", count=2))["m"]) == [A, B]
    error = give(want("m", count=4))["m"].error
    assert "asks for 4, and 3 of 3 can be had" in error
    assert A in error
    assert "RTX 3060" in error


def test_all_takes_every_compute_card_or_none() -> None:
    assert pcis(give(want("m", all=True))["m"]) == [A, B, "0000:00:03.0"]
    assert "other" in give(want("m", all=True), others=foreign(pci=B))["m"].error


@pytest.mark.parametrize(
    ("device", "free"),
    [
        ({"pci": "01:00.0"}, [B]),
        ({"id": "1"}, [B]),
        ({"vendorid": "10de"}, ["0000:00:03.0"]),
        ({"productid": "2684"}, ["0000:00:03.0"]),
    ],
)
def test_an_automatic_choice_avoids_what_others_claim(device: Obj, free: list[str]) -> None:
    assert pcis(give(want("m"), others=foreign(**device))["m"]) == free


def test_a_device_without_a_selector_claims_all() -> None:
    error = give(want("m"), others=foreign())["m"].error
    assert "machine box of project other (stopped, by profile ai, device card)" in error
    assert "incus profile device remove ai card --project other" in error


def test_a_conflict_names_both_sides_and_the_remedy() -> None:
    own = gpu.claims_of("other", "box", {"c": {"type": "gpu", "pci": A}}, CARDS, status="Running")
    for request in (want("m", pci=A), by_hand("m", pci=A), want("m", current=[A])):
        error = give(request, others=own)["m"].error
        assert f"Machine m cannot have its GPU: card {A}" in error
        assert "machine box of project other (running, by device c)" in error
        assert "incus config device remove box c --project other" in error
        assert "gpu_policy: shared" in error
        assert not give(request, others=own, exclusive=False)["m"].error


def test_a_pci_device_that_names_a_card_is_a_claim() -> None:
    found = gpu.claims_of("p", "vm", {"x": {"type": "pci", "address": "01:00.0"}}, CARDS)
    assert [c.pci for c in found] == [A]
    assert gpu.claims_of("p", "vm", {"x": {"type": "pci", "address": "05:00.0"}}, CARDS) == []


def test_slices_of_a_card_meet_only_themselves_and_the_whole() -> None:
    first, second = want("a", mig="MIG-11"), want("b", mig="MIG-22")
    found = give(first, second, cards=ONE)
    assert found["a"].devices == {"gpu0": {"type": "gpu", "gputype": "mig", "pci": A, "mig.uuid": "MIG-11"}}
    assert found["a"].cards[0]["mig"]
    assert pcis(found["b"]) == [A]
    assert "belongs to machine a" in give(first, want("b", mig="mig-11"), cards=ONE)["b"].error
    assert "belongs to machine box" in give(first, cards=ONE, others=foreign(pci=A))["a"].error
    same = foreign(gputype="mig", pci=A, **{"mig.uuid": "11"})
    assert "belongs to machine box" in give(first, cards=ONE, others=same)["a"].error
    assert "2 NVIDIA cards: say whose slice" in give(first)["a"].error
    assert pcis(give(want("a", mig="MIG-11", pci=A))["a"]) == [A]


def test_a_slice_by_profile() -> None:
    slices = gpu.parse_slices(SMI)
    assert next((s.card_uuid, s.profile, s.uuid) for s in slices) == ("GPU-aa", "1g.5gb", "MIG-11")
    found = give(want("a", mig="1g.5gb"), want("b", mig="1g.5gb"), want("c", mig="1g.5gb"), slices=slices)
    assert [found[m].devices["gpu0"]["mig.uuid"] for m in "ab"] == ["MIG-11", "MIG-22"]
    assert "belongs to machine a" in found["c"].error
    assert "nvidia-smi mig -cgi 3g.20gb" in give(want("a", mig="3g.20gb"), slices=slices)["a"].error
    assert "nvidia-smi -L" in give(want("a", mig="1g.5gb"))["a"].error


def test_optional_goes_on_without() -> None:
    found = give(want("m", optional=True), cards=[])["m"]
    assert (found.devices, found.error) == ({}, "")
    assert "runs without a GPU" in found.notes[0]


def test_a_profile_that_hands_over_all_cards_is_narrowed() -> None:
    profile = {"gpu": {"type": "gpu", "gputype": "physical", "gid": "44"}}
    device = {"type": "gpu", "gputype": "physical", "pci": A, "mode": "0666", "gid": "44"}
    assert give(want("m", profile))["m"].devices == {"gpu": device}
    hidden = give(want("m", profile, optional=True), cards=[])["m"]
    assert hidden.devices == {"gpu": {"type": "none"}}


def test_a_device_that_names_its_card_is_the_users_and_counts() -> None:
    found = give(want("auto"), by_hand("m", pci=A))
    assert (found["m"].devices, pcis(found["m"])) == ({}, [A])
    assert pcis(found["auto"]) == [B]


def test_a_taken_device_name_is_avoided() -> None:
    assert list(give(want("m", {"gpu0": {"type": "disk"}}))["m"].devices) == ["gpu1"]


def test_a_newcomer_that_can_do_without_is_served_last() -> None:
    found = give(want("a", optional=True), want("b"), cards=ONE)
    assert (pcis(found["a"]), pcis(found["b"])) == ([], [A])
    there = give(want("a", optional=True, current=[A]), want("b"), cards=ONE)
    assert pcis(there["a"]) == [A]
    assert "2 ask for one: a, b" in there["b"].error


def at(member: str, *pci: str) -> list[gpu.Card]:
    return [gpu.Card(p, "10de", "card", location=member) for p in pci]


def test_a_member_with_room_is_chosen_and_kept() -> None:
    cards = [*at("m1", A), *at("m2", A, B)]
    new = want("new", fixed=None, members=["m1", "m2"])
    assert give(new, cards=cards)["new"].location == "m2"
    busy = [gpu.Claim("x", "y", pci, location="m2") for pci in (A, B)]
    found = give(new, cards=cards, others=busy)["new"]
    assert (found.location, pcis(found)) == ("m1", [A])
    assert give(want("old", fixed="m1"), cards=cards)["old"].location == "m1"
    full = give(want("old", fixed="m2"), cards=cards, others=busy)["old"].error
    assert "x/y" in full
    nobody = give(want("new", fixed=None, members=["m2", "m3"]), cards=cards, others=busy)["new"].error
    assert "m3: member m3 has no GPU" in nobody
    assert f"{A} card on m2, with x/y" in nobody


@pytest.mark.parametrize("device", [{"pci": B.removeprefix("0000:")}, {"vendorid": "10de"}, {}])
def test_a_device_by_hand_is_placed_where_it_finds_a_card(device: dict[str, str]) -> None:
    cards = at("m2", B)
    new = dataclasses.replace(by_hand("new", **device), fixed=None, members=["m1", "m2"])
    found = give(new, cards=cards)["new"]
    assert (found.location, pcis(found)) == ("m2", [B])
    assert [c["pci"] for c in found.cards] == [B]
    assert found.claims[0].location == "m2"

    holder = gpu.Claim("x", "y", B, location="m2")
    error = give(new, cards=cards, others=[holder])["new"].error
    assert "m1: member m1 has no card for its device g" in error
    assert f"m2: card {B} belongs to machine y of project x" in error
    shared = give(new, cards=cards, others=[holder], exclusive=False)["new"]
    assert (shared.location, pcis(shared)) == ("m2", [B])

    named = dataclasses.replace(new, fixed="m1", members=[])
    assert "member m1 has no card for its device g" in give(named, cards=cards)["new"].error
    # A machine that is there is not held up by a card that is gone.
    there = dataclasses.replace(named, status="Running")
    assert give(there, cards=cards)["new"].error == ""


def test_leases_are_told_apart_by_member_and_slice() -> None:
    claims = [
        gpu.Claim("a", "b", A),
        gpu.Claim("a", "b", A, location="m1"),
        gpu.Claim("a", "b", A, "11", "m1"),
        gpu.Claim("a", "b", A, "3/0"),
    ]
    config = {gpu.lease_key(c): "a/b" for c in claims}
    assert len(config) == 4
    assert list(gpu.leases_of({**config, gpu.DRIVER: "1", "core.x": "y"}).values()) == claims
    assert gpu.rivals([gpu.Claim("c", "d", A, location="m1")], gpu.leases_of(config)).keys() == {
        gpu.lease_key(c) for c in claims[1:3]
    }
    assert gpu.rivals([gpu.Claim("a", "b", A)], gpu.leases_of(config)) == {}


POOL = [f"0000:0{i}:00.0" for i in range(1, 5)]
SPEC = st.one_of(
    st.just({}),
    st.builds(lambda n: {"count": n}, st.integers(1, 4)),
    st.builds(lambda p: {"pci": p}, st.sampled_from(POOL)),
    st.just({"all": True}),
    st.builds(lambda n, p: {"mig": f"MIG-{n}", "pci": p}, st.integers(1, 2), st.sampled_from(POOL)),
)
DEVICE = st.sampled_from(
    [{}, {"pci": POOL[0]}, {"vendorid": "10de"}, {"gputype": "mig", "pci": POOL[1], "mig.uuid": "1"}]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(SPEC, st.booleans(), st.lists(st.sampled_from(POOL), max_size=2)), max_size=5),
    st.lists(DEVICE, max_size=2),
    st.integers(0, 4),
)
def test_exclusive_means_one_owner(requests: list[Any], devices: list[Obj], count: int) -> None:
    cards = [gpu.Card(p, "10de", "card", uuid=f"GPU-{p}", tools=True) for p in POOL[:count]]
    others = [
        c
        for i, d in enumerate(devices)
        for c in gpu.claims_of("x", f"f{i}", {"g": {"type": "gpu", **d}}, cards)
    ]
    wanted = [
        want(f"m{i}", current=current, optional=optional, **spec)
        for i, (spec, optional, current) in enumerate(requests)
    ]
    found = gpu.assign(wanted, cards, others)
    ours = [c for a in found.values() for c in a.claims]
    for claim in ours:
        assert not [c for c in ours + others if c.key != claim.key and c.meets(claim, claim.part)]
    for request in wanted:
        given_ = found[request.key]
        assert bool(given_.error) + bool(given_.claims) + bool(given_.notes) >= 1
        assert not (given_.error and given_.devices)


@pytest.mark.parametrize(
    ("version", "stale"),
    [
        ("6.0.4", True),
        ("6.0.5", True),
        ("6.0.6", False),
        ("6.16", True),
        ("7.2.0", True),
        ("7.3", False),
        ("", False),
    ],
)
def test_versions_that_do_not_see_a_changed_card(version: str, stale: bool) -> None:
    assert state.lists_stale_cards({"environment": {"server_version": version}}) is stale


def test_the_driver_that_is_loaded_wins_over_what_incus_remembers(tmp_path: Path) -> None:
    cards = [{"pci_address": "0000:01:00.0", "vendor_id": "10de", "nvidia": {"nvrm_version": "550.1"}}]
    snapshot = state.Snapshot(member_resources={"": {"gpu": {"cards": cards}}})
    state.refresh_driver(snapshot, str(tmp_path))
    assert gpu.cards_of(snapshot.member_resources[""])[0].driver == "550.1"
    version = tmp_path / "sys/module/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text("570.86.15\n")
    state.refresh_driver(snapshot, str(tmp_path))
    assert gpu.cards_of(snapshot.member_resources[""])[0].driver == "570.86.15"

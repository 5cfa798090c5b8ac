# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import json
from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_diff as d
from hypothesis import given
from hypothesis import strategies as st

Obj = dict[str, Any]


def managed(config: Obj, devices: Obj | None = None, image: str = "", **more: object) -> Obj:
    """An object as an earlier run of ours left it."""
    config = {**config, d.MARK: "home", d.RECORD: d.make_record(config, devices, image)}
    return {"config": config, **({"devices": devices} if devices is not None else {}), **more}


def target(**more: object) -> Obj:
    return {"description": "", "config": {}, "mark": "home", **more}


def test_a_new_object_gets_the_marks() -> None:
    after = d.rebuild("network", {}, target(config={"ipv4.nat": True, "ipv6.address": "none"}))
    assert after["config"]["ipv4.nat"] == "true"
    assert after["config"][d.MARK] == "home"
    assert json.loads(after["config"][d.RECORD]) == {"config": ["ipv4.nat", "ipv6.address"]}


def test_what_was_written_needs_no_second_write() -> None:
    wanted = target(config={"a": "1", "b": ""}, devices={"eth0": {"type": "nic", "network": "n"}}, image="x")
    once = d.rebuild("profile", {}, wanted)
    assert d.changes(once, d.rebuild("profile", once, wanted)) == {}


def test_foreign_volatile_and_image_keys_stay() -> None:
    current = managed({"limits.memory": "1GiB"})
    current["config"] |= {"volatile.uuid": "u", "image.os": "debian", "user.mine": "1"}
    after = d.rebuild("network", current, target(config={"limits.memory": "2GiB"}))
    assert after["config"]["limits.memory"] == "2GiB"
    assert {"volatile.uuid", "image.os", "user.mine"} <= after["config"].keys()
    found = d.visible(d.changes(current, after))
    assert found == {"config.limits.memory": {"before": "1GiB", "after": "2GiB"}}


def test_a_key_dropped_from_the_declaration_goes_but_a_users_own_stays() -> None:
    current = managed({"limits.memory": "1GiB", "limits.cpu": "2"})
    current["config"]["limits.processes"] = "500"
    after = d.rebuild("network", current, target(config={"limits.cpu": "2"}))
    assert "limits.memory" not in after["config"]
    assert after["config"]["limits.processes"] == "500"


def test_a_record_cannot_be_used_to_remove_volatile_keys() -> None:
    current = {"config": {"volatile.uuid": "u", d.RECORD: '{"config":["volatile.uuid"]}'}}
    assert d.rebuild("network", current, target())["config"]["volatile.uuid"] == "u"


@pytest.mark.parametrize(
    "record", ["", "no json", "[]", '{"config": 3, "devices": []}', '{"devices": {"a": 1}}']
)
def test_a_damaged_record_counts_as_none(record: str) -> None:
    current = {"config": {"a": "1", d.RECORD: record}, "devices": {"x": {"type": "none"}}}
    after = d.rebuild("profile", current, target(config={"b": "2"}, devices={}))
    assert after["config"]["a"] == "1"
    assert after["config"]["b"] == "2"


def test_devices_foreign_ones_and_foreign_keys_stay() -> None:
    devices = {"eth0": {"type": "nic", "network": "n", "ipv4.address": "10.0.0.1"}, "data": {"type": "disk"}}
    current = managed({}, devices)
    current["devices"] = {
        "eth0": {**devices["eth0"], "limits.ingress": "10Mbit"},
        "data": {"type": "disk"},
        "mine": {"type": "proxy"},
    }
    wanted = {"eth0": {"type": "nic", "network": "n"}}
    after = d.rebuild("instance", current, target(devices=wanted))["devices"]
    assert after == {
        "eth0": {"type": "nic", "network": "n", "limits.ingress": "10Mbit"},
        "mine": {"type": "proxy"},
    }


def test_a_device_of_another_type_is_replaced_and_selectors_exclude_each_other() -> None:
    current = {"devices": {"a": {"type": "disk", "path": "/x"}, "g": {"type": "gpu", "id": "0"}}}
    wanted = {"a": {"type": "proxy"}, "g": {"type": "gpu", "pci": "0000:01:00.0"}}
    assert d.rebuild("profile", current, target(devices=wanted))["devices"] == wanted


def test_auto_is_answered_by_the_server() -> None:
    current = managed({"ipv4.address": "auto"})
    current["config"]["ipv4.address"] = "10.1.1.1/24"
    wanted = target(config={"ipv4.address": "auto"})
    assert d.changes(current, d.rebuild("network", current, wanted)) == {}


def test_the_image_of_record_is_the_first_one() -> None:
    current = managed({}, {}, image="images:debian/12")
    after = d.rebuild("instance", current, target(devices={}, image="images:debian/13"))
    assert d.record_of(after)["image"] == "images:debian/12"


def test_instances_keep_what_put_needs() -> None:
    current = managed({}, {}, architecture="x86_64", ephemeral=False, stateful=True, profiles=["a"])
    after = d.rebuild("instance", current, target(devices={}, profiles=["b"]))
    assert (after["architecture"], after["stateful"], after["profiles"]) == ("x86_64", True, ["b"])


@pytest.mark.parametrize("foreign", [{}, {"boot.priority": "5"}, {"limits.ingress": "1Mbit"}])
def test_an_address_given_up_leaves_nothing_behind(foreign: Obj) -> None:
    nic = {"type": "nic", "network": "n", "ipv4.address": "10.0.0.1"}
    current = managed({"a": "1"}, {"eth0": nic}, image="lab")
    current["devices"] = {"eth0": {**nic, **foreign}, "mine": {"type": "proxy"}}
    given_up = d.give_up_addresses(current, ["eth0", "no-such"])
    assert "ipv4.address" not in given_up["devices"]["eth0"]
    # Incus must see a change of a key that it cannot change on a card in place.
    assert given_up["devices"]["eth0"].keys() - current["devices"]["eth0"].keys() <= {"boot.priority", "mtu"}
    wanted = target(config={"a": "1"}, devices={"eth0": {**nic, "ipv4.address": "10.0.0.2"}}, image="lab")
    after = d.rebuild("instance", given_up, wanted)
    assert after["devices"] == {
        "eth0": {**nic, "ipv4.address": "10.0.0.2", **foreign},
        "mine": {"type": "proxy"},
    }
    assert after["config"] == current["config"]


def test_secrets_are_not_shown() -> None:
    before: Obj = {"config": {}}
    after = {"config": {"environment.API_KEY": "sk-1", "environment.LANG": "C"}}
    found = d.visible(d.changes(before, after))
    assert found["config.environment.API_KEY"]["after"] == "********"
    assert found["config.environment.LANG"]["after"] == "C"
    assert "sk-1" not in d.as_text(after)


def test_the_diff_text_has_no_bookkeeping() -> None:
    obj = managed({"a": "1\n2", "volatile.x": "1", "image.os": "d"}, {"r": {"type": "disk"}}, description="d")
    text = d.as_text(obj)
    assert d.RECORD not in text
    assert "volatile" not in text
    assert '  a: "1\\n2"\n' in text
    assert d.as_text(None) == ""


@pytest.mark.parametrize(
    ("itype", "before", "after", "why"),
    [
        ("container", {}, {"security.nesting": "true"}, ["security.nesting"]),
        ("container", {"raw.lxc": "x"}, {}, ["raw.lxc"]),
        ("container", {"nvidia.runtime": "false"}, {"nvidia.runtime": "true"}, ["nvidia.runtime"]),
        ("container", {"limits.memory": "1"}, {"limits.memory": "2", "boot.autostart": "true"}, []),
        ("container", {"volatile.x": "1"}, {}, []),
        ("container", {}, {"security.nesting": "false"}, []),
        ("virtual-machine", {}, {"security.secureboot": "false"}, ["security.secureboot"]),
        ("virtual-machine", {}, {"limits.memory": "2GiB", "user.a": "1"}, []),
    ],
)
def test_which_keys_need_a_restart(itype: str, before: Obj, after: Obj, why: list[str]) -> None:
    assert d.needs_restart(itype, before, after, {}, {}) == why


def test_which_devices_need_a_restart() -> None:
    nic = {"type": "nic", "network": "n", "ipv4.address": "10.0.0.1"}
    moved = {**nic, "ipv4.address": "10.0.0.2"}
    card = {"type": "gpu", "pci": "0000:01:00.0"}
    assert d.needs_restart("container", {}, {}, {"eth0": nic}, {"eth0": moved}) == ["eth0.ipv4.address"]
    assert d.needs_restart("container", {}, {}, {"eth0": nic}, {"eth0": {**nic, "limits.ingress": "1"}}) == []
    assert d.needs_restart("container", {}, {}, {}, {"gpu0": card, "eth1": nic}) == []
    assert d.needs_restart("virtual-machine", {}, {}, {}, {"gpu0": card}) == ["gpu0"]


def test_expand_follows_incus() -> None:
    profiles = [
        {"config": {"a": "1", "b": "1", d.MARK: "home"}, "devices": {"root": {"pool": "x"}}},
        {"config": {"b": "2"}, "devices": {"root": {"pool": "y"}}},
    ]
    config, devices = d.expand({"c": "3"}, {"eth0": {"type": "nic"}}, profiles)
    assert config == {"a": "1", "b": "2", "c": "3"}
    assert devices == {"root": {"pool": "y"}, "eth0": {"type": "nic"}}


KEYS = st.sampled_from(["a", "b", "limits.cpu", "volatile.x", "image.os", "user.mine"])
CONFIG = st.dictionaries(KEYS, st.sampled_from(["", "1", "2", "auto"]), max_size=4)
DEVICE = st.dictionaries(st.sampled_from(["type", "network", "parent", "pci", "id"]), st.sampled_from("xyz"))
DEVICES = st.dictionaries(st.sampled_from(["eth0", "root", "gpu0"]), DEVICE, max_size=3)


@given(current=CONFIG, first=CONFIG, second=CONFIG, devices=DEVICES, one=DEVICES, two=DEVICES)
def test_any_sequence_of_declarations_settles(current, first, second, devices, one, two) -> None:  # type: ignore[no-untyped-def]
    """Writing twice is writing once, and nothing of the first declaration survives the second."""
    start: Obj = {"config": d.clean(current), "devices": d.clean_devices(devices)}
    middle = d.rebuild("profile", start, target(config=first, devices=one))
    end = d.rebuild("profile", middle, target(config=second, devices=two))
    assert d.changes(end, d.rebuild("profile", end, target(config=second, devices=two))) == {}
    for key in d.clean(first).keys() - d.clean(second).keys():
        if not key.startswith(("volatile.", "image.")):
            assert key not in end["config"]
    for name in one.keys() - two.keys():
        assert name not in end["devices"]
    for key, value in start["config"].items():
        if key not in d.clean(first) and key not in d.clean(second):
            assert end["config"][key] == value

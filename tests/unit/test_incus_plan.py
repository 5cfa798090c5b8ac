# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import copy
from typing import Any

import pytest
from _fake_incus import FakeClient, FakeServer, desired, machine
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_infra as infra
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_plan as planning
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_state as state
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import IncusUnreachable
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_diff import MARK

Obj = dict[str, Any]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    monkeypatch.setattr(state, "read_routes", lambda client, snapshot: None)
    return FakeServer()


def run(
    server: FakeServer, wanted: Obj, *, check: bool = False, fallback: str = "lab", **options: Any
) -> Obj:
    settings = infra.Settings(image_fallback=fallback, probe=lambda _server: "no route")
    return infra.reconcile(
        FakeClient(server),  # type: ignore[arg-type]
        copy.deepcopy(wanted),
        planning.Options(**options),
        settings,
        check=check,
        diff=True,
    )


def refused(server: FakeServer, wanted: Obj, **options: Any) -> str:
    before = copy.deepcopy(server.objects)
    with pytest.raises(infra.InfraError) as caught:
        run(server, wanted, **options)
    assert server.objects == before
    assert caught.value.result["changed"] is False
    return str(caught.value)


def reasons(result: Obj) -> str:
    return "\n".join(f"{r['name']}: {r['why']}" for r in result["resources"] if r["action"] == "skipped")


def actions(result: Obj, *kinds: str) -> dict[str, str]:
    return {r["name"]: r["action"] for r in result["resources"] if not kinds or r["kind"] in kinds}


def test_cold_then_nothing(server: FakeServer) -> None:
    wanted = desired(machine("one"), machine("two", 2))
    assert set(actions(run(server, wanted)).values()) == {"created"}
    again = run(server, wanted)
    assert again["changed"] is False
    assert set(actions(again).values()) == {"unchanged"}
    assert again["diff"] == []
    assert [i["address"] for i in again["instances"]] == ["10.120.0.1", "10.120.0.2"]
    assert {i["status"] for i in again["instances"]} == {"Running"}


def test_requests_do_not_grow_with_machines(server: FakeServer) -> None:
    few = desired(machine("m1"))
    run(server, few)
    one = run(server, few)["requests"]
    many = desired(*[machine(f"m{i}", i) for i in range(1, 100)])
    run(server, many)
    assert run(server, many)["requests"] == one == 5


@pytest.mark.parametrize("options", [{}, {"prune": True}, {"state": "absent"}])
def test_check_mode_writes_nothing_and_tells_the_same(server: FakeServer, options: Obj) -> None:
    run(server, desired(machine("one"), machine("two", 2)))
    wanted = desired(machine("two", 3), machine("three", 4, config={"security.nesting": "true"}))
    before = copy.deepcopy(server.objects)
    told = run(server, wanted, check=True, **options)
    assert server.objects == before
    assert {m for m, _p in server.log[-told["requests"] :]} == {"GET"}
    done = run(server, wanted, **options)
    assert told["resources"] == done["resources"]
    assert told["diff"] == done["diff"]
    assert told["changed"] is done["changed"] is True


def test_check_mode_before_there_is_a_daemon(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_args: Any, **_more: Any) -> Any:
        raise IncusUnreachable("Incus is not running or not installed")

    monkeypatch.setattr(FakeServer, "handle", down)
    wanted = desired(machine("one", image="images:debian/13", gpu={"optional": False}))
    told = run(server, wanted, check=True)
    assert set(actions(told).values()) == {"created"}
    assert "Incus is not running" in told["notes"][0]
    with pytest.raises(IncusUnreachable):
        run(server, wanted)
    assert run(server, wanted, check=True, state="absent")["changed"] is False


def test_drift_is_repaired_and_shown(server: FakeServer) -> None:
    wanted = desired(machine("one", config={"limits.memory": "1GiB"}))
    run(server, wanted)
    one = server.objects["instances"]["a", "one"]
    one["config"] |= {"limits.memory": "9GiB", "user.mine": "1", "volatile.uuid": "u"}
    one["devices"]["eth0"]["limits.ingress"] = "1Mbit"
    server.objects["networks"]["default", "net-a"]["config"]["ipv4.nat"] = "false"
    result = run(server, wanted)
    assert actions(result) == {"a": "unchanged", "net-a": "updated", "one": "updated"}
    diff = {d["before_header"]: d for d in result["diff"]}["machine one in project a"]
    assert "limits.memory: 9GiB" in diff["before"]
    assert "limits.memory: 1GiB" in diff["after"]
    assert one["config"]["user.mine"] == "1"
    assert one["config"]["volatile.uuid"] == "u"
    assert one["devices"]["eth0"]["limits.ingress"] == "1Mbit"


def test_a_stopped_machine_is_started_unless_declared_so(server: FakeServer) -> None:
    run(server, desired(machine("one")))
    server.objects["instances"]["a", "one"].update(status="Stopped", status_code=102)
    assert actions(run(server, desired(machine("one", started=False))))["one"] == "unchanged"
    assert actions(run(server, desired(machine("one"))))["one"] == "started"
    server.objects["instances"]["a", "one"].update(status="Frozen", status_code=110)
    assert actions(run(server, desired(machine("one"))))["one"] == "started"


def test_nothing_is_started_without_start(server: FakeServer) -> None:
    run(server, desired(machine("one")), start=False)
    assert server.objects["instances"]["a", "one"]["status"] == "Stopped"
    assert run(server, desired(machine("one")), start=False)["changed"] is False
    assert actions(run(server, desired(machine("one"))))["one"] == "started"


def test_what_needs_a_restart(server: FakeServer) -> None:
    run(server, desired(machine("one")))
    result = run(server, desired(machine("one", config={"security.nesting": "true"})))
    assert actions(result)["one"] == "restarted"
    assert "security.nesting" in next(r["why"] for r in result["resources"] if r["name"] == "one")
    states = [(m, p) for m, p in server.log if p.endswith("/state")]
    assert len(states) == 2  # stop and start around the change


def test_a_profile_can_need_a_restart_of_those_that_use_it(server: FakeServer) -> None:
    def with_profile(value: str) -> Obj:
        profile = {"project": "a", "name": "p", "config": {"security.nesting": value}, "devices": {}}
        own = machine("own", 2, profiles=["p"], config={"security.nesting": "true"})
        return desired(machine("one", profiles=["p"]), own, profiles=[profile])

    run(server, with_profile("false"))
    found = actions(run(server, with_profile("true")))
    assert found == {
        "a": "unchanged",
        "net-a": "unchanged",
        "p": "updated",
        "one": "restarted",
        "own": "unchanged",
    }


def test_protection_follows_ephemeral(server: FakeServer) -> None:
    run(server, desired(machine("one", ephemeral=False)))
    one = server.objects["instances"]["a", "one"]
    assert one["config"]["security.protection.delete"] == "true"
    assert actions(run(server, desired(machine("one"))))["one"] == "updated"
    assert "security.protection.delete" not in server.objects["instances"]["a", "one"]["config"]


# Root disks, pools, volumes


def test_root_disk_from_the_option_the_profile_or_the_past(server: FakeServer) -> None:
    server.pools = ["fast", "default"]
    run(server, desired(machine("one")), storage_pool="fast")
    one = server.objects["instances"]["a", "one"]
    assert one["devices"]["root"] == {"type": "disk", "path": "/", "pool": "fast"}
    # Another default later does not move what is there.
    assert run(server, desired(machine("one")), storage_pool="default")["changed"] is False
    profile = {
        "project": "a",
        "name": "p",
        "devices": {"disk": {"type": "disk", "path": "/", "pool": "fast"}},
    }
    run(server, desired(machine("one"), machine("two", 2, profiles=["p"]), profiles=[profile]))
    assert "root" not in server.objects["instances"]["a", "two"]["devices"]


def test_a_root_disk_declared_elsewhere_is_a_note(server: FakeServer) -> None:
    server.pools = ["fast", "default"]
    run(server, desired(machine("one")))
    devices = {**machine("one")["devices"], "root": {"type": "disk", "path": "/", "pool": "fast"}}
    result = run(server, desired(machine("one", devices=devices)))
    assert server.objects["instances"]["a", "one"]["devices"]["root"]["pool"] == "default"
    assert any("root disk in pool default" in n for n in result["notes"])


def test_volumes_get_the_pool_and_so_do_the_devices_that_use_them(server: FakeServer) -> None:
    volume = {"project": "a", "name": "data", "pool": None, "config": {"size": "1GiB"}}
    devices = {**machine("one")["devices"], "data": {"type": "disk", "source": "data", "path": "/srv"}}
    wanted = desired(machine("one", devices=devices), volumes=[volume])
    run(server, wanted)
    assert ("a", "default", "data") in server.objects["volumes"]
    assert server.objects["instances"]["a", "one"]["devices"]["data"]["pool"] == "default"
    assert run(server, wanted)["changed"] is False
    # It is found again where it is, even if new ones would go elsewhere.
    server.pools.append("fast")
    assert run(server, wanted, storage_pool="fast")["changed"] is False


def test_a_missing_pool_is_refused_with_the_list(server: FakeServer) -> None:
    message = refused(server, desired(machine("one")), storage_pool="ssd")
    assert "no storage pool ssd" in message
    assert "default" in message


# Ownership and refusals


@pytest.mark.parametrize("kind", ["projects", "networks", "instances"])
def test_what_is_not_ours_is_refused_and_adopted_only_on_request(server: FakeServer, kind: str) -> None:
    wanted = desired(machine("one"))
    run(server, wanted)
    for obj in server.objects[kind].values():
        obj["config"] = {k: v for k, v in obj["config"].items() if not k.startswith("user.sottovoce.")}
    message = refused(server, wanted)
    assert "was not made by this collection" in message
    assert "adopt: true" in message
    assert run(server, wanted, adopt=True)["changed"] is True
    assert run(server, wanted)["changed"] is False


def test_another_projects_things_are_named(server: FakeServer) -> None:
    run(server, desired(machine("one")))
    message = refused(server, {**desired(machine("one")), "project_name": "other"})
    assert f"belongs to {MARK}=home" in message


def test_the_default_profile_of_our_project_is_ours(server: FakeServer) -> None:
    profile = {"project": "a", "name": "default", "config": {"limits.cpu": "1"}, "devices": {}}
    wanted = desired(machine("one"), profiles=[profile])
    run(server, wanted)
    assert server.objects["profiles"]["a", "default"]["config"]["limits.cpu"] == "1"
    assert run(server, wanted)["changed"] is False


def test_an_interface_of_the_host_is_in_the_way(server: FakeServer) -> None:
    server.add("networks", ("default", "net-a"), {"name": "net-a", "managed": False})
    assert "ip link delete net-a" in refused(server, desired())


def test_all_refusals_at_once(server: FakeServer) -> None:
    wanted = desired(
        machine("one", image="nosuch"),
        machine("two", 2, profiles=["nosuch"]),
        machine("three", 3, project="nowhere"),
        machine("four", 4, devices={"eth0": {"type": "nic", "network": "net-x"}}),
        machine("five", 5, gpu={"optional": False}),
        machine("six", 6, image=""),
    )
    message = refused(server, wanted)
    for text in ("nosuch", "uses profile nosuch", "nowhere", "net-x", "cannot have its GPU", "has no image"):
        assert text in message
    assert "nothing was changed" in message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"project_name": ""}, "no project_name"),
        ({"instances": "x"}, "desired.instances is not a list"),
        ({"instances": [{}]}, r"desired.instances\[0\] is not a mapping with a name"),
        ({"projects": [{"name": "a"}, {"name": "a"}]}, "has a twice"),
    ],
)
def test_a_hand_written_state_is_checked(server: FakeServer, change: Obj, text: str) -> None:
    with pytest.raises(infra.InfraError, match=text):
        run(server, {**desired(), **change})


# What cannot be changed in place


def test_image_and_type_are_notes_never_a_rebuild(server: FakeServer) -> None:
    server.aliases.append({"name": "other", "type": "container"})
    run(server, desired(machine("one")))
    result = run(server, desired(machine("one", image="other", type="virtual-machine")))
    assert result["changed"] is False
    assert any("made from lab" in n for n in result["notes"])
    assert any("is a container" in n for n in result["notes"])


def test_features_of_a_project_in_use_stay(server: FakeServer) -> None:
    run(server, desired(machine("one")))
    wanted = desired(machine("one"))
    wanted["projects"][0]["config"]["features.images"] = "true"
    result = run(server, wanted)
    assert result["changed"] is False
    assert any("features.images cannot be changed" in n for n in result["notes"])


def test_a_vm_is_the_same_code(server: FakeServer) -> None:
    server.aliases.append({"name": "vm", "type": "virtual-machine"})
    run(server, desired(machine("one", type="virtual-machine", image="vm")))
    assert server.objects["instances"]["a", "one"]["type"] == "virtual-machine"


# GPU


def card(pci: str) -> Obj:
    return {"pci_address": pci, "vendor_id": "10de", "vendor": "NVIDIA"}


def test_a_gpu_is_given_kept_and_taken_back(server: FakeServer) -> None:
    server.cards = [card("0000:01:00.0"), card("0000:02:00.0")]
    wanted = desired(machine("one", gpu={"pci": "02:00.0"}))
    result = run(server, wanted)
    assert result["instances"][0]["gpu"] == ["0000:02:00.0"]
    keeps = run(server, desired(machine("one", gpu={"optional": False})))
    assert keeps["changed"] is False
    server.cards = []
    gone = run(server, desired(machine("one", gpu={"optional": True})))
    assert gone["resources"][-1]["changes"].keys() == {
        f"devices.gpu0.{k}" for k in ("gputype", "mode", "pci", "type")
    }
    assert any("runs without a GPU" in n for n in gone["notes"])


def test_resources_are_read_only_for_a_gpu(server: FakeServer) -> None:
    run(server, desired(machine("one")))
    assert ("GET", "/1.0/resources") not in server.log


# Subnets


def test_a_subnet_in_use_is_refused_with_both_names(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("networks", ("default", "lan"), {"name": "lan", "config": {"ipv4.address": "10.120.0.1/16"}})
    message = refused(server, desired())
    assert "Network net-a would be 10.120.0.0/24" in message
    assert "10.120.0.0/16 of the Incus network lan" in message


@pytest.mark.parametrize(
    ("route", "refuses", "notes"),
    [
        (state.Route("eth0", "10.120.0.0/24"), True, False),
        (state.Route("eth0", "10.0.0.0/8"), True, False),
        (state.Route("tun0", "10.0.0.0/8", direct=False), False, True),
        (state.Route("tun0", "10.120.0.128/25", direct=False), True, False),
        (state.Route("eth0", "10.121.0.0/24"), False, False),
    ],
)
def test_host_routes(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, route: state.Route, refuses: bool, notes: bool
) -> None:
    monkeypatch.setattr(state, "read_routes", lambda client, snapshot: snapshot.routes.append(route))
    if refuses:
        assert route.interface in refused(server, desired())
    else:
        assert bool(run(server, desired())["notes"]) is notes


def test_the_route_of_our_own_bridge_is_no_overlap(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(server, desired())
    route = state.Route("net-a", "10.120.0.0/24")
    monkeypatch.setattr(state, "read_routes", lambda client, snapshot: snapshot.routes.append(route))
    wanted = desired()
    wanted["networks"][0]["config"]["ipv4.address"] = "10.120.0.253/24"
    assert actions(run(server, wanted))["net-a"] == "updated"


def test_two_declared_networks_overlap(server: FakeServer) -> None:
    wanted = desired()
    wanted["networks"].append({"name": "net-b", "config": {"ipv4.address": "10.120.0.1/16"}})
    assert "the declared network net-" in refused(server, wanted)


def test_routes_are_parsed() -> None:
    table = (
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "net-lab\t0000C70A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        "tun0\t0000000A\t0100A8C0\t0003\t0\t0\t0\t000000FF\t0\t0\t0\n"
        "*\t0000010A\t00000000\t0201\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
    )
    assert state.parse_routes(table) == [
        state.Route("net-lab", "10.199.0.0/24", True),
        state.Route("tun0", "10.0.0.0/8", False),
    ]


# Addresses that move


def test_machines_swap_and_shift_addresses(server: FakeServer) -> None:
    run(server, desired(machine("one", 1), machine("two", 2), machine("three", 3)))
    run(server, desired(machine("one", 2), machine("two", 1), machine("three", 4), machine("new", 3)))
    addresses = {k[1]: i["devices"]["eth0"]["ipv4.address"] for k, i in server.objects["instances"].items()}
    assert addresses == {"one": "10.120.0.2", "two": "10.120.0.1", "three": "10.120.0.4", "new": "10.120.0.3"}
    assert {i["status"] for i in server.objects["instances"].values()} == {"Running"}


def test_an_address_of_a_dropped_machine(server: FakeServer) -> None:
    run(server, desired(machine("old", 1)))
    message = refused(server, desired(machine("new", 1)))
    assert "10.120.0.1" in message
    assert "machine old" in message
    assert actions(run(server, desired(machine("new", 1)), prune=True), "instance") == {
        "old": "deleted",
        "new": "created",
    }


# Prune and absent


def two_domains() -> Obj:
    wanted = desired(machine("one"))
    wanted["projects"].append({"name": "b", "config": {"features.networks": "false"}})
    wanted["networks"].append({"name": "net-b", "config": {"ipv4.address": "10.121.0.254/24"}})
    wanted["profiles"].append(
        {"project": "b", "name": "p", "devices": {"eth9": {"type": "nic", "network": "net-b"}}}
    )
    wanted["instances"].append(
        machine("two", project="b", profiles=["p"], devices={"eth0": {"type": "nic", "network": "net-b"}})
    )
    return wanted


def test_nothing_is_removed_without_being_asked(server: FakeServer) -> None:
    run(server, two_domains())
    assert run(server, desired(machine("one")))["changed"] is False


def test_prune_removes_what_was_dropped(server: FakeServer) -> None:
    run(server, two_domains())
    result = run(server, desired(machine("one")), prune=True)
    assert {n for n, a in actions(result).items() if a == "deleted"} == {"two", "p", "net-b", "b"}
    assert run(server, desired(machine("one")), prune=True)["changed"] is False
    assert set(server.objects["projects"]) == {("default",), ("a",)}


def test_prune_leaves_what_is_not_ours_and_what_it_stands_on(server: FakeServer) -> None:
    run(server, two_domains())
    server.add(
        "instances",
        ("b", "guest"),
        {"name": "guest", "devices": {"eth0": {"type": "nic", "network": "net-b"}}},
    )
    server.add("networks", ("default", "lan"), {"name": "lan"})
    result = run(server, desired(machine("one")), prune=True)
    assert {n: a for n, a in actions(result).items() if a in ("deleted", "skipped")} == {
        "two": "deleted",
        "p": "deleted",
        "net-b": "skipped",
        "b": "skipped",
    }
    assert "net-b: used by machine guest" in reasons(result)
    assert ("b", "guest") in server.objects["instances"]
    assert ("default", "lan") in server.objects["networks"]


def test_prune_keeps_the_protected_and_says_how(server: FakeServer) -> None:
    wanted = two_domains()
    wanted["instances"][1]["ephemeral"] = False
    run(server, wanted)
    result = run(server, desired(machine("one")), prune=True)
    assert result["changed"] is False
    assert {n for n, a in actions(result).items() if a == "skipped"} == {"two", "p", "net-b", "b"}
    why = reasons(result)
    assert "set ephemeral: true for two in infra.yml" in why
    assert "incus config set two security.protection.delete=false --project b" in why
    message = refused(server, desired(machine("one")), prune=True, protected="fail")
    assert "Machine two in project b is protected" in message


def test_a_network_that_its_users_leave_is_pruned_after_them(server: FakeServer) -> None:
    wanted = two_domains()
    run(server, wanted)
    moved = machine("two", 9, project="b", profiles=["default"])
    rest = desired(machine("one"), moved)
    rest["projects"] = wanted["projects"]
    result = run(server, rest, prune=True)
    assert actions(result) == {
        "a": "unchanged",
        "b": "unchanged",
        "net-a": "unchanged",
        "one": "unchanged",
        "two": "restarted",
        "p": "deleted",
        "net-b": "deleted",
    }


def test_a_renamed_domain_takes_the_subnet_over(server: FakeServer) -> None:
    run(server, two_domains())
    renamed = desired(machine("one"))
    renamed["networks"].append({"name": "net-c", "config": {"ipv4.address": "10.121.0.254/24"}})
    assert "overlaps 10.121.0.0/24 of the Incus network net-b" in refused(server, renamed)
    assert actions(run(server, renamed, prune=True))["net-c"] == "created"


def test_volumes_are_removed_only_on_request(server: FakeServer) -> None:
    volume = {"project": "a", "name": "data", "pool": None}
    run(server, desired(machine("one"), volumes=[volume]))
    result = run(server, desired(machine("one")), prune=True)
    assert result["changed"] is False
    assert "prune_volumes: true" in reasons(result)
    assert actions(run(server, desired(machine("one")), prune=True, prune_volumes=True))["data"] == "deleted"


def test_absent_removes_all_that_is_ours_in_reverse_order(server: FakeServer) -> None:
    run(server, two_domains())
    server.log.clear()
    result = run(server, desired(), state="absent")
    deleted = [p for m, p in server.log if m == "DELETE"]
    assert set(actions(result).values()) == {"deleted"}
    assert [p.split("/")[2] for p in deleted] == ["instances"] * 2 + ["profiles"] + ["networks"] * 2 + [
        "projects"
    ] * 2
    assert set(server.objects["projects"]) == {("default",)}
    assert run(server, desired(), state="absent")["changed"] is False


def test_absent_keeps_the_protected_with_what_it_needs(server: FakeServer) -> None:
    wanted = desired(machine("one", ephemeral=False), machine("two", 2))
    run(server, wanted)
    result = run(server, wanted, state="absent")
    assert actions(result) == {"one": "skipped", "two": "deleted", "net-a": "skipped", "a": "skipped"}


def test_absent_lifts_a_protection_that_infra_yml_took_back(server: FakeServer) -> None:
    run(server, desired(machine("one", ephemeral=False)))
    result = run(server, desired(machine("one", ephemeral=True)), state="absent")
    assert actions(result)["one"] == "deleted"
    assert ("a", "one") not in server.objects["instances"]


def test_absent_respects_a_protection_set_by_hand(server: FakeServer) -> None:
    run(server, desired(machine("one")))
    server.objects["instances"]["a", "one"]["config"]["security.protection.delete"] = "true"
    assert actions(run(server, desired(machine("one")), state="absent"))["one"] == "skipped"


def test_absent_respects_a_declared_protection_lost_on_the_server(server: FakeServer) -> None:
    run(server, desired(machine("one")))
    assert actions(run(server, desired(machine("one", ephemeral=False)), state="absent"))["one"] == "skipped"


def test_info(server: FakeServer) -> None:
    server.cards = [card("0000:01:00.0")]
    run(server, desired(machine("one", gpu={"optional": False}, config={"limits.cpu": "1"})))
    server.add("instances", ("default", "guest"), {"name": "guest"})
    wanted = desired(machine("one"), machine("lost", 2))
    found = infra.info(FakeClient(server), wanted)  # type: ignore[arg-type]
    assert {i["name"]: i["status"] for i in found["instances"]} == {"one": "Running", "lost": "Missing"}
    one = found["instances"][0]
    assert (one["address"], one["gpu"], one["managed"]) == ("10.120.0.1", ["0000:01:00.0"], "home")
    assert one["config"] == {"limits.cpu": "1"}
    assert [[c["pci"] for c in i["cards"]] for i in found["instances"]] == [["0000:01:00.0"], []]
    assert found["gpus"][0]["instances"] == ["a/one"]
    everything = infra.info(FakeClient(server), None)  # type: ignore[arg-type]
    assert {i["name"] for i in everything["instances"]} == {"one", "guest"}


# Claims, runtime and members


FACTS = {"uuid": "GPU-aa", "cuda_version": "12.8", "nvrm_version": "570.1", "architecture": "8.6"}


def nvidia(pci: str = "0000:01:00.0", **more: Any) -> Obj:
    return {**card(pci), "driver": "nvidia", "nvidia": {**FACTS, **more}}


def gpu_machine(name: str = "one", host: int = 1, **more: Any) -> Obj:
    return machine(name, host, **{"gpu": {"optional": False}, **more})


@pytest.fixture
def tools(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    monkeypatch.setattr(state, "nvidia_hook", lambda: True)
    server.cards = [nvidia()]
    return server


def config_of(server: FakeServer, name: str = "one") -> Obj:
    found: Obj = server.objects["instances"]["a", name]["config"]
    return found


def test_the_runtime_and_the_driver_are_written(tools: FakeServer) -> None:
    result = run(tools, desired(gpu_machine()))
    config = config_of(tools)
    assert config["nvidia.runtime"] == "true"
    assert config["nvidia.driver.capabilities"] == "compute,utility"
    assert config["user.sottovoce.gpu.driver"] == "570.1"
    assert [c["driver"] for c in result["instances"][0]["cards"]] == ["570.1"]
    assert tools.config == {"user.sottovoce.gpu.0000:01:00.0": "a/one"}
    assert run(tools, desired(gpu_machine()))["changed"] is False


@pytest.mark.parametrize(
    ("config", "left"),
    [({"security.privileged": "true"}, None), ({"nvidia.runtime": "false"}, "false")],
)
def test_the_runtime_is_left_out(tools: FakeServer, config: Obj, left: str | None) -> None:
    run(tools, desired(gpu_machine(config=config)))
    assert config_of(tools).get("nvidia.runtime") == left
    assert "nvidia.driver.capabilities" not in config_of(tools)


def test_no_runtime_without_the_hook_or_the_tools(tools: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.cards = [nvidia(cuda_version="")]
    run(tools, desired(gpu_machine()))
    assert "nvidia.runtime" not in config_of(tools)
    tools.cards = [nvidia()]
    monkeypatch.setattr(state, "nvidia_hook", lambda: False)
    run(tools, desired(gpu_machine()))
    assert "nvidia.runtime" not in config_of(tools)


def test_another_driver_restarts_with_the_reason(tools: FakeServer) -> None:
    run(tools, desired(gpu_machine()))
    tools.cards = [nvidia(nvrm_version="580.2")]
    result = run(tools, desired(gpu_machine()))
    assert actions(result)["one"] == "restarted"
    why = next(r["why"] for r in result["resources"] if r["name"] == "one")
    assert why == "the host's driver went from 570.1 to 580.2: a running container keeps the old libraries"
    assert config_of(tools)["user.sottovoce.gpu.driver"] == "580.2"
    assert run(tools, desired(gpu_machine()))["changed"] is False


def test_a_driver_that_is_not_loaded_takes_nothing_away(tools: FakeServer) -> None:
    run(tools, desired(gpu_machine()))
    tools.cards = [card("0000:01:00.0")]
    assert run(tools, desired(gpu_machine()))["changed"] is False


def test_somebody_elses_claim_is_refused_and_shared_is_told(tools: FakeServer) -> None:
    tools.add("projects", ("b",), {"name": "b"})
    tools.add("profiles", ("b", "ai"), {"name": "ai", "devices": {"g": {"type": "gpu"}}})
    tools.add("instances", ("b", "box"), {"name": "box", "profiles": ["ai"]})
    message = refused(tools, desired(gpu_machine()))
    assert "machine box of project b (stopped, by profile ai, device g)" in message
    assert "incus profile device remove ai g --project b" in message
    assert tools.config == {}
    shared = run(tools, desired(gpu_machine(), gpu_policy="shared"))
    assert any("shares card 0000:01:00.0 with b/box" in n for n in shared["notes"])


def test_ours_but_not_declared_holds_its_card_until_pruned(tools: FakeServer) -> None:
    run(tools, desired(gpu_machine("old")))
    new = desired(gpu_machine("new", 2))
    assert "machine old of project a (running, by device gpu0)" in refused(tools, new)
    assert actions(run(tools, new, prune=True), "instance") == {"old": "deleted", "new": "created"}
    assert tools.config == {"user.sottovoce.gpu.0000:01:00.0": "a/new"}


def test_the_giver_comes_before_the_taker(tools: FakeServer) -> None:
    run(tools, desired(gpu_machine("b"), machine("a", 2)))
    tools.log.clear()
    result = run(tools, desired(machine("b"), gpu_machine("a", 2)))
    puts = [path for method, path in tools.log if method == "PUT" and path.count("/") == 3]
    assert puts == ["/1.0/instances/b", "/1.0/instances/a"]
    assert result["instances"][-1]["gpu"] == ["0000:01:00.0"]
    assert tools.config == {"user.sottovoce.gpu.0000:01:00.0": "a/a"}


def test_cards_can_be_swapped(tools: FakeServer) -> None:
    tools.cards = [nvidia(), nvidia("0000:02:00.0")]
    first, second = {"pci": "0000:01:00.0"}, {"pci": "0000:02:00.0"}
    run(tools, desired(gpu_machine("a", gpu=first), gpu_machine("b", 2, gpu=second)))
    run(tools, desired(gpu_machine("a", gpu=second), gpu_machine("b", 2, gpu=first)))
    assert tools.objects["instances"]["a", "a"]["devices"]["gpu0"]["pci"] == "0000:02:00.0"
    assert tools.objects["instances"]["a", "b"]["devices"]["gpu0"]["pci"] == "0000:01:00.0"


def test_an_unselected_profile_device_is_narrowed(tools: FakeServer) -> None:
    profile = {"project": "a", "name": "g", "devices": {"gpu": {"type": "gpu"}}}
    wanted = desired(machine("one", profiles=["default", "g"]), profiles=[profile])
    run(tools, wanted)
    assert tools.objects["instances"]["a", "one"]["devices"]["gpu"]["pci"] == "0000:01:00.0"
    assert run(tools, wanted)["changed"] is False


def test_a_project_is_restricted_only_while_it_has_no_gpu(tools: FakeServer) -> None:
    run(tools, desired(gpu_machine()))
    project = tools.objects["projects"]["a",]
    assert "restricted" not in project["config"]
    run(tools, desired(machine("one")))
    assert project["config"].items() >= planning.RESTRICTION.items()
    tools.log.clear()
    assert run(tools, desired(machine("one")))["changed"] is False
    run(tools, desired(gpu_machine()))
    # Only switched off: an instance may need what the other keys open.
    assert project["config"].items() >= {**planning.RESTRICTION, "restricted": "false"}.items()
    tools.log.clear()
    assert run(tools, desired(gpu_machine()))["changed"] is False


def clustered(server: FakeServer) -> None:
    server.member_cards = {"m1": [], "m2": [nvidia()], "m3": [nvidia()]}
    server.members = [
        {"server_name": m, "status": s, "groups": g, "config": {}}
        for m, s, g in (
            ("m1", "Online", ["default"]),
            ("m2", "Online", ["default", "gpu"]),
            ("m3", "Online", ["default", "gpu"]),
            ("m4", "Offline", ["default", "gpu"]),
        )
    ]


@pytest.mark.parametrize("target", [None, "@gpu"])
def test_a_member_with_a_free_card_is_chosen_and_kept(tools: FakeServer, target: str | None) -> None:
    clustered(tools)
    wanted = desired(gpu_machine("one", target=target), gpu_machine("two", 2, target=target))
    told = run(tools, wanted, check=True)
    assert [r["why"] for r in told["resources"] if r["kind"] == "instance"] == [
        "on member m2",
        "on member m3",
    ]
    run(tools, wanted)
    instances = tools.objects["instances"]
    assert [instances["a", n]["location"] for n in ("one", "two")] == ["m2", "m3"]
    assert tools.config == {
        "user.sottovoce.gpu.0000:01:00.0@m2": "a/one",
        "user.sottovoce.gpu.0000:01:00.0@m3": "a/two",
    }
    assert run(tools, wanted)["changed"] is False
    more = desired(*wanted["instances"], gpu_machine("three", 3, target=target))
    assert "on m3, with a/two" in refused(tools, more)
    plain = desired(*wanted["instances"], gpu_machine("three", 3, target="m1"))
    assert "member m1 has no GPU" in refused(tools, plain)


@pytest.mark.parametrize("announced", [[], ["m1"]])
def test_a_network_is_announced_to_every_member_first(tools: FakeServer, announced: list[str]) -> None:
    """A run that was killed in between left it pending: the next one goes on."""
    clustered(tools)
    wanted = desired(machine("one"))
    (network,) = wanted["networks"]
    network["description"] = "Domain a"
    name = network["name"]
    for member in announced:
        FakeClient(tools).request(
            "POST", "/1.0/networks", query={"target": member}, body={"name": name, "type": "bridge"}
        )
    told = run(tools, wanted, check=True)
    assert [r["action"] for r in told["resources"] if r["kind"] == "network"] == ["created"]
    run(tools, wanted)
    made = tools.objects["networks"]["default", name]
    assert (made["status"], made["locations"]) == ("Created", ["m1", "m2", "m3", "m4"])
    assert made["description"] == "Domain a"
    assert made["config"].items() >= network["config"].items()
    tools.log.clear()
    assert run(tools, wanted)["changed"] is False
    assert ("GET", "/1.0/cluster/members") not in tools.log


def test_a_new_volume_goes_to_the_member_of_its_machine(tools: FakeServer) -> None:
    clustered(tools)
    disk = {"type": "disk", "source": "data", "pool": "default", "path": "/srv/data"}
    volume = {"project": "a", "name": "data", "pool": "default", "config": {}}
    one = gpu_machine("one")
    one["devices"]["data"] = disk
    wanted = desired(one, volumes=[volume])
    run(tools, wanted)
    assert tools.objects["volumes"]["a", "default", "data"]["location"] == "m2"
    later = {**volume, "name": "more"}
    one["devices"]["more"] = {**disk, "source": "more", "path": "/srv/more"}
    run(tools, desired(one, volumes=[volume, later]))
    assert tools.objects["volumes"]["a", "default", "more"]["location"] == "m2"

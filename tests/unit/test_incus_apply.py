# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import threading
from typing import Any

import pytest
from _fake_incus import FakeClient, FakeServer, desired, machine
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_apply as applying
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_gpu as gpu
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_infra as infra
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_plan as planning
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_state as state
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    IncusError,
    IncusForbidden,
    IncusOperationFailed,
    IncusUnreachable,
)

Obj = dict[str, Any]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    monkeypatch.setattr(state, "read_routes", lambda client, snapshot: None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return FakeServer()


def run(server: FakeServer, wanted: Obj, *, reachable: bool = True, parallel: int = 8, **options: Any) -> Obj:
    settings = infra.Settings(
        image_server="https://images", image_fallback="lab", probe=lambda _s: "" if reachable else "no route"
    )
    settings.parallel = parallel
    return infra.reconcile(FakeClient(server), wanted, planning.Options(**options), settings)  # type: ignore[arg-type]


def fails(server: FakeServer, wanted: Obj, **options: Any) -> infra.InfraError:
    with pytest.raises(infra.InfraError) as caught:
        run(server, wanted, **options)
    return caught.value


def actions(result: Obj) -> dict[str, str]:
    return {r["name"]: r["action"] for r in result["resources"]}


def writes(server: FakeServer) -> list[tuple[str, str]]:
    return [entry for entry in server.log if entry[0] != "GET"]


def test_order_of_dependencies(server: FakeServer) -> None:
    profile = {"project": "a", "name": "p"}
    volume = {"project": "a", "name": "data"}
    run(server, desired(machine("one", profiles=["p"]), profiles=[profile], volumes=[volume]))
    order = [path for _m, path in writes(server)]
    assert order[0] == "/1.0/projects"
    assert set(order[1:3]) == {"/1.0/networks", "/1.0/storage-pools/default/volumes/custom"}
    assert order[3:] == ["/1.0/profiles", "/1.0/instances"]


def test_a_machine_is_made_and_started_in_one_request(server: FakeServer) -> None:
    bodies: list[Obj] = []
    server.hook = lambda method, path, body: (
        bodies.append(body) if path == "/1.0/instances" and body else None
    )
    run(server, desired(machine("one")))
    assert len(bodies) == 1
    assert bodies[0]["start"] is True
    assert bodies[0]["source"] == {"type": "image", "alias": "lab"}
    assert not any(path.endswith("/state") for _m, path in server.log)


def test_an_old_server_starts_in_a_second_request(server: FakeServer) -> None:
    server.extensions.remove("instance_create_start")
    run(server, desired(machine("one")))
    assert server.objects["instances"]["a", "one"]["status"] == "Running"


def test_side_by_side_but_not_more_than_asked(server: FakeServer) -> None:
    gate, now, most = threading.Lock(), [0], [0]
    turn = threading.Event()

    def hook(method: str, path: str, body: Any) -> None:
        if (method, path) != ("POST", "/1.0/instances"):
            return
        with gate:
            now[0] += 1
            most[0] = max(most[0], now[0])
            if now[0] == 3:
                turn.set()
        turn.wait(5)
        with gate:
            now[0] -= 1

    server.hook = hook
    run(server, desired(*[machine(f"m{i}", i) for i in range(1, 10)]), parallel=3)
    assert most[0] == 3


def test_a_change_in_between_is_read_again(server: FakeServer) -> None:
    run(server, desired(machine("one")))
    tries: list[str] = []

    def hook(method: str, path: str, body: Any) -> None:
        if method == "PUT" and len(tries) < 2:
            tries.append(path)
            server.objects["instances"]["a", "one"]["config"][f"user.hand{len(tries)}"] = "1"

    server.hook = hook
    assert actions(run(server, desired(machine("one", config={"limits.cpu": "2"}))))["one"] == "updated"
    config = server.objects["instances"]["a", "one"]["config"]
    assert (config["limits.cpu"], config["user.hand1"], config["user.hand2"]) == ("2", "1", "1")


def test_endless_changes_in_between_end(server: FakeServer) -> None:
    run(server, desired(machine("one")))
    counter = iter(range(1000))

    def hook(method: str, path: str, body: Any) -> None:
        if method == "PUT":
            server.objects["instances"]["a", "one"]["config"]["user.hand"] = str(next(counter))

    server.hook = hook
    error = fails(server, desired(machine("one", config={"limits.cpu": "2"})))
    assert "somebody else changed it" in str(error)
    assert next(counter) == applying.ATTEMPTS


def test_somebody_else_was_faster(server: FakeServer) -> None:
    """Another controller made the same machine between our look and our request."""

    def hook(method: str, path: str, body: Any) -> None:
        if (method, path) == ("POST", "/1.0/instances"):
            config = {**body["config"], "limits.cpu": "9"}
            server.add("instances", ("a", "one"), {"name": "one", "config": config})

    server.hook = hook
    run(server, desired(machine("one", config={"limits.cpu": "2"})))
    one = server.objects["instances"]["a", "one"]
    assert one["config"]["limits.cpu"] == "2"
    assert one["status"] == "Running"


def test_a_stranger_was_faster(server: FakeServer) -> None:
    def hook(method: str, path: str, body: Any) -> None:
        if (method, path) == ("POST", "/1.0/instances"):
            server.add("instances", ("a", "one"), {"name": "one", "config": {"user.theirs": "1"}})

    server.hook = hook
    assert "made by somebody else" in str(fails(server, desired(machine("one"))))
    assert server.objects["instances"]["a", "one"]["config"] == {"user.theirs": "1"}


def test_a_failed_start_shows_the_log_and_the_next_run_carries_on(server: FakeServer) -> None:
    server.start_fails = {"one"}
    server.lxc_log = b"lxc one INFO start\nlxc one 1 ERROR conf - no such device\n"
    error = fails(server, desired(machine("one"), machine("two", 2)))
    message = str(error)
    assert "Failed to run: lxc-start" in message
    assert "ERROR conf - no such device" in message
    assert "INFO start" not in message
    assert "stays behind, stopped" in message
    assert "machine two in project a (created)" in message
    assert actions(error.result) == {"a": "created", "net-a": "created", "one": "failed", "two": "created"}
    assert error.result["changed"] is True
    server.start_fails = set()
    again = run(server, desired(machine("one"), machine("two", 2)))
    assert actions(again) == {"a": "unchanged", "net-a": "unchanged", "one": "started", "two": "unchanged"}


def test_what_stands_on_a_failure_is_not_tried(server: FakeServer) -> None:
    def hook(method: str, path: str, body: Any) -> None:
        if (method, path) == ("POST", "/1.0/networks"):
            raise IncusOperationFailed("dnsmasq is not there")

    server.hook = hook
    free = machine("free", 2, devices={})
    error = fails(server, desired(machine("one"), free))
    message = str(error)
    assert "Failed: network net-a: dnsmasq is not there" in message
    assert "Not done: machine one in project a (it needs network net-a)" in message
    assert "machine free in project a (created)" in message
    assert "Run it again" in message
    server.hook = lambda *args: None
    assert actions(run(server, desired(machine("one"), free))) == {
        "a": "unchanged",
        "net-a": "created",
        "one": "created",
        "free": "unchanged",
    }


def test_nothing_is_removed_after_a_failure(server: FakeServer) -> None:
    wanted = desired(machine("one"))
    wanted["networks"].append({"name": "net-old", "config": {"ipv4.address": "10.9.0.1/24"}})
    wanted["profiles"].append(
        {"project": "a", "name": "p", "devices": {"e": {"type": "nic", "network": "net-old"}}}
    )
    wanted["instances"].append(machine("two", 2, profiles=["p"]))
    run(server, wanted)
    server.start_fails = {"new"}
    rest = desired(machine("one"), machine("two", 2), machine("new", 3))
    error = fails(server, rest, prune=True)
    assert actions(error.result)["net-old"] == "skipped"
    assert ("default", "net-old") in server.objects["networks"]
    server.start_fails = set()
    assert actions(run(server, rest, prune=True))["net-old"] == "deleted"


def test_an_unforeseen_answer_does_not_hide_the_rest(server: FakeServer) -> None:
    def hook(method: str, path: str, body: Any) -> None:
        if (method, path) == ("POST", "/1.0/instances") and body["name"] == "one":
            raise KeyError("surprise")

    server.hook = hook
    error = fails(server, desired(machine("one"), machine("two", 2)))
    assert "KeyError: 'surprise'" in str(error)
    assert actions(error.result)["two"] == "created"


def test_a_broken_connection_is_a_failure_not_a_traceback(server: FakeServer) -> None:
    def hook(method: str, path: str, body: Any) -> None:
        if method == "POST":
            raise IncusUnreachable("the daemon went away")

    server.hook = hook
    error = fails(server, desired(machine("one")))
    assert "the daemon went away" in str(error)
    assert error.result["changed"] is False


def test_a_busy_machine_is_waited_for(server: FakeServer) -> None:
    run(server, desired(machine("one")))
    tries: list[str] = []

    def hook(method: str, path: str, body: Any) -> None:
        if method == "PUT" and len(tries) < 3:
            tries.append(path)
            raise IncusError('Instance is busy running a "create" operation', code=400)

    server.hook = hook
    run(server, desired(machine("one", config={"limits.cpu": "2"})))
    assert len(tries) == 3


def test_a_refused_change_leaves_the_machine_running(server: FakeServer) -> None:
    run(server, desired(machine("one")))

    def hook(method: str, path: str, body: Any) -> None:
        if method == "PUT" and not path.endswith("/state"):
            raise IncusError("Invalid config", code=400)

    server.hook = hook
    fails(server, desired(machine("one", config={"security.nesting": "true"})))
    assert server.objects["instances"]["a", "one"]["status"] == "Running"


def test_a_machine_that_does_not_shut_down_is_stopped(server: FakeServer) -> None:
    run(server, desired(machine("one")))

    def hook(method: str, path: str, body: Any) -> None:
        if path.endswith("/state") and body["action"] == "stop" and not body["force"]:
            raise IncusOperationFailed("Failed shutting down: timeout")

    server.hook = hook
    result = run(server, desired(machine("one", config={"security.nesting": "true"})))
    assert any("did not shut down in 30 s" in n for n in result["notes"])
    assert server.objects["instances"]["a", "one"]["status"] == "Running"


def test_an_image_is_fetched_once_for_many_machines(server: FakeServer) -> None:
    machines = [machine(f"m{i}", i, image="images:debian/13") for i in range(1, 6)]
    result = run(server, desired(*machines))
    assert writes(server).count(("POST", "/1.0/images")) == 1
    order = [path for _m, path in writes(server)]
    assert order.index("/1.0/images") < order.index("/1.0/instances")
    assert actions(result)["debian/13"] == "created"
    later = run(server, desired(*machines, machine("m9", 9, image="images:debian/13")), reachable=False)
    assert actions(later)["m9"] == "created"
    assert later["notes"] == []


def test_an_image_that_does_not_come_is_replaced_by_the_fallback(server: FakeServer) -> None:
    sources = []

    def hook(method: str, path: str, body: Any) -> None:
        if (method, path) == ("POST", "/1.0/images"):
            raise IncusOperationFailed("connection reset")
        if (method, path) == ("POST", "/1.0/instances"):
            sources.append(body["source"])

    server.hook = hook
    result = run(server, desired(machine("one", image="images:debian/13")))
    assert sources == [{"type": "image", "alias": "lab"}]
    assert any("lab is used in place of images:debian/13" in n for n in result["notes"])


def test_requests_of_all_threads_are_counted(server: FakeServer) -> None:
    result = run(server, desired(*[machine(f"m{i}", i) for i in range(1, 10)]))
    assert result["requests"] == len(server.log)


@pytest.mark.parametrize("count", [2, 12])
def test_a_project_of_many_machines_is_restricted_when_they_are_made(server: FakeServer, count: int) -> None:
    """Incus goes through the whole of a restricted project for every machine made in it."""
    seen: list[str] = []

    def hook(method: str, path: str, body: Any) -> None:
        if method == "POST" and path == "/1.0/projects":
            seen.append(body["config"]["restricted"])

    server.hook = hook
    wanted = desired(*[machine(f"m{i}", i) for i in range(1, count + 1)])
    first = run(server, wanted)
    assert seen == ["false" if count > applying.CROWD else "true"]
    [project] = [path for method, path in writes(server) if method == "PUT" and "/projects/" in path] or [""]
    assert bool(project) is (count > applying.CROWD)
    assert len([r for r in first["resources"] if r["kind"] == "project"]) == 1
    again = run(server, wanted)
    assert again["changed"] is False


def test_a_machine_that_is_gone_already_is_no_failure(server: FakeServer) -> None:
    run(server, desired(machine("one")))

    def hook(method: str, path: str, body: Any) -> None:
        if method == "DELETE" and "instances" in path:
            server.objects["instances"].pop(("a", "one"), None)

    server.hook = hook
    assert actions(run(server, desired(), state="absent"))["one"] == "deleted"


def test_bridges_are_removed_one_at_a_time_and_again_if_another_vanished(server: FakeServer) -> None:
    wanted = desired()
    wanted["networks"] += [
        {"name": f"net-{i}", "config": {"ipv4.address": f"10.{i}.0.1/24"}} for i in range(5)
    ]
    run(server, wanted)
    gate, now, most, tries = threading.Lock(), [0], [0], []

    def hook(method: str, path: str, body: Any) -> None:
        if method != "DELETE" or "networks" not in path:
            return
        with gate:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.01)
        with gate:
            now[0] -= 1
        tries.append(path)
        if len(tries) == 2:
            raise IncusError('ip link show net-x: exit status 1 (Device "net-x" does not exist.)', code=500)

    server.hook = hook
    assert set(actions(run(server, desired(), state="absent")).values()) == {"deleted"}
    assert most[0] == 1
    assert len(tries) == 7


@pytest.mark.parametrize(("failures", "made"), [(1, True), (99, False)])
def test_a_bridge_whose_dnsmasq_ended_is_made_again(server: FakeServer, failures: int, made: bool) -> None:
    tries: list[str] = []

    def hook(method: str, path: str, body: Any) -> None:
        if method == "POST" and "networks" in path:
            tries.append(path)
            if len(tries) <= failures:
                raise IncusError('The DNS and DHCP service exited prematurely: exit status 2 ("")', code=500)

    server.hook = hook
    if made:
        run(server, desired())
        assert len(tries) == 2
    else:
        with pytest.raises(infra.InfraError, match="exited prematurely"):
            run(server, desired())
        assert len(tries) == 5


# Leases of cards

CARD = "0000:01:00.0"
LEASE = f"user.sottovoce.gpu.{CARD}"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def leasing(server: FakeServer, clock: Clock, **more: Any) -> applying.Applier:
    claim = gpu.Claim("a", "one", CARD)
    step = planning.Step("instance", "a", "one", "created", planning.INSTANCES, leases=[claim])
    step.body = {"name": "one", "devices": {"gpu0": {"type": "gpu", "pci": CARD}}}
    return applying.Applier(
        FakeClient(server),  # type: ignore[arg-type]
        planning.Plan(steps=[step]),
        mark="home",
        cards=[gpu.Card(CARD, "10de", "card")],
        clock=lambda: clock.now,
        sleep=clock.sleep,
        **more,
    )


def test_a_lease_left_behind_is_taken_over_after_a_while(server: FakeServer) -> None:
    server.add("projects", ("a",), {"name": "a"})
    server.config = {LEASE: "x/gone", "core.other": "1"}
    clock = Clock()
    assert leasing(server, clock).run().failed == []
    assert server.config == {LEASE: "a/one", "core.other": "1"}
    assert clock.now >= applying.LEASE_GRACE
    server.config = {f"{LEASE}/11": "x/gone"}
    server.objects["instances"].clear()
    assert leasing(server, Clock()).run().failed == []
    assert server.config == {LEASE: "a/one"}


def test_a_lease_whose_machine_appears_meanwhile_stands(server: FakeServer) -> None:
    server.add("projects", ("a",), {"name": "a"})
    server.config = {LEASE: "x/new"}
    clock = Clock()

    def hook(method: str, path: str, body: Any) -> None:
        if clock.now >= 3 and ("x", "new") not in server.objects["instances"]:
            device = {"type": "gpu", "pci": CARD}
            server.add("instances", ("x", "new"), {"name": "new", "devices": {"g": device}})

    server.hook = hook
    outcome = leasing(server, clock).run()
    assert "given to machine new of project x by another run" in outcome.failed[0][1]
    assert ("a", "one") not in server.objects["instances"]
    assert server.config == {LEASE: "x/new"}


def test_the_last_of_two_writes_at_one_instant_stands(server: FakeServer) -> None:
    """Both were let through by If-Match: the first one looks again and gives way."""
    server.add("projects", ("a",), {"name": "a"})
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if server.config == {LEASE: "a/one"}:
            server.config = {LEASE: "x/fast"}
            device = {"type": "gpu", "pci": CARD}
            server.add("instances", ("x", "fast"), {"name": "fast", "devices": {"g": device}})

    applier = leasing(server, clock)
    applier.sleep = sleep
    assert "given to machine fast" in applier.run().failed[0][1]
    assert ("a", "one") not in server.objects["instances"]


@pytest.mark.parametrize("hidden", [True, False])
def test_a_client_without_rights_goes_on_with_a_note(server: FakeServer, hidden: bool) -> None:
    server.add("projects", ("a",), {"name": "a"})
    server.config = None if hidden else {}

    def hook(method: str, path: str, body: Any) -> None:
        if method == "PATCH":
            raise IncusForbidden("not authorized", code=403)

    server.hook = hook
    outcome = leasing(server, Clock()).run()
    assert outcome.failed == []
    assert "No lease was taken for the card of one" in outcome.notes[0]


def test_what_a_hook_says_is_shown(server: FakeServer) -> None:
    server.start_fails.add("one")
    server.lxc_log = b"lxc one 1 DEBUG conf - Script exec hook produced output: no driver\nlxc one 2 INFO x\n"
    message = str(fails(server, desired(machine("one", config={"nvidia.runtime": "true"}))))
    assert "produced output: no driver" in message
    assert "INFO" not in message
    assert "nvidia-container-cli info" in message

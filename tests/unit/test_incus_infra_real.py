# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The reconciler against a real daemon: INCUS_SOCKET (or INCUS_DIR) says which.

Everything has names of its own and is removed at the end. Machines are made from the alias in
SOTTOVOCE_TEST_IMAGE, else from any local container image.
"""

from __future__ import annotations

import contextlib
import copy
import ipaddress
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_infra as infra
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_state as state
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    Endpoint,
    IncusClient,
    IncusError,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_diff import MARK
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_plan import Options

pytestmark = pytest.mark.incus
Obj = dict[str, Any]


def _image(client: IncusClient) -> str:
    aliases = client.get("/1.0/images/aliases", query={"recursion": 1}).metadata or []
    names = [a["name"] for a in aliases if a.get("type", "container") == "container"]
    wanted = os.environ.get("SOTTOVOCE_TEST_IMAGE")
    if wanted in names:
        return str(wanted)
    if not names:
        pytest.skip("the daemon has no container image")
    return str(names[0])


class Lab:
    """A project_name of our own with one domain, and what a run against the daemon needs."""

    def __init__(self, client: IncusClient) -> None:
        self.client = client
        self.image = _image(client)
        tag = os.urandom(3).hex()
        self.name, self.project, self.net = f"recon-{tag}", f"recon-{tag}", f"nr-{tag}"
        snapshot = state.read(client)
        state.read_routes(client, snapshot)
        state.read_pools(client, snapshot)
        pools = snapshot.pools or []
        if not pools:
            pytest.skip("the daemon has no storage pool")
        self.pool = "default" if "default" in pools else pools[0]
        used = [ipaddress.ip_network(r.subnet) for r in snapshot.routes]
        start = os.urandom(1)[0]
        free = [f"10.198.{(start + i) % 256}" for i in range(256)]
        self.subnet = next(
            s for s in free if not any(ipaddress.ip_network(f"{s}.0/24").overlaps(u) for u in used)
        )

    def machine(self, name: str, host: int = 1, **more: Any) -> Obj:
        nic = {"type": "nic", "name": "eth0", "network": self.net, "ipv4.address": f"{self.subnet}.{host}"}
        return {
            "project": self.project,
            "name": name,
            "type": "container",
            "description": "test",
            "image": self.image,
            "ephemeral": True,
            "profiles": ["default"],
            "target": None,
            "started": True,
            "config": {"boot.autostart": "false"},
            "devices": {"eth0": nic},
            "gpu": None,
            **more,
        }

    def desired(self, *machines: Obj, **more: Any) -> Obj:
        features = {"features.images": "false", "features.networks": "false"}
        own = {"features.profiles": "true", "features.storage.volumes": "true"}
        return {
            "project_name": self.name,
            "gpu_policy": "exclusive",
            "projects": [{"name": self.project, "description": "test", "config": {**features, **own}}],
            "networks": [
                {
                    "project": "default",
                    "name": self.net,
                    "type": "bridge",
                    "description": "test",
                    "config": {
                        "ipv4.address": f"{self.subnet}.254/24",
                        "ipv4.nat": "true",
                        "ipv4.dhcp.ranges": f"{self.subnet}.100-{self.subnet}.199",
                        "ipv6.address": "none",
                    },
                }
            ],
            "profiles": [],
            "volumes": [],
            "instances": list(machines),
            **more,
        }

    def run(self, wanted: Obj, *, check: bool = False, **options: Any) -> Obj:
        with self.client.clone() as client:
            return infra.reconcile(
                client,
                copy.deepcopy(wanted),
                Options(storage_pool=self.pool, **options),
                infra.Settings(wait_timeout=120),
                check=check,
                diff=True,
            )

    def instance(self, name: str) -> Obj:
        found: Obj = self.client.get(f"/1.0/instances/{name}", project=self.project).metadata
        return found

    def patch(self, path: str, body: Obj, **more: Any) -> None:
        self.client.run("PATCH", path, body=body, **more)

    def clean(self) -> None:
        """By the module's own way, after lifting every protection."""
        with self.client.clone() as client:
            for (project, name), i in state.read(client).instances.items():
                if project == self.project and i["config"].get("security.protection.delete"):
                    body = {"config": {"security.protection.delete": ""}}
                    client.run("PATCH", f"/1.0/instances/{name}", project=project, body=body)
        self.run(self.desired(), state="absent", prune_volumes=True)
        with self.client.clone() as client:
            left = state.read(client)
        assert self.project not in left.projects
        assert ("default", self.net) not in left.networks


@pytest.fixture
def lab() -> Iterator[Lab]:
    client = IncusClient(Endpoint(), timeout=30)
    try:
        client.server()
    except IncusError as exc:
        pytest.skip(f"no Incus daemon: {exc}")
    made = Lab(client)
    try:
        yield made
    finally:
        made.clean()
        client.close()


def actions(result: Obj, *kinds: str) -> dict[str, str]:
    return {r["name"]: r["action"] for r in result["resources"] if not kinds or r["kind"] in kinds}


def wait_for(what: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.2)


def addresses(lab: Lab, name: str) -> list[str]:
    live = lab.client.get(f"/1.0/instances/{name}/state", project=lab.project).metadata
    eth0 = (live.get("network") or {}).get("eth0") or {}
    return [a["address"] for a in eth0.get("addresses", []) if a["family"] == "inet"]


def test_from_nothing_to_nothing(lab: Lab) -> None:
    """Cold with everything, unchanged, drift repaired, dropped keys gone, own keys kept, removed."""
    profile = {"project": lab.project, "name": "small", "config": {"limits.memory": "256MiB"}, "devices": {}}
    volume = {"project": lab.project, "name": "data", "pool": None, "config": {"size": "64MiB"}}
    one = lab.machine("one", profiles=["default", "small"])
    one["config"]["snapshots.expiry"] = "3d"
    one["devices"]["data"] = {"type": "disk", "source": "data", "path": "/srv/data"}
    wanted = lab.desired(one, lab.machine("two", 2, started=False), profiles=[profile], volumes=[volume])

    told = lab.run(wanted, check=True)
    assert lab.project not in state.read(lab.client).projects
    done = lab.run(wanted)
    assert told["resources"] == done["resources"]
    assert set(actions(done).values()) == {"created"}
    assert lab.instance("one")["status"] == "Running"
    assert lab.instance("two")["status"] == "Stopped"

    again = lab.run(wanted)
    assert again["changed"] is False, again["diff"]
    assert again["requests"] == 5  # the server itself was asked before

    path = "/1.0/instances/one"
    config = {"snapshots.expiry": "9d", "limits.processes": "500"}
    lab.patch(path, {"config": config}, project=lab.project)
    lab.patch(f"/1.0/networks/{lab.net}", {"config": {"ipv4.nat": "false"}})
    lab.patch("/1.0/profiles/small", {"config": {"limits.memory": "1GiB"}}, project=lab.project)
    told = lab.run(wanted, check=True)
    repaired = lab.run(wanted)
    assert told["resources"] == repaired["resources"]
    assert told["diff"] == repaired["diff"]
    assert {n for n, a in actions(repaired).items() if a == "updated"} == {"one", lab.net, "small"}
    text = next(d for d in repaired["diff"] if d["before_header"].startswith("machine one"))
    assert "snapshots.expiry: 9d" in text["before"]
    assert "snapshots.expiry: 3d" in text["after"]
    assert lab.instance("one")["config"]["limits.processes"] == "500"

    del one["config"]["snapshots.expiry"]
    del one["devices"]["data"]
    assert actions(lab.run(lab.desired(one, *wanted["instances"][1:], profiles=[profile], volumes=[volume])))
    now = lab.instance("one")
    assert "snapshots.expiry" not in now["config"]
    assert now["config"]["limits.processes"] == "500"
    assert "data" not in now["devices"]
    assert now["config"]["volatile.uuid"]

    wait_for(lambda: addresses(lab, "one"))
    removed = lab.run(wanted, state="absent")
    assert actions(removed)["data"] == "skipped"
    assert actions(removed, "project")[lab.project] == "skipped"
    assert actions(removed, "instance") == {"one": "deleted", "two": "deleted"}


def test_addresses_are_given_swapped_and_restarts_are_real(lab: Lab) -> None:
    wanted = lab.desired(lab.machine("one", 1), lab.machine("two", 2))
    lab.run(wanted)
    wait_for(lambda: addresses(lab, "one") == [f"{lab.subnet}.1"])
    wait_for(lambda: addresses(lab, "two") == [f"{lab.subnet}.2"])
    swapped = lab.run(lab.desired(lab.machine("one", 2), lab.machine("two", 1)))
    assert actions(swapped, "instance") == {"one": "restarted", "two": "restarted"}
    wait_for(lambda: addresses(lab, "one") == [f"{lab.subnet}.2"])
    wait_for(lambda: addresses(lab, "two") == [f"{lab.subnet}.1"])

    before = lab.instance("one")["last_used_at"]
    nested = lab.machine("one", 2)
    nested["config"]["security.nesting"] = "true"
    result = lab.run(lab.desired(nested, lab.machine("two", 1)))
    assert actions(result, "instance") == {"one": "restarted", "two": "unchanged"}
    assert lab.instance("one")["last_used_at"] > before
    assert lab.run(lab.desired(nested, lab.machine("two", 1)))["changed"] is False


def test_prune_protection_and_strangers(lab: Lab) -> None:
    kept = lab.machine("kept", 2, ephemeral=False, started=False)
    lab.run(lab.desired(lab.machine("one", started=False), kept, lab.machine("gone", 3, started=False)))
    rest = lab.desired(lab.machine("one", started=False))
    assert lab.run(rest)["changed"] is False
    result = lab.run(rest, prune=True)
    assert actions(result, "instance") == {"one": "unchanged", "gone": "deleted", "kept": "skipped"}
    why = [r["why"] for r in result["resources"] if r["name"] == "kept"]
    assert "incus config set kept security.protection.delete=false" in why[0]
    with pytest.raises(infra.InfraError, match="protected against deletion"):
        lab.run(rest, state="absent", protected="fail")
    # Taken back in infra.yml, it goes.
    free = lab.desired(lab.machine("kept", 2, ephemeral=True, started=False))
    assert actions(lab.run(free, state="absent"), "instance") == {"kept": "deleted", "one": "deleted"}


def test_a_stranger_of_the_same_name_is_left_alone(lab: Lab) -> None:
    body = {"name": lab.net, "type": "bridge", "config": {"ipv4.address": "none", "ipv6.address": "none"}}
    lab.client.run("POST", "/1.0/networks", body=body)
    try:
        with pytest.raises(infra.InfraError, match="was not made by this collection"):
            lab.run(lab.desired())
        assert lab.project not in state.read(lab.client).projects
    finally:
        lab.client.run("DELETE", f"/1.0/networks/{lab.net}")


def test_a_subnet_of_the_host_is_refused(lab: Lab) -> None:
    lab.run(lab.desired())
    wanted = lab.desired()
    wanted["networks"].append(
        {"name": f"{lab.net}x", "config": {"ipv4.address": f"{lab.subnet}.1/24", "ipv6.address": "none"}}
    )
    with pytest.raises(infra.InfraError, match=f"of the Incus network {lab.net}"):
        lab.run(wanted)


def test_a_failed_start_shows_lxcs_reason_and_the_next_run_carries_on(lab: Lab) -> None:
    bad = lab.machine("bad")
    bad["config"]["raw.lxc"] = "lxc.hook.pre-start = /bin/false"
    with pytest.raises(infra.InfraError) as caught:
        lab.run(lab.desired(bad, lab.machine("good", 2)))
    message = str(caught.value)
    assert "stays behind, stopped" in message
    assert "lxc.log" in message
    assert "ERROR" in message
    assert actions(caught.value.result, "instance") == {"bad": "failed", "good": "created"}
    del bad["config"]["raw.lxc"]
    assert actions(lab.run(lab.desired(bad, lab.machine("good", 2))), "instance") == {
        "bad": "started",
        "good": "unchanged",
    }


def test_a_change_by_hand_at_the_same_moment_survives(lab: Lab) -> None:
    lab.run(lab.desired(lab.machine("one", started=False)))

    class Meddling(IncusClient):
        """Somebody else is faster, once, between our look and our write."""

        met = False

        def clone(self) -> IncusClient:
            twin = Meddling(self.endpoint)
            twin._server = self._server
            return twin

        def request(self, method: str, path: str, **more: Any) -> Any:
            if method == "PUT" and not Meddling.met:
                Meddling.met = True
                lab.patch(path, {"config": {"user.hand": "1"}}, project=lab.project)
            return super().request(method, path, **more)

    changed = lab.machine("one", started=False)
    changed["config"]["limits.cpu"] = "1"
    with Meddling(lab.client.endpoint) as client:
        settings = infra.Settings()
        result = infra.reconcile(client, lab.desired(changed), Options(storage_pool=lab.pool), settings)
    assert Meddling.met
    assert actions(result)["one"] == "updated"
    config = lab.instance("one")["config"]
    assert (config["user.hand"], config["limits.cpu"]) == ("1", "1")


def test_many_threads_and_flat_requests(lab: Lab) -> None:
    few = lab.desired(lab.machine("m1", 1, started=False))
    lab.run(few)
    flat = lab.run(few)["requests"]
    many = lab.desired(*[lab.machine(f"m{i}", i, started=False) for i in range(1, 7)])
    assert actions(lab.run(many), "instance")["m6"] == "created"
    again = lab.run(many)
    assert again["changed"] is False
    assert again["requests"] == flat == 4


def test_everything_made_carries_the_mark(lab: Lab) -> None:
    volume = {"project": lab.project, "name": "data", "pool": None}
    profile = {"project": lab.project, "name": "p"}
    lab.run(lab.desired(lab.machine("one", started=False), volumes=[volume], profiles=[profile]))
    with lab.client.clone() as client:
        there = state.read(client)
        state.read_volumes(client, there, [lab.pool])
    for obj in (
        there.projects[lab.project],
        there.networks["default", lab.net],
        there.profiles[lab.project, "p"],
        there.instances[lab.project, "one"],
        there.volumes[lab.project, lab.pool, "data"],
    ):
        assert obj["config"][MARK] == lab.name


SCRIPT = """
import json, sys
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_infra as infra
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import Endpoint, IncusClient
wanted, pool = json.load(sys.stdin)
with IncusClient(Endpoint()) as client:
    infra.reconcile(client, wanted, infra.Options(storage_pool=pool), infra.Settings(parallel=2))
"""


def test_a_killed_run_is_picked_up_by_the_next(lab: Lab) -> None:
    import json

    wanted = lab.desired(*[lab.machine(f"m{i}", i) for i in range(1, 5)])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, text=True, env=env)
    assert process.stdin is not None
    process.stdin.write(json.dumps([wanted, lab.pool]))
    process.stdin.close()

    def begun() -> bool:
        with contextlib.suppress(IncusError):
            return bool(lab.client.get("/1.0/instances", project=lab.project).metadata)
        return False

    wait_for(begun)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lab.run(wanted)
    assert lab.run(wanted)["changed"] is False
    assert {lab.instance(f"m{i}")["status"] for i in range(1, 5)} == {"Running"}


def test_two_controllers_at_once_end_with_one_state(lab: Lab) -> None:
    """Without the lock, as from two machines: every error is a clean one, and the next run settles it."""
    wanted = lab.desired(*[lab.machine(f"m{i}", i, started=False) for i in range(1, 5)])
    errors: list[BaseException] = []

    def go() -> None:
        try:
            lab.run(wanted)
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=go) for _unused in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(isinstance(e, infra.InfraError) for e in errors), errors
    lab.run(wanted)
    assert lab.run(wanted)["changed"] is False

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Claims, leases and restricted projects on a real daemon.

The card is one that the hardware list only tells of: machines that have it stay stopped.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_gpu as gpu
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_infra as infra
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_plan as planning
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_state as state
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    IncusClient,
    IncusError,
    IncusPreconditionFailed,
)
from test_incus_infra_real import Lab, actions, lab

__all__ = ["lab"]
pytestmark = pytest.mark.incus
Obj = dict[str, Any]
CARD = "0000:7f:00.0"
LEASE = f"user.sottovoce.gpu.{CARD}"


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run asks the server itself, as runs of the module do."""
    monkeypatch.setattr(IncusClient, "clone", lambda self: IncusClient(self.endpoint, timeout=self.timeout))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_client: IncusClient, snapshot: state.Snapshot, _parallel: int = 8) -> None:
        snapshot.resources = {"gpu": {"cards": [{"pci_address": CARD, "vendor_id": "10de"}]}}
        snapshot.member_resources = {"": snapshot.resources}

    monkeypatch.setattr(state, "read_resources", read)


@pytest.fixture
def other(lab: Lab) -> Iterator[Lab]:
    made = Lab(lab.client)
    try:
        yield made
    finally:
        made.clean()


def config(lab: Lab) -> Obj:
    found: Obj = lab.client.get("/1.0").metadata["config"]
    return found


def speech(lab: Lab, **more: Any) -> Obj:
    return lab.desired(lab.machine("speech", started=False, gpu={"optional": False}, **more))


def test_the_servers_configuration_takes_a_lease_under_its_etag(lab: Lab) -> None:
    etag = lab.client.get("/1.0").etag
    body = {"config": {f"{LEASE}@member-1/3-0": "a/b"}}
    lab.client.run("PATCH", "/1.0", body=body, etag=etag)
    try:
        assert config(lab)[f"{LEASE}@member-1/3-0"] == "a/b"
        with pytest.raises(IncusPreconditionFailed):
            lab.client.run("PATCH", "/1.0", body=body, etag=etag)
    finally:
        lab.client.run("PATCH", "/1.0", body={"config": {f"{LEASE}@member-1/3-0": ""}})
    assert f"{LEASE}@member-1/3-0" not in config(lab)


@pytest.mark.usefixtures("told")
def test_a_card_is_leased_kept_and_given_back(lab: Lab, other: Lab) -> None:
    lab.run(speech(lab))
    device = lab.instance("speech")["devices"]["gpu0"]
    assert device == {"type": "gpu", "gputype": "physical", "pci": CARD, "mode": "0666"}
    assert config(lab)[LEASE] == f"{lab.project}/speech"
    assert lab.run(speech(lab))["changed"] is False

    with pytest.raises(infra.InfraError, match=f"machine speech of project {lab.project} \\(stopped, by dev"):
        other.run(speech(other))
    assert other.project not in state.read(lab.client).projects

    # The card goes to another machine of the same file, and the lease with it.
    moved = lab.desired(
        lab.machine("speech", started=False),
        lab.machine("zoe", 2, started=False, gpu={"optional": False}),
    )
    lab.run(moved)
    assert config(lab)[LEASE] == f"{lab.project}/zoe"
    assert lab.run(moved)["changed"] is False
    without = lab.desired(lab.machine("speech", started=False), lab.machine("zoe", 2, started=False))
    lab.run(without)
    assert LEASE not in config(lab)
    assert lab.run(without)["changed"] is False
    other.run(speech(other))
    other.run(other.desired(), state="absent")
    assert LEASE not in config(lab)


@pytest.mark.usefixtures("told")
def test_two_controllers_at_once_give_a_card_once(lab: Lab, other: Lab) -> None:
    """Without the file lock, as from two machines; both plans see the card free."""
    both_planned = threading.Barrier(2)
    real = infra.make_plan
    errors: list[infra.InfraError] = []

    def plan(*args: Any) -> Any:
        made = real(*args)
        both_planned.wait(30)
        return made

    def go(one: Lab) -> None:
        try:
            one.run(speech(one))
        except infra.InfraError as exc:
            errors.append(exc)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infra, "make_plan", plan)
        threads = [threading.Thread(target=go, args=(one,)) for one in (lab, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert [str(e).count("another run at the same moment") for e in errors] == [1], errors
    holders = [
        key
        for key, i in state.read(lab.client).instances.items()
        if CARD in gpu.held(i.get("expanded_devices"))
    ]
    assert [config(lab)[LEASE]] == ["/".join(key) for key in holders]
    assert len([k for k in state.read(lab.client).instances if k[1] == "speech"]) == 1


def test_a_project_without_a_gpu_forbids_gpus_and_nothing_else(lab: Lab, tmp_path: Any) -> None:
    devices: Obj = {
        "null": {"type": "unix-char", "source": "/dev/null", "path": "/dev/null2"},
        "usb": {"type": "usb", "vendorid": "dead", "required": "false"},
        "block": {"type": "unix-block", "source": "/dev/nosuch", "path": "/dev/b", "required": "false"},
        "hotplug": {"type": "unix-hotplug", "vendorid": "dead", "productid": "beef", "required": "false"},
        "folder": {"type": "disk", "source": str(tmp_path), "path": "/srv/folder"},
        "proxy": {"type": "proxy", "listen": "tcp:127.0.0.1:47113", "connect": "tcp:127.0.0.1:80"},
        "unmanaged": {"type": "nic", "nictype": "p2p", "name": "eth7"},
    }
    one = lab.machine("one", started=False)
    one["devices"] |= devices
    one["config"] |= {
        "security.nesting": "true",
        "security.privileged": "true",
        "security.syscalls.intercept.mknod": "true",
        "raw.lxc": "lxc.environment = A=B",
        "raw.idmap": "uid 1000 1000",
        "snapshots.schedule": "@daily",
    }
    profile = {"project": lab.project, "name": "low", "config": {"raw.qemu": "-snapshot"}, "devices": {}}
    wanted = lab.desired(one, profiles=[profile])
    lab.run(wanted)
    project = lab.client.get(f"/1.0/projects/{lab.project}").metadata["config"]
    assert project.items() >= planning.RESTRICTION.items()
    assert lab.run(wanted)["changed"] is False
    path = "/1.0/instances/one"
    lab.client.run("POST", f"{path}/snapshots", body={"name": "s"}, project=lab.project)
    lab.client.run("POST", f"{path}/backups", body={"name": "b"}, project=lab.project)
    with pytest.raises(IncusError, match="GPU devices are forbidden"):
        lab.patch(path, {"devices": {"g": {"type": "gpu"}}}, project=lab.project)


def by_hand_set(lab: Lab, key: str, value: str) -> None:
    """As `incus project set` does: in Incus 6.0 a PATCH of a project replaces its whole configuration."""
    path = f"/1.0/projects/{lab.project}"
    now = lab.client.get(path).metadata
    lab.client.run("PUT", path, body={**now, "config": {**now["config"], key: value}})


def test_a_restriction_by_hand_wins(lab: Lab) -> None:
    lab.run(lab.desired())
    by_hand_set(lab, "restricted.devices.usb", "block")
    again = lab.run(lab.desired())
    assert actions(again, "project")[lab.project] == "updated", "a key of ours is set back"
    by_hand_set(lab, "restricted.idmap.uid", "1000")
    by_hand = lab.run(lab.desired())
    found = lab.client.get(f"/1.0/projects/{lab.project}").metadata["config"]
    assert actions(by_hand, "project")[lab.project] == "updated"
    assert found["restricted.idmap.uid"] == "1000"
    assert "restricted.devices.gpu" not in found


@pytest.mark.usefixtures("told")
def test_the_restriction_follows_the_card(lab: Lab) -> None:
    lab.run(speech(lab))
    assert "restricted" not in lab.client.get(f"/1.0/projects/{lab.project}").metadata["config"]
    lab.run(lab.desired(lab.machine("speech", started=False)))
    found = lab.client.get(f"/1.0/projects/{lab.project}").metadata["config"]
    assert found["restricted.devices.gpu"] == "block"
    lab.run(speech(lab))
    found = lab.client.get(f"/1.0/projects/{lab.project}").metadata["config"]
    assert found["restricted"] == "false"
    assert lab.run(speech(lab))["changed"] is False

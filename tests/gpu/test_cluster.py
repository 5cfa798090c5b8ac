"""A real cluster of two members, one with a card and one without: who gets a machine that wants one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gpu_site
import incusd
import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_infra as infra
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import IncusClient
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_infra import InfraError
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_plan import Options
from simulated_gpu import ADDRESSES

Obj = dict[str, Any]
PROJECT = "placed"


@pytest.fixture(scope="module")
def member() -> Iterator[IncusClient]:
    """The member that has no card: it is asked, and asks the other."""
    with incusd.cluster({"plain": 0, "carded": 1}) as members, members["plain"].client(60) as client:
        yield client


@pytest.fixture
def cluster(member: IncusClient) -> Iterator[IncusClient]:
    yield member
    apply(member)


def apply(client: IncusClient, check: bool = False, **machines: Obj) -> Obj:
    """Machines without a network, which stay stopped: where they are is the question."""
    features = {"features.images": "false", "features.networks": "false"}
    wanted = {
        "project_name": PROJECT,
        "gpu_policy": "exclusive",
        "projects": [{"name": PROJECT, "description": "", "config": features}],
        "networks": [],
        "profiles": [],
        "volumes": [],
        "instances": [
            {
                "project": PROJECT,
                "name": name,
                "type": "container",
                "description": "",
                "image": gpu_site.IMAGE,
                "ephemeral": True,
                "profiles": ["default"],
                "target": None,
                "started": False,
                "config": {},
                "devices": {},
                "gpu": None,
                **more,
            }
            for name, more in machines.items()
        ],
    }
    with client.clone() as twin:
        return infra.reconcile(
            twin,
            wanted,
            Options(storage_pool="default", prune=True),
            infra.Settings(wait_timeout=60),
            check=check,
            diff=True,
        )


def where(client: IncusClient, name: str) -> str:
    return str(client.get(f"/1.0/instances/{name}", project=PROJECT).metadata["location"])


WANTS: Obj = {"gpu": {"optional": False}}


@pytest.mark.parametrize("target", [None, "@default"])
def test_the_member_with_a_free_card_is_chosen_and_kept(cluster: IncusClient, target: str | None) -> None:
    wanted = {**WANTS, "target": target}
    told = gpu_site.resource(apply(cluster, check=True, speech=wanted), "speech")
    assert (told["action"], told["why"]) == ("created", "on member carded")
    done = apply(cluster, speech=wanted)
    assert where(cluster, "speech") == "carded"
    assert [card["pci"] for card in gpu_site.gpu_of(done, "speech")] == ADDRESSES[:1]
    lease = f"user.sottovoce.gpu.{ADDRESSES[0]}@carded"
    assert cluster.get("/1.0").metadata["config"][lease] == f"{PROJECT}/speech"
    assert apply(cluster, speech=wanted)["changed"] is False


def test_the_member_without_a_card_is_refused_when_it_is_named(cluster: IncusClient) -> None:
    with pytest.raises(InfraError, match="member plain has no GPU"):
        apply(cluster, speech={**WANTS, "target": "plain"})
    apply(cluster, speech={**WANTS, "target": "carded"})
    assert where(cluster, "speech") == "carded"


def test_a_card_that_somebody_has_is_not_given_again(cluster: IncusClient) -> None:
    apply(cluster, speech=WANTS)
    with pytest.raises(InfraError, match="2 ask for one"):
        apply(cluster, speech=WANTS, other=WANTS)
    done = apply(cluster, speech=WANTS, other={"gpu": {"optional": True}})
    assert any("other runs without a GPU" in note for note in done["notes"])

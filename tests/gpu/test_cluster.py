"""Which member of a cluster a machine is made on: two real members, the first with one simulated card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gpu_site
import incus_cluster
import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_infra import InfraError
from gpu_site import Site, resource
from incus_cluster import Cluster

CARD_MEMBER, OTHER_MEMBER = incus_cluster.MEMBERS
GPU: dict[str, Any] = {"gpu": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch, incus_cluster.running(gpu=1, image=True) as made:
        for key, value in made.first.environment.items():
            patch.setenv(key, value)
        made.first.incus("cluster", "group", "create", "cards")
        for member in incus_cluster.MEMBERS:
            made.first.incus("cluster", "group", "assign", member, "default,cards")
        yield made


@pytest.fixture
def site(cluster: Cluster) -> Iterator[Site]:
    assert cluster
    # The daemon of the other tests is on the same kernel: bridges and subnets must not be theirs.
    yield Site("h")
    gpu_site.clear()


def card(cluster: Cluster) -> str:
    assert cluster.first.cards
    (pci,) = cluster.first.cards.addresses
    return pci


def locations(site: Site) -> dict[str, str]:
    return {name: str(site.instance(name)["location"]) for name in site.names()}


def refused(site: Site, machines: dict[str, Any]) -> str:
    before = locations(site), gpu_site.leases()
    with pytest.raises(InfraError) as caught:
        site.apply(machines)
    assert caught.value.result["changed"] is False
    assert (locations(site), gpu_site.leases()) == before
    return str(caught.value)


@pytest.mark.parametrize("target", [{}, {"target": "@cards"}, {"target": CARD_MEMBER}])
def test_the_member_with_a_free_card_is_chosen_shown_and_kept(
    site: Site, cluster: Cluster, target: dict[str, str]
) -> None:
    machines = {"speech": {**GPU, **target}}
    told = site.apply(machines, check=True)
    assert resource(told, "speech")["why"] == f"on member {CARD_MEMBER}"
    assert site.names() == set()

    done = site.apply(machines)
    assert done["resources"] == told["resources"]
    assert locations(site) == {"speech": CARD_MEMBER}
    assert site.nodes("speech")["nvidia0"] == "ENXIO"
    assert gpu_site.leases() == {f"{card(cluster)}@{CARD_MEMBER}": f"{site.domain}/speech"}

    again = site.apply(machines)
    assert again["changed"] is False, again["diff"]
    assert locations(site) == {"speech": CARD_MEMBER}


def test_any_member_can_be_asked(site: Site, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has no card asks the one that has."""
    for key, value in cluster.second.environment.items():
        if key.startswith("INCUS_"):
            monkeypatch.setenv(key, value)
    data = {"persistent_data": {"models": {"path": "/srv/models"}}}
    machines = {"speech": {**GPU, **data}, "other": {"gpu": {"optional": True}}}
    done = site.apply(machines)
    assert any("other runs without a GPU" in note for note in done["notes"])
    assert locations(site)["speech"] == CARD_MEMBER
    assert site.nodes("speech")["nvidia0"] == "ENXIO"
    assert "/srv/models" in site.execute("speech", "findmnt", "--noheadings", "/srv/models")
    assert gpu_site.leases() == {f"{card(cluster)}@{CARD_MEMBER}": f"{site.domain}/speech"}
    assert site.apply(machines)["changed"] is False


def test_a_second_machine_is_refused_with_who_holds_what(site: Site, cluster: Cluster) -> None:
    site.apply({"speech": GPU})
    message = refused(site, {"speech": GPU, "two": GPU})
    assert f"{CARD_MEMBER}: it asks for 1, and 0 of 1 can be had" in message
    assert f"{OTHER_MEMBER}: member {OTHER_MEMBER} has no GPU" in message
    assert f"{card(cluster)} NVIDIA GeForce RTX 3090" in message
    assert f"on {CARD_MEMBER}, with {site.domain}/speech" in message


def test_a_member_without_a_card_is_refused_when_named(site: Site) -> None:
    message = refused(site, {"speech": {**GPU, "target": OTHER_MEMBER}})
    assert f"member {OTHER_MEMBER} has no GPU" in message
    assert f"on {CARD_MEMBER}." in message


def test_a_device_by_hand_decides_the_member(site: Site, cluster: Cluster) -> None:
    device = {"gpu": {"type": "gpu", "gputype": "physical", "pci": card(cluster)}}
    message = refused(site, {"hand": {"devices": device, "target": OTHER_MEMBER}})
    assert f"member {OTHER_MEMBER} has no card for its device gpu (pci: {card(cluster)})" in message
    machines = {"hand": {"devices": device, "target": "@cards"}}
    told = site.apply(machines, check=True)
    assert resource(told, "hand")["why"] == f"on member {CARD_MEMBER}"
    site.apply(machines)
    assert locations(site) == {"hand": CARD_MEMBER}
    assert site.nodes("hand")["nvidia0"] == "ENXIO"
    assert gpu_site.leases() == {f"{card(cluster)}@{CARD_MEMBER}": f"{site.domain}/hand"}
    assert site.apply(machines)["changed"] is False
    assert "2 ask for one: hand, speech" in refused(site, {**machines, "speech": GPU})


def test_machines_without_a_gpu_go_anywhere_in_a_restricted_project(site: Site) -> None:
    """The network is there on both members, and a lease ends with its machine."""
    site.apply({"speech": GPU})
    machines = {"one": {}, "two": {"target": OTHER_MEMBER}, "three": {"target": "@cards"}}
    site.apply(machines)
    assert gpu_site.leases() == {}
    found = locations(site)
    assert found.keys() == machines.keys()
    assert found["two"] == OTHER_MEMBER
    with gpu_site.client() as client:
        project = client.get(f"/1.0/projects/{site.domain}").metadata["config"]
    assert project["restricted.devices.gpu"] == "block"
    again = site.apply(machines)
    assert again["changed"] is False, again["diff"]
    assert locations(site) == found


def test_a_card_is_free_again_for_another_machine(site: Site) -> None:
    site.apply({"speech": GPU})
    site.apply({"speech": {}, "two": {**GPU, "target": "@cards"}})
    assert locations(site)["two"] == CARD_MEMBER
    assert set(gpu_site.leases().values()) == {f"{site.domain}/two"}

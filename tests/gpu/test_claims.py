"""A card belongs to one machine: every other claim is found, named, and can be freed as the message says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from typing import Any

import incusd
import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_apply
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_infra import InfraError
from gpu_site import IMAGE, Site, client, incus, instances, leases
from simulated_gpu import Cards

WANTED: dict[str, Any] = {"speech": {"gpu": True}}


def refused(site: Site, machines: dict[str, Any] | None = None) -> str:
    """The message with which a run is refused that changes nothing."""
    before = leases()
    with pytest.raises(InfraError) as caught:
        site.apply(machines or WANTED)
    assert caught.value.result["changed"] is False
    assert site.names() == set()
    assert leases() == before
    return str(caught.value)


def test_two_machines_of_one_file(site: Site, cards: Cards, daemon: incusd.Daemon) -> None:
    message = refused(site, {"one": {"gpu": True}, "two": {"gpu": True}})
    assert "2 ask for one: one, two" in message
    assert cards.addresses[0] in message
    cards.add()
    daemon.restart()
    site.apply({"one": {"gpu": True}, "two": {"gpu": True}})
    assert set(leases().values()) == {f"{site.domain}/one", f"{site.domain}/two"}


def test_a_machine_of_another_file_stopped_or_not(site: Site, other: Site, cards: Cards) -> None:
    other.apply({"theirs": {"gpu": True}})
    message = refused(site)
    assert f"machine theirs of project {other.domain} (running, by device gpu0)" in message
    incus("stop", "--force", "theirs", project=other.domain)
    assert f"machine theirs of project {other.domain} (stopped, by device gpu0)" in refused(site)
    other.apply({"theirs": {}})
    site.apply(WANTED)
    assert leases() == {cards.addresses[0]: f"{site.domain}/speech"}


def foreign(how: str, pci: str) -> tuple[str, str]:
    """A machine that nobody declared claims the card; gives its project and what the message says of it."""
    card = ["gpu", "gputype=physical"]
    if how == "project":
        incus("project", "create", "foreign", "-c", "features.images=false", "-c", "features.profiles=false")
        incus("create", IMAGE, "squatter", "--storage=default", project="foreign")
        incus("config", "device", "add", "squatter", "card", *card, f"pci={pci}", project="foreign")
        return "foreign", "stopped, by device card"
    if how == "profile":
        incus("profile", "create", "graphics")
        # Without a selector: all cards.
        incus("profile", "device", "add", "graphics", "card", *card)
        incus("create", IMAGE, "squatter", "--storage=default", "--profile=default", "--profile=graphics")
        return "default", "stopped, by profile graphics, device card"
    incus("create", IMAGE, "squatter", "--storage=default")
    selector = {"vendor": "vendorid=10de", "short": f"pci={pci.removeprefix('0000:')}"}.get(how, f"pci={pci}")
    incus("config", "device", "add", "squatter", "card", *card, selector)
    if how == "running":
        incus("start", "squatter")
        return "default", "running, by device card"
    return "default", "stopped, by device card"


@pytest.mark.parametrize("how", ["stopped", "running", "short", "vendor", "profile", "project"])
def test_a_machine_that_nobody_declared(site: Site, cards: Cards, how: str) -> None:
    (pci,) = cards.addresses
    project, said = foreign(how, pci)
    message = refused(site)
    assert f"machine squatter of project {project} ({said})" in message
    assert pci in message
    # What the message tells to do frees the card.
    remedy = re.search(r"To free (?:it|one): (incus .*?)\. To use it together", message)
    assert remedy, message
    subprocess.run(shlex.split(remedy[1]), check=True, stdin=subprocess.DEVNULL, timeout=60)
    site.apply(WANTED)
    assert site.nodes("speech")["nvidia0"] == "ENXIO"


def test_by_a_device_or_a_profile_of_the_same_file(site: Site, cards: Cards) -> None:
    (pci,) = cards.addresses
    by_hand = {"type": "gpu", "gputype": "physical", "pci": pci}
    message = refused(site, {"one": {"devices": {"card": by_hand}}, "two": {"gpu": {"pci": pci}}})
    assert "one" in message
    assert "two" in message
    profiles = {"graphics": {"devices": {"card": {"type": "gpu"}}}}
    machines = {"one": {"profiles": ["default", "graphics"]}, "two": {"gpu": True}}
    with pytest.raises(InfraError, match="2 ask for one"):
        site.apply(machines, profiles=profiles)
    assert site.names() == set()
    # Alone, the profile is enough, and its device that names no card is narrowed to one.
    site.apply({"one": {"profiles": ["default", "graphics"]}}, profiles=profiles)
    assert site.instance("one")["devices"]["card"]["pci"] == pci
    assert site.nodes("one")["nvidia0"] == "ENXIO"


def test_shared_is_told_and_both_have_it(site: Site, cards: Cards) -> None:
    machines = {"one": {"gpu": True}, "two": {"gpu": True}}
    done = site.apply(machines, gpu_policy="shared")
    (note,) = [note for note in done["notes"] if "shares card" in note and "two" in note.split(" shares ")[0]]
    assert f"shares card {cards.addresses[0]} with {site.domain}/one (gpu_policy: shared)" in note
    assert site.nodes("one") == site.nodes("two") != {}
    # Back to exclusive: it is said before anything is touched.
    with pytest.raises(InfraError, match="gpu_policy"):
        site.apply(machines)
    assert site.names() == {"one", "two"}


def test_a_lease_of_a_machine_that_is_gone_is_taken_over(
    site: Site, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pci,) = cards.addresses
    with client() as daemon:
        body = {"config": {f"user.sottovoce.gpu.{pci}": f"{site.domain}/ghost"}}
        daemon.run("PATCH", "/1.0", body=body)
    monkeypatch.setattr(_incus_apply, "LEASE_GRACE", 1.0)
    site.apply(WANTED)
    assert leases() == {pci: f"{site.domain}/speech"}


# Plans, says so, and goes on when it is told to: so that both have planned before one has applied.
RACER = """
import sys
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_infra as infra
from gpu_site import Site

plan = infra.make_plan

def planned(*arguments):
    made = plan(*arguments)
    print("planned", flush=True)
    sys.stdin.readline()
    return made

infra.make_plan = planned
site = Site(sys.argv[1])
try:
    site.apply({sys.argv[2]: {"gpu": True}})
except infra.InfraError as error:
    print("refused", error)
else:
    print("done")
"""


def test_two_processes_that_both_saw_the_card_free(site: Site, other: Site, cards: Cards) -> None:
    """As from two controllers, which no file lock keeps apart."""
    (pci,) = cards.addresses
    runs = {
        one: subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RACER), one.letter, f"race-{one.letter}"],
            env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for one in (site, other)
    }  # fmt: skip
    for run in runs.values():
        assert run.stdout
        assert run.stdout.readline() == "planned\n"
    for run in runs.values():
        assert run.stdin
        run.stdin.write("go\n")
        run.stdin.flush()
    said = {one.letter: run.communicate(timeout=120)[0] for one, run in runs.items()}
    print(said)
    assert sorted(text.split()[0] for text in said.values()) == ["done", "refused"]
    winner, loser = (site, other) if said["a"].startswith("done") else (other, site)
    told = f"card {pci} was given to machine race-{winner.letter} of project {winner.domain} by another run"
    assert told in said[loser.letter]
    assert leases() == {pci: f"{winner.domain}/race-{winner.letter}"}
    holders = [
        item["name"]
        for item in instances()
        if any(d.get("type") == "gpu" for d in item["expanded_devices"].values())
    ]
    assert holders == [f"race-{winner.letter}"]
    assert loser.names() == set()


def test_a_project_without_a_card_is_closed_to_cards_and_to_nothing_else(site: Site, cards: Cards) -> None:
    machines = {
        "plain": {
            "config": {"security.nesting": "true", "limits.memory": "256MiB"},
            "devices": {
                "null": {"type": "unix-char", "source": "/dev/null", "path": "/dev/null2"},
            },
        }
    }
    site.apply(machines)
    assert site.instance("plain")["status"] == "Running"
    by_hand = ["config", "device", "add", "plain", "card", "gpu", f"pci={cards.addresses[0]}"]
    assert "GPU devices are forbidden" in incus(*by_hand, project=site.domain, check=False)
    incus("snapshot", "create", "plain", "before", project=site.domain)
    assert site.execute("plain", "test", "-c", "/dev/null2") == ""
    assert site.apply(machines)["changed"] is False
    # With infra.yml's word the same project takes it.
    site.apply({"plain": {"gpu": True}})
    assert site.nodes("plain")["nvidia0"] == "ENXIO"


def test_a_client_of_incus_is_told_by_incus_that_the_card_is_gone(
    site: Site, cards: Cards, daemon: incusd.Daemon
) -> None:
    """What the product's own message stands for: Incus itself fails at the start, not before."""
    site.apply({"speech": {"gpu": True}})
    incus("stop", "--force", "speech", project=site.domain)
    cards.remove(cards.addresses[0])
    daemon.restart()
    said = incus("start", "speech", project=site.domain, check=False)
    assert "Invalid PCI address (no device found)" in said
    with pytest.raises(InfraError, match="is no longer on the server"):
        site.apply(WANTED)

"""What a machine with a card gets, and what becomes of it when the host changes."""

from __future__ import annotations

import os

import incusd
import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_infra import InfraError, info
from gpu_site import Site, client, gpu_of, leases, resource
from simulated_gpu import DRIVER, Cards

ALL = {"nvidia0": "ENXIO", "nvidiactl": "ENXIO", "nvidia-uvm": "ENXIO", "nvidia-uvm-tools": "ENXIO"}


def test_the_card_is_inside_and_a_user_who_is_not_root_may_open_it(site: Site, cards: Cards) -> None:
    result = site.apply({"speech": {"gpu": True}})
    (pci,) = cards.addresses
    assert gpu_of(result, "speech") == [
        {
            "pci": pci,
            "name": "NVIDIA GeForce RTX 3090",
            "uuid": cards.state["cards"][pci]["uuid"],
            "vendor": "nvidia",
            "capability": "8.6",
            "driver": DRIVER,
            "mig": "",
        }
    ]
    assert site.nodes("speech") == ALL
    assert leases() == {pci: f"{site.domain}/speech"}
    # A run that reconciles nothing is told the same.
    with client() as daemon:
        assert gpu_of(info(daemon), "speech") == gpu_of(result, "speech")
    assert site.apply({"speech": {"gpu": True}})["changed"] is False


def test_a_node_that_only_root_may_open_would_be_noticed(site: Site, cards: Cards) -> None:
    (pci,) = cards.addresses
    device = {"type": "gpu", "gputype": "physical", "pci": pci, "mode": "0600"}
    site.apply({"speech": {"devices": {"card": device}}})
    assert site.nodes("speech")["nvidia0"] == "EACCES"
    assert site.nodes("speech", user=0)["nvidia0"] == "ENXIO"


def test_the_drivers_userland_comes_with_the_runtime(site: Site, cards: Cards) -> None:
    site.apply({"speech": {"gpu": True}})
    config = site.instance("speech")["config"]
    assert config["nvidia.runtime"] == "true"
    assert config["nvidia.driver.capabilities"] == "compute,utility"
    assert site.libraries("speech") == [f"libcuda.so.{DRIVER}"]


def test_without_the_tools_the_nodes_come_alone(site: Site, cards: Cards, daemon: incusd.Daemon) -> None:
    cards.tools(False)
    daemon.restart()
    site.apply({"speech": {"gpu": True}})
    assert "nvidia.runtime" not in site.instance("speech")["config"]
    assert site.nodes("speech") == ALL
    assert site.libraries("speech") == []


def test_the_architecture_of_a_card_is_told(site: Site, cards: Cards, daemon: incusd.Daemon) -> None:
    (pci,) = cards.addresses
    cards.change(pci, name="NVIDIA GeForce RTX 5090", capability="12.0")
    daemon.restart()
    (card,) = gpu_of(site.apply({"speech": {"gpu": True}}, check=True), "speech")
    assert (card["name"], card["capability"]) == ("NVIDIA GeForce RTX 5090", "12.0")


def test_another_card_is_handed_over_while_the_machine_runs(
    site: Site, cards: Cards, daemon: incusd.Daemon
) -> None:
    first, second = cards.addresses[0], cards.add()
    daemon.restart()
    site.apply({"speech": {"gpu": {"pci": first}}})
    assert {"nvidia0", "nvidia1"} & set(site.nodes("speech")) == {"nvidia0"}
    site.apply({"speech": {"gpu": {"pci": second}}})
    assert {"nvidia0", "nvidia1"} & set(site.nodes("speech")) == {"nvidia1"}
    assert leases() == {second: f"{site.domain}/speech"}
    assert site.apply({"speech": {"gpu": {"pci": second}}})["changed"] is False


def test_a_card_goes_from_one_machine_to_another(site: Site, cards: Cards) -> None:
    site.apply({"one": {"gpu": True}, "two": {}})
    site.apply({"one": {}, "two": {"gpu": True}})
    assert "nvidia0" not in site.nodes("one")
    assert site.nodes("two") == ALL
    assert leases() == {cards.addresses[0]: f"{site.domain}/two"}


def test_both_cards_or_all_of_them(site: Site, cards: Cards, daemon: incusd.Daemon) -> None:
    cards.add()
    daemon.restart()
    site.apply({"speech": {"gpu": {"count": 2}}})
    assert {"nvidia0", "nvidia1"} <= set(site.nodes("speech"))
    assert site.apply({"speech": {"gpu": {"all": True}}})["changed"] is False
    assert sorted(leases()) == cards.addresses


def test_a_new_driver_restarts_the_machine_and_says_why(site: Site, cards: Cards) -> None:
    site.apply({"speech": {"gpu": True}})
    # Incus itself does not see it before it is restarted.
    cards.driver("580.65.06")
    assert site.libraries("speech") == [f"libcuda.so.{DRIVER}"], "a running container keeps what it has"
    told = site.apply({"speech": {"gpu": True}}, check=True)
    done = site.apply({"speech": {"gpu": True}})
    for result in (told, done):
        step = resource(result, "speech")
        assert step["action"] == "restarted"
        assert f"driver went from {DRIVER} to 580.65.06" in step["why"]
    assert site.libraries("speech") == ["libcuda.so.580.65.06"]
    assert site.apply({"speech": {"gpu": True}})["changed"] is False


def test_a_start_that_nvidias_hook_ends_is_told_with_the_cause(
    site: Site, cards: Cards, daemon: incusd.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards.driver("580.65.06", library=DRIVER)
    daemon.restart()
    monkeypatch.setenv("PATH", f"{cards.host.root}/usr/bin:{os.environ['PATH']}")
    with pytest.raises(InfraError) as caught:
        site.apply({"late": {"gpu": True, "config": {"nvidia.runtime": "true"}}})
    message = str(caught.value)
    assert "Failed to run mount hooks" in message
    assert "nvml error: driver/library version mismatch" in message


def test_a_card_that_is_gone_after_a_reboot(site: Site, cards: Cards, daemon: incusd.Daemon) -> None:
    (pci,) = cards.addresses
    machine = {"gpu": True, "boot_autostart": False}
    site.apply({"speech": machine})
    site.booted("speech")
    cards.remove(pci)
    daemon.reboot()
    with pytest.raises(InfraError, match=f"its card {pci} is no longer on the server"):
        site.apply({"speech": machine})
    # It does without if it may.
    done = site.apply({"speech": {**machine, "gpu": {"optional": True}}})
    assert any("speech runs without a GPU" in note and pci in note for note in done["notes"])
    assert site.nodes("speech") == {}
    assert leases() == {}
    # And has it again when the card is back.
    cards.reset(1)
    daemon.restart()
    site.apply({"speech": machine})
    assert "nvidia0" in site.nodes("speech")


def test_another_card_takes_the_place_of_one_that_is_gone(
    site: Site, cards: Cards, daemon: incusd.Daemon
) -> None:
    first, second = cards.addresses[0], cards.add()
    daemon.restart()
    site.apply({"speech": {"gpu": True}})
    cards.remove(first)
    daemon.restart()
    done = site.apply({"speech": {"gpu": True}})
    assert any(f"its card {first} is no longer on the server; it gets {second}" in n for n in done["notes"])
    assert "nvidia1" in site.nodes("speech")
    assert leases() == {second: f"{site.domain}/speech"}


def test_an_optional_card_that_is_not_there(site: Site, cards: Cards, daemon: incusd.Daemon) -> None:
    cards.remove(cards.addresses[0])
    daemon.restart()
    with pytest.raises(InfraError, match="the server has no GPU"):
        site.apply({"speech": {"gpu": True}})
    assert site.names() == set()
    done = site.apply({"speech": {"gpu": {"optional": True}}})
    assert any("speech runs without a GPU: the server has no GPU" in note for note in done["notes"])
    assert gpu_of(done, "speech") == []
    assert site.instance("speech")["status"] == "Running"
    # The machine gets a card that is put in later.
    cards.add()
    daemon.restart()
    site.apply({"speech": {"gpu": {"optional": True}}})
    assert "nvidia0" in site.nodes("speech")

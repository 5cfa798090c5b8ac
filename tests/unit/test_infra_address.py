# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import pytest
from _infra_support import model_of, problems_of
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_address import (
    dhcp_range_of,
    gateway_of,
    overlaps,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_model import Model


def nets(model: Model) -> dict[str, str]:
    return {n["name"]: n["config"]["ipv4.address"] for n in model.state["networks"]}


def ips(model: Model) -> dict[str, str]:
    return {i["name"]: i["devices"]["eth0"]["ipv4.address"] for i in model.state["instances"]}


def test_zones_of_the_trust_levels() -> None:
    model = model_of("""
        domains:
          adm: {trust_level: admin}
          tru: {trust_level: trusted}
          sem: {trust_level: semi-trusted}
          unt: {trust_level: untrusted}
          dis: {trust_level: disposable}
          nix: {}
        """)
    assert nets(model) == {
        "net-adm": "10.100.0.254/24", "net-tru": "10.110.0.254/24", "net-sem": "10.120.1.254/24",
        "net-unt": "10.140.0.254/24", "net-dis": "10.150.0.254/24", "net-nix": "10.120.0.254/24",
    }  # fmt: skip


def test_zone_base_and_step() -> None:
    head = "project_name: p\nglobal: {addressing: {zone_base: 40, zone_step: 3}}\n"
    model = model_of("domains: {a: {trust_level: disposable}, b: {trust_level: trusted}}", head)
    assert nets(model) == {"net-a": "10.55.0.254/24", "net-b": "10.43.0.254/24"}


def test_sequence_is_alphabetical_and_skips_explicit_numbers() -> None:
    model = model_of("""
        domains:
          zebra: {}
          apple: {}
          mango: {subnet_id: 0}
          pear: {subnet_id: 2}
        """)
    assert nets(model) == {
        "net-zebra": "10.120.3.254/24", "net-apple": "10.120.1.254/24",
        "net-mango": "10.120.0.254/24", "net-pear": "10.120.2.254/24",
    }  # fmt: skip


def test_hosts_in_the_order_of_declaration_skipping_used_ones() -> None:
    model = model_of("""
        domains:
          a:
            machines:
              zz: {}
              aa: {ip: 10.120.0.2}
              mm: {}
              high: {ip: 10.120.0.250}
              last: {}
        """)
    assert ips(model) == {
        "zz": "10.120.0.1",
        "aa": "10.120.0.2",
        "mm": "10.120.0.3",
        "high": "10.120.0.250",
        "last": "10.120.0.4",
    }


def test_a_disabled_domain_keeps_its_addresses() -> None:
    body = """
        domains:
          a: {{enabled: {}, machines: {{m: {{}}}}}}
          b: {{machines: {{n: {{}}}}}}
        """
    on, off = model_of(body.format("true")), model_of(body.format("false"))
    assert ips(on) == {"m": "10.120.0.1", "n": "10.120.1.1"}
    assert ips(off) == {"n": "10.120.1.1"}
    assert list(off.hosts) == ["n"]
    assert list(off.groups) == ["instances", "b"]
    assert [p["name"] for p in off.state["projects"]] == ["b"]


def test_base_subnet_of_older_files() -> None:
    head = "project_name: p\nglobal: {base_subnet: 10.100}\n"
    model = model_of(
        "domains: {a: {subnet_id: 2, trust_level: admin, machines: {m: {}, n: {ip: 10.100.2.1}}}}", head
    )
    assert nets(model) == {"net-a": "10.100.2.254/24"}
    assert ips(model) == {"m": "10.100.2.2", "n": "10.100.2.1"}


def test_base_subnet_wants_every_number_once_over_all_zones() -> None:
    text = (
        'project_name: p\nglobal: {base_subnet: "192.168"}\n'
        "domains: {a: {subnet_id: 2, trust_level: admin}, b: {subnet_id: 2}}\n"
    )
    assert [p.path for p in problems_of(text)] == ["domains.b.subnet_id"]


def test_a_zone_holds_255_domains() -> None:
    def domains(count: int) -> str:
        return "domains: {" + ", ".join(f"d{i:03}: {{}}" for i in range(count)) + "}"

    assert len(model_of(domains(255)).groups) == 256
    problems = problems_of("project_name: p\nglobal: {}\n" + domains(256))
    assert [p.message for p in problems] == ["no subnet is left: more than 255 domains in zone semi-trusted"]


def test_parts_of_a_subnet() -> None:
    assert gateway_of("10.1.2.0/24") == "10.1.2.254"
    assert dhcp_range_of("10.1.2.0/24") == "10.1.2.100-10.1.2.199"


@pytest.mark.parametrize(
    ("others", "hit"),
    [
        ([], []),
        (["10.120.0.5/24"], ["10.120.0.5/24"]),
        (["10.0.0.0/8", "192.168.1.0/24"], ["10.0.0.0/8"]),
        (["10.120.1.0/24", "10.119.255.0/24"], []),
        (["10.120.0.77/32"], ["10.120.0.77/32"]),
        (["0.0.0.0/0", "fd42::1/64", "none", ""], []),
    ],
)
def test_overlaps(others: list[str], hit: list[str]) -> None:
    assert overlaps("10.120.0.0/24", others) == hit

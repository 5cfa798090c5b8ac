# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which subnet a domain gets and which address a machine: 10.(zone_base + offset).seq.host/24.

Only names, trust levels and explicit numbers decide, never what is enabled: switching a domain off
and on moves nobody.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

from ansible_collections.sottovoce.stack.plugins.module_utils._infra_schema import (
    ZONES,
    Domain,
    Infra,
    Problem,
)

FIRST_HOST, LAST_HOST = 1, 99
GATEWAY = 254
DHCP = (100, 199)
LAST_SEQ = 254


def prefix_of(subnet: str) -> str:
    """ "10.120.0." of "10.120.0.0/24"."""
    return subnet.rsplit(".", 1)[0] + "."


def gateway_of(subnet: str) -> str:
    return f"{prefix_of(subnet)}{GATEWAY}"


def dhcp_range_of(subnet: str) -> str:
    prefix = prefix_of(subnet)
    return f"{prefix}{DHCP[0]}-{prefix}{DHCP[1]}"


def overlaps(subnet: str, others: Iterable[str]) -> list[str]:
    """Those of `others` (networks or addresses with a prefix length) that share an address with subnet.

    What is no IPv4 network is passed over: it cannot overlap one.
    """
    mine = ipaddress.IPv4Network(subnet, strict=False)
    hit = []
    for other in others:
        try:
            network = ipaddress.IPv4Network(other, strict=False)
        except ValueError:
            continue
        if network.prefixlen and mine.overlaps(network):  # 0.0.0.0/0 is the default route, nobody's network
            hit.append(other)
    return hit


def zone_octet(infra: Infra, trust_level: str) -> int:
    return infra.zone_base + infra.zone_step * ZONES[trust_level]


def _sequence(domains: Iterable[Domain], problems: list[Problem], scope: str) -> dict[str, int]:
    """The third octet of each of these domains."""
    given: dict[int, str] = {}
    rest: list[Domain] = []
    for domain in sorted(domains, key=lambda d: d.name):
        if domain.subnet_id is None:
            rest.append(domain)
        elif domain.subnet_id in given:
            at = domain.at("subnet_id")
            problems.append(
                Problem(
                    at.file,
                    at.line,
                    f"{domain.place.path}.subnet_id",
                    f"subnet_id {domain.subnet_id} is that of domain {given[domain.subnet_id]!r}{scope}",
                )
            )
        else:
            given[domain.subnet_id] = domain.name
    result = {name: number for number, name in given.items()}
    number = 0
    for domain in rest:
        while number in given:
            number += 1
        if number > LAST_SEQ:
            at = domain.place
            problems.append(
                Problem(
                    at.file, at.line, at.path, f"no subnet is left: more than {LAST_SEQ + 1} domains{scope}"
                )
            )
            break
        result[domain.name] = number
        number += 1
    return result


def subnets(infra: Infra, problems: list[Problem]) -> dict[str, str]:
    """Every domain's subnet, disabled ones included. A domain with a problem is left out."""
    if infra.base_subnet is not None:
        for domain in infra.domains.values():
            if domain.subnet_id is None and "subnet_id" not in domain.places:
                at = domain.place
                problems.append(
                    Problem(
                        at.file,
                        at.line,
                        at.path,
                        "subnet_id is missing; global.base_subnet wants one in every domain "
                        "(global.addressing gives them out by itself)",
                    )
                )
        known = [d for d in infra.domains.values() if d.subnet_id is not None]
        numbers = _sequence(known, problems, "")
        return {name: f"{infra.base_subnet}.{number}.0/24" for name, number in numbers.items()}
    zones: dict[str, list[Domain]] = {}
    for domain in infra.domains.values():
        zones.setdefault(domain.trust_level, []).append(domain)
    found: dict[str, str] = {}
    for trust_level, domains in zones.items():
        octet = zone_octet(infra, trust_level)
        if octet > 255:
            for domain in domains:
                at = domain.at("trust_level")
                problems.append(
                    Problem(
                        at.file,
                        at.line,
                        domain.place.path,
                        f"its zone {trust_level} would be {infra.base_octet}.{octet}; lower "
                        "global.addressing.zone_base or zone_step",
                    )
                )
            continue
        numbers = _sequence(domains, problems, f" in zone {trust_level}")
        found.update({name: f"{infra.base_octet}.{octet}.{n}.0/24" for name, n in numbers.items()})
    return found


def _owner(address: str, infra: Infra, nets: Mapping[str, str]) -> Domain | None:
    head = address.rsplit(".", 1)[0] + ".0/24"
    return next((infra.domains[name] for name, subnet in nets.items() if subnet == head), None)


def _check_given(infra: Infra, domain: Domain, nets: Mapping[str, str], problems: list[Problem]) -> set[int]:
    """The explicit addresses of a domain: problems, and the host numbers they take."""
    subnet = nets[domain.name]
    prefix = prefix_of(subnet)
    taken: set[int] = set()
    for machine in domain.machines.values():
        if machine.ip is None:
            continue
        at = machine.at("ip")
        where = f"{machine.place.path}.ip"
        if not machine.ip.startswith(prefix):
            owner = _owner(machine.ip, infra, nets)
            if owner is not None and not owner.enabled:
                told = (
                    f"{machine.ip} belongs to the disabled domain {owner.name!r} ({nets[owner.name]}), "
                    f"whose addresses stay reserved; this domain has {subnet}"
                )
            else:
                told = f"{machine.ip} is outside the subnet of domain {domain.name!r}, {subnet}"
                if owner is not None:
                    told += f" (it belongs to domain {owner.name!r})"
            problems.append(Problem(at.file, at.line, where, told))
            continue
        host = int(machine.ip.rsplit(".", 1)[1])
        if host in (0, 255):
            problems.append(Problem(at.file, at.line, where, f"{machine.ip} is no address for a host"))
        elif host == GATEWAY:
            problems.append(Problem(at.file, at.line, where, f"{machine.ip} is the gateway of {subnet}"))
        else:
            taken.add(host)
    return taken


def addresses(infra: Infra, nets: Mapping[str, str], problems: list[Problem]) -> dict[str, str]:
    """Every machine's address by its name, machines of disabled domains included."""
    given: dict[str, str] = {}
    for domain in infra.domains.values():
        for machine in domain.machines.values():
            if machine.ip is None:
                continue
            first = given.setdefault(machine.ip, machine.name)
            if first != machine.name:
                at = machine.at("ip")
                problems.append(
                    Problem(
                        at.file,
                        at.line,
                        f"{machine.place.path}.ip",
                        f"{machine.ip} is already the address of machine {first!r}",
                    )
                )
    found: dict[str, str] = {}
    for domain in infra.domains.values():
        if domain.name not in nets:
            continue
        prefix = prefix_of(nets[domain.name])
        taken = _check_given(infra, domain, nets, problems)
        host = FIRST_HOST
        for machine in domain.machines.values():
            if machine.ip is not None:
                found[machine.name] = machine.ip
                continue
            while host in taken:
                host += 1
            if host > LAST_HOST:
                at = domain.place
                count = len(domain.machines)
                problems.append(
                    Problem(
                        at.file,
                        at.line,
                        f"{at.path}.machines",
                        f"{count} machines are more than the {LAST_HOST} addresses of a domain "
                        f"({prefix}{FIRST_HOST} to {prefix}{LAST_HOST}); make a second domain",
                    )
                )
                break
            found[machine.name] = f"{prefix}{host}"
            host += 1
    return found

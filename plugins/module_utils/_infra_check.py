# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What holds between the parts of a document: names, profiles, the GPU, policies, volumes."""

from __future__ import annotations

from collections.abc import Iterator

from ansible_collections.sottovoce.stack.plugins.module_utils import _infra_schema as schema
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_schema import (
    Domain,
    Infra,
    Machine,
    Place,
    Problem,
    SharedVolume,
    did_you_mean,
)


def machines_of(infra: Infra, *, enabled_only: bool = False) -> Iterator[tuple[Domain, Machine]]:
    for domain in infra.domains.values():
        if domain.enabled or not enabled_only:
            for machine in domain.machines.values():
                yield domain, machine


def gpu_devices(domain: Domain, machine: Machine) -> list[str]:
    """Gpu devices written by hand, as 'profile nvidia-compute' or 'devices.gpu'."""
    found = [f"devices.{name}" for name, device in machine.devices.items() if device.get("type") == "gpu"]
    for name in machine.profiles:
        profile = domain.profiles.get(name)
        if profile and any(device.get("type") == "gpu" for device in profile.devices.values()):
            found.append(f"profile {name}")
    return found


def has_gpu(domain: Domain, machine: Machine) -> bool:
    return machine.gpu is not None or bool(gpu_devices(domain, machine))


def consumers_of(infra: Infra, volume: SharedVolume) -> dict[str, str]:
    """machine -> ro or rw, of enabled domains; what is said of a machine wins over its domain."""
    found: dict[str, str] = {}
    for domain in infra.domains.values():
        if domain.enabled and domain.name in volume.consumers:
            found.update(dict.fromkeys(domain.machines, volume.consumers[domain.name][0]))
    for domain, machine in machines_of(infra, enabled_only=True):
        if machine.name in volume.consumers and machine.name not in infra.domains:
            found[machine.name] = volume.consumers[machine.name][0]
        del domain
    return found


def shared_source(infra: Infra, volume: SharedVolume) -> str | None:
    """The folder of the host behind a shared volume; None if it is a volume of Incus."""
    if volume.source:
        return volume.source
    return f"{infra.shared_volumes_base}/{volume.name}" if infra.shared_volumes_base else None


class _Check:
    def __init__(self, infra: Infra) -> None:
        self.infra = infra

    def wrong(self, place: Place, message: str) -> None:
        self.infra.problems.append(Problem(place.file, place.line, place.path, message))

    def names(self) -> None:
        infra = self.infra
        roles = set(schema.OWN_ROLES) | {r for _d, m in machines_of(infra) for r in m.roles}
        seen: dict[str, tuple[Domain, Machine]] = {}
        bridges: dict[str, Domain] = {}
        for domain in infra.domains.values():
            name = domain.name
            if name in schema.RESERVED_GROUPS or name == schema.POLICY_HOST:
                self.wrong(domain.place, f"{name!r} has a meaning of its own and cannot name a domain")
            elif name == "default":
                self.wrong(
                    domain.place, "'default' is the project Incus keeps for itself and cannot name a domain"
                )
            elif name in roles:
                self.wrong(
                    domain.place, f"{name!r} is also the name of a role; both would be one group in Ansible"
                )
            first = bridges.setdefault(domain.network, domain)
            if first is not domain:
                self.wrong(
                    domain.at("bridge"), f"the bridge {domain.network!r} is the one of domain {first.name!r}"
                )
        for domain, machine in machines_of(infra):
            other = seen.setdefault(machine.name, (domain, machine))
            if other[1] is not machine:
                where = other[1].place
                off = [d.name for d in (other[0], domain) if not d.enabled]
                told = (
                    f"the machine {machine.name!r} is already in domain {other[0].name!r} "
                    f"({where.file}, line {where.line}); names are unique over all domains"
                )
                if off:
                    told += f", and the disabled domain {off[0]!r} keeps its names and addresses"
                self.wrong(machine.place, told)
                continue
            if machine.name in infra.domain_names:
                self.wrong(
                    machine.place,
                    f"{machine.name!r} is also a domain; in Ansible it would be a host and a group",
                )
            elif machine.name in roles:
                self.wrong(
                    machine.place,
                    f"{machine.name!r} is also a role; in Ansible it would be a host and a group",
                )
            elif machine.name in schema.RESERVED_GROUPS | schema.RESERVED_HOSTS | {schema.POLICY_HOST}:
                self.wrong(
                    machine.place, f"{machine.name!r} has a meaning of its own and cannot name a machine"
                )

    def profiles(self) -> None:
        for domain, machine in machines_of(self.infra):
            for name in machine.profiles:
                if name != "default" and name not in domain.profiles:
                    known = ["default", *domain.profiles]
                    hint = did_you_mean(name, known) or f"; known: {', '.join(known)}"
                    self.wrong(machine.at("profiles"), f"no profile {name!r} in domain {domain.name!r}{hint}")

    def gpu(self) -> None:
        users: list[Machine] = []
        for domain, machine in machines_of(self.infra, enabled_only=True):
            by_hand = gpu_devices(domain, machine)
            if machine.gpu is not None and by_hand and (machine.gpu.selects or machine.gpu.optional):
                self.wrong(
                    machine.at("gpu"),
                    f"the machine also gets a GPU by {' and '.join(by_hand)}; choose the card in one place",
                )
            if machine.gpu is not None or by_hand:
                users.append(machine)
        if self.infra.gpu_policy == "shared":
            return
        # How many cards there are is known to the server alone, which is asked before anything is changed.
        # Certain here is only what two machines name alike.
        first: dict[tuple[str, str], Machine] = {}
        for machine in users:
            named = machine.gpu.named if machine.gpu else ""
            if not named or (machine.target or "").startswith("@"):
                continue
            other = first.setdefault((named, machine.target or ""), machine)
            if other is not machine:
                self.wrong(
                    machine.at("gpu"),
                    f"the GPU belongs to one machine (gpu_policy: exclusive), 2 ask for {named}: "
                    f"{other.name}, {machine.name}; keep it in one of them, or set global.gpu_policy: shared",
                )

    def policies(self) -> None:
        infra = self.infra
        known = infra.domain_names | infra.machine_names | {schema.POLICY_HOST}
        for policy in infra.policies:
            for end, name in (("from", policy.source), ("to", policy.to)):
                if name not in known:
                    place = policy.place
                    self.wrong(
                        Place(place.file, place.line, f"{place.path}.{end}"),
                        f"{name!r} is no domain, no machine and not host{did_you_mean(name, sorted(known))}",
                    )

    def volumes(self) -> None:
        infra = self.infra
        mounts: dict[tuple[str, str], str] = {}
        devices: dict[str, dict[str, str]] = {m.name: {} for _d, m in machines_of(infra)}

        def claim(machine: Machine, place: Place, device: str, path: str | None, what: str) -> None:
            if device in machine.devices:
                self.wrong(
                    place, f"machine {machine.name!r} has a device {device!r} of its own; rename one of them"
                )
            elif device in devices[machine.name]:
                self.wrong(place, f"its device {device!r} is the one of {devices[machine.name][device]}")
            devices[machine.name].setdefault(device, what)
            if path is None:
                return
            first = mounts.setdefault((machine.name, path), what)
            if first != what:
                self.wrong(place, f"{path} of machine {machine.name!r} is already the place of {first}")

        for domain in infra.domains.values():
            named: dict[str, tuple[str, str | None, str | None]] = {}
            for machine in domain.machines.values():
                for name, device in machine.devices.items():
                    if device.get("type") == "disk" and "path" in device:
                        mounts.setdefault((machine.name, device["path"]), f"devices.{name}")
                for name, volume in machine.storage_volumes.items():
                    at = machine.at("storage_volumes")
                    place = Place(at.file, at.line, f"{at.path}.{name}")
                    claim(machine, place, name, volume.path, f"storage_volumes.{name}")
                    mine = (f"storage_volumes.{name}", volume.size, volume.pool)
                    if named.setdefault(name, mine) != mine:
                        self.wrong(
                            place,
                            f"the volume {name!r} of domain {domain.name!r} is declared differently before",
                        )
                for name, volume in machine.persistent_data.items():
                    at = machine.at("persistent_data")
                    place = Place(at.file, at.line, f"{at.path}.{name}")
                    claim(machine, place, f"pd-{name}", volume.path, f"persistent_data.{name}")
                    mine = (f"persistent_data.{name} of {machine.name}", volume.size, volume.pool)
                    if named.setdefault(f"{machine.name}-{name}", mine) != mine:
                        self.wrong(
                            place,
                            f"its volume {machine.name}-{name} is already one of domain {domain.name!r}",
                        )
        by_name = {m.name: (d, m) for d, m in machines_of(infra)}
        known = infra.domain_names | infra.machine_names
        for shared in infra.shared_volumes.values():
            for who, (_mode, place) in shared.consumers.items():
                if who not in known:
                    self.wrong(
                        place, f"{who!r} is no domain and no machine{did_you_mean(who, sorted(known))}"
                    )
            users = consumers_of(infra, shared)
            homes = sorted({by_name[name][0].name for name in users})
            if shared_source(infra, shared) is None and len(homes) > 1:
                self.wrong(
                    shared.place,
                    f"is shared by the domains {', '.join(homes)}: no volume of Incus leaves its project; "
                    "give it a folder of the host (source: /srv/…, or global.shared_volumes_base)",
                )
            for name in users:
                machine = by_name[name][1]
                claim(
                    machine, shared.place, f"sv-{shared.name}", shared.path, f"shared_volumes.{shared.name}"
                )


def check(infra: Infra) -> None:
    """Adds what is wrong to infra.problems."""
    checks = _Check(infra)
    checks.names()
    checks.profiles()
    checks.gpu()
    checks.policies()
    checks.volumes()

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a valid document means: hosts, groups and their variables, the desired state of Incus, notes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils import _infra_address as address
from ansible_collections.sottovoce.stack.plugins.module_utils import _infra_parse as parser
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_check import (
    check,
    consumers_of,
    gpu_devices,
    has_gpu,
    machines_of,
    shared_source,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_schema import (
    OWN_ROLES,
    Devices,
    Domain,
    Infra,
    InfraError,
    Machine,
    Problem,
    Profile,
    Volume,
)

CONNECTION = "sottovoce.stack.incus"
# Variables of open_webui that follow those of the speech-to-text server it is wired to.
STT_FOLLOWED = {
    "open_webui_stt_language": "stt_server_language",
    "open_webui_stt_api_key": "stt_server_api_key",
}
# The default of open_webui_tts_model, for a speech server that somebody else runs.
TTS_MODEL = "speaches-ai/Kokoro-82M-v1.0-ONNX"
STT_PORT = 8000
OLLAMA_PORT = 11434
PROJECT_CONFIG = {
    "features.images": "false",
    "features.networks": "false",
    "features.profiles": "true",
    "features.storage.volumes": "true",
}

# machine, its groups -> what the user set for it beside the document (host_vars, group_vars)
UserVars = Callable[[str, tuple[str, ...]], Mapping[str, Any]]


@dataclass(slots=True)
class Group:
    vars: dict[str, Any] = field(default_factory=dict)
    hosts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Host:
    groups: tuple[str, ...]
    vars: dict[str, Any]  # computed from the document: what a user sets in group_vars wins over these
    user_vars: dict[str, Any]  # `vars` of the machine: ordinary host variables
    templates: dict[str, str] = field(default_factory=dict)  # computed, for Ansible to evaluate


@dataclass(slots=True)
class Model:
    source: str
    files: list[str]
    all_vars: dict[str, Any]
    groups: dict[str, Group]
    hosts: dict[str, Host]
    state: dict[str, Any]
    notes: list[str]


def _shown(names: Iterable[str], limit: int = 5) -> str:
    listed = list(dict.fromkeys(names))
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")


def notes_of(infra: Infra) -> list[str]:
    """One line for each thing that is read and not acted upon."""
    notes: list[str] = []
    keys = {k: v for k, v in infra.ignored.items() if not k.startswith("role ")}
    if keys:
        told = [f"{key}{f' ({_shown(names, 3)})' if any(names) else ''}" for key, names in keys.items()]
        notes.append(f"ignored, outside the scope of this stack: {'; '.join(told)}")
    roles = {k.removeprefix("role "): v for k, v in infra.ignored.items() if k.startswith("role ")}
    if roles:
        told = [f"{role} ({_shown(names, 3)})" for role, names in roles.items()]
        notes.append(f"roles not provided here, nothing is done for them: {'; '.join(told)}")
    enabled = [d.name for d in infra.domains.values() if d.enabled]
    if len(enabled) > 1 or infra.policies:
        told_policies = (
            f"; {len(infra.policies)} network_policies are checked and not enforced" if infra.policies else ""
        )
        notes.append(f"domains are not isolated from each other yet{told_policies}")
    off = {d.name for d in infra.domains.values() if not d.enabled}
    dead = [p.place.path for p in infra.policies if p.source in off or p.to in off]
    if dead:
        notes.append(f"network policies that refer to a disabled domain: {_shown(dead)}")
    users = [m.name for d, m in machines_of(infra, enabled_only=True) if has_gpu(d, m)]
    if len(users) > 1 and infra.gpu_policy == "shared":
        notes.append(
            f"gpu_policy is shared: {_shown(users)} use the GPU together, without a limit of VRAM for each"
        )
    return notes


def _networks(infra: Infra, domain: Domain, subnet: str) -> dict[str, Any]:
    return {
        "project": "default",
        "name": domain.network,
        "type": "bridge",
        "description": domain.description or f"Domain {domain.name}",
        "config": {
            "ipv4.address": f"{address.gateway_of(subnet)}/24",
            "ipv4.nat": "true",
            "ipv4.dhcp.ranges": address.dhcp_range_of(subnet),
            "ipv6.address": "none",
        },
    }


def _disk(volume: Volume, source: str, pool: str | None) -> dict[str, str]:
    device = {"type": "disk", "source": source, "path": volume.path or ""}
    if pool:
        device["pool"] = pool
    if volume.readonly:
        device["readonly"] = "true"
    return device


class _State:
    """Collects the desired state domain by domain."""

    def __init__(self, infra: Infra) -> None:
        self.infra = infra
        self.volumes: dict[tuple[str, str], dict[str, Any]] = {}
        self.shared: dict[str, Devices] = {}
        domains = {m.name: d for d, m in machines_of(infra)}
        for shared in infra.shared_volumes.values():
            folder = shared_source(infra, shared)
            for name, mode in consumers_of(infra, shared).items():
                device = {"type": "disk", "source": folder or f"sv-{shared.name}", "path": shared.path}
                if folder and shared.shift:
                    device["shift"] = "true"
                if shared.pool:
                    device["pool"] = shared.pool
                if mode == "ro":
                    device["readonly"] = "true"
                self.shared.setdefault(name, {})[f"sv-{shared.name}"] = device
                if not folder:
                    self.volume(
                        domains[name].name, f"sv-{shared.name}", shared.size, shared.pool, shared.shift
                    )

    def volume(
        self, project: str, name: str, size: str | None, pool: str | None, shifted: bool = False
    ) -> None:
        config = {"size": size} if size else {}
        if shifted:
            config["security.shifted"] = "true"
        self.volumes.setdefault(
            (project, name),
            {"project": project, "name": name, "pool": pool, "description": "", "config": config},
        )

    def devices(self, domain: Domain, machine: Machine, ip: str) -> Devices:
        found: Devices = {
            "eth0": {"type": "nic", "name": "eth0", "network": domain.network, "ipv4.address": ip}
        }
        found.update(self.shared.get(machine.name, {}))
        base = self.infra.persistent_data_base
        for name, volume in machine.persistent_data.items():
            if base:
                device = _disk(volume, f"{base}/{domain.name}/{machine.name}/{name}", None)
                device["shift"] = "true"
            else:
                device = _disk(volume, f"{machine.name}-{name}", volume.pool)
                self.volume(domain.name, f"{machine.name}-{name}", volume.size, volume.pool)
            found[f"pd-{name}"] = device
        for name, volume in machine.storage_volumes.items():
            self.volume(domain.name, name, volume.size, volume.pool)
            if volume.path:
                found[name] = _disk(volume, name, volume.pool)
        found.update(machine.devices)
        return found

    def instance(self, domain: Domain, machine: Machine, ip: str) -> dict[str, Any]:
        config = {"security.protection.delete": str(not is_ephemeral(domain, machine)).lower()}
        if machine.boot_autostart is not None:
            config["boot.autostart"] = str(machine.boot_autostart).lower()
        if machine.boot_priority is not None:
            config["boot.autostart.priority"] = str(machine.boot_priority)
        if machine.snapshots_schedule is not None:
            config["snapshots.schedule"] = machine.snapshots_schedule
        if machine.snapshots_expiry is not None:
            config["snapshots.expiry"] = machine.snapshots_expiry
        config.update(machine.config)
        # A gpu device written by hand is the GPU: a second one would only double it.
        gpu = machine.gpu.request() if machine.gpu and not gpu_devices(domain, machine) else None
        return {
            "project": domain.name,
            "name": machine.name,
            "type": "virtual-machine" if machine.type == "vm" else "container",
            "description": machine.description,
            "image": machine.os_image or self.infra.default_os_image,
            # Incus' own ephemeral deletes an instance when it stops. Here the word means: may be deleted.
            "ephemeral": False,
            "profiles": list(machine.profiles),
            "target": machine.target,
            "started": True,
            "config": config,
            "devices": self.devices(domain, machine, ip),
            "gpu": gpu,
        }


def is_ephemeral(domain: Domain, machine: Machine) -> bool:
    return domain.ephemeral if machine.ephemeral is None else machine.ephemeral


def _profile(project: str, name: str, profile: Profile) -> dict[str, Any]:
    return {
        "project": project,
        "name": name,
        "description": profile.description,
        "config": dict(profile.config),
        "devices": {k: dict(v) for k, v in profile.devices.items()},
    }


def _volume_vars(volumes: Mapping[str, Volume]) -> dict[str, Any]:
    return {
        name: {k: v for k in ("path", "size", "pool") if (v := getattr(volume, k)) is not None}
        | ({"readonly": True} if volume.readonly else {})
        for name, volume in volumes.items()
    }


def _host_vars(infra: Infra, domain: Domain, machine: Machine, instance: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ansible_incus_instance": machine.name,
        "instance_name": machine.name,
        "instance_type": machine.type,
        "instance_description": machine.description,
        "instance_domain": domain.name,
        "instance_ip": instance["devices"]["eth0"].get("ipv4.address", ""),
        "instance_os_image": instance["image"],
        "instance_gpu": has_gpu(domain, machine),
        "instance_roles": machine.roles,
        "instance_ephemeral": is_ephemeral(domain, machine),
    }
    # What nobody wrote is not there at all: with thousands of hosts each variable counts.
    if "profiles" in machine.places:
        found["instance_profiles"] = machine.profiles
    if machine.config:
        found["instance_config"] = machine.config
    devices = {k: v for k, v in instance["devices"].items() if k != "eth0" or k in machine.devices}
    if devices:
        found["instance_devices"] = devices
    for key in ("boot_autostart", "boot_priority", "snapshots_schedule", "snapshots_expiry", "target"):
        value = getattr(machine, key)
        if value is not None:
            found[f"instance_{key}"] = value
    if machine.storage_volumes:
        found["instance_storage_volumes"] = _volume_vars(machine.storage_volumes)
    if machine.persistent_data:
        found["instance_persistent_data"] = _volume_vars(machine.persistent_data)
    own = [role for role in machine.roles if role in infra.local_roles and role not in OWN_ROLES]
    if own:
        # By path: Ansible does not look for roles beside an inventory.
        folder = os.path.join(os.path.dirname(os.path.abspath(infra.source)), "roles")
        found["instance_roles_own"] = [os.path.join(folder, role) for role in own]
    if machine.gpu is not None and (machine.gpu.selects or machine.gpu.optional):
        found["instance_gpu_request"] = machine.gpu.request()
    return found


def _port(value: Any, default: int) -> int:
    """A port a user wrote as a number; a template or an address is not looked into."""
    text = str(value).rsplit(":", 1)[-1] if value is not None and not isinstance(value, bool) else ""
    return int(text) if text.isdigit() and 0 < int(text[:6]) < 65536 else default


def _wire(infra: Infra, domain: Domain, model: Model, user_vars: UserVars, ips: Mapping[str, str]) -> None:
    """Where a domain has one speech-to-text server and one Ollama, its Open WebUI is told where they are."""

    def wants(machine: Machine) -> bool:
        given = (machine.wiring, domain.wiring, infra.wiring)
        return next(w for w in given if w is not None)

    readers = [m for m in domain.machines.values() if "open_webui" in m.roles and wants(m)]
    if not readers:
        return
    wires = (
        ("stt_server", "open_webui_stt_url", ("stt_server_port",), STT_PORT, "http://{}:{}/v1"),
        (
            "ollama_server",
            "open_webui_ollama_url",
            ("ollama_host", "ollama_server_host"),
            OLLAMA_PORT,
            "http://{}:{}",
        ),
    )
    for role, variable, port_variables, default, form in wires:
        servers = [m for m in domain.machines.values() if role in m.roles]
        if len(servers) > 1:
            model.notes.append(
                f"domain {domain.name} has {len(servers)} machines with {role}: set {variable} yourself"
            )
        if len(servers) != 1:
            continue
        server = servers[0]
        seen = {**user_vars(server.name, model.hosts[server.name].groups), **server.vars}
        port = _port(next((seen[v] for v in port_variables if v in seen), None), default)
        for machine in readers:
            model.hosts[machine.name].vars[variable] = form.format(ips[server.name], port)
            if role == "stt_server":
                # Wherever the user sets them (a vault, host_vars, -e), the server and its reader agree.
                url = model.hosts[machine.name].vars[variable]
                model.hosts[machine.name].templates = {
                    **{
                        reader: f"{{{{ hostvars['{server.name}'].{asked} | default('') }}}}"
                        for reader, asked in STT_FOLLOWED.items()
                    },
                    **_tts_templates(server.name, str(url)),
                }


def _tts_templates(server: str, url: str) -> dict[str, str]:
    """A server that was given a model to speak with speaks at the URL where it listens."""
    asked = f"hostvars['{server}']"
    return {
        "open_webui_tts_url": f"{{{{ '{url}' if {asked}.stt_server_tts_model | default('') else '' }}}}",
        "open_webui_tts_model": f"{{{{ {asked}.stt_server_tts_model | default('{TTS_MODEL}', true) }}}}",
        # The key is for this server and no other that a user may name.
        "open_webui_tts_api_key": (
            f"{{{{ {asked}.stt_server_api_key | default('') if open_webui_tts_url == '{url}' else '' }}}}"
        ),
    }


def _no_user_vars(_machine: str, _groups: tuple[str, ...]) -> Mapping[str, Any]:
    return {}


def build(infra: Infra, *, user_vars: UserVars = _no_user_vars) -> Model:
    """The model of a document, or InfraError with everything that is wrong with it."""
    check(infra)
    nets = address.subnets(infra, infra.problems)
    ips = address.addresses(infra, nets, infra.problems)
    if infra.problems:
        raise InfraError(infra.source, infra.problems)

    collected = _State(infra)
    model = Model(infra.source, list(infra.files), {}, {}, {}, {}, notes_of(infra))
    state: dict[str, Any] = {
        "project_name": infra.project_name,
        "source": infra.source,
        "gpu_policy": infra.gpu_policy,
        "projects": [],
        "networks": [],
        "profiles": [],
        "volumes": [],
        "instances": [],
    }
    everyone = model.groups["instances"] = Group(
        vars={
            "ansible_connection": CONNECTION,
            "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_user": infra.default_user,
        }
    )
    enabled = [d for d in infra.domains.values() if d.enabled]
    for domain in enabled:
        subnet = nets[domain.name]
        network = {"name": domain.network, "subnet": subnet, "gateway": address.gateway_of(subnet)}
        group = model.groups[domain.name] = Group(
            vars={
                "domain_name": domain.name,
                "domain_description": domain.description,
                "domain_ephemeral": domain.ephemeral,
                "domain_trust_level": domain.trust_level,
                "incus_project": domain.name,
                "incus_network": network,
                "ansible_incus_project": domain.name,
                "subnet_id": int(subnet.split(".")[2]),
            }
        )
        if domain.profiles:
            group.vars["incus_profiles"] = {
                name: {"config": dict(p.config), "devices": {k: dict(v) for k, v in p.devices.items()}}
                for name, p in domain.profiles.items()
            }
        state["projects"].append(
            {"name": domain.name, "description": domain.description, "config": dict(PROJECT_CONFIG)}
        )
        state["networks"].append(_networks(infra, domain, subnet))
        state["profiles"].extend(_profile(domain.name, name, p) for name, p in domain.profiles.items())
        for machine in domain.machines.values():
            instance = collected.instance(domain, machine, ips[machine.name])
            state["instances"].append(instance)
            groups = ("instances", domain.name, *machine.roles)
            model.hosts[machine.name] = Host(
                groups=groups, vars=_host_vars(infra, domain, machine, instance), user_vars=dict(machine.vars)
            )
            everyone.hosts.append(machine.name)
            group.hosts.append(machine.name)
            for role in machine.roles:
                model.groups.setdefault(role, Group()).hosts.append(machine.name)
    state["volumes"] = list(collected.volumes.values())
    model.state = state
    for domain in enabled:
        _wire(infra, domain, model, user_vars, ips)
    model.all_vars = {
        "project_name": infra.project_name,
        "sottovoce_infra_file": infra.source,
        "sottovoce_notes": model.notes,
    }
    if infra.policies:
        model.all_vars["network_policies"] = [p.as_dict() for p in infra.policies]
    return model


@contextmanager
def without_collector() -> Iterator[None]:
    """A tree of many small objects with no garbage in it: looking for some takes 40 % of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _guarded(make: Callable[[], Model], source: str) -> Model:
    try:
        with without_collector():
            return make()
    except RecursionError:  # aliases of aliases; the size limit leaves a few hundred levels
        raise InfraError(source, [Problem(source, 0, "", "its aliases are nested too deeply")]) from None


def load(path: str, *, read: parser.Read = parser._read, user_vars: UserVars = _no_user_vars) -> Model:
    """The model of infra.yml, of base.yml of the folder form, or of a folder that holds either."""
    return _guarded(lambda: build(parser.parse(path, read=read), user_vars=user_vars), path)


def load_text(
    text: str | bytes,
    *,
    name: str = "infra.yml",
    roles: Iterable[str] = (),
    user_vars: UserVars = _no_user_vars,
) -> Model:
    """The same from memory."""
    return _guarded(lambda: build(parser.parse_text(text, name=name, roles=roles), user_vars=user_vars), name)


# What the inventory plugin loaded in this run. The lookup hands out the same model: a file that is
# edited while a playbook runs must not give it a second truth.
_LOADED: dict[str, Model] = {}


def remember(path: str, model: Model) -> None:
    _LOADED[path] = model


def remembered(path: str) -> Model | None:
    return _LOADED.get(path)

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a snapshot of a server and a declared state to the steps that lead from one to the other.

No request is made here. Check mode and a real run use the same plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_gpu as gpu
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_diff import (
    MARK,
    changes,
    clean,
    clean_devices,
    expand,
    merge_devices,
    needs_restart,
    owner,
    rebuild,
    record_of,
    visible,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_images import Image
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_state import (
    FROZEN,
    RUNNING,
    STOPPED,
    Key,
    Obj,
    Snapshot,
    lists_stale_cards,
    location_of,
    parse_url,
    pending,
)

# The order in which steps are carried out; those of one phase run side by side.
(
    REMOVE_INSTANCES,
    REMOVE_PROFILES,
    REMOVE_BASE,
    PROJECTS,
    BASE,
    PROFILES,
    RELEASE,
    INSTANCES,
    REMOVE_LATE_PROFILES,
    REMOVE_LATE_BASE,
    REMOVE_PROJECTS,
) = range(0, 1100, 100)
# Between them: who gives a card up comes before who gets it, one step for each link of such a chain; and
# what a project forbids only once nobody in it has it any more.
RESTRICT = INSTANCES + 50

PROTECTION = "security.protection.delete"
RUNTIME = "nvidia.runtime"
CAPABILITIES = "nvidia.driver.capabilities"
# A project of ours in which nothing has a GPU cannot be given one by hand. `restricted` closes much more
# by default, and infra.yml may declare any of it: all of that is opened again.
RESTRICTION = {
    "restricted": "true",
    "restricted.devices.gpu": "block",
    **dict.fromkeys(
        (
            "restricted.backups",
            "restricted.cluster.target",
            "restricted.containers.interception",
            "restricted.containers.lowlevel",
            "restricted.containers.nesting",
            "restricted.containers.privilege",
            "restricted.devices.disk",
            "restricted.devices.infiniband",
            "restricted.devices.nic",
            "restricted.devices.pci",
            "restricted.devices.proxy",
            "restricted.devices.unix-block",
            "restricted.devices.unix-char",
            "restricted.devices.unix-hotplug",
            "restricted.devices.usb",
            "restricted.snapshots",
            "restricted.virtual-machines.lowlevel",
        ),
        "allow",
    ),
}
_LABEL = {
    "project": "Incus project",
    "network": "network",
    "profile": "profile",
    "volume": "storage volume",
    "instance": "machine",
}


@dataclasses.dataclass
class Options:
    state: str = "present"
    adopt: bool = False
    prune: bool = False
    prune_volumes: bool = False
    protected: str = "keep"
    storage_pool: str = "default"
    start: bool = True
    infra_file: str = "infra.yml"


@dataclasses.dataclass
class Step:
    kind: str
    project: str
    name: str
    action: str = "unchanged"
    phase: int = BASE
    pool: str = ""
    why: str = ""
    changes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    before: Obj | None = None
    after: Obj | None = None
    # To create: the body of the POST. To update: what is declared, laid over what is found then.
    body: Obj | None = None
    target: Obj = dataclasses.field(default_factory=dict)
    # Of a cluster, where it has to be announced before it is made.
    members: list[str] = dataclasses.field(default_factory=list)
    query: dict[str, str] = dataclasses.field(default_factory=dict)
    image: tuple[str, str] | None = None
    start: bool = False
    unfreeze: bool = False
    restart: bool = False
    stop: bool = False
    release: list[str] = dataclasses.field(default_factory=list)
    unprotect: bool = False
    gentle: bool = False
    # Cards it is given now, to be leased first; leases of its own to be given back afterwards.
    leases: list[gpu.Claim] = dataclasses.field(default_factory=list)
    unlease: list[str] = dataclasses.field(default_factory=list)
    # Cards of its own that another machine gets in this run.
    gives: list[gpu.Claim] = dataclasses.field(default_factory=list)
    needs: set[Key] = dataclasses.field(default_factory=set)

    @property
    def key(self) -> Key:
        name = f"{self.pool}/{self.name}" if self.kind == "volume" else self.name
        return self.kind, "" if self.kind == "project" else self.project, name

    @property
    def label(self) -> str:
        kind = _LABEL.get(self.kind, self.kind)
        inside = f" in project {self.project}" if self.kind != "project" and self.project != "default" else ""
        return f"{kind} {self.name}{inside}"

    @property
    def title(self) -> str:
        return self.label[0].upper() + self.label[1:]

    @property
    def writes(self) -> bool:
        return self.action not in ("unchanged", "skipped")


@dataclasses.dataclass
class Plan:
    steps: list[Step] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    images: dict[tuple[str, str], Image] = dataclasses.field(default_factory=dict)
    gpus: dict[tuple[str, str], list[str]] = dataclasses.field(default_factory=dict)
    cards: dict[tuple[str, str], list[dict[str, str]]] = dataclasses.field(default_factory=dict)
    known_cards: list[gpu.Card] = dataclasses.field(default_factory=list)

    @property
    def changed(self) -> bool:
        return any(step.writes for step in self.steps)

    def note(self, text: str) -> None:
        if text and text not in self.notes:
            self.notes.append(text)


def truthy(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes", "on")


def names(desired: Mapping[str, Any], kind: str) -> list[tuple[str, str]]:
    return [(str(o.get("project") or "default"), str(o["name"])) for o in desired.get(kind) or []]


def missing(snapshot: Snapshot, desired: Mapping[str, Any]) -> list[Obj]:
    """Declared instances that are not there yet."""
    there = snapshot.instances
    return [
        i for i in desired.get("instances") or [] if (i.get("project") or "default", i["name"]) not in there
    ]


# Present


class Planner:
    """Builds the plan for `state: present`."""

    def __init__(
        self,
        snapshot: Snapshot,
        desired: Mapping[str, Any],
        options: Options,
        images: Mapping[tuple[str, str], Image] | None = None,
    ) -> None:
        self.there = snapshot
        self.desired = desired
        self.options = options
        self.mark = str(desired["project_name"])
        self.plan = Plan(images=dict(images or {}))
        self.declared_projects: dict[str, Obj] = {str(p["name"]): p for p in desired.get("projects") or []}
        self.after: dict[Key, Obj] = {}
        self.assigned: dict[tuple[str, str], gpu.Assignment] = {}
        self.cards = [c for m, r in snapshot.member_resources.items() for c in gpu.cards_of(r, m)]
        self.plan.known_cards = self.cards
        self.exclusive = str(desired.get("gpu_policy") or "exclusive") == "exclusive"

    def build(self) -> Plan:
        for project in self.desired.get("projects") or []:
            self._project(project)
        for network in self.desired.get("networks") or []:
            self._network(network)
        for volume in self.desired.get("volumes") or []:
            self._volume(volume)
        for profile in self.desired.get("profiles") or []:
            self._profile(profile)
        self._images()
        self._instances()
        removed: list[Step] = []
        if self.options.prune:
            removed = plan_removals(self.there, self.mark, self.options, self.desired, self.plan, self.after)
        self._addresses(removed)
        self._hand_over(removed)
        self.plan.errors += overlaps(
            self._wanted_subnets(),
            self.there,
            {s.name for s in removed if s.kind == "network" and s.writes and s.phase == REMOVE_BASE},
            self.plan,
        )
        self.plan.steps.sort(key=lambda s: s.phase)
        return self.plan

    # what the kinds have in common

    def _refused(self, step: Step, current: Obj) -> bool:
        """Whether an object of that name belongs to somebody else; says so."""
        found = owner(current)
        if found == self.mark or self.options.adopt or self._is_default_profile(step):
            return False
        whose = f"belongs to {MARK}={found}" if found else "was not made by this collection"
        self.plan.errors.append(
            f"{step.title} exists already and {whose}: it is left alone. Choose another name in"
            f" {self.options.infra_file}, remove it by hand, or take it over with adopt: true."
        )
        return True

    def _is_default_profile(self, step: Step) -> bool:
        """Incus makes this one itself, with each project; in a project of ours it is ours."""
        if step.kind != "profile" or step.name != "default" or step.project == "default":
            return False
        project = self.there.projects.get(step.project)
        return step.project in self.declared_projects and (project is None or owner(project) == self.mark)

    def _settle(self, step: Step, current: Obj | None, body: Obj, immutable: Iterable[str] = ()) -> Step:
        """Create it, update it, or leave it."""
        if step.kind != "project":
            step.needs.add(("project", "", step.project))
        if current is None:
            after = rebuild(step.kind, {}, step.target)
            step.action, step.after = "created", {**body, **after}
            step.body = {k: v for k, v in step.after.items() if k not in ("architecture", "stateful")}
        elif not self._refused(step, current):
            for field in immutable:
                if body.get(field) and current.get(field) and body[field] != current[field]:
                    self.plan.note(
                        f"{step.title} is a {current[field]}, declared as {body[field]}: that cannot be"
                        " changed in place, it stays as it is."
                    )
            step.before, step.after = current, rebuild(step.kind, current, step.target)
            found = changes(current, step.after)
            if found:
                step.action, step.changes = "updated", visible(found)
        self.after[step.key] = step.after or {}
        self.plan.steps.append(step)
        return step

    def _target(self, obj: Mapping[str, Any], **more: Any) -> Obj:
        return {
            "description": obj.get("description") or "",
            "config": clean(obj.get("config")),
            "mark": self.mark,
            **more,
        }

    def _project_known(self, project: str, what: str) -> None:
        if project not in self.declared_projects and project not in self.there.projects:
            self.plan.errors.append(
                f"{what}: there is no Incus project {project}, and {self.options.infra_file} declares none."
            )

    # the kinds

    def _project(self, obj: Obj) -> None:
        name = str(obj["name"])
        current = self.there.projects.get(name)
        target = self._target(obj)
        now, later = self._gpu_in_project(name)
        if name != "default" and self._may_restrict(current, target["config"]):
            if not later:
                target["config"] = {**RESTRICTION, **target["config"]}
            elif "restricted" in record_of(current)["config"]:
                # Only switched off: Incus 6.0 refuses to drop a key that an instance needs open, even then.
                target["config"] = {**RESTRICTION, "restricted": "false", **target["config"]}
        if current is not None:
            # The server takes these only while a project is empty.
            old = current.get("config") or {}
            fixed = {
                k: old[k]
                for k, v in target["config"].items()
                if k.startswith("features.") and old.get(k) not in (None, v)
            }
            default = ("profile", name, "default")
            used = [u for u in current.get("used_by") or [] if parse_url(u) != default]
            if fixed and used:
                target["config"].update(fixed)
                self.plan.note(
                    f"Incus project {name} is in use: {', '.join(sorted(fixed))} cannot be changed and stays."
                )
        # Incus refuses what an instance still contradicts.
        step = Step("project", name, name, phase=RESTRICT if now and not later else PROJECTS, target=target)
        self._settle(step, current, {"name": name})

    def _gpu_in_project(self, project: str) -> tuple[bool, bool]:
        """Whether anything in a project has a GPU device now, and whether anything will after this run."""
        now: set[Key] = set()
        for kind, objects in (("profile", self.there.profiles), ("instance", self.there.instances)):
            now |= {
                (kind, *k) for k, o in objects.items() if k[0] == project and gpu.uses_gpu(o.get("devices"))
            }
        later = now - self._leaving()
        for kind in ("profile", "instance"):
            for obj in self.desired.get(f"{kind}s") or []:
                key = (kind, str(obj.get("project") or "default"), str(obj["name"]))
                if key[1] != project:
                    continue
                current = (self.there.profiles if kind == "profile" else self.there.instances).get(key[1:])
                if obj.get("gpu") or gpu.uses_gpu(self._merged(obj, current)):
                    later.add(key)
                else:
                    later.discard(key)
        return bool(now), bool(later)

    @staticmethod
    def _may_restrict(current: Obj | None, declared: Mapping[str, str]) -> bool:
        """Not where a person set such keys: then they say what is forbidden."""
        ours = record_of(current)["config"]
        by_hand = [k for k in (current or {}).get("config") or {} if k not in ours]
        return not any(k.split(".")[0] == "restricted" for k in [*declared, *by_hand])

    @staticmethod
    def _merged(obj: Mapping[str, Any], current: Obj | None) -> dict[str, dict[str, str]]:
        """The devices of a declared object without those that this module gave it."""
        there = (current or {}).get("devices") or {}
        return merge_devices(there, clean_devices(obj.get("devices")), record_of(current)["devices"])

    def _leaving(self) -> set[Key]:
        """What prune removes for certain before anything else is done."""
        if not self.options.prune:
            return set()
        declared = set(names(self.desired, "instances"))
        return {
            ("instance", *k)
            for k, i in self.there.instances.items()
            if k not in declared and owner(i) == self.mark and not _protection(i, None)[0]
        }

    def _network(self, obj: Obj) -> None:
        project, name = str(obj.get("project") or "default"), str(obj["name"])
        current = self.there.networks.get((project, name))
        if current is not None and pending(current):
            current = None
        self._project_known(project, f"Network {name}")
        if current is not None and not current.get("managed", True):
            self.plan.errors.append(
                f"Network {name}: the host has an interface of that name which Incus does not manage."
                f" Remove it (ip link delete {name}), or rename the domain in {self.options.infra_file}."
            )
            return
        kind = str(obj.get("type") or "bridge")
        step = Step("network", project, name, phase=BASE, target=self._target(obj))
        step.members = [str(m["server_name"]) for m in self.there.members]
        self._settle(step, current, {"name": name, "type": kind}, immutable=["type"])

    def _volume(self, obj: Obj) -> None:
        project, name = str(obj.get("project") or "default"), str(obj["name"])
        pool = self._volume_pool(obj)
        self._project_known(project, f"Storage volume {name}")
        current = self.there.volumes.get((project, pool, name))
        if current is None:
            self._pool_known(pool, f"storage volume {name}")
        body: Obj = {
            "name": name,
            "type": "custom",
            "content_type": str(obj.get("content_type") or "filesystem"),
        }
        step = Step("volume", project, name, pool=pool, phase=BASE, target=self._target(obj))
        self._settle(step, current, body, immutable=["content_type"])

    def _volume_pool(self, obj: Obj) -> str:
        """Where it is declared to be; else where an earlier run put it; else the pool for new things."""
        if obj.get("pool"):
            return str(obj["pool"])
        project, name = str(obj.get("project") or "default"), str(obj["name"])
        found = [
            pool
            for (p, pool, n), v in sorted(self.there.volumes.items())
            if (p, n) == (project, name) and owner(v) == self.mark
        ]
        return found[0] if found else self.options.storage_pool

    def _pool_known(self, pool: str, what: str) -> None:
        if self.there.pools is not None and pool not in self.there.pools:
            have = ", ".join(self.there.pools) or "none; make one: incus storage create default btrfs"
            text = (
                f"There is no storage pool {pool} for {what}. Pools on the server: {have}. Set storage_pool."
            )
            if text not in self.plan.errors:
                self.plan.errors.append(text)

    def _profile(self, obj: Obj) -> None:
        project, name = str(obj.get("project") or "default"), str(obj["name"])
        self._project_known(project, f"Profile {name}")
        devices = self._devices(project, clean_devices(obj.get("devices")), None)
        step = Step("profile", project, name, phase=PROFILES, target=self._target(obj, devices=devices))
        current = self.there.profiles.get((project, name))
        if current is None and self._is_default_profile(step):
            current = {"name": name, "project": project, "description": "", "config": {}, "devices": {}}
        step.needs |= self._device_needs(project, devices)
        self._settle(step, current, {"name": name})

    def _devices(self, project: str, devices: Mapping[str, dict[str, str]], current: Obj | None) -> Any:
        """Disks get the pool they were declared without; an existing root disk stays where it is."""
        volumes = {
            (str(v.get("project") or "default"), str(v["name"])): v for v in self.desired.get("volumes") or []
        }
        home = self.there.feature(project, "storage.volumes", self.declared_projects)
        result: dict[str, dict[str, str]] = {}
        for name, device in devices.items():
            device = dict(device)
            if device.get("type") == "disk" and not device.get("pool"):
                source = device.get("source", "")
                if device.get("path") == "/" and not source:
                    old = ((current or {}).get("devices") or {}).get(name) or {}
                    device["pool"] = old.get("pool") or self.options.storage_pool
                elif source and "/" not in source and ":" not in source:
                    volume = volumes.get((project, source)) or volumes.get((home, source))
                    device["pool"] = self._volume_pool(volume) if volume else self.options.storage_pool
            result[name] = device
        return result

    def _device_needs(self, project: str, devices: Mapping[str, Mapping[str, str]]) -> set[Key]:
        needs: set[Key] = set()
        for device in devices.values():
            if device.get("network"):
                home = self.there.feature(project, "networks", self.declared_projects)
                needs.add(("network", home, device["network"]))
            if device.get("type") == "disk" and device.get("source") and device.get("pool"):
                home = self.there.feature(project, "storage.volumes", self.declared_projects)
                needs.add(("volume", home, f"{device['pool']}/{device['source']}"))
        return needs

    def _images(self) -> None:
        for (name, itype), image in sorted(self.plan.images.items()):
            if image.error:
                self.plan.errors.append(image.error)
            self.plan.note(image.note)
            if image.remote:
                step = Step("image", "default", image.alias, "created", BASE, why=f"{name} is fetched once")
                step.image = (name, itype)
                step.after = {"image": name, "type": itype}
                self.plan.steps.append(step)

    # instances

    def _profiles_of(self, project: str, profiles: Iterable[str], *, after: bool) -> list[Obj]:
        home = self.there.feature(project, "profiles", self.declared_projects)
        result = []
        for name in profiles:
            planned = self.after.get(("profile", home, name)) if after else None
            result.append(planned or self.there.profiles.get((home, name)) or {})
        return result

    def _from_profiles(self, project: str, profiles: Iterable[str], *, after: bool) -> dict[str, str]:
        """device -> the profile it comes from."""
        found: dict[str, str] = {}
        wanted = [str(p) for p in profiles]
        for name, profile in zip(wanted, self._profiles_of(project, wanted, after=after), strict=True):
            found.update(dict.fromkeys(profile.get("devices") or {}, name))
        return found

    def _claims_there(self, key: tuple[str, str], instance: Obj) -> list[gpu.Claim]:
        """What an instance claims now."""
        own = instance.get("devices") or {}
        by_profile = self._from_profiles(key[0], instance.get("profiles") or [], after=False)
        return gpu.claims_of(
            *key,
            instance.get("expanded_devices", own),
            self.cards,
            location=location_of(instance),
            status=str(instance.get("status") or ""),
            by_profile={d: p for d, p in by_profile.items() if d not in own},
        )

    def _request(self, obj: Obj) -> gpu.Request | None:
        key = (str(obj.get("project") or "default"), str(obj["name"]))
        current = self.there.instances.get(key)
        profiles = [str(p) for p in obj.get("profiles") or []]
        own = self._merged(obj, current)
        _config, inherited = expand({}, own, self._profiles_of(key[0], profiles, after=True))
        spec = obj.get("gpu") or None
        by_hand = gpu.uses_gpu(inherited)
        unselected = gpu.unselected(inherited)
        if by_hand and not unselected:
            spec = None  # the user says by device which card it is
        elif spec is None and unselected and self.exclusive:
            spec = {"optional": False}  # a device that selects none would take them all
        if spec is None and not by_hand:
            return None
        by_profile = self._from_profiles(key[0], profiles, after=True)
        fixed: str | None = location_of(current) if current else ""
        members: list[str] = []
        if current is None and self.there.members:
            fixed, members = self._places(str(obj.get("target") or ""))
        return gpu.Request(
            *key,
            spec,
            inherited,
            self._claims_there(key, current) if current else [],
            fixed,
            members,
            str((current or {}).get("status") or ""),
            str((current or obj).get("type") or "container") == "container",
            {d: p for d, p in by_profile.items() if d not in own},
        )

    def _places(self, target: str) -> tuple[str | None, list[str]]:
        """The member a new machine is declared on, or those it may be put on."""
        if target and not target.startswith("@"):
            return target, []
        group = target.removeprefix("@")
        open_to = ("all", "group") if group else ("all",)
        return None, [
            str(m["server_name"])
            for m in self.there.members
            if m.get("status") == "Online"
            and str((m.get("config") or {}).get("scheduler.instance") or "all") in open_to
            and (not group or group in (m.get("groups") or []))
        ]

    def _gpus(self) -> dict[tuple[str, str], gpu.Assignment]:
        if not self.there.member_resources:
            return {}
        requests = [r for i in self.desired.get("instances") or [] if (r := self._request(i))]
        skip = set(names(self.desired, "instances")) | {k[1:] for k in self._leaving()}
        others = [
            claim
            for key, instance in self.there.instances.items()
            if key not in skip
            for claim in self._claims_there(key, instance)
        ]
        slices = None if self.there.slices is None else gpu.parse_slices(self.there.slices)
        hint = (
            " This Incus keeps that list from when it was first asked: after a change of cards, restart it."
            if lists_stale_cards(self.there.server)
            else ""
        )
        return gpu.assign(requests, self.cards, others, self.exclusive, slices, hint)

    def _instances(self) -> None:
        self.assigned = self._gpus()
        for obj in self.desired.get("instances") or []:
            key = (str(obj.get("project") or "default"), str(obj["name"]))
            given = self.assigned.get(key)
            if given is not None:
                if given.error:
                    self.plan.errors.append(given.error)
                for note in given.notes:
                    self.plan.note(note)
                self.plan.gpus[key] = [c.pci for c in given.claims]
                self.plan.cards[key] = given.cards
            self._instance(obj, given)

    def _gpu_config(
        self, obj: Obj, given: gpu.Assignment, current: Obj | None, config: dict[str, str]
    ) -> str:
        """Adds what a container with an NVIDIA card needs; gives the reason to restart it, if any."""
        project = str(obj.get("project") or "default")
        profiles = self._profiles_of(project, obj.get("profiles") or [], after=True)
        whole, _devices = expand({**((current or {}).get("config") or {}), **config}, {}, profiles)
        vm = str((current or obj).get("type") or "container") != "container"
        if not any(card["vendor"] == "nvidia" for card in given.cards) or vm:
            return ""
        ours = record_of(current)["config"]
        by_hand = RUNTIME in config or (RUNTIME in whole and RUNTIME not in ours)
        # A driver that is not loaded answers nothing: no reason to take the runtime from a machine.
        tools = (given.tools and self.there.nvidia_hook) or (not given.driver and RUNTIME in ours)
        if tools and not by_hand and not truthy(whole.get("security.privileged")):
            config[RUNTIME] = "true"
            config.setdefault(CAPABILITIES, "compute,utility")
        runs = (current or {}).get("status_code") == RUNNING
        was = str(((current or {}).get("config") or {}).get(gpu.DRIVER) or "")
        starts = bool(obj.get("started", True)) and self.options.start
        if not given.driver or not (runs or starts or not was):
            if was:
                config[gpu.DRIVER] = was
            return ""
        config[gpu.DRIVER] = given.driver
        if runs and was and was != given.driver:
            return (
                f"the host's driver went from {was} to {given.driver}: a running container keeps the old"
                " libraries"
            )
        return ""

    def _hand_over(self, removed: list[Step]) -> None:
        """Leases for cards that change hands, and givers before takers."""
        leases = gpu.leases_of(self.there.server.get("config"))
        steps = {s.key[1:]: s for s in self.plan.steps if s.kind == "instance" and s.phase == INSTANCES}
        givers: dict[tuple[str, str], list[Step]] = {}
        before = {k: self._claims_there(k, i) for k, i in self.there.instances.items()} if self.cards else {}
        for key, step in steps.items():
            given = self.assigned.get(key)
            claims = given.claims if given else []
            keys = {gpu.lease_key(c) for c in claims}
            step.unlease = sorted(k for k, lease in leases.items() if lease.key == key and k not in keys)
            if not self.exclusive:
                continue
            had = before.get(key, [])
            step.leases = [c for c in claims if not any(h.meets(c, c.part) for h in had)]
            for lost in had:
                if not any(c.meets(lost, lost.part) for c in claims):
                    for other, taker in self.assigned.items():
                        if other != key and any(c.meets(lost, lost.part) for c in taker.claims):
                            givers.setdefault(other, []).append(step)
                            step.gives.append(lost)
        leaving = {s.key[1:]: s for s in removed if s.kind == "instance" and s.writes}
        for key in leaving:
            for other, taker in self.assigned.items():
                if other in steps and any(
                    c.meets(h, h.part) for h in before.get(key, []) for c in taker.claims
                ):
                    steps[other].needs.add(leaving[key].key)
        for key in givers:
            self._before(key, givers, steps, {key})

    def _before(
        self,
        key: tuple[str, str],
        givers: Mapping[tuple[str, str], list[Step]],
        steps: Mapping[tuple[str, str], Step],
        seen: set[tuple[str, str]],
    ) -> None:
        """Put whoever gives `key` its card ahead of it. Two that swap cards do so at the same time."""
        for giver in givers.get(key, []):
            if giver.key[1:] in seen:
                continue
            steps[key].needs.add(giver.key)
            giver.phase = max(RELEASE + 1, min(giver.phase, steps[key].phase - 1))
            self._before(giver.key[1:], givers, steps, seen | {giver.key[1:]})

    def _instance(self, obj: Obj, given: gpu.Assignment | None) -> None:
        project, name = str(obj.get("project") or "default"), str(obj["name"])
        self._project_known(project, f"Machine {name}")
        current = self.there.instances.get((project, name))
        itype = str(obj.get("type") or "container")
        profiles = [str(p) for p in obj.get("profiles") or []]
        declared = clean_devices(obj.get("devices"))
        declared.update(given.devices if given else {})
        devices = self._devices(project, declared, current)
        self._root(project, profiles, devices, current, name)
        target = self._target(obj, devices=devices, profiles=profiles, image=str(obj.get("image") or ""))
        skew = self._gpu_config(obj, given, current, target["config"]) if given else ""
        if not obj.get("ephemeral"):
            target["config"].setdefault(PROTECTION, "true")
        step = Step("instance", project, name, phase=INSTANCES, target=target)
        home = self.there.feature(project, "profiles", self.declared_projects)
        step.needs |= self._device_needs(project, devices) | {("profile", home, p) for p in profiles}
        self._references(step, home, profiles, devices)
        started = bool(obj.get("started", True)) and self.options.start
        if current is None:
            self._create(step, obj, itype, started)
            self._volumes_to(step, step.query.get("target", ""))
            return
        self._volumes_to(step, location_of(current))
        self._immutable(step, obj, current, itype)
        self._settle(step, current, {"name": name})
        if step.after is None:
            return
        self._restarts(step, current, profiles, skew)
        status = current.get("status_code")
        if started and status == FROZEN:
            step.unfreeze, step.action, step.why = True, "started", "it was paused"
        elif started and status != RUNNING:
            step.start, step.action = True, "started"
            step.why = f"it was {str(current.get('status') or 'stopped').lower()}"

    def _volumes_to(self, step: Step, member: str) -> None:
        """On a cluster, new volumes are made on the member of the machine that mounts them."""
        if not member or member.startswith("@"):
            return
        for volume in self.plan.steps:
            if volume.kind == "volume" and volume.body is not None and volume.key in step.needs:
                volume.query.setdefault("target", member)

    def _create(self, step: Step, obj: Obj, itype: str, started: bool) -> None:
        wanted = (str(obj.get("image") or ""), itype)
        image = self.plan.images.get(wanted)
        if not wanted[0]:
            self.plan.errors.append(f"Machine {step.name} has no image: set os_image or default_os_image.")
        body: Obj = {
            "name": step.name,
            "type": itype,
            "source": image.source if image else {"type": "image", "alias": wanted[0]},
            "start": bool(started),
        }
        step.image, step.start = wanted, bool(started)
        if image and image.remote:
            step.needs.add(("image", "default", image.alias))
        if obj.get("target"):
            step.query["target"] = str(obj["target"])
        given = self.assigned.get((step.project, step.name))
        if given and given.location:
            step.query["target"] = given.location
            step.why = f"on member {given.location}"
        for device in step.target["devices"].values():
            if device.get("type") == "disk" and device.get("pool"):
                self._pool_known(device["pool"], f"machine {step.name}")
        self._settle(step, None, body)
        step.after = {**(step.after or {}), "image": (image.alias or image.wanted) if image else wanted[0]}

    def _root(
        self,
        project: str,
        profiles: list[str],
        devices: dict[str, dict[str, str]],
        current: Obj | None,
        name: str,
    ) -> None:
        """Every machine needs a root disk: its own, a profile's, or one in the pool for new things."""

        def is_root(device: Mapping[str, str]) -> bool:
            return device.get("type") == "disk" and device.get("path") == "/" and not device.get("source")

        own = next((n for n, d in devices.items() if is_root(d)), None)
        there = next(((n, d) for n, d in ((current or {}).get("devices") or {}).items() if is_root(d)), None)
        if own is not None:
            if there and there[1].get("pool") and devices[own]["pool"] != there[1]["pool"]:
                self.plan.note(
                    f"Machine {name} has its root disk in pool {there[1]['pool']}, declared in"
                    f" {devices[own]['pool']}: that cannot be changed in place, it stays."
                )
                devices[own]["pool"] = there[1]["pool"]
            return
        if there:
            devices[there[0]] = {"type": "disk", "path": "/", "pool": str(there[1].get("pool", ""))}
            return
        inherited = self._profiles_of(project, profiles, after=True)
        if not any(is_root(d) for p in inherited for d in (p.get("devices") or {}).values()):
            free = "root" if "root" not in devices else "root-disk"
            devices[free] = {"type": "disk", "path": "/", "pool": self.options.storage_pool}

    def _references(self, step: Step, home: str, profiles: list[str], devices: Mapping[str, Any]) -> None:
        for profile in profiles:
            key = ("profile", home, profile)
            new_project = home in self.declared_projects and home not in self.there.projects
            if key in self.after or (home, profile) in self.there.profiles:
                continue
            if not (profile == "default" and new_project):
                self.plan.errors.append(
                    f"Machine {step.name} uses profile {profile}, which is neither declared nor in project"
                    f" {home}."
                )
        for kind, where, name in self._device_needs(step.project, devices):
            if kind != "network" or (kind, where, name) in self.after or (where, name) in self.there.networks:
                continue
            self.plan.errors.append(
                f"Machine {step.name} uses network {name}, which is neither declared nor on the server."
            )

    def _immutable(self, step: Step, obj: Obj, current: Obj, itype: str) -> None:
        if current.get("type") and current["type"] != itype:
            self.plan.note(
                f"Machine {step.name} is a {current['type']}, declared as a {itype}: that cannot be changed"
                " in place, it stays as it is. Remove it (destroy) and apply again to rebuild it."
            )
        made_from, wanted = record_of(current)["image"], str(obj.get("image") or "")
        if made_from and wanted and made_from != wanted:
            self.plan.note(
                f"Machine {step.name} was made from {made_from}, declared as {wanted}: the image of an"
                " existing machine is never changed. Remove it (destroy) and apply again to rebuild it."
            )
        target, location = str(obj.get("target") or ""), current.get("location")
        if target and not target.startswith("@") and location not in (None, "", "none", target):
            self.plan.note(
                f"Machine {step.name} is on {location}, declared on {target}: it is not moved. Do it with"
                f" incus move {step.name} --target {target} --project {step.project}."
            )

    def _restarts(self, step: Step, current: Obj, profiles: list[str], skew: str) -> None:
        if current.get("status_code") != RUNNING or step.after is None:
            return
        new = self._profiles_of(step.project, profiles, after=True)
        config, devices = expand(step.after["config"], step.after["devices"], new)
        old_config = current.get("expanded_config")
        old_devices = current.get("expanded_devices")
        if old_config is None or old_devices is None:
            old = self._profiles_of(step.project, current.get("profiles") or [], after=False)
            old_config, old_devices = expand(current.get("config") or {}, current.get("devices") or {}, old)
        why = needs_restart(str(current.get("type")), old_config, config, old_devices, devices)
        if why or skew:
            step.restart, step.action = True, "restarted"
            taken = f"{', '.join(why)} is taken only at a start" if why else ""
            step.why = "; ".join(x for x in (skew, taken) if x)

    # addresses

    def _addresses(self, removed: list[Step]) -> None:
        """Machines that swap or pass on addresses give theirs up before anybody takes one."""
        gone = {s.key for s in removed if s.writes}
        steps = {s.key: s for s in self.plan.steps if s.kind == "instance" and s.phase == INSTANCES}
        wanted: dict[tuple[str, str], Step] = {}
        for step in steps.values():
            for _device, address in static_addresses((step.after or {}).get("devices")):
                wanted.setdefault(address, step)
        for (project, name), instance in self.there.instances.items():
            key = ("instance", project, name)
            for device, address in static_addresses(instance.get("expanded_devices")):
                taker = wanted.get(address)
                if taker is None or taker.key == key or key in gone:
                    continue
                if key not in steps:
                    self.plan.errors.append(
                        f"{taker.title} is declared with {address[1]}, which machine {name} of project"
                        f" {project} has. That one is not declared in {self.options.infra_file}: remove it"
                        " (prune: true, if an earlier run made it), or give one of them another address."
                    )
                elif address in [
                    a for _unused, a in static_addresses((steps[key].after or {}).get("devices"))
                ]:
                    self.plan.errors.append(
                        f"{taker.title} and machine {name} are both declared with {address[1]}."
                    )
                elif device in (instance.get("devices") or {}):
                    steps[key].release.append(device)

    def _wanted_subnets(self) -> list[tuple[str, str]]:
        """Networks that are new or get a new address."""
        wanted = []
        for step in self.plan.steps:
            if step.kind != "network" or not step.writes or step.after is None or step.phase != BASE:
                continue
            for family in ("ipv4.address", "ipv6.address"):
                new = step.after["config"].get(family, "")
                if "/" in new and new != ((step.before or {}).get("config") or {}).get(family):
                    wanted.append((step.name, new))
        return wanted


def static_addresses(devices: Mapping[str, Mapping[str, str]] | None) -> list[tuple[str, tuple[str, str]]]:
    """(device, (network, address)) of the cards with a static IPv4 address."""
    return [
        (name, (d.get("network") or d.get("parent") or "", d["ipv4.address"]))
        for name, d in (devices or {}).items()
        if d.get("type") == "nic" and d.get("ipv4.address") not in (None, "", "none")
    ]


def overlaps(
    wanted: list[tuple[str, str]], snapshot: Snapshot, leaving: Iterable[str], plan: Plan | None = None
) -> list[str]:
    """Subnets that the server or its host uses already."""
    if not wanted:
        return []
    import ipaddress

    def net(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
        try:
            return ipaddress.ip_network(text, strict=False)
        except ValueError:
            return None

    gone = set(leaving)
    managed = {str(o["name"]) for o in snapshot.networks.values() if o.get("managed")}
    used: list[tuple[str, str, str, bool]] = []
    for (project, name), o in snapshot.networks.items():
        for family in ("ipv4.address", "ipv6.address"):
            address = str((o.get("config") or {}).get(family) or "")
            if "/" in address and name not in gone:
                inside = "" if project == "default" else f" of project {project}"
                used.append((name, address, f"the Incus network {name}{inside}", True))
    # What Incus manages was listed above, with its name.
    for r in snapshot.routes:
        if r.interface not in managed:
            what = f"the host's interface {r.interface}" if r.direct else f"a route over {r.interface}"
            used.append(("", r.subnet, what, r.direct))
    used += [(name, address, f"the declared network {name}", True) for name, address in wanted]
    errors: list[str] = []
    for name, address in wanted:
        ours = net(address)
        for other, subnet, what, direct in used:
            theirs = net(subnet)
            if ours is None or theirs is None or ours.version != theirs.version or other == name:
                continue
            if not ours.overlaps(theirs):
                continue
            text = f"Network {name} would be {ours}, which overlaps {theirs} of {what}"
            if not direct and theirs.prefixlen < ours.prefixlen:
                # A wide route, as of a company's VPN: the narrower bridge wins on this host.
                if plan is not None:
                    plan.note(f"{text}: on this host the addresses of {name} are no longer reached there.")
                continue
            if other and not direct:
                continue
            errors.append(
                f"{text}. Nothing was changed. Set global.addressing or subnet_id of the domain in infra.yml"
                " so that they differ."
            )
    return list(dict.fromkeys(errors))


# Removal


def plan_removals(
    snapshot: Snapshot,
    mark: str,
    options: Options,
    desired: Mapping[str, Any],
    plan: Plan,
    after: Mapping[Key, Obj] | None = None,
) -> list[Step]:
    """Steps that remove what is marked as ours: all of it, or (prune) what is no longer declared.

    Never what is protected, what somebody else uses, or what such things stand on.
    """
    absent = options.state == "absent"
    after = after or {}
    declared: set[Key] = set()
    if not absent:
        declared |= {("project", "", str(p["name"])) for p in desired.get("projects") or []}
        for kind in ("network", "profile", "instance"):
            declared |= {(kind, p, n) for p, n in names(desired, f"{kind}s")}
        declared |= {key for key in after if key[0] == "volume"}
        # A project that declared things live in is in use, whoever declared it.
        declared |= {
            ("project", "", p)
            for kind in ("profiles", "volumes", "instances")
            for p, _unused in names(desired, kind)
        }
    wanted_config = {
        (str(i.get("project") or "default"), str(i["name"])): i for i in desired.get("instances") or []
    }
    gone: set[Key] = set()
    steps: list[Step] = []
    kept: list[Step] = []

    def candidates(kind: str, objects: Mapping[Any, Obj]) -> list[tuple[Key, Obj]]:
        found = []
        for raw, obj in sorted(objects.items()):
            key: Key
            if kind == "project":
                key = ("project", "", raw)
            elif kind == "volume":
                key = ("volume", raw[0], f"{raw[1]}/{raw[2]}")
            else:
                key = (kind, raw[0], raw[1])
            if owner(obj) == mark and key not in declared:
                found.append((key, obj))
        return found

    def step_for(key: Key, phase: int, obj: Obj) -> Step:
        pool, _unused, name = key[2].partition("/") if key[0] == "volume" else ("", "", key[2])
        return Step(key[0], key[1] or name, name, "deleted", phase, pool=pool, before=obj)

    def keep(step: Step, why: str) -> None:
        step.action, step.why = "skipped", why
        kept.append(step)
        steps.append(step)

    def drop(step: Step) -> None:
        gone.add(step.key)
        steps.append(step)

    def users(obj: Obj, *, now: bool) -> list[Key]:
        """Who still uses it: at present, or once the plan is carried out."""
        found = []
        for url in obj.get("used_by") or []:
            key = parse_url(url)
            if key is None:
                found.append(("", "", str(url)))
            elif key not in gone and (now or key not in after or _refers(after[key], obj)):
                found.append(key)
        return found

    for key, obj in candidates("instance", snapshot.instances):
        step = step_for(key, REMOVE_INSTANCES, obj)
        step.gentle = any(
            d.get("type") == "disk" and d.get("source") for d in (obj.get("expanded_devices") or {}).values()
        )
        protected, step.unprotect = _protection(obj, wanted_config.get(key[1:]) if absent else None)
        if protected:
            keep(step, _remedy(step, options))
        else:
            step.stop = obj.get("status_code") != STOPPED
            leases = gpu.leases_of(snapshot.server.get("config"))
            step.unlease = sorted(k for k, lease in leases.items() if lease.key == key[1:])
            drop(step)
    for key, obj in candidates("profile", snapshot.profiles):
        if key[2] == "default":
            continue  # it goes with its project
        step = step_for(key, REMOVE_PROFILES, obj)
        if left := users(obj, now=False):
            keep(step, f"used by {_people(left)}")
            continue
        step.phase = REMOVE_LATE_PROFILES if users(obj, now=True) else REMOVE_PROFILES
        drop(step)
    for key, obj in candidates("volume", snapshot.volumes):
        step = step_for(key, REMOVE_LATE_BASE, obj)
        if left := users(obj, now=False):
            keep(step, f"used by {_people(left)}")
        elif not options.prune_volumes:
            keep(
                step,
                "it holds data; to remove it, run again with prune_volumes: true, or: incus storage volume"
                f" delete {step.pool} {step.name} --project {step.project}",
            )
        else:
            drop(step)
    for key, obj in candidates("network", snapshot.networks):
        step = step_for(key, REMOVE_BASE, obj)
        if left := users(obj, now=False):
            keep(step, f"used by {_people(left)}")
            continue
        step.phase = REMOVE_LATE_BASE if users(obj, now=True) else REMOVE_BASE
        drop(step)
    for key, obj in candidates("project", snapshot.projects):
        step = step_for(key, REMOVE_PROJECTS, obj)
        default = ("profile", key[2], "default")
        if left := [k for k in users(obj, now=True) if k != default]:
            keep(step, f"it holds {_people(left)}")
        else:
            drop(step)
    if options.protected == "fail":
        plan.errors += [f"{s.title} is {s.why}" for s in kept if s.kind == "instance"]
    plan.steps += steps
    return steps


def plan_absent(snapshot: Snapshot, desired: Mapping[str, Any], options: Options) -> Plan:
    plan = Plan()
    plan_removals(snapshot, str(desired["project_name"]), options, desired, plan)
    plan.steps.sort(key=lambda s: s.phase)
    return plan


def _protection(obj: Obj, declared: Mapping[str, Any] | None) -> tuple[bool, bool]:
    """(protected, protection of ours that the user has taken back in infra.yml and is to be lifted)."""
    on_server = truthy((obj.get("expanded_config") or obj.get("config") or {}).get(PROTECTION))
    if declared is not None:
        config = clean(declared.get("config"))
        if truthy(config.get(PROTECTION, "false" if declared.get("ephemeral") else "true")):
            return True, False
        if on_server and PROTECTION in record_of(obj)["config"]:
            return False, True
    return on_server, False


def _remedy(step: Step, options: Options) -> str:
    return (
        f"protected against deletion; to remove it, set ephemeral: true for {step.name} in"
        f" {options.infra_file} and destroy again, or: incus config set {step.name} {PROTECTION}=false"
        f" --project {step.project}"
    )


def _refers(after: Mapping[str, Any], obj: Obj) -> bool:
    """Whether a planned profile or instance still uses this network, volume or profile."""
    name = obj["name"]
    if name in (after.get("profiles") or []):
        return True
    return any(
        name in (d.get("network"), d.get("parent"), d.get("source"))
        for d in (after.get("devices") or {}).values()
    )


def _people(keys: list[Key]) -> str:
    told = [f"{_LABEL.get(kind, '')} {name}".strip() for kind, _project, name in keys]
    return ", ".join(told[:5]) + (f" and {len(told) - 5} more" if len(told) > 5 else "")

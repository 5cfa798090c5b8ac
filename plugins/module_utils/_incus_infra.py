# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From the declared state to the result of a run: read, plan, apply, tell."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_gpu as gpu
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_images as images
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_state as state
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import IncusUnreachable
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_diff import MARK, as_text, clean, owner
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_plan import (
    Options,
    Plan,
    Planner,
    Step,
    missing,
    names,
    plan_absent,
)

if TYPE_CHECKING:
    from ansible_collections.sottovoce.stack.plugins.module_utils._incus_apply import Outcome
    from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import IncusClient

IMAGE_SERVER = "https://images.linuxcontainers.org"


class InfraError(Exception):
    """A refusal or a failure; `result` holds what is known of it for the task's result."""

    def __init__(self, message: str, result: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = dict(result or {})


@dataclasses.dataclass
class Settings:
    """How to work, as opposed to what is wanted."""

    image_server: str = IMAGE_SERVER
    image_fallback: str | None = None
    parallel: int = 8
    wait_timeout: float = 300.0
    probe: Callable[[str], str] = images.probe_server


def check_desired(desired: Mapping[str, Any]) -> None:
    """What the inventory plugin guarantees; a hand-written state may lack it."""
    if not str(desired.get("project_name") or ""):
        raise InfraError("desired has no project_name: it is what resources are marked with.")
    seen: set[tuple[str, str, str]] = set()
    for kind in ("projects", "networks", "profiles", "volumes", "instances"):
        value = desired.get(kind) or []
        if not isinstance(value, list):
            raise InfraError(f"desired.{kind} is not a list.")
        for index, item in enumerate(value):
            if not isinstance(item, Mapping) or not item.get("name"):
                raise InfraError(f"desired.{kind}[{index}] is not a mapping with a name.")
            key = (
                kind,
                "" if kind == "projects" else str(item.get("project") or "default"),
                str(item["name"]),
            )
            if key in seen:
                raise InfraError(f"desired.{kind} has {item['name']} twice.")
            seen.add(key)


def make_plan(
    client: IncusClient, desired: Mapping[str, Any], options: Options, settings: Settings
) -> tuple[Plan, state.Snapshot]:
    """Read what is there, ask only what this state needs to know, and plan."""
    snapshot = state.read(client)
    if options.state == "absent":
        state.read_volumes(client, snapshot, state.pools_in_use(snapshot))
        return plan_absent(snapshot, desired, options), snapshot
    volumes = desired.get("volumes") or []
    if volumes or options.prune:
        pools = {str(v["pool"]) for v in volumes if v.get("pool")} | state.pools_in_use(snapshot)
        state.read_volumes(client, snapshot, pools)
    new = missing(snapshot, desired)
    if set(names(desired, "networks")) - {k for k, n in snapshot.networks.items() if not state.pending(n)}:
        state.read_members(client, snapshot)
    there = {(project, name) for project, _pool, name in snapshot.volumes}
    if new or set(names(desired, "volumes")) - there:
        state.read_pools(client, snapshot)
    found: dict[tuple[str, str], images.Image] = {}
    if new:
        state.read_aliases(client, snapshot)
        wanted = [(str(i["image"]), str(i.get("type") or "container")) for i in new if i.get("image")]
        found = images.resolve(
            wanted,
            snapshot.aliases or [],
            server=settings.image_server,
            fallback=settings.image_fallback,
            probe=settings.probe,
        )
    if wants_gpu(desired, snapshot):
        state.read_resources(client, snapshot, settings.parallel)
        if client.endpoint.url is None:
            state.refresh_driver(snapshot, os.environ.get("SOTTOVOCE_HOST_ROOT") or "/")
            snapshot.nvidia_hook = state.nvidia_hook()
            if any((i.get("gpu") or {}).get("mig") for i in desired.get("instances") or []):
                snapshot.slices = state.nvidia_slices()
    if _new_subnets(snapshot, desired):
        state.read_routes(client, snapshot)
    return Planner(snapshot, desired, options, found).build(), snapshot


def wants_gpu(desired: Mapping[str, Any], snapshot: state.Snapshot) -> bool:
    """Whether a declared machine has a GPU by whatever way: then the cards have to be known."""
    instances = desired.get("instances") or []
    used = {str(name) for i in instances for name in i.get("profiles") or []}
    profiles = [*(desired.get("profiles") or []), *snapshot.profiles.values()]
    there = (snapshot.instances.get(key) or {} for key in names(desired, "instances"))
    objects = [*instances, *there, *(p for p in profiles if p["name"] in used)]
    return any(i.get("gpu") for i in instances) or any(gpu.uses_gpu(o.get("devices")) for o in objects)


def blind_plan(desired: Mapping[str, Any], options: Options, why: str) -> tuple[Plan, state.Snapshot]:
    """Check mode before there is a daemon: what would be done on an empty server."""
    snapshot = state.Snapshot(
        projects={"default": {"name": "default", "config": {"features.networks": "true"}}},
        profiles={("default", "default"): {"name": "default", "project": "default"}},
    )
    if options.state == "absent":
        plan = plan_absent(snapshot, desired, options)
    else:
        # Which cards and images there are cannot be known yet.
        instances = [{**i, "gpu": None} for i in desired.get("instances") or []]
        plan = Planner(snapshot, {**desired, "instances": instances}, options).build()
    plan.note(f"Shown is what a run on an empty server does. {why}")
    return plan, snapshot


def _new_subnets(snapshot: state.Snapshot, desired: Mapping[str, Any]) -> bool:
    for network in desired.get("networks") or []:
        current = snapshot.networks.get((str(network.get("project") or "default"), str(network["name"])))
        wanted = clean(network.get("config")).get("ipv4.address")
        if current is None or (current.get("config") or {}).get("ipv4.address") != wanted:
            return True
    return False


def reconcile(
    client: IncusClient,
    desired: Mapping[str, Any],
    options: Options,
    settings: Settings,
    *,
    check: bool = False,
    diff: bool = False,
) -> dict[str, Any]:
    """The whole run. Raises InfraError for refusals (nothing was changed) and failures (something may be)."""
    check_desired(desired)
    if desired.get("source"):
        options.infra_file = os.path.basename(str(desired["source"]))
    try:
        plan, snapshot = make_plan(client, desired, options, settings)
    except IncusUnreachable as exc:
        if not check or client.endpoint.url:
            raise
        plan, snapshot = blind_plan(desired, options, str(exc))
    result = describe(plan, snapshot, desired, options)
    result["requests"] = client.requests
    if diff:
        result["diff"] = diffs(plan)
    if plan.errors:
        more = f"\n{len(plan.errors)} problems, nothing was changed." if len(plan.errors) > 1 else ""
        raise InfraError("\n".join(plan.errors) + more, {**result, "changed": False, "errors": plan.errors})
    if check or not plan.changed:
        return result
    from ansible_collections.sottovoce.stack.plugins.module_utils._incus_apply import Applier

    outcome = Applier(
        client,
        plan,
        mark=str(desired["project_name"]),
        adopt=options.adopt,
        parallel=settings.parallel,
        wait_timeout=settings.wait_timeout,
        image_server=settings.image_server,
        image_fallback=settings.image_fallback,
        aliases=snapshot.aliases,
        cards=plan.known_cards,
        leases=gpu.leases_of(snapshot.server.get("config")),
    ).run()
    result = {**result, **describe(plan, snapshot, desired, options, outcome)}
    result["requests"] = client.requests + outcome.requests
    result["notes"] += outcome.notes
    if outcome.failed:
        raise InfraError(outcome.message(), {**result, "changed": bool(outcome.done)})
    return result


def describe(
    plan: Plan,
    snapshot: state.Snapshot,
    desired: Mapping[str, Any],
    options: Options,
    outcome: Outcome | None = None,
) -> dict[str, Any]:
    bad = {s.key: ("failed", why) for s, why in (outcome.failed if outcome else [])}
    bad |= {s.key: ("skipped", why) for s, why in (outcome.blocked if outcome else [])}
    resources = []
    for step in plan.steps:
        action, why = bad.get(step.key, (step.action, step.why))
        entry: dict[str, Any] = {
            "kind": step.kind,
            "project": "" if step.kind == "project" else step.project,
            "name": step.name,
            "action": action,
            "changes": step.changes,
            "why": why,
        }
        if step.kind == "volume":
            entry["pool"] = step.pool
        resources.append(entry)
    return {
        "changed": plan.changed,
        "resources": resources,
        "notes": list(plan.notes),
        "instances": summaries(plan, snapshot) if options.state == "present" else [],
    }


def summaries(plan: Plan, snapshot: state.Snapshot) -> list[dict[str, Any]]:
    found = []
    for step in plan.steps:
        if step.kind != "instance" or step.action == "deleted" or step.after is None:
            continue
        current = snapshot.instances.get((step.project, step.name)) or {}
        runs = step.start or step.restart or step.unfreeze
        found.append(
            {
                "name": step.name,
                "project": step.project,
                "address": address_of(step.after.get("devices")),
                "gpu": plan.gpus.get((step.project, step.name)) or gpu.described(step.after.get("devices")),
                "cards": plan.cards.get((step.project, step.name), []),
                "status": "Running" if runs else str(current.get("status") or "Stopped"),
            }
        )
    return found


def address_of(devices: Mapping[str, Mapping[str, str]] | None) -> str:
    """The static address, of eth0 if it has one."""
    cards = sorted((devices or {}).items(), key=lambda item: (item[0] != "eth0", item[0]))
    for _name, device in cards:
        if device.get("type") == "nic" and device.get("ipv4.address") not in (None, "", "none"):
            return str(device["ipv4.address"])
    return ""


def diffs(plan: Plan) -> list[dict[str, str]]:
    """One diff per resource that is touched, as Ansible shows them."""
    return [one_diff(step) for step in plan.steps if step.writes]


def one_diff(step: Step) -> dict[str, str]:
    before, after = dict(step.before or {}), dict(step.after or {})
    if step.kind == "instance":
        before_status = str(before.get("status") or "")
        if step.start or step.unfreeze:
            after["status"] = "Running"
        elif step.restart:
            after["status"] = "Running (restarted)"
        else:
            after["status"] = before_status
    else:
        before.pop("status", None)
    if step.action == "deleted":
        after = {}
    elif "type" in before:
        after.setdefault("type", before["type"])
    title = step.label
    return {
        "before_header": title,
        "after_header": f"{title} ({step.action})",
        "before": as_text(before),
        "after": as_text(after),
    }


# incus_infra_info


def info(
    client: IncusClient, desired: Mapping[str, Any] | None = None, *, live: bool = False, gpus: bool = True
) -> dict[str, Any]:
    """What is on the server, for people and for templates: with `desired` only what is of that project_name.

    `live` asks for the present addresses, too.
    """
    project_name = str(desired["project_name"]) if desired and desired.get("project_name") else None
    snapshot = state.read(client, recursion=2 if live else 1)
    cards: list[gpu.Card] = []
    if gpus:
        state.read_resources(client, snapshot)
        cards = [c for m, r in snapshot.member_resources.items() for c in gpu.cards_of(r, m)]

    claims = [
        claim
        for (project, name), i in snapshot.instances.items()
        for claim in gpu.claims_of(
            project, name, i.get("expanded_devices"), cards, location=state.location_of(i)
        )
    ]

    def cards_given(project: str, name: str) -> list[dict[str, str]]:
        given = [claim for claim in claims if claim.key == (project, name)]
        return [card.summary() for card in cards if any(claim.meets(card, "") for claim in given)]

    def ours(obj: Mapping[str, Any]) -> bool:
        return project_name is None or owner(obj) == project_name

    environment = snapshot.server.get("environment") or {}
    return {
        "server": {
            "name": environment.get("server_name", ""),
            "version": environment.get("server_version", ""),
            "clustered": bool(environment.get("server_clustered")),
            "storage": environment.get("storage", ""),
            "os": f"{environment.get('os_name', '')} {environment.get('os_version', '')}".strip(),
        },
        "projects": [
            {
                "name": name,
                "description": p.get("description", ""),
                "managed": owner(p) or "",
                "config": _without_marks(p),
            }
            for name, p in sorted(snapshot.projects.items())
            if ours(p)
        ],
        "networks": [
            {
                "name": name,
                "project": project,
                "type": n.get("type", ""),
                "managed": owner(n) or "",
                "address": (n.get("config") or {}).get("ipv4.address", ""),
                "config": _without_marks(n),
            }
            for (project, name), n in sorted(snapshot.networks.items())
            if n.get("managed") and ours(n)
        ],
        "instances": [
            {**_instance_info(project, name, i), "cards": cards_given(project, name)}
            for (project, name), i in sorted(snapshot.instances.items())
            if ours(i)
        ]
        + [
            {
                **_instance_info(str(i.get("project") or "default"), str(i["name"]), {}),
                "cards": [],
                "type": str(i.get("type") or "container"),
                "status": "Missing",
                "address": address_of(i.get("devices")),
            }
            for i in missing(snapshot, desired or {})
        ],
        "gpus": [
            {
                "pci": card.pci,
                "name": card.name,
                "uuid": card.uuid,
                "vendor": card.vendor,
                "location": card.location,
                "driver": card.driver,
                "capability": card.capability,
                "instances": sorted({f"{c.project}/{c.name}" for c in claims if c.meets(card, "")}),
            }
            for card in cards
        ],
        "requests": client.requests,
    }


def _without_marks(obj: Mapping[str, Any]) -> dict[str, str]:
    return {
        k: v
        for k, v in (obj.get("config") or {}).items()
        if not k.startswith(("user.sottovoce.", "volatile."))
    }


def _instance_info(project: str, name: str, i: Mapping[str, Any]) -> dict[str, Any]:
    devices = i.get("expanded_devices") or {}
    entry: dict[str, Any] = {
        "name": name,
        "project": project,
        "type": i.get("type", ""),
        "status": i.get("status", ""),
        "location": "" if i.get("location") in (None, "none") else i["location"],
        "address": address_of(devices),
        "gpu": gpu.described(devices),
        "managed": owner(i) or "",
        "profiles": list(i.get("profiles") or []),
        "config": {k: v for k, v in _without_marks(i).items() if not k.startswith("image.")},
        "protected": (i.get("expanded_config") or {}).get("security.protection.delete") == "true",
    }
    if "state" in i:
        live = i.get("state") or {}
        entry["addresses"] = {
            card: [a["address"] for a in net.get("addresses") or [] if a.get("scope") == "global"]
            for card, net in sorted((live.get("network") or {}).items())
            if card != "lo"
        }
        memory = live.get("memory") or {}
        entry["memory"] = {"usage": int(memory.get("usage") or 0), "total": int(memory.get("total") or 0)}
        entry["processes"] = int(live.get("processes") or 0)
    return entry


__all__ = ["MARK", "InfraError", "Options", "Settings", "info", "reconcile"]

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carries out a plan: phase by phase, the steps of a phase side by side, each thread with its own client."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_gpu as gpu
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    IncusConflict,
    IncusError,
    IncusForbidden,
    IncusNotFound,
    IncusOperationFailed,
    IncusPreconditionFailed,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_diff import (
    MARK,
    changes,
    give_up_addresses,
    owner,
    rebuild,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_images import find_alias
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_plan import (
    PROTECTION,
    RELEASE,
    RESTRICT,
    RUNTIME,
    Plan,
    Step,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_state import (
    RUNNING,
    STOPPED,
    Key,
    Obj,
    location_of,
    nvidia_tools_say,
)

if TYPE_CHECKING:
    from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import IncusClient

ATTEMPTS = 5
LOG_LINES = 20
# Machines that a new project may get before it pays to restrict it afterwards.
CROWD = 8
# Seconds after which a lease whose instance does not have the card counts as left behind: until then another
# run may be about to make it.
LEASE_GRACE = 15.0
# Seconds between taking a lease and looking whether it stands. Incus compares If-Match before it opens its
# transaction, so of two writes at the same instant both are accepted and the last one stands.
LEASE_SETTLE = 0.3


@dataclasses.dataclass
class Outcome:
    done: list[Step] = dataclasses.field(default_factory=list)
    failed: list[tuple[Step, str]] = dataclasses.field(default_factory=list)
    blocked: list[tuple[Step, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    requests: int = 0

    def message(self) -> str:
        """What was done, what failed and why, and what was not done."""
        total = len(self.done) + len(self.failed) + len(self.blocked)
        lines = [f"{len(self.failed)} of {total} changes failed."]
        lines += [f"Failed: {s.label}: {text}" for s, text in self.failed]
        if self.done:
            lines.append("Done: " + ", ".join(f"{s.label} ({s.action})" for s in self.done) + ".")
        if self.blocked:
            lines.append("Not done: " + "; ".join(f"{s.label} ({why})" for s, why in self.blocked) + ".")
        lines.append("Run it again to carry on from here.")
        return "\n".join(lines)


def path_of(step: Step, *, collection: bool = False) -> str:
    base = {
        "project": "/1.0/projects",
        "network": "/1.0/networks",
        "profile": "/1.0/profiles",
        "instance": "/1.0/instances",
        "image": "/1.0/images",
        "volume": f"/1.0/storage-pools/{quote(step.pool, safe='')}/volumes/custom",
    }[step.kind]
    return base if collection else f"{base}/{quote(step.name, safe='')}"


class Applier:
    def __init__(
        self,
        client: IncusClient,
        plan: Plan,
        *,
        mark: str,
        adopt: bool = False,
        parallel: int = 8,
        wait_timeout: float = 300.0,
        image_server: str = "",
        image_fallback: str | None = None,
        aliases: list[Obj] | None = None,
        cards: list[gpu.Card] | None = None,
        leases: dict[str, gpu.Claim] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.client = client
        self.plan = plan
        self.mark = mark
        self.adopt = adopt
        self.parallel = max(1, parallel)
        self.wait_timeout = wait_timeout
        self.image_server = image_server
        self.image_fallback = image_fallback
        self.aliases = aliases or []
        self.cards = cards or []
        self.clock = clock
        self.sleep = sleep
        self.outcome = Outcome()
        # When a lease of somebody else was seen first.
        self._seen = {(key, lease.key): clock() for key, lease in (leases or {}).items()}
        self._guard = threading.Lock()
        self._bridges = threading.Lock()
        self._idle: queue.SimpleQueue[IncusClient] = queue.SimpleQueue()
        self._clients: list[IncusClient] = []
        self._bad: dict[Key, str] = {}
        self._reserve: dict[tuple[str, str], str] = {}

    # phases

    def run(self) -> Outcome:
        writing = [s for s in self.plan.steps if s.writes]
        # Addresses are given up by all before they are taken by anybody.
        work = [(s.phase, s, self._carry_out) for s in writing]
        work += [(RELEASE, s, self._release) for s in writing if s.release]
        work += [(RESTRICT, s, self._update) for s in writing if self._opens_first(s)]
        try:
            for phase in sorted({p for p, _s, _f in work}):
                self._side_by_side([(s, f) for p, s, f in work if p == phase])
        finally:
            self.outcome.requests = sum(c.requests for c in self._clients)
            for client in self._clients:
                client.close()
        return self.outcome

    def _opens_first(self, step: Step) -> bool:
        """Whether a new project is restricted only when its machines are made.

        Incus goes through a whole restricted project for every machine that it makes in it.
        """
        if step.kind != "project" or step.body is None or step.body["config"].get("restricted") != "true":
            return False
        machines = (s for s in self.plan.steps if s.kind == "instance" and s.project == step.name)
        return sum(s.body is not None for s in machines) > CROWD

    def _side_by_side(self, tasks: list[tuple[Step, Callable[[IncusClient, Step], None]]]) -> None:
        ready = []
        for step, function in tasks:
            if step.key in self._bad:
                continue
            if why := self._why_not(step):
                self._bad[step.key] = why
                self.outcome.blocked.append((step, why))
            else:
                ready.append((step, function))
        if len(ready) <= 1 or self.parallel == 1:
            for step, function in ready:
                self._one(step, function)
            return
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(self.parallel, len(ready))) as pool:
            for future in [pool.submit(self._one, step, function) for step, function in ready]:
                future.result()

    def _why_not(self, step: Step) -> str:
        if step.action == "deleted" and self.outcome.failed:
            return "nothing is removed after a failure"
        broken = sorted(k for k in step.needs if k in self._bad)
        return f"it needs {broken[0][0]} {broken[0][2]}" if broken else ""

    def _one(self, step: Step, function: Callable[[IncusClient, Step], None]) -> None:
        client = self._borrow()
        try:
            function(client, step)
        except IncusError as exc:
            self._failed(step, str(exc))
        except Exception as exc:  # an answer nobody foresaw must not hide what the others did
            self._failed(step, f"{type(exc).__name__}: {exc}")
        else:
            if function == self._carry_out:
                with self._guard:
                    self.outcome.done.append(step)
        finally:
            self._idle.put(client)

    def _failed(self, step: Step, text: str) -> None:
        with self._guard:
            self._bad[step.key] = text
            self.outcome.failed.append((step, text))

    def _borrow(self) -> IncusClient:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            client = self.client.clone()
            with self._guard:
                self._clients.append(client)
            return client

    # one step

    def _carry_out(self, client: IncusClient, step: Step) -> None:
        if step.action == "deleted":
            self._delete(client, step)
        elif step.kind == "image":
            self._fetch_image(client, step)
        elif step.kind == "instance":
            self._create_instance(client, step) if step.body is not None else self._instance(client, step)
        elif step.body is not None:
            self._create(client, step)
        else:
            self._update(client, step)

    def _project(self, step: Step) -> str | None:
        return None if step.kind == "project" else step.project

    def _run(self, client: IncusClient, method: str, path: str, step: Step, **more: Any) -> Any:
        """A request, tried again while the server is busy with the same object."""
        deadline = self.clock() + min(self.wait_timeout, 60.0)
        while True:
            try:
                return client.run(
                    method, path, project=self._project(step), wait_timeout=self.wait_timeout, **more
                )
            except IncusError as exc:
                if "is busy running" not in str(exc) or self.clock() >= deadline:
                    raise
                self.sleep(0.5)

    def _create(self, client: IncusClient, step: Step) -> None:
        for member in step.members:
            with contextlib.suppress(IncusConflict):  # announced by an earlier run
                body = {"name": step.name, "type": (step.body or {})["type"]}
                where = {"target": member}
                self._run(client, "POST", path_of(step, collection=True), step, body=body, query=where)
        made = step.body or {}
        if self._opens_first(step):
            made = {**made, "config": {**made["config"], "restricted": "false"}}
        try:
            self._post(client, step, made)
        except IncusError as exc:
            if not (isinstance(exc, IncusConflict) or "already exists" in str(exc)):
                raise
            self._update(client, step)
        else:
            if step.members:  # Incus 6.0 keeps what it was announced with: no description
                self._update(client, step)

    def _post(self, client: IncusClient, step: Step, made: Obj) -> None:
        """Where Incus starts a bridge's dnsmasq beside another change of bridges, that may end at once."""
        for attempt in range(ATTEMPTS):
            try:
                collection = path_of(step, collection=True)
                self._run(client, "POST", collection, step, body=made, query=step.query or None)
            except IncusError as exc:
                if "service exited prematurely" not in str(exc) or attempt == ATTEMPTS - 1:
                    raise
                self.sleep(0.5)
            else:
                return

    def _read(self, client: IncusClient, step: Step) -> tuple[Obj, str | None]:
        response = client.get(path_of(step), project=self._project(step))
        current: Obj = response.metadata or {}
        found = owner(current)
        if found != self.mark and not self.adopt and not (step.kind == "profile" and step.name == "default"):
            raise IncusError(
                f"{step.label} was made by somebody else in the meantime"
                f" ({MARK}={found or 'not set'}): it is left alone."
            )
        return current, response.etag

    def _update(self, client: IncusClient, step: Step) -> None:
        """Lay what is declared over what is there now; if somebody else is faster, again."""
        for _attempt in range(ATTEMPTS):
            current, etag = self._read(client, step)
            after = rebuild(step.kind, current, step.target)
            if not changes(current, after):
                return
            try:
                self._run(client, "PUT", path_of(step), step, body=after, etag=etag)
            except IncusPreconditionFailed:
                continue
            return
        raise IncusError(
            f"somebody else changed it at the same moment, {ATTEMPTS} times in a row. Run again after that."
        )

    # leases of cards

    def _lease(self, client: IncusClient, step: Step) -> None:
        """Reserve the cards that a machine is given now; IncusError if somebody else was faster.

        The lease is compared and written under the ETag of the server's configuration, so two runs at the
        same time, from two controllers, cannot both have a card.
        """
        if not step.leases:
            return
        mine = f"{step.project}/{step.name}"
        for _attempt in range(10 * ATTEMPTS):
            response = client.get("/1.0")
            config = (response.metadata or {}).get("config")
            if config is None:
                self._no_lease(step, "this client may not see the server's configuration")
                return
            rivals = gpu.rivals(step.leases, gpu.leases_of(config))
            body = {key: mine for claim in step.leases if config.get(key := gpu.lease_key(claim)) != mine}
            body = {**dict.fromkeys(rivals, ""), **body}
            if not body:
                return
            if not self._left_behind(client, step, rivals):
                self.sleep(1.0)
                continue
            try:
                client.run("PATCH", "/1.0", body={"config": body}, etag=response.etag)
            except IncusPreconditionFailed:
                continue
            except IncusForbidden as exc:
                self._no_lease(step, str(exc))
                return
            self.sleep(LEASE_SETTLE)
        raise IncusError("the server's configuration is changed by somebody else all the time. Run again.")

    def _left_behind(self, client: IncusClient, step: Step, rivals: dict[str, gpu.Claim]) -> bool:
        """Whether all these leases are of instances that are gone or no longer have the card."""
        fresh = False
        given = [claim for s in self.plan.steps for claim in s.gives]
        for key, lease in rivals.items():
            if any(claim.key == lease.key and claim.meets(lease, lease.part) for claim in given):
                continue  # two machines of this very run that swap cards
            try:
                found = client.get(f"/1.0/instances/{quote(lease.name, safe='')}", project=lease.project)
            except IncusNotFound:
                claims = []
            else:
                there: Obj = found.metadata or {}
                where = location_of(there)
                claims = gpu.claims_of(*lease.key, there.get("expanded_devices"), self.cards, location=where)
            if any(claim.meets(lease, lease.part) for claim in claims):
                raise IncusError(
                    f"card {lease.pci} was given to machine {lease.name} of project {lease.project} by"
                    " another run at the same moment, and gpu_policy is exclusive: nothing of this machine"
                    " was changed. Keep `gpu` in one of them, or set global.gpu_policy: shared (the server's"
                    f" configuration says {key}: {lease.project}/{lease.name})."
                )
            with self._guard:
                since = self._seen.setdefault((key, lease.key), self.clock())
            fresh = fresh or self.clock() - since < LEASE_GRACE
        return not fresh

    def _no_lease(self, step: Step, why: str) -> None:
        with self._guard:
            self.outcome.notes.append(
                f"No lease was taken for the card of {step.name} ({why}): runs from two controllers at the"
                " same moment are not kept apart. Use a client that may configure the server, or run one at a"
                " time."
            )

    def _unlease(self, client: IncusClient, step: Step) -> None:
        """Give back the leases of cards that a machine no longer has."""
        if not step.unlease:
            return
        mine = f"{step.project}/{step.name}"
        for _attempt in range(ATTEMPTS):
            response = client.get("/1.0")
            config = (response.metadata or {}).get("config") or {}
            body = {key: "" for key in step.unlease if config.get(key) == mine}
            if not body:
                return
            try:
                client.run("PATCH", "/1.0", body={"config": body}, etag=response.etag)
            except IncusPreconditionFailed:
                continue
            except IncusForbidden:
                pass  # a lease that is left behind is taken over
            return

    # instances

    def _create_instance(self, client: IncusClient, step: Step) -> None:
        self._lease(client, step)
        body = dict(step.body or {})
        if step.image in self._reserve:
            body["source"] = {"type": "image", "alias": self._reserve[step.image]}
        body.pop("image", None)
        in_one = client.has("instance_create_start")
        if not in_one:
            body.pop("start", None)
        try:
            self._run(
                client, "POST", path_of(step, collection=True), step, body=body, query=step.query or None
            )
        except IncusError as exc:
            if isinstance(exc, IncusConflict) or "already exists" in str(exc):
                self._instance(client, step)
                return
            if isinstance(exc, IncusOperationFailed):
                raise IncusError(f"{exc}{self._after_failed_start(client, step)}") from exc
            raise
        if not in_one:
            self._start(client, step)

    def _after_failed_start(self, client: IncusClient, step: Step) -> str:
        try:
            client.get(path_of(step), project=step.project)
        except IncusError:
            return ""
        return (
            " The machine was made and stays behind, stopped; the next run starts it."
            f"{self._log(client, step)}"
        )

    def _log(self, client: IncusClient, step: Step) -> str:
        """The end of the log: why a container does not start is told nowhere else."""
        sink = io.BytesIO()
        try:
            client.download(f"{path_of(step)}/logs/lxc.log", sink, project=step.project)
        except IncusError:
            return ""
        lines = sink.getvalue().decode("utf-8", "replace").strip().splitlines()
        # What a hook says itself is logged at a lower level than the error that it leads to.
        said = (" ERROR ", " WARN ", "produced output")
        telling = [line for line in lines if any(x in line for x in said)] or lines
        if not telling:
            return ""
        hint = ""
        if (step.target.get("config") or {}).get(RUNTIME) == "true":
            # The hook's own words are logged only where Incus runs with --debug: ask what it asks.
            told = nvidia_tools_say() if client.endpoint.url is None else ""
            hint = "\nnvidia.runtime is set: `nvidia-container-cli info` on the host " + (
                f"says\n  {told}" if told else "shows whether that works."
            )
        shown = "\n".join(f"  {x}" for x in telling[-LOG_LINES:])
        return f"\nEnd of {step.name}'s lxc.log:\n{shown}{hint}"

    def _instance(self, client: IncusClient, step: Step) -> None:
        """Bring an instance that is there to what is declared, and have it running if it should."""
        stopped = False
        self._lease(client, step)
        if step.restart:
            # Stop first: if we are killed in between, the next run sees a stopped machine and goes on.
            stopped = self._stop(client, step, gentle=30)
        try:
            if stopped:
                self._lease(client, step)  # that may have taken long
            self._update(client, step)
        finally:
            if stopped:
                self._start(client, step)
        self._unlease(client, step)
        if step.unfreeze:
            self._state(client, step, "unfreeze")
        elif step.start and not stopped:
            self._start(client, step)

    def _release(self, client: IncusClient, step: Step) -> None:
        """Give an address up, so that another machine can take it."""
        self._lease(client, step)
        if step.restart and self._stop(client, step, gentle=30):
            step.restart, step.start = False, True
        for _attempt in range(ATTEMPTS):
            current, etag = self._read(client, step)
            body = give_up_addresses(current, step.release)
            try:
                self._run(client, "PUT", path_of(step), step, body=body, etag=etag)
            except IncusPreconditionFailed:
                continue
            return
        raise IncusError("somebody else changed it at the same moment, again and again. Run again.")

    def _state(self, client: IncusClient, step: Step, action: str, **more: Any) -> None:
        self._run(client, "PUT", f"{path_of(step)}/state", step, body={"action": action, **more})

    def _status(self, client: IncusClient, step: Step) -> int:
        current = client.get(path_of(step), project=step.project).metadata or {}
        return int(current.get("status_code") or 0)

    def _start(self, client: IncusClient, step: Step) -> None:
        try:
            self._state(client, step, "start", timeout=-1)
        except IncusError as exc:
            if "already running" in str(exc) or self._status(client, step) == RUNNING:
                return
            raise IncusError(f"{exc}{self._log(client, step)}") from exc

    def _stop(self, client: IncusClient, step: Step, *, gentle: int) -> bool:
        """Stop it, with so many seconds to shut down by itself; False if it was not running."""
        if self._status(client, step) == STOPPED:
            return False
        if gentle:
            try:
                self._state(client, step, "stop", timeout=gentle, force=False)
                return True
            except IncusError:
                if self._status(client, step) == STOPPED:
                    return True
                with self._guard:
                    self.outcome.notes.append(
                        f"Machine {step.name} did not shut down in 30 s and was stopped."
                    )
        try:
            self._state(client, step, "stop", timeout=-1, force=True)
        except IncusNotFound:
            raise
        except IncusError as exc:
            if "already stopped" not in str(exc) and self._status(client, step) != STOPPED:
                raise
        return True

    # images

    def _fetch_image(self, client: IncusClient, step: Step) -> None:
        """Once per image, however many machines are made from it."""
        image = self.plan.images[step.image] if step.image else None
        if image is None:
            return
        body = {
            "source": {
                "type": "image",
                "mode": "pull",
                "server": self.image_server,
                "protocol": "simplestreams",
                "alias": image.remote,
                "image_type": image.type,
            },
            "aliases": [{"name": image.alias, "description": ""}],
            "auto_update": True,
            "public": False,
        }
        try:
            self._run(client, "POST", "/1.0/images", step, body=body)
        except IncusError as exc:
            reserve = find_alias([self.image_fallback or ""], image.type, self.aliases)
            if not reserve or step.image is None:
                raise
            with self._guard:
                self._reserve[step.image] = reserve
                step.action, step.why = "skipped", f"it could not be fetched; {reserve} is used"
                self.outcome.notes.append(f"Image {reserve} is used in place of {image.wanted}: {exc}")

    # removal

    def _delete(self, client: IncusClient, step: Step) -> None:
        self._remove(client, step)
        self._unlease(client, step)

    def _remove(self, client: IncusClient, step: Step) -> None:
        try:
            if step.kind == "instance":
                self._read(client, step)
                if step.unprotect:
                    self._unprotect(client, step)
                if step.stop:
                    self._stop(client, step, gentle=10 if step.gentle else 0)
            if step.kind == "network":
                self._delete_network(client, step)
            else:
                self._run(client, "DELETE", path_of(step), step)
        except IncusNotFound:
            return

    def _delete_network(self, client: IncusClient, step: Step) -> None:
        """One at a time: Incus looks at all bridges, and fails if one of them vanishes meanwhile."""
        with self._bridges:
            for attempt in range(ATTEMPTS):
                try:
                    self._run(client, "DELETE", path_of(step), step)
                except IncusNotFound:
                    raise
                except IncusError as exc:
                    # Somebody else may remove one, too.
                    if "does not exist" not in str(exc) or attempt == ATTEMPTS - 1:
                        raise
                    self.sleep(0.2)
                else:
                    return

    def _unprotect(self, client: IncusClient, step: Step) -> None:
        """Only where infra.yml says `ephemeral: true` now and the protection was ours."""
        for _attempt in range(ATTEMPTS):
            current, etag = self._read(client, step)
            fields = ("architecture", "description", "devices", "ephemeral", "profiles", "stateful")
            config = {k: v for k, v in (current.get("config") or {}).items() if k != PROTECTION}
            body = {**{k: current.get(k) for k in fields}, "config": config}
            try:
                self._run(client, "PUT", path_of(step), step, body=body, etag=etag)
            except IncusPreconditionFailed:
                continue
            return
        raise IncusError("somebody else changed it at the same moment, again and again. Run again.")

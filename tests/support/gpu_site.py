"""An infra.yml applied to the daemon with simulated cards, and a look into the machines that come of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_infra as infra
from ansible_collections.sottovoce.stack.plugins.module_utils import _infra_model
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import Endpoint, IncusClient
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_plan import Options

Obj = dict[str, Any]
OCTET = int(os.environ.get("SOTTOVOCE_TEST_OCTET") or 210)
ID = os.environ.get("SOTTOVOCE_TEST_ID") or "test"
IMAGE = "sottovoce/debian/12"
NOBODY = 65534
# A node without a driver answers ENXIO to whoever may open it.
OPEN = """
import json, os, sys
os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
found = {}
for name in sorted(os.listdir("/dev")):
    if name.startswith("nvidia"):
        try:
            os.close(os.open(f"/dev/{name}", os.O_RDWR))
            found[name] = "open"
        except OSError as error:
            found[name] = __import__("errno").errorcode[error.errno]
print(json.dumps(found))
"""


def incus(*arguments: str, project: str = "default", check: bool = True) -> str:
    done = subprocess.run(
        ["incus", "--project", project, *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"incus {' '.join(arguments)}: {done.stderr}"
    return done.stdout if check else done.stdout + done.stderr


@dataclass(frozen=True)
class Site:
    """One infra.yml with one domain. Sites differ by their letter."""

    letter: str = "a"

    @property
    def domain(self) -> str:
        return f"g{self.letter}-{ID}"

    def document(self, machines: Obj, *, profiles: Obj | None = None, **settings: Any) -> str:
        zone = OCTET + "abcdefgh".index(self.letter)
        domain: Obj = {"ephemeral": True, "machines": machines}
        if profiles:
            domain["profiles"] = profiles
        return yaml.safe_dump(
            {
                "project_name": f"site-{self.letter}",
                "global": {
                    "addressing": {"base_octet": 10, "zone_base": zone - 20, "zone_step": 10},
                    "default_os_image": IMAGE,
                    **settings,
                },
                "domains": {self.domain: domain},
            }
        )

    def apply(
        self, machines: Obj, *, check: bool = False, profiles: Obj | None = None, **settings: Any
    ) -> Obj:
        """Reconcile, as the module does, but without its file lock; InfraError if it is refused or fails."""
        wanted = _infra_model.load_text(self.document(machines, profiles=profiles, **settings)).state
        with client() as daemon:
            options = Options(storage_pool="default", prune=True)
            return infra.reconcile(
                daemon, wanted, options, infra.Settings(wait_timeout=60), check=check, diff=True
            )

    def instance(self, name: str) -> Obj:
        with client() as daemon:
            found: Obj = daemon.get(f"/1.0/instances/{name}", project=self.domain).metadata
            return found

    def names(self) -> set[str]:
        return {item["name"] for item in instances() if item["project"] == self.domain}

    def execute(self, name: str, *command: str) -> str:
        return incus("exec", name, "--", *command, project=self.domain)

    def nodes(self, name: str, user: int = NOBODY) -> dict[str, str]:
        """The driver's nodes in a machine, with what comes of opening each as that user."""
        found: dict[str, str] = json.loads(self.execute(name, "python3", "-c", OPEN, str(user)))
        return found

    def libraries(self, name: str) -> list[str]:
        """What the driver's userland tool handed in; it leaves an empty file behind where one was."""
        mounts = [line.split()[1] for line in self.execute(name, "cat", "/proc/mounts").splitlines()]
        return [mount.rpartition("/")[2] for mount in mounts if "/libcuda.so." in mount]

    def booted(self, name: str) -> None:
        """Wait until it can be shut down: before that a shutdown waits for its time-out."""
        # In its first moments there is nobody yet whom systemctl could ask.
        ask = "for i in $(seq 100); do test -S /run/dbus/system_bus_socket && break; sleep 0.1; done"
        self.execute(name, "sh", "-c", f"{ask}; systemctl is-system-running --wait || true")

    def remove(self) -> None:
        """The domain as well: each bridge costs a start of the daemon a second."""
        wanted = _infra_model.load_text(self.document({})).state
        with client() as daemon:
            infra.reconcile(daemon, wanted, Options(state="absent"), infra.Settings(wait_timeout=60))


def client() -> contextlib.closing[IncusClient]:
    return contextlib.closing(IncusClient(Endpoint(), timeout=30))


def server_config() -> Obj:
    with client() as daemon:
        found: Obj = daemon.get("/1.0").metadata["config"]
        return found


def instances() -> list[Obj]:
    """Of all projects."""
    with client() as daemon:
        found: list[Obj] = daemon.get("/1.0/instances", query={"recursion": 1, "all-projects": True}).metadata
        return found


def leases() -> dict[str, str]:
    prefix = "user.sottovoce.gpu."
    return {k.removeprefix(prefix): v for k, v in server_config().items() if k.startswith(prefix)}


def gpu_of(result: Obj, name: str) -> list[Obj]:
    """The cards that a result says a machine has."""
    (found,) = [item for item in result["instances"] if item["name"] == name]
    cards: list[Obj] = found["cards"]
    return cards


def resource(result: Obj, name: str) -> Obj:
    (found,) = [item for item in result["resources"] if item["kind"] == "instance" and item["name"] == name]
    return dict(found)


def clear() -> None:
    """Every instance, foreign project, gpu device of a profile and lease goes; domains and bridges stay."""
    with client() as daemon:
        for item in instances():
            path, project = f"/1.0/instances/{item['name']}", item["project"]
            if item["status"] != "Stopped":
                body = {"action": "stop", "force": True, "timeout": 30}
                daemon.run("PUT", f"{path}/state", project=project, body=body)
            # Those of infra.yml may be ephemeral to Incus, too: gone when they end.
            incus("delete", "--force", item["name"], project=project, check=False)
        for project in daemon.get("/1.0/projects", query={"recursion": 1}).metadata:
            if project["name"].startswith("foreign"):
                incus("project", "delete", project["name"])
        held = {f"user.sottovoce.gpu.{key}": "" for key in leases()}
        if held:
            daemon.run("PATCH", "/1.0", body={"config": held})
    for name in incus("profile", "list", "--format=csv", "--columns=n").split():
        if name != "default":
            incus("profile", "delete", name)


def daemon_folder() -> Path:
    return Path(os.environ["INCUS_DIR"]).parent

#!/usr/bin/env python3
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""
What one task costs over our connection plugin and over community.general.incus, in one run.

The same playbook (so many times stat, a copy of 1 MB to a new file, a command) runs with each
connection in turn, several rounds, against one instance made for it. From each time that of the same
playbook without these tasks is taken away. The times depend on the machine and on what else it
does; the ratios are of medians of rounds that lie side by side.

community.general is not needed otherwise. --community-general names a folder in which
ansible_collections/community/general lies (any installed collections path will do).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".collections"))

from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    Endpoint,
    IncusClient,
    IncusError,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_websocket import run_command

OURS, GENERAL, PIPED = "sottovoce.stack", "community.general", "community.general, pipelined"
VARIANTS: dict[str, dict[str, Any]] = {
    OURS: {"ansible_connection": "sottovoce.stack.incus"},
    GENERAL: {"ansible_connection": "community.general.incus", "ansible_pipelining": False},
    PIPED: {"ansible_connection": "community.general.incus", "ansible_pipelining": True},
}
KINDS = ("stat", "copy 1 MB", "command")


class Bench:
    def __init__(self, folder: Path, general: Path | None, project: str, instance: str, count: int) -> None:
        self.folder, self.project, self.instance, self.count = folder, project, instance, count
        self.serial = 0
        self.collections = os.pathsep.join(map(str, filter(None, [ROOT / ".collections", general])))
        (folder / "ansible.cfg").touch()
        (folder / "megabyte").write_bytes(os.urandom(1_000_000))

    def tasks(self, kind: str) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for _ in range(self.count):
            self.serial += 1
            if kind == "stat":
                made.append({"ansible.builtin.stat": {"path": "/etc/hostname"}})
            elif kind == "command":
                made.append({"ansible.builtin.command": "true", "changed_when": False})
            else:
                target = {"src": str(self.folder / "megabyte"), "dest": f"/root/copy-{self.serial}"}
                made.append({"ansible.builtin.copy": {**target, "mode": "0600"}})
        return made

    def play(self, variant: str, tasks: list[dict[str, Any]]) -> float:
        host = {
            **VARIANTS[variant],
            "ansible_incus_project": self.project,
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        (self.folder / "hosts.json").write_text(json.dumps({"all": {"hosts": {self.instance: host}}}))
        play = {"hosts": "all", "gather_facts": False, "tasks": tasks}
        (self.folder / "play.json").write_text(json.dumps([play]))
        environment = {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": self.collections,
            "ANSIBLE_INVENTORY_ENABLED": "yaml",
            "ANSIBLE_CONFIG": str(self.folder / "ansible.cfg"),
        }
        begin = time.monotonic()
        done = subprocess.run(
            [
                str(Path(sys.executable).parent / "ansible-playbook"),
                *("-i", str(self.folder / "hosts.json"), str(self.folder / "play.json")),
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        took = time.monotonic() - begin
        if done.returncode:
            raise SystemExit(f"The playbook failed over {variant}:\n{done.stdout}\n{done.stderr}")
        return took


def primitives(client: IncusClient, project: str, instance: str, rounds: int) -> dict[str, float]:
    """Milliseconds of one command without Ansible: over the API, and with the incus program."""
    took: dict[str, list[float]] = {"API": [], "incus exec": []}
    for _ in range(rounds):
        begin = time.monotonic()
        run_command(client, instance, ["true"], project=project)
        middle = time.monotonic()
        subprocess.run(
            ["incus", "exec", instance, "--project", project, "--", "true"], check=True, capture_output=True
        )
        took["API"].append((middle - begin) * 1000)
        took["incus exec"].append((time.monotonic() - middle) * 1000)
    return {name: statistics.median(values) for name, values in took.items()}


def make(client: IncusClient, project: str, instance: str, image: str) -> None:
    pools = [pool["name"] for pool in client.get("/1.0/storage-pools?recursion=1").metadata]
    if not pools:
        raise SystemExit("The daemon has no storage pool: run the playbook `host` first.")
    config = {"features.images": "false", "features.networks": "false"}
    client.run("POST", "/1.0/projects", body={"name": project, "config": config})
    disk = {"type": "disk", "path": "/", "pool": "default" if "default" in pools else pools[0]}
    body = {
        "name": instance,
        "source": {"type": "image", "alias": image},
        "devices": {"root": disk},
        "ephemeral": True,
        "start": True,
    }
    client.run("POST", "/1.0/instances", project=project, body=body)


def remove(client: IncusClient, project: str, instance: str) -> None:
    state = {"action": "stop", "force": True}
    for method, path, body in (
        ("PUT", f"/1.0/instances/{instance}/state?project={project}", state),
        ("DELETE", f"/1.0/projects/{project}", None),
    ):
        for _ in range(20):
            try:
                client.run(method, path, body=body)
                break
            except IncusError:
                time.sleep(0.25)  # an ephemeral instance goes away a moment after it stopped


def report(result: dict[str, Any]) -> str:
    lines = [f"{'one task, seconds':<18}" + "".join(f"{variant:>32}" for variant in result["variants"])]
    for kind in KINDS:
        line = f"{kind:<18}"
        for variant in result["variants"]:
            seconds = result["seconds"][variant][kind]
            ratio = seconds / result["seconds"][OURS][kind]
            line += f"{seconds:>22.3f} ({ratio:5.2f} x)"
        lines.append(line)
    lines.append("")
    lines += [f"one command, {name}: {value:.1f} ms" for name, value in result["primitives_ms"].items()]
    if result["skipped"]:
        lines.append(f"community.general: not measured, {result['skipped']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--community-general", type=Path, metavar="PATH")
    parser.add_argument("--image", help="alias of a local image with Python (default: the first)")
    parser.add_argument("--tasks", type=int, default=8, help="tasks per playbook (default 8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    general: Path | None = options.community_general
    skipped = ""
    if general is None:
        skipped = "no --community-general PATH given"
    elif not (general / "ansible_collections/community/general/plugins/connection/incus.py").is_file():
        skipped = f"there is no ansible_collections/community/general below {general}"
    variants = [OURS] if skipped else list(VARIANTS)

    project, instance = f"bench-{os.urandom(3).hex()}", "box"
    with IncusClient(Endpoint()) as client, tempfile.TemporaryDirectory() as folder:
        aliases = client.get("/1.0/images/aliases?recursion=1").metadata or []
        names = [alias["name"] for alias in aliases if alias.get("type", "container") == "container"]
        if not names or (options.image and options.image not in names):
            raise SystemExit(f"Image not found; the daemon has these aliases: {', '.join(names) or 'none'}")
        bench = Bench(Path(folder), None if skipped else general, project, instance, options.tasks)
        times: dict[str, dict[str, list[float]]] = {
            variant: {kind: [] for kind in (*KINDS, "")} for variant in variants
        }
        try:
            make(client, project, instance, options.image or names[0])
            for variant in variants:  # warm: Python's caches, the first files in the instance
                bench.play(variant, bench.tasks("stat")[:1])
            for number in range(options.rounds):
                for kind in (*KINDS, ""):
                    # Each round begins with another one.
                    for variant in variants[number % len(variants) :] + variants[: number % len(variants)]:
                        times[variant][kind].append(bench.play(variant, bench.tasks(kind) if kind else []))
            single = primitives(client, project, instance, 20)
        finally:
            remove(client, project, instance)
    seconds = {
        variant: {
            kind: (statistics.median(taken[kind]) - statistics.median(taken[""])) / options.tasks
            for kind in KINDS
        }
        for variant, taken in times.items()
    }
    result = {
        "tasks": options.tasks,
        "rounds": options.rounds,
        "variants": variants,
        "seconds": seconds,
        "primitives_ms": single,
        "skipped": skipped,
    }
    print(json.dumps(result, indent=2) if options.json else report(result))


if __name__ == "__main__":
    main()

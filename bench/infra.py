#!/usr/bin/env python3
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long the infrastructure play takes, as a whole process: cold, and with nothing to do.

    .venv/bin/python bench/infra.py                  # 4 machines started, 200 not started
    .venv/bin/python bench/infra.py --machines 4,50 --runs 5 --image lab --assert

It makes projects, networks and machines of its own on the daemon that INCUS_SOCKET or INCUS_DIR names
(else the usual one), and removes them. Each run is one `ansible-playbook` with an infra.yml, our inventory
plugin and one task of incus_infra, as in playbooks/infra.yml. Runs of more than --started machines do
not start them, and make them from an empty image: what is measured is the reconciler, not the host.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".collections"))
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    Endpoint,
    IncusClient,
)

BIN = Path(sys.executable).parent
PER_DOMAIN = 90
# What the project promises, in seconds: (up to so many machines, cold, nothing to do).
LIMITS = [(4, 6.0, 2.5), (200, None, 4.0)]

PLAY = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - name: Reconcile
      sottovoce.stack.incus_infra:
        desired: "{{ sottovoce_state }}"
        state: "{{ bench_state }}"
        start: "{{ bench_start }}"
        storage_pool: "{{ bench_pool }}"
      register: bench
    - ansible.builtin.debug:
        msg: "requests={{ bench.requests }} changed={{ bench.changed }}"
"""


class Run(NamedTuple):
    seconds: float
    cpu: float
    requests: int
    changed: bool


def empty_image() -> bytes:
    """An image that can be made into machines, though not started."""
    kernel = os.uname().machine
    metadata = json.dumps({"architecture": kernel, "creation_date": int(time.time()), "properties": {}})
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        entry = tarfile.TarInfo("metadata.yaml")
        entry.size = len(metadata)
        archive.addfile(entry, io.BytesIO(metadata.encode()))
        for folder in ("rootfs", "rootfs/dev", "rootfs/proc", "rootfs/sys"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
    return data.getvalue()


@contextlib.contextmanager
def image_for(alias: str) -> Iterator[str]:
    """The empty image under an alias of its own, removed at the end."""
    with IncusClient(Endpoint()) as client:
        answer = client.upload("POST", "/1.0/images", empty_image())
        made = client.wait(answer.operation or "")
        fingerprint = made["fingerprint"]
        client.run("POST", "/1.0/images/aliases", body={"name": alias, "target": fingerprint})
        try:
            yield alias
        finally:
            client.run("DELETE", f"/1.0/images/{fingerprint}")


class Bench:
    def __init__(self, folder: Path, machines: int, image: str, options: argparse.Namespace) -> None:
        self.folder = folder
        self.machines = machines
        self.options = options
        self.start = machines <= options.started
        tag = os.urandom(2).hex()
        domains = {}
        for first in range(0, machines, PER_DOMAIN):
            name = f"b{tag}-{first // PER_DOMAIN}"
            count = min(PER_DOMAIN, machines - first)
            domains[name] = {
                "ephemeral": True,
                "machines": {f"b{tag}-m{first + i}": {"boot_autostart": False} for i in range(count)},
            }
        infra = {
            "project_name": f"bench-{tag}",
            "global": {
                "addressing": {"base_octet": 10, "zone_base": options.zone_base, "zone_step": 10},
                "default_os_image": image,
            },
            "domains": domains,
        }
        # JSON is YAML.
        (folder / "infra.yml").write_text(json.dumps(infra, indent=1), encoding="utf-8")
        (folder / "play.yml").write_text(PLAY, encoding="utf-8")

    def run(self, state: str = "present") -> Run:
        """One whole ansible-playbook process."""
        extra = {"bench_state": state, "bench_start": self.start, "bench_pool": self.options.pool}
        command = [
            str(BIN / "ansible-playbook"),
            *("-i", str(self.folder / "infra.yml")),
            *("-e", json.dumps(extra)),
            str(self.folder / "play.yml"),
        ]
        began, before = time.perf_counter(), os.times()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
        seconds, after = time.perf_counter() - began, os.times()
        # On a busy machine, compare the processor time: it hardly depends on what else runs.
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        found = re.search(r"requests=(\d+) changed=(True|False)", done.stdout)
        if done.returncode or found is None:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[:6000]}\n{done.stderr[-4000:]}")
        return Run(seconds, cpu, int(found[1]), found[2] == "True")


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the infrastructure play.")
    parser.add_argument("--machines", default="4,200", help="numbers of machines (default 4,200)")
    parser.add_argument("--runs", type=int, default=3, help="runs with nothing to do (default 3)")
    parser.add_argument("--image", default="sottovoce/debian/12", help="image of started machines")
    parser.add_argument("--pool", default="default", help="storage pool")
    parser.add_argument("--started", type=int, default=10, help="start machines up to this number")
    parser.add_argument("--zone-base", type=int, default=150, help="second octet of the addresses")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--assert", dest="check", action="store_true", help="fail when a limit is exceeded")
    options = parser.parse_args()

    # Killed, too, it cleans up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results, late = [], []
    for machines in [int(n) for n in options.machines.split(",")]:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sottovoce-bench-"))
            image = options.image
            if machines > options.started:
                image = stack.enter_context(image_for(f"bench-{os.urandom(3).hex()}"))
            bench = Bench(Path(folder), machines, image, options)
            try:
                cold = bench.run()
                idle = [bench.run() for _ in range(options.runs)]
            finally:
                removal = bench.run("absent")
        row = {
            "machines": machines,
            "started": bench.start,
            "cold_s": round(cold.seconds, 2),
            "cold_requests": cold.requests,
            "nothing_s": round(statistics.median(r.seconds for r in idle), 2),
            "nothing_max_s": round(max(r.seconds for r in idle), 2),
            "nothing_cpu_s": round(statistics.median(r.cpu for r in idle), 2),
            "nothing_requests": idle[0].requests,
            "nothing_changed": any(r.changed for r in idle),
            "removal_s": round(removal.seconds, 2),
        }
        results.append(row)
        if row["nothing_changed"]:
            late.append(f"{machines} machines: a run with nothing to do changed something")
        limit = next(((c, n) for upto, c, n in LIMITS if machines <= upto), None)
        if limit:
            if bench.start and limit[0] and cold.seconds > limit[0]:
                late.append(f"{machines} machines cold: {cold.seconds:.2f} s, at most {limit[0]} s wanted")
            if row["nothing_s"] > limit[1]:
                late.append(f"{machines} machines, nothing to do: {row['nothing_s']} s, at most {limit[1]} s")
    if len({row["nothing_requests"] for row in results}) > 1:
        late.append("the number of requests grows with the machines")

    if options.json:
        print(json.dumps({"results": results, "late": late}, indent=1))
    else:
        head = (
            "machines",
            "started",
            "cold s",
            "requests",
            "nothing s",
            "(max)",
            "cpu s",
            "requests",
            "removal s",
        )
        print("".join(f"{h:>11}" for h in head))
        for r in results:
            values = (
                r["machines"],
                "yes" if r["started"] else "no",
                r["cold_s"],
                r["cold_requests"],
                r["nothing_s"],
                r["nothing_max_s"],
                r["nothing_cpu_s"],
                r["nothing_requests"],
                r["removal_s"],
            )
            print("".join(f"{v:>11}" for v in values))
        for text in late:
            print(f"LIMIT: {text}")
    return 1 if late and options.check else 0


if __name__ == "__main__":
    sys.exit(main())

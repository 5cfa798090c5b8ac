"""
An Incus cluster of two members on one machine, for tests: two daemons of incusd.py, joined over the network.

Each has its own host name. The second has a network of its own, too, with a cable to the first: otherwise the
bridge that a cluster makes on every member would be one and the same bridge here. A user talks to the first.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import incusd

MEMBERS = ("m1", "m2")
PORT = 8443
# The new /sys tells of the new network; it comes without the control groups that were mounted below the old.
OWN_NETWORK = """
ip link set lo up
mkdir -p "$1"
mount -n --rbind /sys/fs/cgroup "$1"
mount -n -t sysfs sysfs /sys
mount -n --rbind "$1" /sys/fs/cgroup
umount -n -l "$1"
"""


@dataclass
class Member(incusd.Daemon):
    """`apart`: with a network of its own."""

    name: str = ""
    apart: bool = False

    def command(self, argv: list[str]) -> list[str]:
        script = f'set -e\nhostname "$0"\n{OWN_NETWORK if self.apart else ""}\nshift\nexec "$@"'
        namespaces = ["--uts", *(["--net", "--mount", "--propagation", "private"] if self.apart else [])]
        scratch = str(self.folder / "cgroup")
        return ["unshare", *namespaces, "sh", "-c", script, self.name, scratch, *super().command(argv)]

    def incus(self, *arguments: str, stdin: str = "") -> str:
        return _call("incus", *arguments, env=self.environment, stdin=stdin).strip()

    def kill(self) -> None:
        """End the daemon alone, without the time that it takes to look for the other member."""
        record = self.record
        if incusd._started(int(record["daemon_pid"])) == record["daemon_started"]:
            self._end(int(record["daemon_pid"]), patience=1.0)


def _call(*argv: str, env: dict[str, str] | None = None, stdin: str = "") -> str:
    done = subprocess.run(
        argv, env={**os.environ, **(env or {})}, input=stdin, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise incusd.DaemonError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclass
class Cluster:
    first: Member
    second: Member

    def join(self) -> None:
        """Make a cluster of the first and let the second join it."""
        record = self.first.record
        tag, link = f"sv-{record['id']}", f"169.254.{record['octet']}"
        pid = str(self.second.record["daemon_pid"])
        inside = ["nsenter", f"--target={pid}", "--net", "ip"]
        _call("ip", "link", "add", f"{tag}a", "type", "veth", "peer", "name", f"{tag}b", "netns", pid)
        for number, (ip, name) in enumerate([(["ip"], f"{tag}a"), (inside, f"{tag}b")], start=1):
            _call(*ip, "address", "add", f"{link}.{number}/30", "dev", name)
            _call(*ip, "link", "set", name, "up")
        with self.first.client() as client:
            pool = client.get("/1.0/storage-pools/default").metadata
        self.first.incus("config", "set", f"core.https_address={link}.1:{PORT}")
        self.first.incus("cluster", "enable", self.first.name)
        token = self.first.incus("cluster", "add", "--quiet", self.second.name)
        own = {"source": ""} if pool["driver"] == "dir" else {"source": "", "size": pool["config"]["size"]}
        preseed = {
            "cluster": {
                "enabled": True,
                "server_address": f"{link}.2:{PORT}",
                "cluster_token": token,
                "member_config": [
                    {"entity": "storage-pool", "name": "default", "key": key, "value": value}
                    for key, value in own.items()
                ],
            }
        }
        self.second.incus("admin", "init", "--preseed", stdin=json.dumps(preseed))

    def remove(self) -> None:
        """The second, while both are there, empties the whole cluster. Then the first, with the database."""
        try:
            self.second.remove()
        finally:
            # Alone it would wait for the other at every request.
            self.first.kill()
            self.first.remove()


@contextlib.contextmanager
def running(*, gpu: int = 1, **options: Any) -> Iterator[Cluster]:
    """A cluster for the time of a with block: `gpu` simulated cards on the first member."""

    def first(folder: Path) -> Member:
        return Member(folder, MEMBERS[0])

    def second(folder: Path) -> Member:
        return Member(folder, MEMBERS[1], apart=True)

    one = incusd.create(gpu=gpu, make=first, **options)
    try:
        two = incusd.create(pool="none", make=second)
    except BaseException:
        one.remove()
        raise
    assert isinstance(one, Member)
    assert isinstance(two, Member)
    cluster = Cluster(one, two)
    try:
        cluster.join()
        yield cluster
    finally:
        cluster.remove()

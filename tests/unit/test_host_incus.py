"""What is decided about a host: how Incus is installed, whether the kernel can run it, the pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_host as host
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_pool as pools
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    IncusConflict,
    IncusError,
    IncusUnreachable,
)

GIB = 1 << 30


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        (
            {"ID": "debian", "VERSION_ID": "12", "VERSION_CODENAME": "bookworm"},
            host.Install(True, "bookworm-backports"),
        ),
        ({"ID": "debian", "VERSION_ID": "13", "VERSION_CODENAME": "trixie"}, host.Install(True)),
        ({"ID": "debian", "PRETTY_NAME": "Debian GNU/Linux forky/sid"}, host.Install(True)),
        ({"ID": "ubuntu", "VERSION_ID": "24.04"}, host.Install(True)),
        ({"ID": "ubuntu", "VERSION_ID": "26.04"}, host.Install(True)),
    ],
)
def test_distributions_with_incus(release: dict[str, str], expected: host.Install) -> None:
    assert host.install_plan(release) == expected


@pytest.mark.parametrize(
    "release",
    [
        {"ID": "debian", "VERSION_ID": "11", "PRETTY_NAME": "Debian 11"},
        {"ID": "ubuntu", "VERSION_ID": "22.04", "PRETTY_NAME": "Ubuntu 22.04"},
        {"ID": "fedora", "VERSION_ID": "43", "PRETTY_NAME": "Fedora 43"},
        {},
    ],
)
def test_other_distributions_are_told_what_to_do(release: dict[str, str]) -> None:
    plan = host.install_plan(release)
    assert not plan.supported
    assert release.get("PRETTY_NAME", "This system") in plan.why
    assert "Install Incus" in plan.why


def _kernel(
    root: Path, *, uid_map: str = "0 0 4294967295", mounts: str = "c /c cgroup2 rw 0 0", limit: str = "9"
) -> str:
    (root / "proc/self/ns").mkdir(parents=True)
    (root / "proc/self/ns/user").touch()
    (root / "proc/sys/user").mkdir(parents=True)
    (root / "proc/sys/user/max_user_namespaces").write_text(f"{limit}\n", encoding="ascii")
    (root / "proc/self/mounts").write_text(f"{mounts}\n", encoding="ascii")
    (root / "proc/self/uid_map").write_text(f"  {uid_map}\n", encoding="ascii")
    return str(root)


def _fine(_argv: Sequence[str]) -> tuple[bool, str]:
    return True, ""


def test_a_usual_kernel_is_fine(tmp_path: Path) -> None:
    assert host.kernel_problems(root=_kernel(tmp_path), is_root=True, run=_fine) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mounts": "proc /proc proc rw 0 0"}, "cgroup"),
        ({"limit": "0"}, "max_user_namespaces"),
        ({"uid_map": "0 100000 65536"}, "65536 user ids"),
    ],
)
def test_what_the_files_show(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    (problem,) = host.kernel_problems(root=_kernel(tmp_path, **changes), is_root=True, run=_fine)
    assert says in str(problem)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("bridge", "cannot make a bridge"),
        ("veth", "veth"),
        ("nft", "masquerade"),
        ("--user", "User namespaces"),
    ],
)
def test_what_trials_show(tmp_path: Path, word: str, says: str) -> None:
    def run(argv: Sequence[str]) -> tuple[bool, str]:
        return (False, "Operation not supported") if word in argv else (True, "")

    (problem,) = host.kernel_problems(root=_kernel(tmp_path), is_root=True, run=run, which=lambda _name: "/x")
    assert says in str(problem)
    assert "Operation not supported" in str(problem)


def test_a_sandbox_is_named_once(tmp_path: Path) -> None:
    def run(_argv: Sequence[str]) -> tuple[bool, str]:
        return False, "Operation not permitted"

    (problem,) = host.kernel_problems(root=_kernel(tmp_path), is_root=True, run=run)
    assert "restricted" in str(problem)


def test_users_without_rights_try_nothing(tmp_path: Path) -> None:
    def run(argv: Sequence[str]) -> tuple[bool, str]:
        raise AssertionError(argv)

    assert host.kernel_problems(root=_kernel(tmp_path), is_root=False, run=run) == []


def test_trial_reports_the_last_line() -> None:
    assert host.trial(["sh", "-c", "echo a >&2; echo b >&2; exit 3"]) == (False, "b")
    assert host.trial(["sh", "-c", "true"])[0]
    assert host.trial(["no-such-tool-here"]) == (True, "")


# Pool


def test_auto_is_btrfs_with_room_to_spare() -> None:
    plan = pools.plan_pool("auto", "", "", {}, {"btrfs", "dir"}, 100 * GIB)
    assert plan == pools.Plan("btrfs", {"size": "60GiB"})


@pytest.mark.parametrize(("free", "size"), [(1000, "200GiB"), (50, "30GiB"), (8, "")])
def test_loop_size(free: int, size: str) -> None:
    assert pools.loop_size(free * GIB) == size


def test_auto_without_btrfs_is_a_directory_and_says_so() -> None:
    plan = pools.plan_pool("auto", "30GiB", "", {"rsync.bwlimit": "1"}, {"dir"}, 100 * GIB)
    assert (plan.driver, plan.config) == ("dir", {"rsync.bwlimit": "1"})
    assert "btrfs" in plan.note


def test_a_disk_of_its_own_has_no_size() -> None:
    plan = pools.plan_pool("btrfs", "", "/dev/vdb", {}, {"btrfs"}, 100 * GIB)
    assert plan.config == {"source": "/dev/vdb"}


class PoolServer:
    def __init__(self, error: IncusError | None = None) -> None:
        self.error = error
        self.made: list[tuple[str, str]] = []

    def request(
        self, method: str, path: str, *, body: dict[str, object] | None = None, **_more: object
    ) -> None:
        if method == "POST" and body and body["driver"] != "dir" and self.error:
            raise self.error
        self.made.append((method, str(body["driver"]) if body else path))


def _create(server: PoolServer, **options: object) -> pools.Plan:
    plan = pools.Plan("btrfs", {"size": "9GiB"})
    return pools.create_pool(server, "default", plan, **options)  # type: ignore[arg-type]


def test_a_failed_btrfs_becomes_a_directory() -> None:
    server = PoolServer(IncusError("no loop device", code=500))
    made = _create(server, fallback=True)
    assert made.driver == "dir"
    assert "size" not in made.config
    assert "no loop device" in made.note
    assert server.made == [("DELETE", "/1.0/storage-pools/default"), ("POST", "dir")]


@pytest.mark.parametrize("error", [IncusConflict("there", code=409), IncusUnreachable("gone")])
def test_other_failures_are_not_papered_over(error: IncusError) -> None:
    with pytest.raises(type(error)):
        _create(PoolServer(error), fallback=True)


def test_a_driver_the_user_chose_is_not_replaced() -> None:
    with pytest.raises(IncusError):
        _create(PoolServer(IncusError("no", code=500)), fallback=False)

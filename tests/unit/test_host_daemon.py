"""The private daemon of the tests, for real where one can run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import incusd

SCRIPT = str(Path(incusd.__file__))
REASONS = incusd.probe()
needs_incus = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of this test alone; not below pytest's, as the paths of sockets must be short."""
    with tempfile.TemporaryDirectory(prefix="svt-", dir="/var/tmp") as folder:
        monkeypatch.setenv("SOTTOVOCE_TEST_DIR", folder)
        yield Path(folder)


def _mounts(folder: Path) -> list[str]:
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if str(folder) in line]


def test_leftovers_are_those_of_dead_runs(base: Path) -> None:
    own = base / f"{incusd.PREFIX}own"
    dead = base / f"{incusd.PREFIX}dead"
    stays = base / f"{incusd.PREFIX}stays"
    for folder in (own, dead, stays):
        folder.mkdir()
    pid = os.getpid()
    incusd.Daemon(own)._note(owner_pid=pid, owner_started=incusd._started(pid))
    # The number is in use, but by another process than the one that was noted.
    incusd.Daemon(dead)._note(owner_pid=pid, owner_started="1")
    incusd.Daemon(stays)._note(owner_pid=pid, owner_started="1", stays=True)
    assert [daemon.folder for daemon in incusd.leftovers()] == [dead]


def test_octets_of_other_test_daemons_are_used(base: Path) -> None:
    folder = base / f"{incusd.PREFIX}one"
    folder.mkdir()
    incusd.Daemon(folder)._note(octet=136)
    assert set(range(136, 144)) <= incusd._used_octets()


def test_stop_takes_no_other_folder(base: Path) -> None:
    (base / "precious").mkdir()
    assert incusd.main(["stop", str(base / "precious")]) == 1
    assert (base / "precious").is_dir()


@pytest.mark.incus
@needs_incus
def test_daemon_comes_and_goes(base: Path) -> None:
    with incusd.running(pool="auto", size="5GiB") as daemon:
        with daemon.client() as client:
            assert client.get("/1.0/storage-pools/default").metadata["status"] == "Created"
            name = f"t{daemon.record['id']}"
            body = {
                "name": name,
                "config": {"ipv4.address": f"10.{daemon.record['octet']}.0.254/24", "ipv6.address": "none"},
            }
            client.run("POST", "/1.0/networks", body=body)
            instance = {
                "name": "empty",
                "source": {"type": "none"},
                "devices": {"root": {"type": "disk", "path": "/", "pool": "default"}},
                "config": {"security.protection.delete": "true"},
            }
            client.run("POST", "/1.0/instances", body=instance)
        assert Path(f"/sys/class/net/{name}").exists()
        folder = daemon.folder
    assert not folder.exists()
    assert not Path(f"/sys/class/net/{name}").exists()
    assert _mounts(folder) == []


@pytest.mark.incus
@needs_incus
def test_command_sees_its_daemon_and_its_status_comes_back(base: Path) -> None:
    command = ["sh", "-c", 'test -S "$INCUS_SOCKET" && exit 7']
    run = [sys.executable, SCRIPT, "run", "--pool", "none", "--", *command]
    done = subprocess.run(run, check=False, timeout=120)
    assert done.returncode == 7
    assert list(base.iterdir()) == []


@pytest.mark.incus
@needs_incus
def test_a_killed_run_is_swept_up(base: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "run", "--size", "5GiB", "--", "sh", "-c", "echo ready; exec sleep 60"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    (folder,) = base.iterdir()
    daemon = int(incusd.Daemon(folder).record["daemon_pid"])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    process.kill()
    process.wait()
    for child in children:
        if int(child) != daemon:
            os.kill(int(child), signal.SIGKILL)
    assert incusd._started(daemon), "the daemon should have outlived its run"
    assert incusd.main(["clean"]) == 0
    deadline = time.monotonic() + 10
    while incusd._started(daemon) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not incusd._started(daemon)
    assert list(base.iterdir()) == []
    assert _mounts(folder) == []


@pytest.mark.incus
@needs_incus
def test_sigterm_ends_command_and_daemon(base: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "run", "--pool", "none", "--", "sh", "-c", "echo ready; exec sleep 60"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert list(base.iterdir()) == []

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_lock as lock

HOLDER = """
import sys, time
from ansible_collections.sottovoce.stack.plugins.module_utils import _incus_lock as lock
with lock.hold(sys.argv[1], 5):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(path: Path, seconds: float) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    args = [sys.executable, "-c", HOLDER, str(path), str(seconds)]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_waits_and_says_so(tmp_path: Path) -> None:
    process = holder(tmp_path / "l", 0.7)
    with lock.hold(str(tmp_path / "l"), 10) as note:
        assert f"process {process.pid}" in note
    process.communicate()


def test_the_second_stops_with_the_first_ones_number(tmp_path: Path) -> None:
    process = holder(tmp_path / "l", 30)
    try:
        began = time.monotonic()
        with (
            pytest.raises(lock.LockError, match=f"process {process.pid}.*lock_timeout"),
            lock.hold(str(tmp_path / "l"), 0.3),
        ):
            pass
        assert time.monotonic() - began < 3
    finally:
        process.kill()
        process.communicate()
    # The kernel frees the lock of a killed run.
    with lock.hold(str(tmp_path / "l"), 1) as note:
        assert note == ""


def test_one_file_per_server(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "socket")
    assert lock.lock_path(str(tmp_path / "link")) == lock.lock_path(str(tmp_path / "socket"))
    assert lock.lock_path("https://a:8443") != lock.lock_path("https://b:8443")


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "l").symlink_to(tmp_path / "victim")
    with pytest.raises(lock.LockError, match="is a link"), lock.hold(str(tmp_path / "l"), 1):
        pass
    assert not (tmp_path / "victim").exists()

"""The decision of service_state, from made-up answers of systemd."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _service_state as state

RUNNING = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "UnitFileState": "enabled",
    "NeedDaemonReload": "no",
    "ExecMainStartTimestamp": "Fri 2026-11-20 23:45:09.500000 UTC",
}
STARTED = 1795218309.5
ABSENT = {"LoadState": "not-found", "ActiveState": "inactive", "UnitFileState": "", "NeedDaemonReload": "no"}


def test_started_at_reads_systemds_timestamp() -> None:
    assert state.started_at("Fri 2026-11-20 23:45:09.500000 UTC") == STARTED
    assert state.started_at("") is None
    assert state.started_at("n/a") is None


def test_nothing_to_do_when_the_process_is_newer_than_its_files() -> None:
    file = state.File("/etc/x.env", STARTED - 1)
    assert state.decide(RUNNING, enabled=True, restart=False, newest=file) == state.Plan()


def test_a_file_written_after_the_start_restarts_and_says_which() -> None:
    file = state.File("/etc/x.env", STARTED + 0.1)
    plan = state.decide(RUNNING, enabled=True, restart=False, newest=file)
    assert plan == state.Plan(["restart"], "/etc/x.env is newer than the process")


@pytest.mark.parametrize(
    ("shown", "actions"),
    [
        ({"NeedDaemonReload": "yes"}, ["daemon-reload", "restart"]),
        ({"UnitFileState": "disabled"}, ["enable", "restart"]),
        ({"ActiveState": "failed"}, ["start"]),
        ({"ActiveState": "inactive", "UnitFileState": "disabled"}, ["enable", "start"]),
    ],
)
def test_enabled(shown: dict[str, str], actions: list[str]) -> None:
    assert state.decide(RUNNING | shown, enabled=True, restart=True, newest=None).actions == actions


@pytest.mark.parametrize(
    ("shown", "actions"),
    [
        ({}, ["disable", "stop"]),
        ({"ActiveState": "inactive"}, ["disable"]),
        ({"ActiveState": "inactive", "UnitFileState": "disabled"}, []),
        ({"ActiveState": "inactive", "UnitFileState": "disabled", "NeedDaemonReload": "yes"}, []),
        (ABSENT, []),
    ],
)
def test_disabled(shown: dict[str, str], actions: list[str]) -> None:
    assert state.decide(RUNNING | shown, enabled=False, restart=False, newest=None).actions == actions


def test_a_unit_written_a_moment_ago_is_read_first() -> None:
    file = state.File("/etc/systemd/system/x.service", STARTED)
    plan = state.decide(ABSENT, enabled=True, restart=True, newest=file)
    assert plan.actions == ["daemon-reload", "enable", "start"]
    assert not plan.missing


def test_a_unit_without_a_file_is_missing_but_not_in_check_mode() -> None:
    assert state.decide(ABSENT, enabled=True, restart=False, newest=None).missing
    checked = state.decide(ABSENT, enabled=True, restart=False, newest=None, check_mode=True)
    assert (checked.missing, checked.actions) == (False, ["enable", "start"])


def test_newest_takes_the_links_own_time_and_leaves_out_missing_files(tmp_path: Path) -> None:
    old, link = tmp_path / "old", tmp_path / "link"
    old.write_text("x")
    os.utime(old, (1000, 1000))
    link.symlink_to(old)
    found = state.newest([str(old), str(link), str(tmp_path / "gone")])
    assert found is not None
    assert found.path == str(link)
    assert state.newest([]) is None


def test_describe() -> None:
    assert state.describe(RUNNING) == state.wanted(True)
    assert state.describe(ABSENT) == "absent\n"

"""The files and the decision of systemd_unit, from made-up answers of systemd."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _systemd_unit as systemd

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
    assert systemd.started_at("Fri 2026-11-20 23:45:09.500000 UTC") == STARTED
    assert systemd.started_at("") is None
    assert systemd.started_at("n/a") is None


def test_nothing_to_do_when_the_process_is_newer_than_its_files() -> None:
    file = systemd.File("/etc/x.env", STARTED - 1)
    assert systemd.decide(RUNNING, enabled=True, restart=False, newest=file) == systemd.Plan()


def test_a_file_written_after_the_start_restarts_and_says_which() -> None:
    file = systemd.File("/etc/x.env", STARTED + 0.1)
    plan = systemd.decide(RUNNING, enabled=True, restart=False, newest=file)
    assert plan == systemd.Plan(["restart"], "/etc/x.env is newer than the process")


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
    assert systemd.decide(RUNNING | shown, enabled=True, restart=True, newest=None).actions == actions


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
    assert systemd.decide(RUNNING | shown, enabled=False, restart=False, newest=None).actions == actions


def test_a_unit_written_a_moment_ago_is_read_first() -> None:
    file = systemd.File("/etc/systemd/system/x.service", STARTED)
    plan = systemd.decide(ABSENT, enabled=True, restart=True, newest=file)
    assert plan.actions == ["daemon-reload", "enable", "start"]
    assert not plan.missing


def test_a_unit_without_a_file_is_missing_but_not_in_check_mode() -> None:
    assert systemd.decide(ABSENT, enabled=True, restart=False, newest=None).missing
    checked = systemd.decide(ABSENT, enabled=True, restart=False, newest=None, check_mode=True)
    assert (checked.missing, checked.actions) == (False, ["enable", "start"])


def test_newest_takes_the_links_own_time_and_leaves_out_missing_files(tmp_path: Path) -> None:
    old, link = tmp_path / "old", tmp_path / "link"
    old.write_text("x")
    os.utime(old, (1000, 1000))
    link.symlink_to(old)
    found = systemd.newest([str(old), str(link), str(tmp_path / "gone")])
    assert found is not None
    assert found.path == str(link)
    assert systemd.newest([]) is None


def test_describe() -> None:
    assert systemd.describe(RUNNING) == systemd.wanted(True)
    assert systemd.describe(ABSENT) == "absent\n"


def test_a_file_is_stored_whole_with_its_mode_and_seen_as_the_same(tmp_path: Path) -> None:
    path = str(tmp_path / "x.env")
    wanted = systemd.Stored('KEY="ä"\n', 0o640, os.geteuid(), os.getegid())
    assert systemd.look(path) is None
    systemd.store(path, wanted)
    assert systemd.look(path) == wanted
    os.chmod(path, 0o644)
    assert systemd.look(path) != wanted
    # What a killed run left does not stop the next one.
    (tmp_path / "x.env.new").write_text("half")
    systemd.store(path, wanted)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.env"]
    assert systemd.look(path) == wanted


def test_a_hidden_file_shows_no_word_of_either_text() -> None:
    old, new = (
        systemd.Stored("KEY=old-secret\n", 0o640, 0, 0),
        systemd.Stored("KEY=new-secret\n", 0o640, 0, 0),
    )
    hidden = systemd.file_diff("/etc/x.env", old, new, hidden=True)
    assert "secret" not in str(hidden)
    assert hidden["before"] != hidden["after"]
    assert systemd.file_diff("/etc/x.env", None, new, hidden=True)["before"] == ""
    shown = systemd.file_diff("/etc/x.env", old, new, hidden=False)
    assert (shown["before"], shown["after"]) == (old.text, new.text)

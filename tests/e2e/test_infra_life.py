"""Machines without roles: prune, protection, a killed apply, two applies at once, destroy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e import OCTET, Collection

HEAD = f"""---
project_name: life
global:
  addressing: {{base_octet: 10, zone_base: {OCTET + 1 - 20}}}
domains:
  life:
    ephemeral: true
    machines:
"""


def machines() -> dict[str, str]:
    """Instances of the project with their state; empty when the project is not there."""
    listed = subprocess.run(
        ["incus", "list", "--project", "life", "--format=json"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        return {}
    return {item["name"]: item["status"] for item in json.loads(listed.stdout)}


@pytest.fixture
def infra(tmp_path: Path, collection: Collection) -> Iterator[Path]:
    path = tmp_path / "infra.yml"
    yield path
    # Whatever a test left: nothing in it is protected any more once infra.yml says so.
    path.write_text(
        HEAD + "".join(f"      {name}: {{}}\n" for name in machines() or ["m1"]), encoding="utf-8"
    )
    collection.play("apply", path, "--tags", "infra")
    collection.play("destroy", path, "-e", "confirm=yes")
    assert machines() == {}


def declare(path: Path, **declared: str) -> None:
    path.write_text(
        HEAD + "".join(f"      {name}: {body}\n" for name, body in declared.items()), encoding="utf-8"
    )


def test_a_check_before_the_first_apply_foresees_all_and_makes_nothing(
    infra: Path, collection: Collection
) -> None:
    declare(infra, m1="{roles: [base_system]}")
    run = collection.play("check", infra, "--check", "--diff")
    assert run.recap["localhost"]["changed"] == 1
    assert machines() == {}


def test_prune_removes_what_was_dropped_but_nothing_protected(infra: Path, collection: Collection) -> None:
    declare(infra, m1="{}", m2="{}", m3="{ephemeral: false}")
    collection.play("apply", infra, "--tags", "infra")
    declare(infra, m1="{}")
    kept = collection.play("apply", infra, "--tags", "infra")
    assert kept.changed == 0
    assert set(machines()) == {"m1", "m2", "m3"}
    pruned = collection.play("apply", infra, "--tags", "infra", "-e", "sottovoce_prune=true")
    assert pruned.changed == 1
    assert set(machines()) == {"m1", "m3"}


def test_destroy_without_a_yes_removes_nothing(infra: Path, collection: Collection) -> None:
    declare(infra, m1="{}")
    collection.play("apply", infra, "--tags", "infra")
    refused = collection.play("destroy", infra, "-e", "confirm=no", check=False)
    assert refused.code != 0
    assert "Nothing was removed" in refused.output
    assert set(machines()) == {"m1"}


@pytest.mark.parametrize("after", [0.9, 1.6, 2.4])
def test_the_next_apply_carries_on_after_a_killed_one(
    infra: Path, collection: Collection, after: float
) -> None:
    declare(infra, **{f"m{number}": "{}" for number in range(1, 5)})
    process = subprocess.Popen(
        collection.command("apply", infra, "--tags", "infra"),
        env=collection.environment(),
        cwd=collection.path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(after)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    collection.play("apply", infra, "--tags", "infra")
    assert machines() == dict.fromkeys(["m1", "m2", "m3", "m4"], "Running")
    assert collection.play("apply", infra, "--tags", "infra").changed == 0


def test_two_applies_at_once_end_well_and_make_each_machine_once(infra: Path, collection: Collection) -> None:
    declare(infra, m1="{}", m2="{}")
    runs = [
        subprocess.Popen(
            collection.command("apply", infra, "--tags", "infra"),
            env=collection.environment(),
            cwd=collection.path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    print(*outputs, sep="\n")
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted("changed=1" in output for output in outputs) == [False, True]
    assert machines() == {"m1": "Running", "m2": "Running"}


def test_a_role_of_the_users_own_runs_and_is_in_the_summary(infra: Path, collection: Collection) -> None:
    tasks = infra.parent / "roles/greeter/tasks"
    tasks.mkdir(parents=True)
    (tasks / "main.yml").write_text(
        "- name: Greet\n"
        "  ansible.builtin.copy:\n"
        "    {content: 'hello from {{ instance_name }}', dest: /etc/greeting, mode: '0644'}\n"
        "- name: Sum up\n"
        "  ansible.builtin.set_fact: {greeter_summary: {url: 'file:///etc/greeting', version: '1'}}\n",
        encoding="utf-8",
    )
    declare(infra, m1="{roles: [base_system, greeter]}")
    applied = collection.play("apply", infra)
    assert "greeter: file:///etc/greeting 1" in " ".join(applied.output.split())
    read = ["incus", "exec", "--project", "life", "m1", "--", "cat", "/etc/greeting"]
    assert subprocess.run(read, capture_output=True, text=True, check=True).stdout == "hello from m1"
    assert collection.play("apply", infra).changed == 0


def test_a_broken_infra_yml_stops_everything_with_its_message(infra: Path, collection: Collection) -> None:
    declare(infra, m1="{roles: [ollama_serverr]}")
    refused = collection.play("apply", infra, check=False)
    assert refused.code != 0
    assert "ollama_server" in refused.output
    assert "Traceback" not in refused.output
    assert machines() == {}

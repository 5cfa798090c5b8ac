# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The exporter: its text is what Prometheus reads, its program runs alone, dashboard and alerts fit it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nvml_standin as standin
import pytest
import yaml
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_health as vram
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_metrics as metrics
from ansible_collections.sottovoce.stack.plugins.module_utils._nvml import Device, Process
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles/vram_exporter"
MIB = 1 << 20
LABELS = r'\{(?P<labels>([a-z_]+="(\\[\\n"]|[^\\"\n])*",?)+)\}'
SAMPLE = re.compile(rf"^(?P<name>[a-z_]+)({LABELS})? (?P<value>-?[0-9.]+(e[+-]?[0-9]+)?)$")


def parse(text: str) -> dict[str, float]:
    """Samples by name with labels; holds the text to the format on the way."""
    found: dict[str, float] = {}
    kinds: dict[str, str] = {}
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# TYPE "):
            _hash, _type, name, kind = line.split(" ")
            assert name not in kinds, "one block for each metric"
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            match = SAMPLE.match(line)
            assert match, line
            assert match["name"] in kinds, "TYPE comes first"
            assert (kinds[match["name"]] == "counter") == match["name"].endswith("_total")
            key = f"{match['name']}{{{match['labels'] or ''}}}"
            assert key not in found, "no sample twice"
            found[key] = float(match["value"])
    return found


def report(**details: Any) -> dict[str, Any]:
    processes = [Process(10, 6000, "compute")]
    device = Device(
        0, "GPU-1", "0000:01:00.0", "A5000", "8.6", 24564, 9000, 15113, 451, temperature_c=41,
        clock_reasons=["hw_slowdown"], ecc_corrected=3, ecc_uncorrected=0, processes=processes,
    )  # fmt: skip
    facts = vram.Facts(
        source="nvml", vendor="nvidia", devices=[device, Device(1, error="lost")], kernel_log="",
        units={"ollama": "active", "speaches": "failed"}, holders=[vram.Holder(10, "ollama")],
        details={name: ("u", body, "") for name, body in details.items()},
    )  # fmt: skip
    return vram.report(facts, vram.Thresholds(), {"ollama": (4000, 5000)})


def test_every_figure_is_there_in_base_units() -> None:
    model = {"name": 'a"b\\c\n', "size": 8, "size_vram": 4}
    found = parse(metrics.exposition(report(ollama={"models": [model, model]}), duration=0.04, now=1.7e9))
    labels = 'gpu="0",uuid="GPU-1",name="A5000"'
    assert found[f"sottovoce_vram_total_bytes{{{labels}}}"] == 24564 * MIB
    assert found[f"sottovoce_vram_allocated_bytes{{{labels}}}"] == 9000 * MIB
    assert found[f"sottovoce_vram_throttled{{{labels}}}"] == 1
    assert found[f'sottovoce_vram_ecc_errors_total{{{labels},kind="corrected"}}'] == 3
    assert found['sottovoce_vram_up{gpu="1",uuid="",name=""}'] == 0
    assert found['sottovoce_vram_used_bytes{gpu="0",unit="ollama"}'] == 6000 * MIB
    assert found['sottovoce_vram_plan_drift_ratio{unit="ollama"}'] == pytest.approx(0.2)
    assert found['sottovoce_vram_offload_ratio{unit="ollama",model="a\\"b\\\\c\\n"}'] == 0.5
    assert found['sottovoce_vram_unit_active{unit="speaches"}'] == 0
    assert (
        found['sottovoce_vram_findings{severity="fail"}'] == 3
    )  # the lost card, and a model that is listed twice
    assert found["sottovoce_vram_duration_seconds{}"] == 0.04
    names = {key.partition("{")[0].removeprefix(metrics.PREFIX) for key in found}
    assert names == set(metrics.METRICS) - {"reserve_bytes", "evictions_total"}


@given(st.text(), st.text())
def test_any_name_makes_a_readable_file(model: str, unit: str) -> None:
    body = {"models": [{"name": model, "size": 2, "size_vram": 1}]}
    parse(metrics.exposition(report(**{unit: body}), duration=1, now=1))


def test_a_machine_without_cards_exports_that_it_ran() -> None:
    empty = vram.report(vram.Facts(), vram.Thresholds(), {})
    found = parse(metrics.exposition(empty, duration=0.01, now=5))
    assert found["sottovoce_vram_last_run_timestamp_seconds{}"] == 5
    assert not any(key.startswith("sottovoce_vram_up") for key in found)


def used_metrics(text: str) -> set[str]:
    return {name.removeprefix(metrics.PREFIX) for name in re.findall(rf"{metrics.PREFIX}[a-z_]+", text)}


def test_alerts_are_whole_and_use_what_is_exported() -> None:
    rules = [
        rule
        for group in yaml.safe_load((ROLE / "files/alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    ]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 6
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert used_metrics(rule["expr"])
        assert used_metrics(rule["expr"]) <= set(metrics.METRICS)
        assert rule["expr"].count("(") == rule["expr"].count(")")
        for text in rule["annotations"].values():
            assert text.count("{{") == text.count("}}")


def test_alerts_have_the_thresholds_of_the_module() -> None:
    text = (ROLE / "files/alerts.yml").read_text()
    limits = vram.Thresholds()
    assert f"free_bytes < {limits.min_free_mib} * 1024 * 1024" in text
    assert f"plan_drift_ratio > {limits.max_drift_percent / 100:g}" in text


def test_the_dashboard_is_whole_and_uses_what_is_exported() -> None:
    dashboard = json.loads((ROLE / "files/grafana-dashboard.json").read_text())
    assert dashboard["uid"]
    assert {item["name"] for item in dashboard["templating"]["list"]} == {"datasource", "instance"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) >= 6
    places: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & places, f"{panel['title']} lies over another panel"
        places |= cells
        for target in panel["targets"]:
            assert used_metrics(target["expr"])
            assert used_metrics(target["expr"]) <= set(metrics.METRICS)


def installed(folder: Path) -> Path:
    """The files that the role installs, in folder."""
    names = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    package = folder / names["__vram_exporter_package"]
    package.mkdir(parents=True)
    for name in names["__vram_exporter_modules"]:
        shutil.copy(ROOT / f"plugins/module_utils/{name}.py", package)
    shutil.copy(ROLE / "files/export.py", folder)
    return folder / "export.py"


def test_the_program_runs_alone(tmp_path: Path) -> None:
    if not standin.has_compiler():
        pytest.skip(standin.NO_COMPILER)
    program = installed(tmp_path / "opt")
    environment = standin.environment(
        standin.build(tmp_path), tmp_path, standin.DRIVER + standin.card(0, memory="24564 451 30")
    )
    (tmp_path / "plan.json").write_text('{"ollama": 100}')
    target = tmp_path / "vram.prom"
    # Without site-packages, so without Ansible, as on a machine that has none.
    command = [sys.executable, "-I", "-S", str(program), "--plan", str(tmp_path / "plan.json"), str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    found = parse(target.read_text())
    assert found['sottovoce_vram_free_bytes{gpu="0",uuid="GPU-00000000-0000-0000-0000-000000000000",'
                 'name="NVIDIA RTX A5000"}'] == 24083 * MIB  # fmt: skip
    assert [path.name for path in tmp_path.glob("*prom*")] == ["vram.prom"]


@pytest.mark.parametrize(
    ("given", "plan"),
    [
        ({}, set()),
        ({"gpu_vram_mib": 24576}, {"ollama", "speaches", "voicegate"}),
        ({"gpu_vram_mib": 24576, "sottovoce_vram_plan": {"mine": 5}}, {"mine"}),
        (
            {"gpu_vram_mib": 24576, "sottovoce_vram_plan": {"mine": 5}, "vram_exporter_plan": {"other": 1}},
            {"other"},
        ),
    ],
)
def test_the_plan_comes_from_the_planner_unless_somebody_wrote_one(
    tmp_path: Path, given: dict[str, Any], plan: set[str]
) -> None:
    machine = {"instance_gpu": True, "instance_roles": ["ollama_server", "stt_server", "vram_exporter"]}
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    # The defaults as a role has them: below host vars.
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    inventory = {"instances": {"hosts": {"box": {**defaults, **local, **machine, **given}}}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(inventory))
    target = tmp_path / "plan.json"
    task = {"ansible.builtin.copy": {"content": "{{ __vram_exporter_plan | to_json }}", "dest": str(target)}}
    play = {
        "hosts": "all",
        "gather_facts": False,
        "vars_files": [str(ROLE / "vars/main.yml")],
        "tasks": [task],
    }
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    program = str(Path(sys.executable).parent / "ansible-playbook")
    done = subprocess.run(
        [program, "-i", str(tmp_path / "hosts.yml"), str(tmp_path / "play.yml")],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = json.loads(target.read_text())
    assert set(found) == plan
    vram.plan_of(found)

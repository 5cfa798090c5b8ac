"""The text that ends apply and the table of status, from made-up results."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _summary

INFRA = {
    "resources": [
        {"kind": "project", "name": "ai", "action": "created"},
        {"kind": "instance", "name": "speech", "action": "created"},
        {"kind": "instance", "name": "webui", "action": "unchanged"},
        {"kind": "instance", "name": "old", "action": "skipped", "why": "it is protected"},
    ],
    "notes": ["no GPU on this server"],
}


def test_instances_to_create_takes_only_created_instances() -> None:
    assert _summary.instances_to_create(INFRA) == ["speech"]
    assert _summary.instances_to_create({}) == []


def test_infra_summary_tells_actions_and_what_was_left_alone() -> None:
    assert _summary.infra_summary(INFRA) == [
        "created: project ai, instance speech",
        "left alone: instance old: it is protected",
        "no GPU on this server",
    ]
    assert _summary.infra_summary({"resources": [{"kind": "n", "name": "x", "action": "unchanged"}]}) == [
        "nothing to do"
    ]


def test_apply_summary_tells_what_was_found_on_the_host() -> None:
    assert _summary.apply_summary({}, None, ["first"], {"notes": ["no uvm [uvm-unit]"]}) == [
        "note: first",
        "note: host: no uvm [uvm-unit]",
    ]


def test_apply_summary_names_services_skips_and_the_sentence() -> None:
    machines: dict[str, dict[str, Any]] = {
        "speech": {
            "instance_ip": "10.1.2.1",
            "instance_roles": ["base_system", "stt_server"],
            "stt_server_summary": {
                "url": "http://10.1.2.1:8000/v1",
                "engine": "builtin",
                "model": "demo",
                "skipped": [{"what": "Speaches", "why": "source not reachable"}],
                "notes": ["float16 became int8"],
            },
        },
        "webui": {"sottovoce_heard": {"text": "Lock the door.", "seconds": 0.321}},
    }
    assert _summary.apply_summary(machines, INFRA, ["domains are not isolated"]) == [
        "Incus: created: project ai, instance speech; left alone: instance old: it is protected",
        "speech (10.1.2.1)",
        "    stt_server: http://10.1.2.1:8000/v1  builtin, demo",
        "webui (no address)",
        "note: domains are not isolated",
        "note: no GPU on this server",
        "note: speech, skipped: Speaches: source not reachable",
        "note: speech, stt_server: float16 became int8",
        "heard through Open WebUI in 0.32 s: Lock the door.",
    ]


def test_summary_vars_takes_the_facts_of_the_hosts_own_roles() -> None:
    hostvars = {
        "a": {
            "instance_roles": ["own"],
            "own_summary": {"url": "u"},
            "other_summary": 1,
            "instance_ip": "10.0.0.1",
        },
        "b": {},
    }
    assert _summary.summary_vars(["a", "b"], hostvars) == {
        "a": {"instance_ip": "10.0.0.1", "instance_roles": ["own"], "own_summary": {"url": "u"}},
        "b": {},
    }


def test_pick_vars_leaves_out_what_a_host_lacks() -> None:
    assert _summary.pick_vars(["a", "b"], {"a": {"x": 1, "y": 2}, "b": {}}, ["x"]) == {"a": {"x": 1}, "b": {}}


def test_unhealthy_services_ignores_disabled_and_those_without_a_url() -> None:
    health = {
        "services": [
            {"name": "a", "enabled": True, "health": "ok"},
            {"name": "b", "enabled": True, "health": "HTTP 503"},
            {"name": "c", "enabled": False, "health": "stopped"},
            {"name": "d", "enabled": True, "health": "unknown"},
        ]
    }
    assert _summary.unhealthy_services(health) == ["b: HTTP 503"]
    assert _summary.unhealthy_services({}) == []


def test_status_table_has_a_line_per_service_and_per_silent_machine() -> None:
    instances: list[dict[str, Any]] = [
        {"name": "webui", "status": "Stopped", "address": None, "gpu": []},
        {"name": "speech", "status": "Running", "address": "10.1.2.1", "gpu": ["0000:01:00.0"]},
    ]
    machines: dict[str, dict[str, Any]] = {
        "speech": {
            "sottovoce_health": {
                "services": [
                    {"name": "ollama", "health": "ok", "memory_mib": 60, "details": {"models": []}},
                    {
                        "name": "voicegate",
                        "health": "ok",
                        "memory_mib": 250,
                        "details": {"model": "tiny", "compute_type": "int8", "device": "cpu"},
                    },
                ],
            },
            "sottovoce_vram": {
                "gpus": [{"free_mib": 900, "total_mib": 1000, "error": ""}],
                "units": [
                    {"name": "ollama", "used_mib": None},
                    {"name": "voicegate", "used_mib": 77},
                    {"name": "idle", "used_mib": 0},
                ],
                "findings": [
                    {"severity": "warn", "what": "it is hot", "why": "90 °C", "remedy": "cool it"},
                ],
            },
        }
    }
    lines = _summary.status_table(instances, machines)
    assert lines[0].split() == [
        "MACHINE",
        "STATE",
        "ADDRESS",
        "GPU",
        "SERVICE",
        "HEALTH",
        "MODEL",
        "IN",
        "USE",
        "VRAM",
        "FREE",
    ]
    assert lines[1].startswith("speech   running  10.1.2.1  0000:01:00.0  ollama     ok      none loaded")
    assert lines[1].endswith("VRAM 900 of 1000 MiB free")
    assert "60 MiB   ?" in lines[1]
    assert "tiny (int8/cpu)  250 MiB  77 MiB" in lines[2]
    assert lines[3].split()[:3] == ["webui", "stopped", "-"]
    assert lines[4:] == ["speech, VRAM, warn: it is hot (90 °C). To do: cool it"]


@pytest.mark.parametrize(
    ("infra", "declared", "expected"),
    [
        ({"instances": [{"name": "a", "gpu": ["0000:01:00.0"]}]}, False, True),
        ({"instances": [{"name": "a", "gpu": []}, {"name": "b", "gpu": ["all"]}]}, True, False),
        ({"instances": []}, True, False),
        ({}, True, True),
        ({}, False, False),
    ],
)
def test_has_card_believes_incus_before_the_file(
    infra: dict[str, Any], declared: bool, expected: bool
) -> None:
    assert _summary.has_card("a", infra, declared) is expected


def test_what_was_only_read_of_incus_is_no_news() -> None:
    assert _summary.apply_summary({}, {"instances": []}) == []


def test_apply_summary_tells_of_the_cards_and_what_is_wrong() -> None:
    memory = {"used_mib": 9000, "total_mib": 24564, "free_mib": 15113, "reserved_mib": 451}
    vram = {
        "gpus": [{"index": 0, "name": "A5000", "error": "", "temperature_c": 41, **memory}],
        "findings": [{"severity": "fail", "what": "w", "why": "y", "remedy": "r"}],
    }
    lines = _summary.apply_summary({"m": {"instance_roles": [], "sottovoce_vram": vram}})
    assert lines[1] == "    GPU 0 A5000: 9000 of 24564 MiB used, 15113 free, 451 reserved, 41 °C"
    assert lines[2] == "note: m, VRAM, fail: w (y). To do: r"

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From facts to a report: every threshold on both sides, units by processes and by difference, drift."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_health as vram
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_text as vram_text
from ansible_collections.sottovoce.stack.plugins.module_utils._nvml import Device, MigDevice, Process
from hypothesis import given
from hypothesis import strategies as st

GIB = 1 << 30
Plan = dict[str, tuple[int, int]]


def card(used: int = 0, *, total: int = 24564, reserved: int = 451, index: int = 0, **more: Any) -> Device:
    free = total - used - reserved
    memory: dict[str, Any] = {
        "total_mib": total,
        "used_mib": used,
        "free_mib": free,
        "reserved_mib": reserved,
    }
    return Device(index, "GPU-x", f"0000:{index + 1:02x}:00.0", "A5000", "8.6", **memory, **more)


def facts(*devices: Device, **more: Any) -> vram.Facts:
    return vram.Facts(source="nvml", vendor="nvidia", devices=list(devices), kernel_log="", **more)


def judge(given_: vram.Facts, plan: Plan | None = None, **limits: Any) -> dict[str, Any]:
    return vram.report(given_, vram.Thresholds(**limits), plan or {})


def ids(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [(finding["id"], finding["severity"]) for finding in result["findings"]]


def test_a_healthy_card_has_no_findings() -> None:
    result = judge(facts(card(12000, temperature_c=60, clock_reasons=["idle", "power_cap"], ecc_corrected=0)))
    assert (result["status"], result["findings"], result["notes"][1:]) == ("ok", [], [])
    assert result["gpus"][0]["throttling"] == []


def test_no_card_is_fine_unless_one_is_required() -> None:
    assert judge(vram.Facts())["status"] == "ok"
    assert ids(judge(vram.Facts(), require_gpu=True)) == [("no-gpu", "fail")]
    assert ids(judge(facts(card()), require_gpu=True)) == []


# Each threshold: the last value that is fine, the first that is not.
@pytest.mark.parametrize(
    ("good", "bad", "limits", "expected"),
    [
        (card(24564 - 451 - 256), card(24564 - 451 - 255), {"max_used_percent": 100.0}, ("low-free", "fail")),
        (card(980, total=1000, reserved=0), card(981, total=1000, reserved=0), {"min_free_mib": 0},
         ("high-use", "warn")),
        (card(480, total=1000, reserved=500), card(480, total=1000, reserved=501), {"min_free_mib": 0},
         ("high-use", "warn")),
        (card(temperature_c=85), card(temperature_c=86), {}, ("temperature", "warn")),
        (card(temperature_c=70), card(temperature_c=71), {"max_temperature": 70}, ("temperature", "warn")),
        (card(ecc_corrected=100), card(ecc_corrected=101), {}, ("ecc-corrected", "warn")),
        (card(ecc_uncorrected=0), card(ecc_uncorrected=1), {}, ("ecc-uncorrected", "fail")),
        (card(ecc_uncorrected=2), card(ecc_uncorrected=3), {"max_ecc_uncorrected": 2},
         ("ecc-uncorrected", "fail")),
        (card(clock_reasons=["power_cap"]), card(clock_reasons=["hw_slowdown"]), {}, ("throttling", "warn")),
        (card(clock_reasons=["idle"]), card(clock_reasons=["hw_power_brake"]), {}, ("throttling", "warn")),
        (card(), card(error="the GPU is lost"), {}, ("gpu-lost", "fail")),
        (card(mig=[MigDevice("m", total_mib=900, used_mib=644, free_mib=256)]),
         card(mig=[MigDevice("m", total_mib=900, used_mib=645, free_mib=255)]), {}, ("low-free", "fail")),
        (card(mig=[MigDevice("m", total_mib=900, free_mib=900)]), card(mig=[MigDevice("m", error="gone")]),
         {}, ("mig-unreadable", "warn")),
    ],
)  # fmt: skip
def test_thresholds_of_a_card(
    good: Device, bad: Device, limits: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert ids(judge(facts(good), **limits)) == []
    result = judge(facts(bad), **limits)
    assert ids(result) == [expected]
    assert result["status"] == expected[1]
    assert all(result["findings"][0][key] for key in ("what", "why", "remedy"))


def test_a_lost_card_does_not_hide_the_other_and_the_worst_comes_first() -> None:
    result = judge(facts(card(temperature_c=90), card(index=1, error="lost")))
    assert ids(result) == [("gpu-lost", "fail"), ("temperature", "warn")]


def test_an_unreadable_card_and_a_driver_mismatch_say_different_things() -> None:
    unreadable = vram.Facts(trouble="NVML: no library")
    assert ids(judge(unreadable)) == ids(judge(unreadable, require_gpu=True)) == [("gpu-unreadable", "fail")]
    assert ids(judge(vram.Facts(trouble="NVML: x", trouble_code=18))) == [("driver-mismatch", "fail")]


# Xid errors

LOG = """<6>[    1.000000] Linux version 6
<4>[  100.500000] NVRM: Xid (PCI:0000:01:00): 13, pid=1, name=x, Graphics SM Warp Exception
<3>[  200.000000] NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.
<4>[  300.000000] NVRM: Xid (PCI:0000:41:00 GPU-I:02): 31, pid=77
"""


def test_xids_are_read_by_card() -> None:
    assert vram.parse_xids(LOG) == [
        {"pci": "0000:01:00.0", "xid": 13, "at": 100},
        {"pci": "0000:01:00.0", "xid": 79, "at": 200},
        {"pci": "0000:41:00.0", "xid": 31, "at": 300},
    ]


@pytest.mark.parametrize(
    ("uptime", "expected"),
    [(150.0, [("xid", "fail")]), (250.0, [("xid", "fail")]), (300.0, [("xid", "fail")]), (301.0, [])],
)
def test_xids_count_for_a_while(uptime: float, expected: list[tuple[str, str]]) -> None:
    given_ = facts(card(), uptime=uptime)
    given_.kernel_log = LOG
    result = judge(given_, xid_max_age=100)
    assert ids(result) == expected
    assert result["xid_readable"]
    assert len(result["gpus"][0]["xid"]) == 2


def test_an_xid_of_a_program_is_a_warning_and_one_of_another_card_is_none() -> None:
    given_ = facts(card(), uptime=110.0)
    given_.kernel_log = LOG.splitlines()[1]
    assert ids(judge(given_)) == [("xid", "warn")]
    given_.kernel_log = LOG.splitlines()[3]
    assert ids(judge(given_)) == []


def test_a_kernel_log_that_cannot_be_read_is_said() -> None:
    given_ = facts(card())
    given_.kernel_log = None
    result = judge(given_)
    assert (result["status"], result["xid_readable"], result["gpus"][0]["xid"]) == ("ok", False, None)
    assert any("kernel log" in note for note in result["notes"])


# Models


def ollama(size: int, vram_bytes: int, name: str = "llama3.1:8b") -> dict[str, Any]:
    return {"models": [{"name": name, "size": size, "size_vram": vram_bytes, "context_length": 8192}]}


def with_details(device: Device, **details: Any) -> vram.Facts:
    return facts(
        device,
        units=dict.fromkeys(details, "active"),
        details={name: ("http://127.0.0.1:1/x", body, "") for name, body in details.items()},
    )


@pytest.mark.parametrize(
    ("size_vram", "percent", "expected"),
    [
        (6 * GIB, 100, []),
        (6 * GIB - 1, 99, [("partial-offload", "fail")]),
        (0, 0, [("partial-offload", "fail")]),
    ],
)
def test_layers_on_the_cpu(size_vram: int, percent: int, expected: list[tuple[str, str]]) -> None:
    given_ = with_details(card(), ollama=ollama(6 * GIB, size_vram))
    result = judge(given_)
    assert ids(result) == expected
    assert result["models"][0]["offload_percent"] == percent
    assert ids(judge(given_, require_full_offload=False)) == []
    # Without a card it is as it must be.
    given_.devices = []
    assert ids(judge(given_)) == []


def voicegate(device: str, state: str = "loaded") -> dict[str, Any]:
    return {
        "model": "medium",
        "engine": "whisper",
        "device": device,
        "compute_type": "int8",
        "load_state": state,
    }


def test_speech_on_the_cpu_beside_a_card() -> None:
    assert ids(judge(with_details(card(), voicegate=voicegate("cuda")))) == []
    assert ids(judge(with_details(card(), voicegate=voicegate("cpu")))) == [("stt-on-cpu", "warn")]
    assert ids(judge(with_details(card(), voicegate=voicegate("cpu", "unloaded")))) == []
    assert ids(judge(with_details(card(), voicegate=voicegate("cpu")), require_full_offload=False)) == []


def test_models_are_told_by_the_shape_of_the_answer() -> None:
    (model,) = vram.models_of("ollama", ollama(6 * GIB, 3 * GIB))
    assert (model["engine"], model["size_mib"], model["vram_mib"], model["context"]) == (
        "ollama",
        6144,
        3072,
        8192,
    )
    (model,) = vram.models_of("speaches", {"models": ["Systran/faster-whisper-medium"]})
    assert (model["engine"], model["name"]) == ("speaches", "Systran/faster-whisper-medium")
    (model,) = vram.models_of("voicegate", voicegate("cuda", "unloaded"))
    assert (model["engine"], model["device"], model["loaded"]) == ("whisper", "cuda", False)
    assert vram.models_of("webui", {"status": True}) == []


KEYS = st.sampled_from(["models", "model", "size", "size_vram", "name", "load_state"])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
    )
)
def test_whatever_a_daemon_answers_is_survived(body: Any) -> None:
    result = judge(with_details(card(), any=body))
    assert result["status"] in vram.RANK


def test_a_silent_daemon_is_noted() -> None:
    given_ = facts(
        card(), units={"speaches": "active"}, details={"speaches": ("http://x", None, "timed out")}
    )
    assert any("speaches" in note and "timed out" in note for note in judge(given_)["notes"])


# Units


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("0::/system.slice/ollama.service\n", "ollama"),
        ("0::/system.slice/ollama.service/runner\n", "ollama"),
        ("12:memory:/x\n1:name=systemd:/system.slice/speaches.service\n0::/\n", "speaches"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/app.service\n", "app"),
        ("0::/user.slice/user-0.slice/session-1.scope\n", "session-1.scope"),
        ("0::/lxc.payload.gpu-server/system.slice/ollama.service\n", "gpu-server:ollama"),
        ("0::/.lxc\n", ""),
        ("", ""),
    ],
)
def test_unit_of_cgroup(text: str, unit: str) -> None:
    assert vram.unit_of_cgroup(text) == unit


def units(result: dict[str, Any]) -> dict[str, tuple[int | None, str]]:
    return {unit["name"]: (unit["used_mib"], unit["source"]) for unit in result["units"]}


BOTH = {"ollama": "active", "speaches": "active"}
HOLDERS = [vram.Holder(10, "ollama"), vram.Holder(11, "ollama"), vram.Holder(20, "speaches")]


def listed(*pairs: tuple[int, int | None]) -> list[Process]:
    return [Process(pid, used, "compute") for pid, used in pairs]


def test_units_by_processes() -> None:
    device = card(9000, processes=listed((10, 4000), (11, 2000), (20, 2980)))
    result = judge(facts(device, units=BOTH, holders=HOLDERS))
    assert units(result) == {"ollama": (6000, "processes"), "speaches": (2980, "processes")}
    assert result["notes"] == []
    assert next(unit for unit in result["units"] if unit["name"] == "ollama")["pids"] == [10, 11]


def test_units_on_two_cards() -> None:
    first = card(4000, processes=listed((10, 4000)))
    second = card(5000, index=1, processes=listed((10, 2000), (20, 3000)))
    result = judge(facts(first, second, units=BOTH, holders=HOLDERS))
    assert units(result) == {"ollama": (6000, "processes"), "speaches": (3000, "processes")}
    assert result["units"][0]["gpus"] == [{"gpu": 0, "used_mib": 4000}, {"gpu": 1, "used_mib": 2000}]


@pytest.mark.parametrize("processes", [None, [], listed((4711, 5000)), listed((10, None))])
def test_hidden_processes_are_attributed_by_difference_and_it_says_so(
    processes: list[Process] | None,
) -> None:
    alone = facts(card(5000, processes=processes), units=BOTH, holders=HOLDERS[:2])
    result = judge(alone)
    assert units(result) == {"ollama": (5000, "difference"), "speaches": (0, "none")}
    assert "by difference" in result["notes"][0]


def test_ollama_says_its_part_and_the_rest_is_the_other_units() -> None:
    given_ = with_details(
        card(9000, processes=[]), ollama=ollama(6 * GIB, 6 * GIB), speaches={"models": ["m"]}
    )
    given_.holders = HOLDERS
    assert units(judge(given_)) == {"ollama": (6144, "difference"), "speaches": (2856, "difference")}
    # What Ollama says is no help when it is more than there is, or on two cards.
    given_.devices = [card(6000, processes=[])]
    assert units(judge(given_)) == {"ollama": (None, "unknown"), "speaches": (None, "unknown")}
    given_.devices = [card(9000, processes=[]), card(9000, index=1, processes=[])]
    result = judge(given_)
    assert units(result) == {"ollama": (None, "unknown"), "speaches": (None, "unknown")}
    assert "cannot be told" in result["notes"][0]


def test_one_unit_seen_and_one_hidden() -> None:
    device = card(9000, processes=listed((10, 6000)))
    result = judge(facts(device, units=BOTH, holders=HOLDERS))
    assert units(result) == {"ollama": (6000, "processes"), "speaches": (3000, "difference")}


def test_vram_of_somebody_else_is_nobodys_here() -> None:
    result = judge(facts(card(9000, processes=[]), units=BOTH))
    assert units(result) == {"ollama": (0, "none"), "speaches": (0, "none")}
    assert "somebody else" in result["notes"][0]


def test_what_an_idle_driver_uses_is_not_asked_about() -> None:
    # Where the driver does not tell what it reserves, that is part of used.
    assert judge(facts(card(664, total=24000, reserved=0, processes=[]), units=BOTH))["notes"] == []
    assert judge(facts(card(665, total=24000, reserved=0, processes=[]), units=BOTH))["notes"] != []
    assert judge(facts(card(vram.IDLE_MIB, processes=[]), units=BOTH, holders=HOLDERS))["notes"] == []
    assert judge(facts(card(vram.IDLE_MIB + 1, processes=[]), units=BOTH, holders=HOLDERS))["notes"] != []


@given(
    used=st.lists(st.integers(0, 20000), min_size=1, max_size=3),
    parts=st.lists(st.tuples(st.sampled_from([10, 11, 20, 30, 99]), st.integers(0, 8000)), max_size=6),
    holders=st.lists(st.sampled_from([*HOLDERS, vram.Holder(30, "")]), unique=True),
    told=st.integers(0, 12000),
)
def test_no_unit_gets_more_than_is_used(
    used: list[int], parts: list[tuple[int, int]], holders: list[vram.Holder], told: int
) -> None:
    devices = []
    for index, amount in enumerate(used):
        fitting = listed(*dict(parts).items()) if sum(dict(parts).values()) <= amount else []
        devices.append(card(amount, index=index, processes=fitting))
    details = {"ollama": ("u", ollama(max(1, told) << 20, told << 20), "")}
    result = judge(facts(*devices, units=BOTH, holders=holders, details=details), require_full_offload=False)
    for index, amount in enumerate(used):
        shares = [
            share["used_mib"] for unit in result["units"] for share in unit["gpus"] if share["gpu"] == index
        ]
        assert sum(share or 0 for share in shares) <= amount
    for unit in result["units"]:
        if unit["used_mib"] is not None:
            assert unit["used_mib"] == sum(share["used_mib"] for share in unit["gpus"])


def test_expected_units() -> None:
    device = card(9000, processes=listed((10, 6000), (20, 2900)))
    given_ = facts(device, units=BOTH, holders=HOLDERS)
    assert ids(judge(given_)) == []
    assert ids(judge(given_, expected_units=["ollama", "speaches"])) == []
    assert ids(judge(given_, expected_units=["ollama"])) == [("unit-unexpected", "warn")]
    given_.units = {"ollama": "failed", "speaches": "active"}
    assert ids(judge(given_, expected_units=["ollama", "speaches"])) == [("unit-missing", "fail")]
    assert (
        ids(judge(given_, expected_units=["voicegate", "ollama", "speaches"]))
        == [("unit-missing", "fail")] * 2
    )
    # A unit that only could use the card is not too many.
    given_ = facts(card(6000, processes=listed((10, 6000))), units=BOTH, holders=HOLDERS[:2])
    assert ids(judge(given_, expected_units=["ollama"])) == []


def test_a_process_outside_of_units_has_a_name_too() -> None:
    given_ = facts(card(500, processes=listed((30, 500))), holders=[vram.Holder(30, "")])
    result = judge(given_, expected_units=["ollama"])
    assert units(result) == {"pid 30": (500, "processes")}
    assert ids(result) == [("unit-missing", "fail"), ("unit-unexpected", "warn")]


# Plan


@pytest.mark.parametrize(
    ("used", "drift", "expected"),
    [
        (0, -100.0, []),
        (1500, -25.0, []),
        (2000, 0.0, []),
        (3000, 0.0, []),
        (3300, 10.0, []),
        (3301, 10.0, []),
        (3303, 10.1, [("drift", "warn")]),
    ],
)
def test_drift_from_the_plan(used: int, drift: float, expected: list[tuple[str, str]]) -> None:
    given_ = facts(card(used, processes=listed((20, used))), units=BOTH, holders=HOLDERS)
    result = judge(given_, {"speaches": (2000, 3000)})
    assert ids(result) == expected
    (unit,) = (unit for unit in result["units"] if unit["name"] == "speaches")
    assert (unit["drift_percent"], unit["plan_rest_mib"], unit["plan_peak_mib"]) == (drift, 2000, 3000)
    assert ids(judge(given_, {"speaches": (2000, 3000)}, max_drift_percent=11.0)) == []


@given(st.integers(0, 50000), st.integers(0, 50000), st.integers(0, 50000))
def test_drift_is_zero_inside_the_plan_and_signed_outside(used: int, one: int, two: int) -> None:
    rest, peak = sorted((one, two))
    drift = vram.drift_percent(used, rest, peak)
    if rest <= used <= peak:
        assert drift == 0
    else:
        assert drift >= 0 if used > peak else -100 <= drift <= 0


def test_plan_of_takes_numbers_and_mappings() -> None:
    given_ = {"a": 10, "b": {"rest_mib": "5", "peak_mib": 7}, "c": {"peak_mib": 3}}
    assert vram.plan_of(given_) == {"a": (10, 10), "b": (5, 7), "c": (3, 3)}


@pytest.mark.parametrize("wrong", ["x", None, {}, {"rest_mib": 1}, {"rest_mib": 9, "peak_mib": 5}, -1, [1]])
def test_plan_of_names_the_unit_that_is_wrong(wrong: Any) -> None:
    with pytest.raises(ValueError, match="plan: ollama"):
        vram.plan_of({"ollama": wrong})


@pytest.mark.parametrize(("used", "expected"), [(4199, "drift"), (4200, "two-copies")])
def test_two_copies_of_a_speech_model(used: int, expected: str) -> None:
    given_ = with_details(card(used, processes=listed((20, used))), speaches={"models": ["m"]})
    given_.holders = HOLDERS
    plan = {"speaches": (2000, 3000)}
    assert ids(judge(given_, plan)) == [(expected, "warn")]
    # Two models may be meant to be there: then it is only more than planned.
    given_.details["speaches"] = ("u", {"models": ["m", "n"]}, "")
    assert ids(judge(given_, plan)) == [("drift", "warn")]
    given_.details["speaches"] = ("u", {"models": ["m", "m"]}, "")
    assert ids(judge(given_)) == [("two-copies", "warn")]


@given(st.integers(0, 24000), st.integers(0, 24000), st.integers(0, 100))
def test_a_stricter_threshold_never_finds_less(used: int, minimum: int, percent: int) -> None:
    given_ = facts(card(used))
    mild = judge(given_, min_free_mib=minimum, max_used_percent=float(percent))
    strict = judge(given_, min_free_mib=minimum + 1, max_used_percent=percent - 1.0)
    assert set(ids(mild)) <= set(ids(strict))


# As text


def machine() -> dict[str, Any]:
    device = card(8950, processes=listed((10, 6000), (20, 2900)), temperature_c=41)
    given_ = facts(device, units=BOTH, holders=HOLDERS, driver="570.86.15", cuda="12.8")
    given_.details = {"ollama": ("u", ollama(6 * GIB, 3 * GIB), ""), "speaches": ("u", {"models": ["m"]}, "")}
    result = judge(given_, {"ollama": (4000, 5000), "speaches": (3000, 3500)})
    return {"sottovoce_vram": result}


def test_the_report_says_everything_once() -> None:
    lines = vram_text.vram_report(
        {"gpu": machine(), "down": {"sottovoce_vram": {"unreachable": True, "msg": "x"}}}
    )
    assert lines[0] == "down: not known: x"
    assert lines[1] == "gpu: fail (nvml, driver 570.86.15, CUDA 12.8)"
    assert lines[2] == "  GPU 0 A5000: 8950 of 24564 MiB used, 15163 free, 451 reserved, 41 °C"
    assert lines[3].split() == ["UNIT", "STATE", "VRAM", "PLAN", "KNOWN", "BY"]
    assert " ".join(lines[4].split()) == "ollama active 6000 MiB 4000 to 5000 MiB (+20 %) processes"
    assert " ".join(lines[5].split()) == "speaches active 2900 MiB 3000 to 3500 MiB (-3.3 %) processes"
    assert lines[6:8] == ["  ollama: llama3.1:8b: 3072 of 6144 MiB in VRAM (50 %)", "  speaches: m"]
    assert lines[8].startswith("  fail: ollama: of llama3.1:8b only 3072 of 6144 MiB")
    assert lines[9].startswith("  warn: ollama uses 6000 MiB, 20 % over its planned peak of 5000 MiB")
    assert len(lines) == 10


def test_the_report_without_cards() -> None:
    assert vram_text.vram_report({}) == ["No machine has a GPU."]
    assert vram_text.vram_report({"a": {"sottovoce_vram": judge(vram.Facts())}}) == ["a: ok (no card)"]


@pytest.mark.parametrize(("fail_on", "expected"), [("never", 0), ("fail", 1), ("warn", 2)])
def test_problems_are_those_that_were_asked_for(fail_on: str, expected: int) -> None:
    assert len(vram_text.vram_problems({"gpu": machine()}, fail_on)) == expected


def test_a_machine_that_cannot_be_asked_is_a_problem() -> None:
    silent = {"a": {"sottovoce_vram": {"unreachable": True, "msg": "it is stopped"}}, "b": {}}
    assert vram_text.vram_problems(silent) == ["a: it is stopped"]
    assert vram_text.vram_problems(silent, "never") == []

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""NVML through ctypes against a compiled stand-in for its library; nvidia-smi's CSV; sysfs of amdgpu."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nvml_standin as standin
import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _nvidia_smi as smi
from ansible_collections.sottovoce.stack.plugins.module_utils import _nvml as nvml
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_facts as reading
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_health as health
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
Read = Callable[..., list[nvml.Device]]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if not standin.has_compiler():
        pytest.skip(standin.NO_COMPILER)
    folder = tmp_path_factory.mktemp("nvml")
    return {"new": standin.build(folder), "old": standin.build(folder, old_driver=True)}


@pytest.fixture
def read(libraries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Gives the devices that a text describes."""

    def devices(text: str, library: str = "new") -> list[nvml.Device]:
        described = tmp_path / "cards.txt"
        described.write_text(standin.DRIVER + text)
        monkeypatch.setenv("SOTTOVOCE_NVML_STANDIN", str(described))
        with nvml.open_nvml(str(libraries[library])) as opened:
            assert opened.driver_version() == "570.86.15"
            assert opened.cuda_version() == "12.8"
            return opened.devices()

    return devices


def test_a_card_says_everything(read: Read) -> None:
    text = standin.card(
        0, "ecc 3 1", "process 100 5000 compute", "process 101 -1 graphics", memory="24564 451 9000",
        more={"reasons": "0x61"},
    )  # fmt: skip
    (device,) = read(text)
    assert device == nvml.Device(
        index=0,
        uuid="GPU-00000000-0000-0000-0000-000000000000",
        pci="0000:01:00.0",
        name="NVIDIA RTX A5000",
        capability="8.6",
        total_mib=24564,
        used_mib=9000,
        free_mib=15113,
        reserved_mib=451,
        temperature_c=41,
        clock_reasons=["idle", "sw_thermal_slowdown", "hw_thermal_slowdown"],
        ecc_corrected=3,
        ecc_uncorrected=1,
        processes=[nvml.Process(100, 5000, "compute"), nvml.Process(101, None, "graphics")],
    )


def test_an_old_driver_counts_what_it_reserves_as_used(read: Read) -> None:
    text = standin.card(0, "process 100 5000 compute", memory="24564 451 9000")
    (device,) = read(text, "old")
    assert (device.total_mib, device.used_mib, device.free_mib, device.reserved_mib) == (
        24564,
        9451,
        15113,
        0,
    )
    assert device.processes == [nvml.Process(100, 5000, "compute")]
    assert device.pci == "0000:01:00.0"
    assert device.clock_reasons == ["idle"]
    assert not device.mig_enabled


def test_a_new_library_that_refuses_the_newer_struct_is_asked_the_older_way(read: Read) -> None:
    (device,) = read(standin.card(0, "fail nvmlDeviceGetMemoryInfo_v2 25", memory="1000 100 200"))
    assert (device.used_mib, device.reserved_mib, device.error) == (300, 0, "")


def test_a_process_that_draws_and_computes_counts_once(read: Read) -> None:
    (device,) = read(standin.card(0, "process 7 50 graphics", "process 7 50 compute"))
    assert device.processes == [nvml.Process(7, 50, "compute")]


def test_more_processes_than_there_was_room_for(read: Read) -> None:
    lines = [f"process {number} 1 compute" for number in range(1, 301)]
    (device,) = read(standin.card(0, *lines))
    assert [process.pid for process in device.processes or ()] == list(range(1, 301))


@pytest.mark.parametrize(
    "symbol",
    [
        "nvmlDeviceGetHandleByIndex",
        "nvmlDeviceGetName",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetTemperature",
        "nvmlDeviceGetComputeRunningProcesses_v3",
    ],
)
def test_a_card_lost_in_the_middle_is_its_own_error_only(read: Read, symbol: str) -> None:
    first, second = read(standin.card(0, f"lost {symbol}") + standin.card(1))
    assert first.error_code == nvml.GPU_IS_LOST
    assert "lost" in first.error
    assert symbol in first.error
    assert (second.index, second.error, second.total_mib) == (1, "", 24564)


def test_a_card_of_somebody_else_is_left_out(read: Read) -> None:
    only = read(standin.card(0, "fail nvmlDeviceGetHandleByIndex 4") + standin.card(1))
    assert [device.index for device in only] == [1]


def test_what_a_card_does_not_tell_is_none(read: Read) -> None:
    calls = ["Temperature", "CurrentClocksEventReasons", "ComputeRunningProcesses_v3",
             "CudaComputeCapability"]  # fmt: skip
    (device,) = read(standin.card(0, *(f"fail nvmlDeviceGet{call} 3" for call in calls)))
    assert device.error == ""
    assert (device.temperature_c, device.clock_reasons, device.processes) == (None, None, None)
    assert (device.capability, device.ecc_corrected) == ("", None)


def test_a_card_without_memory_of_its_own_says_so(read: Read) -> None:
    (device,) = read(standin.card(0, "fail nvmlDeviceGetMemoryInfo_v2 3"))
    assert "not supported" in device.error
    assert device.total_mib == 0


def test_mig_slices(read: Read) -> None:
    text = standin.card(
        0,
        "mig MIG-a 1 9856 16 4000",
        "mig MIG-b 2 9856 16 0",
        "process 5 3900 compute 1",
        memory="81559 600 4100",
    )
    (device,) = read(text)
    assert device.mig_enabled
    assert [(m.uuid, m.gpu_instance, m.total_mib, m.used_mib, m.free_mib) for m in device.mig] == [
        ("MIG-a", 1, 9856, 4000, 5840),
        ("MIG-b", 2, 9856, 0, 9840),
    ]
    assert device.processes == [nvml.Process(5, 3900, "compute", 1)]
    assert device.total_mib == 81559


def test_who_may_not_see_the_whole_card_gets_the_sum_of_its_slices(read: Read) -> None:
    (device,) = read(standin.card(0, "fail nvmlDeviceGetMemoryInfo_v2 4", "mig MIG-a 1 9856 16 4000"))
    assert device.error == ""
    assert (device.total_mib, device.used_mib, device.free_mib, device.reserved_mib) == (9856, 4000, 5840, 16)


def test_no_library_and_no_driver_are_told_apart(
    libraries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(nvml.NvmlMissing, match=r"absent\.so"):
        nvml.open_nvml(str(tmp_path / "absent.so"))
    (tmp_path / "garbage.so").write_text("no library")
    monkeypatch.setenv("SOTTOVOCE_NVML", str(tmp_path / "garbage.so"))
    with pytest.raises(nvml.NvmlMissing, match="garbage"):
        nvml.open_nvml()
    (tmp_path / "cards.txt").write_text("init 9\n")
    monkeypatch.setenv("SOTTOVOCE_NVML_STANDIN", str(tmp_path / "cards.txt"))
    with pytest.raises(nvml.NvmlError, match="driver is not loaded") as caught:
        nvml.open_nvml(str(libraries["new"]))
    assert caught.value.code == nvml.DRIVER_NOT_LOADED


def test_a_library_that_is_not_nvml_is_an_error() -> None:
    with pytest.raises(nvml.NvmlError) as caught:
        nvml.open_nvml("libc.so.6")
    assert caught.value.code == nvml.FUNCTION_NOT_FOUND


# nvidia-smi

ROW = "0, GPU-1, 00000000:01:00.0, A5000, 570.86.15, 24564, 9000, 15113, 8.6, 41, 3, 0, 0x0000000000000040"


def test_smi_gives_the_same_card() -> None:
    (device,), driver = smi.parse(ROW + "\n", smi.FULL)
    assert driver == "570.86.15"
    assert (device.pci, device.total_mib, device.used_mib, device.free_mib) == (
        "0000:01:00.0",
        24564,
        9000,
        15113,
    )
    assert (device.reserved_mib, device.temperature_c, device.clock_reasons) == (
        451,
        41,
        ["hw_thermal_slowdown"],
    )
    assert (device.ecc_corrected, device.ecc_uncorrected, device.processes) == (3, 0, None)


def test_smi_shows_what_is_not_there_and_what_is_lost() -> None:
    absent = (
        "0, GPU-1, 00000000:01:00.0, X, 1.0, 100, 10, 90, [N/A], [Not Supported], [N/A], N/A, [Unknown Error]"
    )
    lost = "1, GPU-2, 00000000:02:00.0, Y, 1.0" + ", [GPU is lost]" * 8
    unified = "2, GPU-3, 00000000:03:00.0, Z, 1.0, [N/A], [N/A], [N/A], 12.1, 40, [N/A], [N/A], 0x0"
    first, second, third = smi.parse("\n".join([absent, lost, unified]), smi.FULL)[0]
    assert (first.error, first.capability, first.temperature_c, first.ecc_corrected) == ("", "", None, None)
    assert first.clock_reasons is None
    assert "GPU is lost" in second.error
    assert "memory" in third.error


def test_smi_without_cards() -> None:
    assert smi.parse("No devices were found\n", smi.FULL) == ([], "")


@pytest.mark.parametrize(
    "garbage",
    [
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
        ROW.replace("24564", "lots"),
        ROW.replace("9000", "-9000"),
        ROW.replace("9000", "90000"),
        ROW.replace("00000000:01:00.0", "somewhere"),
        ROW.replace("0, GPU", "[N/A], GPU", 1),
        ROW + ", more",
        "\x00\x01\x02",
    ],
)
def test_smi_garbage_is_a_typed_error(garbage: str) -> None:
    with pytest.raises(smi.SmiGarbage):
        smi.parse(garbage, smi.FULL)


@given(st.text())
def test_smi_never_gives_anything_but_cards_or_the_typed_error(text: str) -> None:
    try:
        devices, _driver = smi.parse(text, smi.BASE)
    except smi.SmiGarbage:
        return
    for device in devices:
        assert device.error or device.total_mib == device.used_mib + device.free_mib + device.reserved_mib


@given(
    st.tuples(*[st.sampled_from(["0", "7", "[N/A]", "", "-1", "x", "0x4", "[GPU is lost]"])] * len(smi.BASE))
)
def test_smi_rows_of_anything(cells: tuple[str, ...]) -> None:
    try:
        devices, _driver = smi.parse(", ".join(cells), smi.BASE)
    except smi.SmiGarbage:
        return
    assert all(d.error or d.total_mib == d.used_mib + d.free_mib + d.reserved_mib for d in devices)


def program(folder: Path, text: str) -> str:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_smi_that_lacks_a_field_is_asked_for_the_common_ones(tmp_path: Path) -> None:
    row = ", ".join(ROW.split(", ")[: len(smi.BASE)])
    refuse = """echo 'Field "compute_cap" is not a valid field to query.'; exit 2"""
    text = f"""case "$1" in *compute_cap*) {refuse};; esac; echo '{row}'"""
    facts = reading.read_smi(program(tmp_path, text), 5)
    assert (facts.driver, facts.devices[0].free_mib, facts.devices[0].capability) == ("570.86.15", 15113, "")


def test_smi_that_fails_or_hangs_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(smi.SmiGarbage, match="driver is dead"):
        reading.read_smi(program(tmp_path, "echo driver is dead; exit 9"), 5)
    begin = time.monotonic()
    with pytest.raises(smi.SmiGarbage, match=r"within 0\.2 s"):
        reading.read_smi(program(tmp_path, "exec sleep 20"), 0.2)
    assert time.monotonic() - begin < 5


# Which way the cards are read


def test_nvidia_smi_is_asked_where_there_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOTTOVOCE_NVML", str(tmp_path / "absent.so"))
    facts = reading.read_cards(program(tmp_path, f"echo '{ROW}'"), 5, str(tmp_path))
    assert (facts.source, facts.devices[0].used_mib, facts.trouble) == ("nvidia-smi", 9000, "")
    facts = reading.read_cards(program(tmp_path, "echo garbage"), 5, str(tmp_path))
    assert (facts.source, facts.devices, facts.trouble) == ("none", [], "")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    facts = reading.read_cards(program(tmp_path, "echo garbage"), 5, str(tmp_path))
    assert "absent.so" in facts.trouble
    assert "garbage" in facts.trouble


def test_no_card_is_a_clean_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOTTOVOCE_NVML", str(tmp_path / "absent.so"))
    assert reading.read_cards(None, 5, str(tmp_path)) == health.Facts()


def test_amd_cards_are_read_from_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOTTOVOCE_NVML", str(tmp_path / "absent.so"))
    device = tmp_path / "sys/devices/0000:03:00.0"
    (device / "hwmon/hwmon2").mkdir(parents=True)
    for name, text in {"mem_info_vram_total": 16368 << 20, "mem_info_vram_used": 1024 << 20,
                       "hwmon/hwmon2/temp1_input": 53000, "product_name": "Radeon"}.items():  # fmt: skip
        (device / name).write_text(f"{text}\n")
    for card in ("card0", "card1", "card1-DP-1"):
        (tmp_path / "sys/class/drm" / card).mkdir(parents=True)
    (tmp_path / "sys/class/drm/card1/device").symlink_to(device)
    facts = reading.read_cards(None, 5, str(tmp_path))
    (card_,) = facts.devices
    assert (facts.source, facts.vendor, card_.pci, card_.name) == ("amdgpu", "amd", "0000:03:00.0", "Radeon")
    assert (card_.total_mib, card_.used_mib, card_.free_mib, card_.temperature_c) == (16368, 1024, 15344, 53)
    (device / "mem_info_vram_used").write_text("garbage")
    assert "no numbers" in reading.read_cards(None, 5, str(tmp_path)).devices[0].error


# Processes and their units


def process(proc: Path, pid: int, cgroup: str, *files: str) -> None:
    (proc / str(pid) / "fd").mkdir(parents=True)
    (proc / str(pid) / "cgroup").write_text(cgroup)
    for number, target in enumerate(files):
        (proc / str(pid) / "fd" / str(number)).symlink_to(target)


def test_holders_are_those_that_have_the_card_open(tmp_path: Path) -> None:
    process(tmp_path, 10, "0::/system.slice/ollama.service\n", "/dev/null", "/dev/nvidia-uvm")
    process(tmp_path, 11, "0::/system.slice/monitor.service\n", "/dev/nvidiactl")
    process(tmp_path, 12, "0::/system.slice/cron.service\n", "/dev/null")
    process(tmp_path, 13, "0::/\n", "/dev/dri/renderD128")
    (tmp_path / "self").mkdir()
    assert reading.find_holders([12], str(tmp_path)) == [health.Holder(10, "ollama"), health.Holder(13, "")]


def test_a_job_that_hangs_holds_up_no_other() -> None:
    begin = time.monotonic()
    done = reading.in_parallel({"slow": (lambda: time.sleep(3), 0.1), "quick": (lambda: 7, 5)})
    assert done == {"quick": 7}
    assert time.monotonic() - begin < 2
    with pytest.raises(ZeroDivisionError):
        reading.in_parallel({"wrong": (lambda: 1 // 0, 5)})


# The module as Ansible runs it


def run_module(arguments: dict[str, Any], environment: dict[str, str], folder: Path) -> dict[str, Any]:
    given = folder / "arguments.json"
    given.write_text(json.dumps({"ANSIBLE_MODULE_ARGS": {"unit_path": str(folder), **arguments}}))
    name = "ansible_collections.sottovoce.stack.plugins.modules.vram_health"
    done = subprocess.run(
        [sys.executable, "-m", name, str(given)], capture_output=True, text=True, timeout=30, check=False,
        env={**environment, "PYTHONPATH": str(ROOT / ".collections")},
    )  # fmt: skip
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == int(bool(result.get("failed")))
    return result


def test_the_module_on_two_cards_of_which_one_is_lost(libraries: dict[str, Path], tmp_path: Path) -> None:
    text = standin.DRIVER + standin.card(0) + standin.card(1, "lost nvmlDeviceGetTemperature")
    environment = standin.environment(libraries["new"], tmp_path, text)
    result = run_module({}, environment, tmp_path)
    assert (result["changed"], result["status"], result["source"]) == (False, "fail", "nvml")
    assert [finding["id"] for finding in result["findings"]] == ["gpu-lost"]
    assert [(gpu["index"], bool(gpu["error"])) for gpu in result["gpus"]] == [(0, False), (1, True)]
    assert (result["driver"], result["cuda"]) == ("570.86.15", "12.8")
    assert result["seconds"] < 0.5


@pytest.mark.parametrize(
    ("fail_on", "minimum", "failed"),
    [
        ("never", 30000, False),
        ("fail", 30000, True),
        ("fail", 1, False),
        ("warn", 1, True),
        ("never", 1, False),
    ],
)
def test_the_module_fails_only_where_asked(
    libraries: dict[str, Path], tmp_path: Path, fail_on: str, minimum: int, failed: bool
) -> None:
    hot = standin.card(0, more={"temperature": "99"})
    environment = standin.environment(libraries["new"], tmp_path, standin.DRIVER + hot)
    result = run_module({"fail_on": fail_on, "min_free_mib": minimum}, environment, tmp_path)
    assert bool(result.get("failed")) is failed
    assert result["status"] == ("fail" if minimum == 30000 else "warn")
    if failed:
        assert "99 °C" in result["msg"]


def test_the_module_without_card_library_or_plan(tmp_path: Path) -> None:
    environment = standin.environment(tmp_path / "absent.so", tmp_path, "")
    result = run_module({"_ansible_check_mode": True}, environment, tmp_path)
    assert (result["status"], result["gpus"], result["findings"], result["source"]) == ("ok", [], [], "none")
    result = run_module({"require_gpu": True}, environment, tmp_path)
    assert [finding["id"] for finding in result["findings"]] == ["no-gpu"]
    result = run_module({"plan": {"ollama": "much"}}, environment, tmp_path)
    assert result["failed"]
    assert "ollama" in result["msg"]


def test_a_mismatched_driver_says_what_to_do(
    libraries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    (tmp_path / "cards.txt").write_text("init 18\n")
    monkeypatch.setenv("SOTTOVOCE_NVML_STANDIN", str(tmp_path / "cards.txt"))
    monkeypatch.setenv("SOTTOVOCE_NVML", str(libraries["new"]))
    facts = reading.read_cards(None, 5, str(tmp_path))
    assert facts.trouble_code == nvml.LIB_RM_VERSION_MISMATCH

"""The table of compute capabilities: facts, properties of every row, refusals, the page made from it."""

from __future__ import annotations

from typing import Any

import gpu_docs
import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_capability as gpu

ALL = list(gpu.TABLE)
OLD, NOW = "4.5.0", "4.8.5"


def card(capability: str, **more: str) -> dict[str, str]:
    return {"name": "Card", "pci": "0000:01:00.0", "capability": capability, **more}


def messages(quantization: str, capability: str, ctranslate2: str = NOW, **more: str) -> dict[str, str]:
    found = gpu.check(
        {"quantization": quantization, "ctranslate2": ctranslate2, "engine": "speaches"},
        card(capability, **more),
    )
    return {finding["level"]: finding["message"] for finding in found}


@pytest.mark.parametrize("capability", ALL)
@pytest.mark.parametrize("ctranslate2", ["", OLD, "4.6.2", NOW])
def test_what_is_offered_can_be_computed(capability: str, ctranslate2: str) -> None:
    types = gpu.compute_types(capability, ctranslate2)
    assert set(types) <= set(gpu.COMPUTE_TYPES)
    assert set(gpu.compute_types(capability, OLD)) <= set(gpu.compute_types(capability, NOW))
    can = gpu.supports(capability)
    assert not any("bfloat16" in name for name in types) or can["bfloat16"]
    assert not any(name.startswith("int8") for name in types) or can["dp4a"]
    best = gpu.best_compute_type(capability, ctranslate2)
    assert best in types or (best, types) == ("", [])
    if types:
        assert gpu.check({"quantization": best, "ctranslate2": ctranslate2}, card(capability)) == []
        assert gpu.settle({"quantization": "auto", "ctranslate2": ctranslate2}, [card(capability)])[0] == best


@pytest.mark.parametrize("capability", ALL)
def test_every_row_is_whole(capability: str) -> None:
    row = gpu.TABLE[capability]
    assert gpu.known(capability)
    assert gpu.architecture(capability) == row.architecture
    assert gpu.version(row.first_cuda) <= gpu.version(row.last_cuda or "99")
    assert row.first_driver <= (row.last_driver or 9999)
    assert gpu.pytorch_builds(capability)


def test_the_table_is_sorted_as_numbers() -> None:
    assert sorted(ALL, key=gpu.version) == ALL
    assert gpu.version("10.0") > gpu.version("9.0")


@pytest.mark.parametrize(
    ("capability", "ctranslate2", "types"),
    [
        # The rows of CTranslate2's own table, then what its wheels lack.
        ("8.6", NOW, set(gpu.COMPUTE_TYPES)),
        ("7.5", NOW, {"float16", "float32", "int8", "int8_float16", "int8_float32"}),
        ("6.2", NOW, {"float32"}),
        ("6.1", NOW, {"float32", "int8", "int8_float32"}),
        ("6.0", NOW, {"float32"}),
        ("5.2", NOW, set()),
        ("12.0", "4.6.1", {"float16", "bfloat16", "float32"}),
        ("12.0", "4.6.3", {"float16", "bfloat16", "float32"}),
        ("12.0", "4.7.0", set(gpu.COMPUTE_TYPES)),
        ("10.0", "4.6.1", {"float16", "bfloat16", "float32"}),
        ("10.0", "4.6.2", set(gpu.COMPUTE_TYPES)),
    ],
)
def test_compute_types(capability: str, ctranslate2: str, types: set[str]) -> None:
    assert set(gpu.compute_types(capability, ctranslate2)) == types


@pytest.mark.parametrize(
    ("capability", "builds"),
    [
        ("5.2", ["cu126"]),
        ("6.1", ["cu126"]),
        ("7.5", ["cu126", "cu128", "cu129"]),
        ("8.9", ["cu126", "cu128", "cu129"]),
        ("10.3", ["cu128", "cu129"]),
        ("12.1", ["cu128", "cu129"]),
    ],
)
def test_pytorch_builds(capability: str, builds: list[str]) -> None:
    assert gpu.pytorch_builds(capability) == builds


@pytest.mark.parametrize(
    ("capability", "code", "ptx", "runs"),
    [
        ("8.9", ["8.6"], "", True),
        ("8.0", ["8.6"], "", False),
        ("9.0", ["8.6"], "", False),
        ("9.0", ["8.6"], "8.6", True),
        ("8.0", [], "8.6", False),
    ],
)
def test_code_runs_within_a_major_version_and_ptx_on_what_is_newer(
    capability: str, code: list[str], ptx: str, runs: bool
) -> None:
    assert gpu.has_code(capability, code, ptx) is runs


def test_bfloat16_on_turing_is_refused_with_what_to_set() -> None:
    told = messages("bfloat16", "7.5")["refusal"]
    for part in (
        "bfloat16",
        "Card (Turing, compute capability 7.5)",
        "int8_float16",
        "stt_server_quantization: float16",
    ):
        assert part in told


def test_float16_on_pascal_is_a_hint() -> None:
    assert "the model runs as int8" in messages("float16", "6.1")["note"]
    assert gpu.settle({"quantization": "float16"}, [card("6.1")])[0] == "int8"
    assert gpu.settle({"quantization": "float16"}, [card("6.0")])[0] == "float32"


def test_int8_on_blackwell_with_an_old_ctranslate2_is_refused() -> None:
    told = messages("int8_float16", "12.0", OLD)["refusal"]
    for part in ("4.5.0", "from 4.7.0 on", "stt_server_quantization: float16", "stt_server_engine: builtin"):
        assert part in told
    assert messages("int8_float16", "12.0", NOW) == {}
    # A version that is not known refuses nothing.
    assert messages("int8_float16", "12.0", "") == {}


def test_an_old_driver_for_a_new_card_is_refused() -> None:
    assert (
        "570 or newer, the host runs 550.54.14" in messages("float16", "12.0", driver="550.54.14")["refusal"]
    )
    assert messages("float16", "12.0", driver="570.86.15") == {}


@pytest.mark.parametrize("capability", ["", "unknown", "[N/A]"])
def test_an_unknown_card_refuses_nothing(capability: str) -> None:
    assert list(messages("bfloat16", capability)) == ["note"]
    assert gpu.settle({"quantization": "auto"}, [card(capability)])[0] == "float16"
    assert gpu.ollama_device(capability) == ("gpu", "")


def test_a_capability_that_is_newer_than_the_table_is_judged_by_its_number() -> None:
    assert gpu.architecture("13.0") == ""
    assert gpu.best_compute_type("13.0") == "float16"


def test_with_several_cards_the_weakest_counts() -> None:
    assert gpu.settle({"quantization": "auto"}, [card("8.6"), card("6.1")])[0] == "int8"
    chosen, notes, _refusals = gpu.settle({"quantization": "auto"}, [card("8.6"), card("5.0")])
    assert chosen == ""
    assert "no code for Card (Maxwell" in notes[0]


@pytest.mark.parametrize(("capability", "device"), [("3.5", "cpu"), ("5.0", "gpu"), ("12.0", "gpu")])
def test_ollama(capability: str, device: str) -> None:
    chosen, note = gpu.ollama_device(capability)
    assert chosen == device
    assert bool(note) is (device == "cpu")


def test_the_page_holds_the_table() -> None:
    empty = f"# GPU\n\n{gpu_docs.BEGIN}\n{gpu_docs.END}\n\nrest\n"
    filled = gpu_docs.page(empty)
    assert all(f"| {capability} |" in filled for capability in ALL)
    assert filled.startswith("# GPU\n")
    assert filled.endswith(f"{gpu_docs.END}\n\nrest\n")
    assert gpu_docs.page(filled) == filled
    with pytest.raises(ValueError, match="once each"):
        gpu_docs.page("no markers")


def test_docs_gpu_md_is_made_from_the_table() -> None:
    if not gpu_docs.PAGE.exists():
        pytest.skip("docs/gpu.md is not there")
    text = gpu_docs.PAGE.read_text(encoding="utf-8")
    assert gpu_docs.page(text) == text, "run: .venv/bin/python tests/support/gpu_docs.py --write"


def test_settings_are_not_changed() -> None:
    settings: dict[str, Any] = {"quantization": "auto", "ctranslate2": ""}
    gpu.settle(settings, [card("8.6")])
    assert settings == {"quantization": "auto", "ctranslate2": ""}


def test_the_cards_of_a_machine() -> None:
    mine = {"pci": "0000:01:00.0", "vendor": "nvidia", "capability": "8.6"}
    infra = {
        "instances": [
            {"name": "other", "cards": [{"capability": "7.5"}]},
            {"name": "mine", "cards": [mine, {"vendor": "amd", "capability": ""}]},
            {"name": "none"},
        ]
    }
    assert gpu.cards_of(infra, "mine") == [mine]
    assert gpu.cards_of(infra, "none") == gpu.cards_of(infra, "gone") == gpu.cards_of({}, "mine") == []

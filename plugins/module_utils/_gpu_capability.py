# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""
What an NVIDIA card can do, by its compute capability. The one table; no I/O.

Where the facts are from:

- kernels in CTranslate2: read from the fatbins of the wheels 4.5.0, 4.6.0, 4.6.2, 4.6.3, 4.7.0 and 4.8.5 for
  x86_64 (all the same);
- its compute types: its docs/quantization.md and src/types.cc; int8 on Blackwell: its issue 1865 and the pull
  requests 1937 (4.6.2 no longer offers it on 12.0) and 1982 (4.7.0 offers it again);
- kernels in PyTorch's wheels: its .ci/manywheel/build_cuda.sh, one version of it; other releases may differ;
- CUDA toolkits and driver branches: NVIDIA's release notes, not tried on cards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One compute capability. CUDA toolkits and driver branches are the first (and last) that know it."""

    capability: str
    architecture: str
    cards: str
    first_cuda: str
    last_cuda: str
    first_driver: int
    last_driver: int = 0  # 0: still supported


# CUDA 12 needs a driver of the branch 525 at least.
_CUDA_12_DRIVER = 525
_TABLE = (
    Row("5.0", "Maxwell", "GTX 750", "6.0", "12.9", _CUDA_12_DRIVER, 580),
    Row("5.2", "Maxwell", "GTX 960 … Titan X, Tesla M40", "6.5", "12.9", _CUDA_12_DRIVER, 580),
    Row("5.3", "Maxwell", "Jetson TX1", "7.0", "12.9", _CUDA_12_DRIVER, 580),
    Row("6.0", "Pascal", "Tesla P100", "8.0", "12.9", _CUDA_12_DRIVER, 580),
    Row("6.1", "Pascal", "GTX 1050 … 1080 Ti, Tesla P4, P40", "8.0", "12.9", _CUDA_12_DRIVER, 580),
    Row("6.2", "Pascal", "Jetson TX2", "8.0", "12.9", _CUDA_12_DRIVER, 580),
    Row("7.0", "Volta", "Tesla V100, Titan V", "9.0", "12.9", _CUDA_12_DRIVER, 580),
    Row("7.2", "Volta", "Jetson Xavier", "9.2", "12.9", _CUDA_12_DRIVER, 580),
    Row("7.5", "Turing", "GTX 1650, RTX 2060 … 2080 Ti, T4", "10.0", "", _CUDA_12_DRIVER),
    Row("8.0", "Ampere", "A30, A100", "11.0", "", _CUDA_12_DRIVER),
    Row("8.6", "Ampere", "RTX 3050 … 3090, A2 … A40, RTX A6000", "11.1", "", _CUDA_12_DRIVER),
    Row("8.7", "Ampere", "Jetson Orin", "11.4", "", _CUDA_12_DRIVER),
    Row("8.9", "Ada", "RTX 4060 … 4090, L4, L40", "11.8", "", _CUDA_12_DRIVER),
    Row("9.0", "Hopper", "H100, H200, GH200", "11.8", "", _CUDA_12_DRIVER),
    Row("10.0", "Blackwell", "B100, B200, GB200", "12.8", "", 570),
    Row("10.3", "Blackwell", "B300, GB300", "12.9", "", 575),
    Row("12.0", "Blackwell", "RTX 5060 … 5090, RTX PRO 6000", "12.8", "", 570),
    Row("12.1", "Blackwell", "GB10 (DGX Spark)", "12.9", "", 580),
)
TABLE: Mapping[str, Row] = {row.capability: row for row in _TABLE}

# Machine code in CTranslate2's wheels; the last is there as PTX too, which newer cards compile at first use.
CTRANSLATE2_CODE = ("5.3", "6.0", "6.1", "7.0", "7.5", "8.0", "8.6")
CTRANSLATE2_PTX = "8.6"
# From these versions on int8 works on Blackwell, by major capability.
CTRANSLATE2_BLACKWELL_INT8 = {10: "4.6.2", 12: "4.7.0"}
# Machine code in PyTorch's wheels, by the CUDA build.
PYTORCH_CODE: Mapping[str, Sequence[str]] = {
    "cu126": ("5.0", "6.0", "7.0", "7.5", "8.0", "8.6", "9.0"),
    "cu128": ("7.0", "7.5", "8.0", "8.6", "9.0", "10.0", "12.0"),
    "cu129": ("7.0", "7.5", "8.0", "8.6", "9.0", "10.0", "12.0"),
}
OLLAMA_MINIMUM = "5.0"
COMPUTE_TYPES = (
    "float16",
    "bfloat16",
    "float32",
    "int8_float16",
    "int8_bfloat16",
    "int8_float32",
    "int8",
)


def version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version or capability, so that 10.0 comes after 9.0."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def known(capability: str) -> bool:
    """Is this written as a capability, such as 8.6?"""
    return bool(re.fullmatch(r"\d{1,2}\.\d", capability))


def architecture(capability: str) -> str:
    """Return the name of the architecture; empty for a capability that is not in the table."""
    row = TABLE.get(capability)
    return row.architecture if row else ""


def at_least(capability: str, minimum: str) -> bool:
    return version(capability) >= version(minimum)


def has_code(capability: str, code: Iterable[str], ptx: str = "") -> bool:
    """
    Can a build run on a card: machine code of the same major and no newer minor, or older PTX.

    The rule is the binary compatibility that the CUDA programming guide describes.
    """
    major, minor = version(capability)
    built = [version(item) for item in code]
    return any(item[0] == major and item[1] <= minor for item in built) or bool(
        ptx and version(ptx) <= (major, minor)
    )


def supports(capability: str) -> dict[str, bool]:
    """Return what a card computes fast; dp4a are sums of four int8 products."""
    return {
        "float16": at_least(capability, "7.0"),
        "bfloat16": at_least(capability, "8.0"),
        # Pascal's 6.1 brought dp4a; 6.2 has it too, but not in CTranslate2.
        "dp4a": at_least(capability, "6.1"),
        "int8_tensor_cores": at_least(capability, "7.2"),
    }


def _int8(capability: str, ctranslate2: str) -> bool:
    major = version(capability)[0]
    since = CTRANSLATE2_BLACKWELL_INT8.get(major)
    if since and ctranslate2 and version(ctranslate2) < version(since):
        return False
    return capability == "6.1" or at_least(capability, "7.0")


def compute_types(capability: str, ctranslate2: str = "") -> list[str]:
    """
    Return what CTranslate2 computes with on a card, best first; nothing where its wheels have no code for it.

    ctranslate2: its version; empty means a present one.
    """
    if not has_code(capability, CTRANSLATE2_CODE, CTRANSLATE2_PTX):
        return []
    can, int8 = supports(capability), _int8(capability, ctranslate2)
    offered = {
        "float32": True,
        "float16": can["float16"],
        "bfloat16": can["bfloat16"],
        "int8": int8,
        "int8_float32": int8,
        "int8_float16": int8 and can["float16"],
        "int8_bfloat16": int8 and can["bfloat16"],
    }
    return [name for name in COMPUTE_TYPES if offered[name]]


def best_compute_type(capability: str, ctranslate2: str = "") -> str:
    """
    Return what `auto` means on a card; empty where CTranslate2 cannot use it.

    float16 wherever it is fast: it is the form that the weights have. Without it int8, which takes a quarter
    of the memory of float32.
    """
    types = compute_types(capability, ctranslate2)
    return next((name for name in ("float16", "int8", "float32") if name in types), "")


def pytorch_builds(capability: str) -> list[str]:
    """Return the CUDA builds of PyTorch's wheels that know a card."""
    return [build for build, code in PYTORCH_CODE.items() if has_code(capability, code)]


def ollama_device(capability: str) -> tuple[str, str]:
    """Return gpu or cpu for Ollama, and a note where the card is too old; Ollama judges unknown ones."""
    if known(capability) and not at_least(capability, OLLAMA_MINIMUM):
        return "cpu", (
            f"the card has compute capability {capability}, Ollama needs {OLLAMA_MINIMUM}; it runs on the CPU"
        )
    return "gpu", ""


def describe(card: Mapping[str, Any]) -> str:
    """Return a card as messages name it, such as `RTX 2080 (Turing, compute capability 7.5)`."""
    capability = str(card.get("capability") or "")
    name = str(card.get("name") or card.get("pci") or "the card")
    family = architecture(capability)
    return f"{name} ({f'{family}, ' if family else ''}compute capability {capability or 'unknown'})"


def check(settings: Mapping[str, Any], card: Mapping[str, Any]) -> list[dict[str, str]]:
    """
    Return findings {level: refusal or note, message} about a speech server's settings on a card.

    settings: quantization (a compute type or auto), ctranslate2 (version, or empty), engine; card: name, pci,
    capability, driver, each possibly empty.
    """
    capability = str(card.get("capability") or "")
    asked = str(settings["quantization"])
    ctranslate2 = str(settings.get("ctranslate2") or "")
    if not known(capability):
        return [
            _note(
                f"the compute capability of {card.get('name') or 'the card'} is not known here, so "
                f"{'float16 is taken' if asked == 'auto' else f'{asked} was not checked'}"
            )
        ]
    row, driver = TABLE.get(capability), version(str(card.get("driver") or ""))
    if row and driver and driver[0] < row.first_driver:
        return [
            _refusal(
                f"{describe(card)} needs an NVIDIA driver of the branch {row.first_driver} or newer, "
                f"the host runs {card['driver']}. Upgrade the driver on the host, reboot it, and apply again."
            )
        ]
    types = compute_types(capability, ctranslate2)
    if not types or asked == "auto" or asked in types:
        return []
    best = best_compute_type(capability, ctranslate2)
    if asked in ("float16", "int16"):
        return [_note(f"{asked} is not fast on {describe(card)}; the model runs as {best}")]
    able = f"{describe(card)} computes with {', '.join(types)}"
    major = version(capability)[0]
    if asked.startswith("int8") and asked in compute_types(capability):
        return [
            _refusal(
                f"stt_server_quantization is {asked}, but the engine {settings.get('engine') or ''} brings "
                f"CTranslate2 {ctranslate2}, and its int8 works on Blackwell only "
                f"from {CTRANSLATE2_BLACKWELL_INT8[major]} on. "
                f"With it {able}. Set stt_server_quantization: {best}, or stt_server_engine: builtin."
            )
        ]
    return [
        _refusal(
            f"stt_server_quantization is {asked}, but {able}. Set stt_server_quantization: {best}, or auto."
        )
    ]


def _refusal(message: str) -> dict[str, str]:
    return {"level": "refusal", "message": message}


def _note(message: str) -> dict[str, str]:
    return {"level": "note", "message": message}


def settle(
    settings: Mapping[str, Any], cards: Sequence[Mapping[str, Any]]
) -> tuple[str, list[str], list[str]]:
    """
    Return compute type, notes and refusals for the cards of a machine; what all of them can do counts.

    An empty compute type means that CTranslate2 cannot use a card at all.
    """
    asked, ctranslate2 = str(settings["quantization"]), str(settings.get("ctranslate2") or "")
    notes: list[str] = []
    refusals: list[str] = []
    chosen = asked
    for card in cards or [{}]:
        for finding in check(settings, card):
            (refusals if finding["level"] == "refusal" else notes).append(finding["message"])
        capability = str(card.get("capability") or "")
        if not known(capability):
            chosen = "float16" if chosen == "auto" else chosen
        elif not compute_types(capability, ctranslate2):
            notes.append(f"CTranslate2 has no code for {describe(card)}")
            return "", notes, refusals
        elif chosen not in compute_types(capability, ctranslate2):
            chosen = best_compute_type(capability, ctranslate2)
    return chosen, list(dict.fromkeys(notes)), list(dict.fromkeys(refusals))


def cards_of(infra: Mapping[str, Any], host: str) -> list[dict[str, Any]]:
    """Return the NVIDIA cards of a machine from a result of incus_infra; nothing where it names none."""
    return [
        dict(card)
        for instance in infra.get("instances") or []
        if instance.get("name") == host
        for card in instance.get("cards") or []
        if card.get("vendor", "nvidia") == "nvidia"
    ]


def table() -> list[str]:
    """Return the table as lines of Markdown."""
    lines = [
        "| capability | architecture | cards | CTranslate2 computes with | CUDA | driver | PyTorch wheels |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in _TABLE:
        toolkits = f"{row.first_cuda} to {row.last_cuda}" if row.last_cuda else f"{row.first_cuda} or newer"
        drivers = (
            f"{row.first_driver} to {row.last_driver}" if row.last_driver else f"{row.first_driver} or newer"
        )
        types = (
            ", ".join(f"`{name}`" for name in compute_types(row.capability)) or "nothing (runs on the CPU)"
        )
        builds = ", ".join(pytorch_builds(row.capability)) or "none"
        cells = (row.capability, row.architecture, row.cards, types, toolkits, drivers, builds)
        lines.append(f"| {' | '.join(cells)} |")
    return lines

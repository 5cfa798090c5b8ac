# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Do speech-to-text and language models fit on one card? Pure arithmetic over footprints, in MiB."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional

from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_footprint as footprints
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_footprint import (
    Footprint,
    Llm,
    UnknownModel,
)

TURNS = ("yield", "exclusive")
POLICIES = ("resident", *TURNS)
TOGETHER, ONE_AT_A_TIME, CANNOT = "fits together", "fits one at a time", "cannot fit"
AUTO = "auto"

# What the driver keeps of a card for itself (NVML: reserved); an estimate, drivers take 300 to 500.
DRIVER_MIB = 450
# What llama.cpp leaves free by itself when it decides how many layers go to the card.
FREE_MIB = 1024
LEAST_CONTEXT = 2048

# Best first. What a card cannot compute is left out by `allowed`.
QUALITY = ("float32", "float16", "bfloat16", "int8_float32", "int8_float16", "int8_bfloat16", "int8")
# For `auto`: half precision computes as well as full and costs half; the rest are its quantised forms.
AUTO_TYPES = ("float16", "bfloat16", "int8_float16", "int8_bfloat16", "int8")
AUTO_MODELS = ("large-v3", "large-v3-turbo", "medium", "small", "base", "tiny")
KV_ORDER = ("f32", "f16", "bf16", "q8_0", "q4_0")


class PlanError(ValueError):
    """A request that makes no sense; the message is for the user."""


@dataclasses.dataclass(frozen=True)
class Mix:
    """
    What is to live on a card of `card_mib`. `model` empty: no speech-to-text; `live` is the small model that
    the engine builtin has beside it, if any; `llms` empty: no language model. `seconds` is the longest
    recording that is planned for, `loaded` how many language models stay loaded at once (the largest are
    counted), `allowed` the compute types that the card can do (empty: all).
    """

    card_mib: int
    engine: str = "speaches"
    model: str = ""
    compute_type: str = "float16"
    llms: tuple[Llm, ...] = ()
    context: int = 8192
    parallel: int = 1
    kv_type: str = "f16"
    loaded: int = 2
    policy: str = "resident"
    seconds: float = 240.0
    allowed: tuple[str, ...] = ()
    live: str = ""


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a mix needs, and whether the card has it."""

    mix: Mix
    speech: Optional[Footprint]
    llms: tuple[Footprint, ...]
    verdict: str
    together_mib: int
    one_mib: int

    @property
    def ok(self) -> bool:
        return self.verdict == TOGETHER or (self.verdict == ONE_AT_A_TIME and self.mix.policy != "resident")

    @property
    def parts(self) -> tuple[Footprint, ...]:
        return (*((self.speech,) if self.speech else ()), *self.llms)

    @property
    def need_mib(self) -> int:
        """What the policy asks of the card."""
        return self.together_mib if self.mix.policy == "resident" else self.one_mib

    @property
    def fit_target_mib(self) -> int:
        """
        LLAMA_ARG_FIT_TARGET: MiB that llama-server leaves free. All of speech-to-text's peak beside
        llama.cpp's own 1024 where the card has that room; where it has less, never under what a loaded
        speech model still grows by: llama.cpp counts what is loaded already as used, and would otherwise
        move layers of a model to the CPU that fits.
        """
        if self.speech is None:
            return FREE_MIB
        most = FREE_MIB + self.speech.high
        if not self.llms or self.mix.policy != "resident":
            return most if self.mix.policy == "resident" else FREE_MIB + self.speech.unloaded
        least = FREE_MIB + self.speech.peak - self.speech.rest
        room = self.mix.card_mib - DRIVER_MIB - self.speech.rest - sum(part.peak for part in self.llms)
        return max(least, min(most, room))


def check(mix: Mix) -> None:
    """Raises PlanError for values that mean nothing."""
    if mix.card_mib <= 0:
        raise PlanError(f"A card has more than {mix.card_mib} MiB; give its size in MiB.")
    if mix.policy not in POLICIES:
        raise PlanError(f"vram_policy {mix.policy!r} is not one of {', '.join(POLICIES)}.")
    if mix.context < 1 or mix.parallel < 1 or mix.loaded < 1 or mix.seconds <= 0:
        raise PlanError("Context, parallel requests, loaded models and seconds are 1 or more.")


def speech(mix: Mix, **changes: Any) -> Footprint:
    """What the speech-to-text of a mix takes, with changes to it. Raises UnknownModel."""
    mix = dataclasses.replace(mix, **changes)
    live = mix.live if mix.engine == "builtin" else ""
    return footprints.stt(mix.model, mix.compute_type, footprints.windows(mix.seconds, mix.engine), live)


def fit(mix: Mix) -> Fit:
    """Add it up. Raises PlanError, and UnknownModel for a model without figures."""
    check(mix)
    heard = speech(mix) if mix.model else None
    every = sorted(
        (footprints.llm(model, mix.context, mix.parallel, mix.kv_type) for model in mix.llms),
        key=lambda part: (-part.peak, part.name),
    )
    llms = tuple(every[: mix.loaded])
    parts = [*([heard] if heard else []), *llms]
    error = math.ceil(math.sqrt(sum(part.error**2 for part in parts)))
    together = DRIVER_MIB + sum(part.peak for part in parts) + max(FREE_MIB if llms else 0, error)
    # Speaches keeps its process; that of the builtin engine ends.
    stays = mix.policy != "exclusive" or mix.engine != "builtin"
    left_by_speech = heard.unloaded if heard and stays else 0
    alone = [DRIVER_MIB + heard.peak + heard.error] if heard else []
    alone += [DRIVER_MIB + part.peak + max(FREE_MIB, part.error) + left_by_speech for part in llms[:1]]
    one = max(alone, default=DRIVER_MIB)
    if together <= mix.card_mib:
        verdict = TOGETHER
    elif one <= mix.card_mib:
        verdict = ONE_AT_A_TIME
    else:
        verdict = CANNOT
    return Fit(mix, heard, llms, verdict, together, one)


def _types(mix: Mix, asked: str) -> Sequence[str]:
    """Compute types to try: the one asked for, or for `auto` all that the card can do, best first."""
    if asked != AUTO:
        return (asked,)
    return [name for name in AUTO_TYPES if not mix.allowed or name in mix.allowed]


def _models(mix: Mix) -> Sequence[str]:
    return (mix.model,) if mix.model != AUTO else AUTO_MODELS


def choose(mix: Mix) -> Fit:
    """
    Replace `auto` by the best that fits: first the model that hears best, then the most exact compute type.
    If nothing fits, the smallest is returned, and its verdict says so.
    """
    options = [
        dataclasses.replace(mix, model=model, compute_type=kind)
        for model, kind in itertools.product(_models(mix), _types(mix, mix.compute_type))
    ]
    if not options:
        raise PlanError("The card can do none of the compute types that `auto` chooses from.")
    for option in options:
        found = fit(option)
        if found.ok:
            return found
    return fit(options[-1])


def _smaller_speech(mix: Mix) -> Iterator[tuple[int, dict[str, Any]]]:
    """Less exact compute types of the same model (1 each), and smaller models (2 each rank)."""
    yield 0, {}
    known = footprints.WHISPER.get(mix.model)
    if known is None:
        return
    kinds = [k for k in QUALITY if k in ("float16", "int8_float16", "int8") or k == mix.compute_type]
    kinds = [k for k in kinds if not mix.allowed or k in mix.allowed] or [mix.compute_type]
    place = kinds.index(mix.compute_type) if mix.compute_type in kinds else 0
    now = footprints.WEIGHT_BYTES[mix.compute_type]
    names = [mix.model, *(name for name in AUTO_MODELS if footprints.WHISPER[name].rank < known.rank)]
    for name in names:
        lower = 2 * (known.rank - footprints.WHISPER[name].rank)
        for index, kind in enumerate(kinds):
            if name == mix.model and footprints.WEIGHT_BYTES[kind] >= now:
                continue
            yield lower + max(0, index - place), {"model": name, "compute_type": kind}


def _smaller_llm(mix: Mix) -> Iterator[tuple[int, dict[str, Any]]]:
    """Half the context (1 each time), a smaller cache (1 each), fewer models or requests at once (1 each)."""
    if not mix.llms:
        yield 0, {}
        return
    contexts = [mix.context]
    while contexts[-1] // 2 >= LEAST_CONTEXT:
        contexts.append(contexts[-1] // 2)
    start = KV_ORDER.index(mix.kv_type) if mix.kv_type in KV_ORDER else 1
    caches = [mix.kv_type, *(k for k in ("q8_0", "q4_0") if KV_ORDER.index(k) > start)]
    loads = range(min(mix.loaded, len(mix.llms)), 0, -1)
    for (i, context), (j, cache), (k, load), parallel in itertools.product(
        enumerate(contexts), enumerate(caches), enumerate(loads), {mix.parallel, 1}
    ):
        changes: dict[str, Any] = {}
        if i:
            changes["context"] = context
        if j:
            changes["kv_type"] = cache
        if k:
            changes["loaded"] = load
        if parallel != mix.parallel:
            changes["parallel"] = parallel
        yield i + j + k + (parallel != mix.parallel), changes


def _other_llms(mix: Mix) -> Iterator[tuple[int, dict[str, Any]]]:
    """The largest language model replaced by a smaller one of the table (4, and 1 for each in between)."""
    if not mix.llms:
        return
    largest = max(mix.llms, key=lambda model: (model.weights_mib, model.name))
    smaller = sorted(
        (known_llm(name) for name in known_llms()), key=lambda model: model.weights_mib, reverse=True
    )
    smaller = [model for model in smaller if model.kv and model.weights_mib < largest.weights_mib]
    for index, model in enumerate(smaller):
        yield 4 + index, {"llms": tuple(model if one is largest else one for one in mix.llms)}


def nearest(mix: Mix, count: int = 3, turns: bool = False) -> list[tuple[Fit, dict[str, Any]]]:
    """
    The nearest mixes that fit, each with what to change: fewest steps down first (a less exact compute type,
    half the context, a smaller cache, one model or request less, no live model: 1 each; a smaller speech
    model: 2 each; taking turns instead of staying: 3), of equal ones that which uses the card best. Another
    language model (4 and more) is only proposed where the wanted one fits in no way. With `turns` policy
    yield is proposed, too, for a stack in which something carries it out.
    """
    policies: list[tuple[int, dict[str, Any]]] = [(0, {})]
    if turns and mix.policy == "resident" and mix.model and mix.llms:
        policies.append((3, {"policy": "yield"}))
    lives: list[tuple[int, dict[str, Any]]] = [(0, {}), *([(1, {"live": ""})] if mix.live else [])]
    smaller, llm = list(_smaller_speech(mix)), list(_smaller_llm(mix))
    found = _fitting(mix, itertools.product(smaller, lives, llm, policies))
    if not found:
        found = _fitting(mix, itertools.product(smaller, lives, _other_llms(mix), policies))
    chosen: list[tuple[Fit, dict[str, Any]]] = []
    # What changes all that a nearer one changes, and more, is no other way: only if there is no better.
    for strict in (True, False):
        for tried, told in found:
            if len(chosen) == count:
                return chosen
            nearer = (set(less) <= set(told) if strict else less == told for _fit, less in chosen)
            if not any(nearer):
                chosen.append((tried, told))
    return chosen


def _fitting(
    mix: Mix, ways: Iterable[Sequence[tuple[int, dict[str, Any]]]]
) -> list[tuple[Fit, dict[str, Any]]]:
    """Those of the ways down that fit, the nearest first, with what each changes."""
    found: list[tuple[int, int, str, Fit, dict[str, Any]]] = []
    for way in ways:
        changes = {key: value for _cost, part in way for key, value in part.items()}
        told = {key: value for key, value in changes.items() if getattr(mix, key) != value}
        if not told:
            continue
        tried = fit(dataclasses.replace(mix, **told))
        if tried.ok:
            cost = sum(part[0] for part in way)
            found.append((cost, -tried.need_mib, repr(sorted(told)) + repr(tried.mix), tried, told))
    found.sort(key=lambda item: item[:3])
    return [item[3:] for item in found]


# Cards that people buy, MiB as nvidia-smi shows them (public listings; yours wins).
CARDS: Mapping[str, int] = {
    "GTX 1060 6GB": 6144,
    "GTX 1070": 8192,
    "GTX 1080 Ti": 11264,
    "RTX 2060": 6144,
    "RTX 2070": 8192,
    "RTX 2080 Ti": 11264,
    "RTX 3050": 8192,
    "RTX 3060": 12288,
    "RTX 3060 Ti": 8192,
    "RTX 3070": 8192,
    "RTX 3080": 10240,
    "RTX 3090": 24576,
    "RTX 4060": 8188,
    "RTX 4060 Ti 16GB": 16380,
    "RTX 4070": 12282,
    "RTX 4070 Ti SUPER": 16376,
    "RTX 4080": 16376,
    "RTX 4090": 24564,
    "RTX 5060": 8151,
    "RTX 5060 Ti 16GB": 16311,
    "RTX 5070": 12227,
    "RTX 5080": 16303,
    "RTX 5090": 32607,
    "RTX A2000 12GB": 12282,
    "RTX A4000": 16376,
    "RTX A5000": 24564,
    "RTX A6000": 49140,
    "RTX 6000 Ada": 49140,
    "T4": 15360,
    "L4": 23034,
    "A10": 23028,
    "L40S": 46068,
}


def card_mib(name: str) -> int:
    """MiB of a card by its name, without maker and case. Raises PlanError with the nearest names."""
    from difflib import get_close_matches

    def plain(text: str) -> str:
        words = text.lower().replace("-", " ").replace("geforce", "").replace("nvidia", "").split()
        return "".join(words)

    known = {plain(card): mib for card, mib in CARDS.items()}
    names = {plain(card): card for card in CARDS}
    wanted = plain(name)
    if wanted in known:
        return known[wanted]
    near = get_close_matches(wanted, known, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(names[n] for n in near)}?" if near else ""
    raise PlanError(
        f"The card {name!r} is not in the table.{hint} Give its size instead: gpu_vram_mib: 12288 (nvidia-smi"
        " shows it)."
    )


# Language models by name, for planning before there is a file: size of the default tag in Ollama's library
# (MB), layers with attention, KV heads, head size, trained context, from their published configurations.
_KNOWN_LLMS: Mapping[str, tuple[int, int, int, int, int]] = {
    "llama3.2:1b": (1321, 16, 8, 64, 131072),
    "llama3.2:3b": (2019, 28, 8, 128, 131072),
    "llama3.1:8b": (4921, 32, 8, 128, 131072),
    "llama3.3:70b": (42520, 80, 8, 128, 131072),
    "mistral:7b": (4373, 32, 8, 128, 32768),
    "mistral-nemo:12b": (7071, 40, 8, 128, 131072),
    "qwen2.5:7b": (4683, 28, 4, 128, 32768),
    "qwen2.5:14b": (8988, 48, 8, 128, 32768),
    "qwen2.5:32b": (19851, 64, 8, 128, 32768),
    "qwen3:4b": (2497, 36, 8, 128, 40960),
    "qwen3:8b": (5226, 36, 8, 128, 40960),
    "qwen3:14b": (9276, 40, 8, 128, 40960),
    "qwen3:32b": (20201, 64, 8, 128, 40960),
    "phi4:14b": (9053, 40, 10, 128, 16384),
    "nomic-embed-text:latest": (274, 0, 0, 0, 2048),
}
_KNOWN_ALIASES = {
    "llama3.2": "llama3.2:3b",
    "llama3.1": "llama3.1:8b",
    "llama3.3": "llama3.3:70b",
    "mistral": "mistral:7b",
    "mistral-nemo": "mistral-nemo:12b",
    "qwen2.5": "qwen2.5:7b",
    "qwen3": "qwen3:8b",
    "phi4": "phi4:14b",
    "nomic-embed-text": "nomic-embed-text:latest",
}
TABLE = "docs/vram.md: table of models by name"


def known_llm(name: str) -> Llm:
    """A language model of the table. Raises UnknownModel."""
    plain = name.strip().lower().removesuffix(":latest")
    entry = _KNOWN_LLMS.get(_KNOWN_ALIASES.get(plain, plain))
    if entry is None:
        raise UnknownModel(
            f"How much VRAM the model {name} takes is not known before it is there. Known by name:"
            f" {', '.join(_KNOWN_LLMS)}."
        )
    megabytes, layers, heads, size, trained = entry
    return Llm(name, math.ceil(megabytes * footprints.MB), (heads * 2 * size,) * layers, trained, TABLE)


def known_llms() -> Iterable[str]:
    return _KNOWN_LLMS

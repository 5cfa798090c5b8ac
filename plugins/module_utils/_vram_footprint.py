# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How much VRAM a speech-to-text engine or a language model takes, in MiB, by formula.

Each footprint says what stays while the model is loaded (`rest`), what one full load of work takes at most
(`peak`), how far that may be off (`error`, a fraction of the peak), and where the formula comes from. The
tables and constants are in docs/vram.md beside the measurements they are held against.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Optional

MB = 1_000_000 / 2**20  # MiB

# Measured peaks that these formulas are held against are met within 8 %; the rest is for other cards.
STT_ERROR = 0.10
# Compute buffers and the CUDA context differ between cards and versions: half of their range.
LLM_ERROR_MIB = 0.25 * 1000 * MB
FITTED = "docs/vram.md: weights from the parameters, working set fitted to published peaks of faster-whisper"
GGUF = "docs/vram.md: size of the GGUF file, KV cache from its metadata, buffers of llama.cpp"


class UnknownModel(ValueError):
    """No table and no file says how large a model is; the message is for the user."""


@dataclasses.dataclass(frozen=True)
class Footprint:
    """VRAM of one thing on a card, in MiB."""

    name: str
    rest: int
    peak: int
    error: int
    source: str
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # What stays of it after its model was unloaded, until its process ends.
    unloaded: int = 0

    @property
    def low(self) -> int:
        return max(0, self.peak - self.error)

    @property
    def high(self) -> int:
        return self.peak + self.error


@dataclasses.dataclass(frozen=True)
class Whisper:
    """A Whisper model: millions of parameters, working set of one request in MB, width of the decoder."""

    parameters: int
    working: int
    width: int
    # Higher hears better; after Whisper's own order and the distillations' published error rates.
    rank: int
    english: bool = False


# The working set follows the decoder's depth: 700 MB up to 12 layers, more above; the encoder's width decides
# between turbo and distil (900) and the full large models (1450).
WHISPER: Mapping[str, Whisper] = {
    "tiny": Whisper(39, 700, 384, 1),
    "tiny.en": Whisper(39, 700, 384, 1, True),
    "base": Whisper(74, 700, 512, 2),
    "base.en": Whisper(74, 700, 512, 2, True),
    "small": Whisper(244, 700, 768, 3),
    "small.en": Whisper(244, 700, 768, 3, True),
    "distil-small.en": Whisper(166, 700, 768, 3, True),
    "medium": Whisper(769, 1100, 1024, 4),
    "medium.en": Whisper(769, 1100, 1024, 4, True),
    "distil-medium.en": Whisper(394, 700, 1024, 4, True),
    "distil-large-v2": Whisper(756, 900, 1280, 5, True),
    "distil-large-v3": Whisper(756, 900, 1280, 5, True),
    "distil-large-v3.5": Whisper(756, 900, 1280, 5, True),
    "large-v1": Whisper(1550, 1450, 1280, 5),
    "large-v3-turbo": Whisper(809, 900, 1280, 6),
    "large-v2": Whisper(1550, 1450, 1280, 6),
    "large-v3": Whisper(1550, 1450, 1280, 7),
}
# Bytes a weight takes on the card. int8 keeps scales, and layers that are not quantised.
WEIGHT_BYTES: Mapping[str, float] = {
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "int16": 2.0,
    "int8": 1.02,
    "int8_float32": 1.02,
    "int8_float16": 1.02,
    "int8_bfloat16": 1.02,
}
# Each further window of 30 seconds that is worked on at once, in MB, for a decoder as wide as the large ones.
BATCH_MB, BATCH_WIDTH, MOST_BATCH = 200, 1280, 8
# What an engine's CUDA context and libraries keep after its model is gone, until its process ends.
ENGINE_MB = 500
# A batched request is the rule with Speaches (batch 8, fixed); voicegate takes windows one after another.
ENGINE_BATCH: Mapping[str, int] = {"speaches": 8, "builtin": 1}

# Bytes of one value in the KV cache.
KV_BYTES: Mapping[str, float] = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.0625, "q4_0": 0.5625}
COMPUTE_MB, CONTEXT_MB = 550, 355  # 300 to 800, 250 to 460
# An embedding model has no cache and little to compute: the lower ends.
EMBEDDING_COMPUTE_MB, EMBEDDING_CONTEXT_MB = 300, 250


def _mib(megabytes: float) -> int:
    return math.ceil(megabytes * MB)


def windows(seconds: float, engine: str) -> int:
    """How many windows of 30 seconds an engine works on at once for a recording of this length."""
    most = ENGINE_BATCH.get(engine, MOST_BATCH)
    return most if seconds >= 30 * most else max(1, math.ceil(seconds / 30))


def _whisper(model: str) -> Whisper:
    known = WHISPER.get(model)
    if known is None:
        raise UnknownModel(
            f"How much VRAM the speech model {model!r} takes is not known. Known: {', '.join(WHISPER)}."
        )
    return known


def stt(model: str, compute_type: str, batch: int = 1, live: str = "") -> Footprint:
    """
    VRAM of Whisper under CTranslate2: parameters times bytes, a working set by the size of the decoder, and
    200 MB times (batch - 1) times width/1280. A second model in the process (`live`) adds its weights; both
    work by turns in one CUDA context, so only the larger working set counts. Raises UnknownModel for what the
    table does not hold.
    """
    names = list(dict.fromkeys([model, live] if live else [model]))
    models = [_whisper(name) for name in names]
    if compute_type not in WEIGHT_BYTES:
        raise UnknownModel(f"Compute type {compute_type!r} is not known. Known: {', '.join(WEIGHT_BYTES)}.")
    each = [_mib(known.parameters * WEIGHT_BYTES[compute_type]) for known in models]
    weights = sum(each)
    working, more = max(
        (
            (_mib(known.working), _mib(BATCH_MB * (max(1, batch) - 1) * known.width / BATCH_WIDTH))
            for known in models
        ),
        key=sum,
    )
    # The fitted working set holds the CUDA context; that part stays when nothing is being heard.
    context = min(working, _mib(ENGINE_MB))
    peak = weights + working + more
    return Footprint(
        f"{' + '.join(names)} {compute_type}",
        rest=weights + context,
        peak=peak,
        error=math.ceil(peak * STT_ERROR),
        source=FITTED,
        parts={
            "weights": each[0],
            **({"live model": each[1]} if len(each) > 1 else {}),
            "working set": working,
            "batch": more,
        },
        unloaded=_mib(ENGINE_MB),
    )


@dataclasses.dataclass(frozen=True)
class Llm:
    """
    A language model: MiB of its weights, and its KV cache. `kv` holds, for each layer that has one, the
    number of values that a token adds: kv_heads times (key size plus value size).
    """

    name: str
    weights_mib: int
    kv: tuple[int, ...]
    trained_context: int = 0
    source: str = GGUF

    def cache_mib(self, context: int, parallel: int, kv_type: str) -> int:
        """Of all layers together: values of a token times tokens times bytes."""
        if kv_type not in KV_BYTES:
            raise UnknownModel(f"KV cache type {kv_type!r} is not known. Known: {', '.join(KV_BYTES)}.")
        return math.ceil(sum(self.kv) * context * parallel * KV_BYTES[kv_type] / 2**20)


def llm(model: Llm, context: int, parallel: int = 1, kv_type: str = "f16") -> Footprint:
    """
    VRAM of a model under llama-server with all layers on the card: the weights, the cache for the whole
    context at once (it is taken at load, so rest and peak are the same), compute buffers, CUDA context.
    A context longer than the model was trained for is cut to that, as Ollama does.
    """
    used = min(context, model.trained_context) if model.trained_context else context
    cache = model.cache_mib(used, max(1, parallel), kv_type)
    compute, cuda = (
        (_mib(COMPUTE_MB), _mib(CONTEXT_MB))
        if model.kv
        else (_mib(EMBEDDING_COMPUTE_MB), _mib(EMBEDDING_CONTEXT_MB))
    )
    total = model.weights_mib + cache + compute + cuda
    return Footprint(
        model.name,
        rest=total,
        peak=total,
        error=math.ceil(LLM_ERROR_MIB + 0.03 * model.weights_mib),
        source=model.source,
        parts={"weights": model.weights_mib, "KV cache": cache, "compute": compute, "CUDA context": cuda},
    )


def llm_from_metadata(name: str, metadata: Mapping[str, Any], size_bytes: int) -> Llm:
    """
    From GGUF metadata (the file's, or `model_info` of Ollama's /api/show) and the file's size in bytes.
    Raises UnknownModel if it names no architecture or no layers.
    """
    architecture = str(metadata.get("general.architecture") or "")

    def number(key: str) -> Optional[int]:
        value = metadata.get(f"{architecture}.{key}")
        return int(value) if isinstance(value, (int, float)) and value > 0 else None

    layers = number("block_count")
    if not architecture or layers is None or layers > 10_000:
        raise UnknownModel(f"The metadata of {name} name no architecture or no number of layers.")
    heads = number("attention.head_count") or 1
    width = number("embedding_length") or 0
    key = number("attention.key_length") or (width // heads)
    value = number("attention.value_length") or (width // heads)
    each = metadata.get(f"{architecture}.attention.head_count_kv", heads)
    # Hybrid models have an array: layers without attention have 0 heads there.
    per_layer = list(each)[:layers] if isinstance(each, (list, tuple)) else [each] * layers
    if len(per_layer) < layers or not all(isinstance(n, (int, float)) and n >= 0 for n in per_layer):
        raise UnknownModel(f"The metadata of {name} say nothing usable of its KV heads.")
    return Llm(
        name,
        math.ceil(size_bytes / 2**20),
        tuple(int(n) * (key + value) for n in per_layer),
        number("context_length") or 0,
    )

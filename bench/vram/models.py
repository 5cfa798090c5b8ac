# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whisper models of the true shapes with random weights, in CTranslate2's format.

What a model takes on a card hangs on its shapes alone, so no weights need be fetched. One with random
weights decodes to the limit every time: the longest that a window can be, and so the peak.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.vram.collection import ROOT

# Tokenizer and vocabulary of Whisper's multilingual models lie beside the demo model.
TOKENS = ROOT / "demo/whisper-demo"
POSITIONS, TEXT_POSITIONS = 1500, 448
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Whisper:
    """Layers of encoder and decoder, width, heads, mel bands, size of the vocabulary."""

    encoder: int
    decoder: int
    width: int
    heads: int
    mels: int = 80
    # English-only models have one token less: not worth a tokenizer of their own here.
    tokens: int = 51865


# From the published configurations of Whisper and its distillations.
SHAPES: dict[str, Whisper] = {
    "tiny": Whisper(4, 4, 384, 6),
    "base": Whisper(6, 6, 512, 8),
    "small": Whisper(12, 12, 768, 12),
    "distil-small.en": Whisper(12, 4, 768, 12),
    "medium": Whisper(24, 24, 1024, 16),
    "distil-medium.en": Whisper(24, 2, 1024, 16),
    "large-v1": Whisper(32, 32, 1280, 20),
    "large-v2": Whisper(32, 32, 1280, 20),
    "distil-large-v2": Whisper(32, 2, 1280, 20),
    "large-v3": Whisper(32, 32, 1280, 20, 128, 51866),
    "large-v3-turbo": Whisper(32, 4, 1280, 20, 128, 51866),
    "distil-large-v3": Whisper(32, 2, 1280, 20, 128, 51866),
    "distil-large-v3.5": Whisper(32, 2, 1280, 20, 128, 51866),
}


def _attention(prefix: str, width: int, *, cross: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}/layer_norm/gamma", (width,)
    yield f"{prefix}/layer_norm/beta", (width,)
    # Query, key and value are one product; of cross attention only key and value.
    rows = (width, 2 * width, width) if cross else (3 * width, width)
    for index, each in enumerate(rows):
        yield f"{prefix}/linear_{index}/weight", (each, width)
        yield f"{prefix}/linear_{index}/bias", (each,)


def _feed_forward(prefix: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}/layer_norm/gamma", (width,)
    yield f"{prefix}/layer_norm/beta", (width,)
    for index, (rows, columns) in enumerate(((4 * width, width), (width, 4 * width))):
        yield f"{prefix}/linear_{index}/weight", (rows, columns)
        yield f"{prefix}/linear_{index}/bias", (rows,)


def weights(model: Whisper) -> dict[str, Shape]:
    """Every array of a model by its name in model.bin; the projection is the embeddings again."""
    found: dict[str, Shape] = {
        "encoder/conv1/weight": (model.width, model.mels, 3),
        "encoder/conv1/bias": (model.width,),
        "encoder/conv2/weight": (model.width, model.width, 3),
        "encoder/conv2/bias": (model.width,),
        "encoder/position_encodings/encodings": (POSITIONS, model.width),
        "decoder/embeddings/weight": (model.tokens, model.width),
        "decoder/position_encodings/encodings": (TEXT_POSITIONS, model.width),
    }
    for part, layers in (("encoder", model.encoder), ("decoder", model.decoder)):
        found[f"{part}/layer_norm/gamma"] = found[f"{part}/layer_norm/beta"] = (model.width,)
        for number in range(layers):
            layer = f"{part}/layer_{number}"
            found.update(_attention(f"{layer}/self_attention", model.width, cross=False))
            if part == "decoder":
                found.update(_attention(f"{layer}/attention", model.width, cross=True))
            found.update(_feed_forward(f"{layer}/ffn", model.width))
    return found


def parameters(model: Whisper) -> int:
    return sum(math.prod(shape) for shape in weights(model).values())


def _set(spec: Any, name: str, value: Any) -> None:
    """Put a value where a name like encoder/layer_3/ffn/linear_0/weight says."""
    *path, last = name.split("/")
    for part in path:
        head, _unused, index = part.rpartition("_")
        spec = (
            getattr(spec, head)[int(index)]
            if index.isdigit() and not hasattr(spec, part)
            else getattr(spec, part)
        )
    setattr(spec, last, value)


def write(name: str, folder: Path) -> Path:
    """
    Write the model as its publishers do (float16) and return its folder; one that is there is taken as it is.
    Takes about twice the size of the file in memory.
    """
    import ctranslate2
    import numpy as np

    target = folder / name
    if (target / "model.bin").exists():
        return target
    model = SHAPES[name]
    random = np.random.default_rng(0)
    spec = ctranslate2.specs.WhisperSpec(model.encoder, model.heads, model.decoder, model.heads)
    for path, shape in weights(model).items():
        values = random.standard_normal(shape, dtype=np.float32)
        values *= 0.02
        if path.endswith("/gamma"):
            values += 1
        _set(spec, path, values.astype(np.float16))
    spec.decoder.projection.weight = spec.decoder.embeddings.weight
    tokens = json.loads((TOKENS / "vocabulary.json").read_text(encoding="utf-8"))
    spec.register_vocabulary([*tokens, "<|unused|>"][: model.tokens])
    config = json.loads((TOKENS / "config.json").read_text(encoding="utf-8"))
    for key in ("suppress_ids", "suppress_ids_begin", "lang_ids"):
        setattr(spec.config, key, config[key])
    spec.config.alignment_heads = [(model.decoder - 1, 0)]
    spec.validate()
    # A name instead of values: the same array.
    spec.decoder.projection.weight = "decoder/embeddings/weight"
    scratch = folder / f"{name}.new"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    spec.save(str(scratch))
    shutil.copy(TOKENS / "tokenizer.json", scratch)
    features = json.loads((TOKENS / "preprocessor_config.json").read_text(encoding="utf-8"))
    (scratch / "preprocessor_config.json").write_text(json.dumps({**features, "feature_size": model.mels}))
    scratch.rename(target)
    return target

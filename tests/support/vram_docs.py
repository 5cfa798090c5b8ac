"""
The tables of docs/vram.md, made by the planner.

python tests/support/vram_docs.py           says whether the page differs (exit 1)
python tests/support/vram_docs.py --write   writes it
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / ".collections") not in sys.path:
    sys.path.insert(0, str(ROOT / ".collections"))

from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_footprint as footprint
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_plan as vram

PAGE = ROOT / "docs/vram.md"
# Published peaks in MiB: model, compute type, batch.
MEASURED = [
    ("large-v2", "float16", 1, 4525),
    ("large-v2", "int8", 1, 2926),
    ("large-v2", "float16", 8, 6090),
    ("large-v2", "int8", 8, 4500),
    ("large-v3", "float16", 1, 4521),
    ("large-v3", "int8", 1, 2953),
    ("large-v3-turbo", "float16", 1, 2537),
    ("distil-large-v3", "float16", 1, 2409),
    ("distil-large-v3", "int8", 1, 1481),
]
# What the docs of AnKLuMe print for float16, GB.
ANKLUME = {"large-v3-turbo": 6, "large-v3": 10}
SIZES = {"6 GB": 6144, "8 GB": 8192, "12 GB": 12288, "16 GB": 16384, "24 GB": 24576, "48 GB": 49152}
BESIDE = ("llama3.2:3b", "llama3.1:8b", "qwen2.5:14b", "qwen3:32b")


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured() -> str:
    rows = []
    for model, kind, batch, peak in MEASURED:
        found = footprint.stt(model, kind, batch)
        off = f"{100 * (found.peak / peak - 1):+.1f} %"
        old = f"{ANKLUME[model] * 1000} MB" if kind == "float16" and model in ANKLUME and batch == 1 else ""
        rows.append([model, kind, str(batch), str(peak), f"{found.peak} ±{found.error}", off, old])
    head = [
        "model",
        "compute type",
        "batch",
        "published peak, MiB",
        "formula, MiB",
        "off by",
        "AnKLuMe's docs",
    ]
    return _rows(head, rows)


def models() -> str:
    rows = []
    for name in vram.AUTO_MODELS:
        row = [name]
        for kind in ("float16", "int8_float16"):
            one, eight = footprint.stt(name, kind, 1), footprint.stt(name, kind, 8)
            row += [str(one.rest), str(one.peak), str(eight.peak)]
        rows.append(row)
    head = ["model", "float16: rest", "peak", "peak, batch 8", "int8_float16: rest", "peak", "peak, batch 8"]
    return _rows(head, rows)


def choices() -> str:
    """For each size of a card and each language model: the best speech model that stays loaded beside it."""
    rows = []
    for size, mib in SIZES.items():
        row = [size]
        for name in BESIDE:
            mix = vram.Mix(mib, model="auto", compute_type="auto", llms=(vram.known_llm(name),), loaded=1)
            found = vram.choose(mix)
            row.append(f"{found.mix.model} {found.mix.compute_type}" if found.ok else "no")
        rows.append(row)
    return _rows(["card", *(f"beside {name}" for name in BESIDE)], rows)


TABLES = {"measured": measured, "models": models, "choices": choices}


def page() -> str:
    """The page as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        text = re.sub(
            re.escape(begin) + ".*?" + re.escape(end), f"{begin}\n{make()}\n{end}", text, flags=re.DOTALL
        )
    return text


def main() -> int:
    if page() == PAGE.read_text(encoding="utf-8"):
        return 0
    if "--write" not in sys.argv:
        print("differs: docs/vram.md")
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    print("wrote docs/vram.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

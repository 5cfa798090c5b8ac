"""
The table of compute capabilities in docs/gpu.md, made from plugins/module_utils/_gpu_capability.py.

python tests/support/gpu_docs.py           says whether the page differs (exit 1 if so)
python tests/support/gpu_docs.py --write   writes it
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / ".collections") not in sys.path:
    sys.path.insert(0, str(ROOT / ".collections"))

from ansible_collections.sottovoce.stack.plugins.module_utils import _gpu_capability

PAGE = ROOT / "docs/gpu.md"
BEGIN, END = "<!-- capabilities: begin -->", "<!-- capabilities: end -->"


def page(text: str) -> str:
    """The page with the table as it should be between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the page must hold {BEGIN} and {END} once each")
    head, rest = text.split(BEGIN)
    return "\n".join([head + BEGIN, *_gpu_capability.table(), END + rest.split(END)[1]])


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    wanted = page(text)
    if wanted == text:
        return 0
    if "--write" in sys.argv:
        PAGE.write_text(wanted, encoding="utf-8")
        print("wrote docs/gpu.md")
        return 0
    print("differs: docs/gpu.md")
    return 1


if __name__ == "__main__":
    sys.exit(main())

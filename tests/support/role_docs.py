"""
The table of variables in each role's README, made from meta/argument_specs.yml.

python tests/support/role_docs.py           says which READMEs differ (exit 1 if any)
python tests/support/role_docs.py --write   writes them
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- variables: begin -->", "<!-- variables: end -->"


def roles() -> list[Path]:
    """Folders of the roles of this collection."""
    return sorted(path.parent.parent for path in ROOT.glob("roles/*/meta/argument_specs.yml"))


def options(role: Path) -> dict[str, dict[str, Any]]:
    """Options of the role's main entry point."""
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = specs["argument_specs"]["main"].get("options") or {}
    return found


def _default(option: dict[str, Any]) -> str:
    if "default" not in option:
        return "required" if option.get("required") else "none"
    text = yaml.safe_dump(option["default"], default_flow_style=True, width=1000).strip()
    text = text.removesuffix("\n...").strip()
    return f"`{text}`"


def _description(option: dict[str, Any]) -> str:
    text = option.get("description", "")
    words = " ".join(text if isinstance(text, list) else [text]).split()
    if option.get("choices"):
        words.append(f"One of {', '.join(f'`{choice}`' for choice in option['choices'])}.")
    # Ansible's markup: C(code), V(value), O(option), M(module), P(plugin#kind) are all code in Markdown.
    return re.sub(r"\b[CVOMP]\(([^)#]+)(?:#\w+)?\)", r"`\1`", " ".join(words)).replace("|", "\\|")


def table(role: Path) -> str:
    """The Markdown table with its markers."""
    lines = [BEGIN, "| variable | type | default | |", "|---|---|---|---|"]
    for name, option in options(role).items():
        kind = option.get("type", "str")
        kind = f"{kind} of {option['elements']}" if option.get("elements") else kind
        lines.append(f"| `{name}` | {kind} | {_default(option)} | {_description(option)} |")
    return "\n".join([*lines, END])


def readme(role: Path) -> str:
    """The role's README with the table as it should be; a README without the markers gets one at its end."""
    text = (role / "README.md").read_text(encoding="utf-8")
    if BEGIN not in text:
        return f"{text.rstrip()}\n\n## Variables\n\n{table(role)}\n"
    head, rest = text.split(BEGIN, 1)
    return head + table(role) + rest.split(END, 1)[1]


def main() -> int:
    stale = [role for role in roles() if readme(role) != (role / "README.md").read_text(encoding="utf-8")]
    for role in stale:
        if "--write" in sys.argv:
            (role / "README.md").write_text(readme(role), encoding="utf-8")
        print(f"{'wrote' if '--write' in sys.argv else 'differs:'} {role.relative_to(ROOT)}/README.md")
    return int(bool(stale) and "--write" not in sys.argv)


if __name__ == "__main__":
    sys.exit(main())

"""What every role is held to: specs equal defaults, names, README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import role_docs
import yaml

ROLES = role_docs.roles()


def test_there_are_roles() -> None:
    assert len(ROLES) >= 6


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_specs_equal_defaults(role: Path) -> None:
    defaults = yaml.safe_load((role / "defaults/main.yml").read_text(encoding="utf-8")) or {}
    options = role_docs.options(role)
    specs = {name: option["default"] for name, option in options.items() if "default" in option}
    assert specs == defaults


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_variables_carry_the_name_of_the_role(role: Path) -> None:
    # Ollama's variables keep the shorter names that existing host_vars use.
    prefix = {"ollama_server": "ollama_"}.get(role.name, f"{role.name}_")
    assert [name for name in role_docs.options(role) if not name.startswith(prefix)] == []


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_readme_is_made_from_the_specs(role: Path) -> None:
    assert role_docs.readme(role) == (role / "README.md").read_text(encoding="utf-8"), (
        "run: .venv/bin/python tests/support/role_docs.py --write"
    )


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_public_variable_used_is_specified(role: Path) -> None:
    prefix = "ollama_" if role.name == "ollama_server" else f"{role.name}_"
    known = set(role_docs.options(role))
    used: set[str] = set()
    for path in [*role.rglob("tasks/*.yml"), *role.rglob("templates/*")]:
        # Inside expressions only; file names and registered results have other prefixes or a leading __.
        for expression in re.findall(r"\{\{(.*?)\}\}", path.read_text(encoding="utf-8"), re.DOTALL):
            used |= set(re.findall(rf"(?<![\w.'\"/]){prefix}\w+", expression))
    assert used - known == set()

"""Smaller ways to load a model, for a card that has no room for it as asked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fallback:
    """On the CPU, or with a compute type that needs less."""

    name: str  # cpu, or a compute type
    need_mib: int  # 0 for the CPU


def fallbacks(text: str) -> list[Fallback]:
    """`int8=1500,cpu` as a list, in order. ValueError names what cannot be read."""
    found = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name, _unused, need = part.partition("=")
        if name == "cpu" and not need:
            found.append(Fallback("cpu", 0))
        elif name.startswith("int8") and need.isdigit() and int(need) > 0:
            found.append(Fallback(name, int(need)))
        else:
            raise ValueError(f"{part!r} is neither cpu nor a compute type with its MiB, such as int8=1500")
    return found

# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Local certificate authorities of one machine handed to another."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

_BLOCK = re.compile(r"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)


class CertificateError(Exception):
    """str() is the message for the user."""


@dataclasses.dataclass(frozen=True)
class Plan:
    write: dict[str, str]
    remove: list[str]
    # The files are in place, but the bundle was not made from them.
    stale: bool

    @property
    def changed(self) -> bool:
        return bool(self.write or self.remove or self.stale)


def bodies(text: str) -> set[str]:
    """The certificates of a PEM text, without line breaks."""
    return {re.sub(r"\s", "", block) for block in _BLOCK.findall(text)}


def wanted_files(certificates: Mapping[str, str]) -> dict[str, str]:
    """File name → content. Names may be paths; equal names in different folders get a number."""
    files: dict[str, str] = {}
    for source in sorted(certificates):
        content = certificates[source].strip() + "\n"
        if not bodies(content):
            raise CertificateError(
                f"{source} holds no certificate in PEM form (-----BEGIN CERTIFICATE-----). Convert it, or"
                " take it out of the folder."
            )
        if "PRIVATE KEY-----" in content:
            raise CertificateError(
                f"{source} holds a private key; it is not handed on. Take the key out of it."
            )
        stem = (
            re.sub(r"[^A-Za-z0-9_.-]", "_", os.path.basename(source).removesuffix(".crt")).lstrip(".") or "ca"
        )
        name, number = f"{stem}.crt", 1
        while name in files:
            number += 1
            name = f"{stem}-{number}.crt"
        files[name] = content
    return files


def plan(files: Mapping[str, str], there: Mapping[str, str], bundle: str) -> Plan:
    """What to write and remove; `bundle` is the text of the system's bundle."""
    write = {name: text for name, text in files.items() if there.get(name) != text}
    remove = sorted(set(there) - set(files))
    known = bodies(bundle)
    stale = any(bodies(text) - known for text in files.values())
    return Plan(write, remove, stale)

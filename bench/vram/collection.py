# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The collection's own code, importable with and without `make setup`, and without Ansible."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def importable() -> None:
    """Make `ansible_collections.sottovoce.stack` this checkout."""
    base = ROOT / ".collections"
    if not base.is_dir():
        base = Path(tempfile.mkdtemp(prefix="sottovoce-bench-"))
        atexit.register(shutil.rmtree, base, ignore_errors=True)
        folder = base / "ansible_collections/sottovoce"
        folder.mkdir(parents=True)
        (folder / "stack").symlink_to(ROOT)
    if str(base) not in sys.path:
        sys.path.insert(0, str(base))


importable()

"""
End-to-end tests: a stack that apply brings up in the Incus daemon of this run.

tests/e2e.sh starts that daemon (INCUS_DIR) and runs these. The collection under test is the built tarball,
installed into an empty path, as a user has it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e import BIN, INFRA, ROOT, Collection, Stack


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "" if os.environ.get("INCUS_DIR") else "no Incus daemon of its own (run tests/e2e.sh)"
    for item in items:
        if reason and "e2e" in Path(str(item.fspath)).parts:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """The tarball of this checkout, built and installed into an empty path."""
    path = tmp_path_factory.mktemp("user")
    galaxy = str(BIN / "ansible-galaxy")
    subprocess.run(
        [galaxy, "collection", "build", "--output-path", str(path), str(ROOT)], check=True, cwd=ROOT
    )
    (tarball,) = path.glob("sottovoce-stack-*.tar.gz")
    subprocess.run(
        [galaxy, "collection", "install", str(tarball), "-p", str(path / "collections"), "--offline"],
        check=True,
        cwd=path,
    )
    (path / "ansible.cfg").write_text(
        "[defaults]\ncollections_path = collections\nforks = 10\n"
        "[inventory]\nenable_plugins = sottovoce.stack.infra\n",
        encoding="utf-8",
    )
    return Collection(path)


@pytest.fixture(scope="session")
def stack(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    inventory = tmp_path_factory.mktemp("stack") / "inventory"
    (inventory / "host_vars").mkdir(parents=True)
    (inventory / "group_vars").mkdir()
    (inventory / "infra.yml").write_text(INFRA, encoding="utf-8")
    (inventory / "group_vars/all.yml").write_text(
        f"stt_server_fallback_model: {ROOT}/demo/whisper-demo\n", encoding="utf-8"
    )
    first = collection.play("apply", inventory)
    yield Stack(collection, inventory, first)
    collection.play("destroy", inventory, "-e", "confirm=yes")

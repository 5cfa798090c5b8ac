"""What users get: the tarball holds what they need and nothing of the checkout."""

from __future__ import annotations

import tarfile

from e2e import Collection


def test_the_tarball_holds_only_what_users_need(collection: Collection) -> None:
    (path,) = collection.path.glob("sottovoce-stack-*.tar.gz")
    with tarfile.open(path) as tarball:
        names = tarball.getnames()
    assert {name.split("/")[0] for name in names} == {
        "CONTRIBUTING.md", "FILES.json", "LICENSE", "MANIFEST.json", "README.md",
        "changelogs", "docs", "gateway", "inventories", "meta", "playbooks", "plugins", "roles",
    }  # fmt: skip
    assert {name for name in names if "__pycache__" in name or name.startswith("gateway/tests")} == set()
    for needed in (
        "gateway/requirements.lock",
        "gateway/src/voicegate/api.py",
        "playbooks/files/sentence.wav",
    ):
        assert needed in names
    # Galaxy takes 20 MB at most.
    assert path.stat().st_size < 5_000_000

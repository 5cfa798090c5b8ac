"""The built image: recipe, cache, need, import."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _image_build as image_build
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import IncusNotFound, Response

RECIPE = image_build.Recipe("debian", "bookworm", "amd64", ("udev", "python3"))
ALIAS = "sottovoce/debian/12"


def test_digest_changes_with_what_is_built() -> None:
    same = dataclasses.replace(RECIPE, packages=("python3", "udev", "udev"))
    assert same.digest == RECIPE.digest
    others = [
        dataclasses.replace(RECIPE, release="trixie"),
        dataclasses.replace(RECIPE, architecture="arm64"),
        dataclasses.replace(RECIPE, packages=("udev",)),
        dataclasses.replace(RECIPE, sources=("deb http://m.example bookworm main",)),
    ]
    assert len({recipe.digest for recipe in (RECIPE, *others)}) == 5


def test_digest_changes_with_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    before = RECIPE.digest
    monkeypatch.setattr(image_build, "HOOKS", (*image_build.HOOKS, "true"))
    assert RECIPE.digest != before


def test_no_mirror_is_named_without_sources_of_the_host() -> None:
    command = RECIPE.command()
    assert command[-2:] == ["bookworm", "-"]
    assert not any("://" in part for part in command)
    line = "deb http://m.example bookworm main"
    assert dataclasses.replace(RECIPE, sources=(line,)).command()[-1] == line


def test_hooks_make_a_machine_without_identity(tmp_path: Path) -> None:
    for folder in ("etc/apt", "usr/share/doc/x", "usr/share/man", "var/log/apt", "var/cache/apt/archives"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "var/lib/apt/lists").mkdir(parents=True)
    (tmp_path / "var/lib/apt/lists/old").touch()
    (tmp_path / "etc/machine-id").write_text("abc\n", encoding="ascii")
    (tmp_path / "etc/hostname").write_text("host\n", encoding="ascii")
    (tmp_path / "usr/share/doc/x/copyright").touch()
    (tmp_path / "usr/share/doc/x/README").touch()
    for hook in image_build.HOOKS:
        if "chroot" not in hook:
            subprocess.run(["sh", "-euc", hook, "sh", str(tmp_path)], check=True)
    network = (tmp_path / "etc/systemd/network/eth0.network").read_text(encoding="ascii")
    assert "[Match]\nName=eth0\n" in network
    assert "DHCP=yes\n" in network
    assert (tmp_path / "etc/machine-id").read_bytes() == b""
    assert not (tmp_path / "etc/hostname").exists()
    assert [path.name for path in (tmp_path / "usr/share/doc/x").iterdir()] == ["copyright"]
    lists = tmp_path / "var/lib/apt/lists"
    assert [path.name for path in lists.iterdir()] == ["partial"]
    assert lists.stat().st_mtime == 0


def test_metadata_is_what_incus_reads() -> None:
    with tarfile.open(fileobj=io.BytesIO(image_build.metadata_tarball(RECIPE, ALIAS, 1_700_000_000))) as tar:
        handle = tar.extractfile("metadata.yaml")
        assert handle is not None
        document = json.load(handle)
        names = tar.getnames()
    assert document["architecture"] == "x86_64"
    assert document["properties"][image_build.RECIPE_PROPERTY] == RECIPE.digest
    for template in document["templates"].values():
        assert f"templates/{template['template']}" in names


# Need


def _wanted(**changes: str) -> dict[str, str]:
    return {"project": "ai", "name": "m", "type": "container", "image": "images:debian/13", **changes}


def test_existing_and_virtual_machines_need_nothing() -> None:
    existing = ["/1.0/instances/m?project=ai", "/1.0/instances/d"]
    wanted = [_wanted(), _wanted(project="default", name="d"), _wanted(name="v", type="virtual-machine")]
    assert image_build.missing_instances(wanted, existing) == []
    other = _wanted(project="other")
    assert image_build.missing_instances([other], existing) == [other]


@pytest.mark.parametrize(
    ("image", "needs"), [("images:debian/13", True), ("lab", False), ("images:lab", False), ("other", True)]
)
def test_local_aliases_need_no_fallback(image: str, needs: bool) -> None:
    aliases = [{"name": "lab", "type": "container", "target": "f" * 64}]
    assert image_build.wants_fallback([_wanted(image=image)], aliases) is needs


def _properties(recipe: str = RECIPE.digest, built: str = "0") -> dict[str, str]:
    return {image_build.RECIPE_PROPERTY: recipe, image_build.BUILT_PROPERTY: built}


@pytest.mark.parametrize(
    ("properties", "max_age", "current"),
    [
        (_properties(), 30, True),
        (_properties(), 9, False),
        (_properties(), 0, True),
        (_properties(recipe="other"), 0, False),
        (_properties(built="soon"), 30, False),
        ({}, 30, False),
    ],
)
def test_age_and_recipe(properties: dict[str, str], max_age: float, current: bool) -> None:
    found, why = image_build.is_current(properties, RECIPE.digest, max_age, now=10 * image_build.DAY)
    assert found is current
    assert bool(why) is not current


# Cache


class Builder:
    def __init__(self) -> None:
        self.built: list[str] = []

    def __call__(self, recipe: image_build.Recipe, target: str) -> None:
        self.built.append(recipe.release)
        Path(target).write_bytes(recipe.digest.encode())


def _obtain(
    folder: Path, build: Any, now: float = 0.0, recipe: image_build.Recipe = RECIPE, **more: Any
) -> Any:
    return image_build.obtain(recipe, ALIAS, folder=str(folder), now=lambda: now, build=build, **more)


def test_built_once_then_from_the_cache(tmp_path: Path) -> None:
    build = Builder()
    first, second = _obtain(tmp_path, build), _obtain(tmp_path, build, now=29 * image_build.DAY)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.rootfs == second.rootfs
    assert build.built == ["bookworm"]


def test_an_old_entry_is_built_anew_and_force_too(tmp_path: Path) -> None:
    build = Builder()
    _obtain(tmp_path, build)
    assert _obtain(tmp_path, build, now=31 * image_build.DAY).built == 31 * image_build.DAY
    assert not _obtain(tmp_path, build, now=31 * image_build.DAY, force=True).from_cache
    assert len(build.built) == 3


def test_one_entry_per_alias(tmp_path: Path) -> None:
    build = Builder()
    _obtain(tmp_path, build)
    (tmp_path / ".new-killed").mkdir()
    other = dataclasses.replace(RECIPE, release="trixie")
    _obtain(tmp_path, build, recipe=other)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [other.digest]


def test_a_damaged_entry_is_built_anew(tmp_path: Path) -> None:
    build = Builder()
    Path(_obtain(tmp_path, build).rootfs).unlink()
    assert not _obtain(tmp_path, build).from_cache


def test_a_failed_build_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    build = Builder()
    _obtain(tmp_path, build)

    def fail(_recipe: image_build.Recipe, target: str) -> None:
        Path(target).write_bytes(b"half")
        raise image_build.BuildError("no network")

    with pytest.raises(image_build.BuildError):
        _obtain(tmp_path, fail, force=True)
    assert _obtain(tmp_path, build).from_cache
    assert not list(tmp_path.glob(".new-*"))


def test_two_at_once_build_once(tmp_path: Path) -> None:
    build = Builder()
    threads = [threading.Thread(target=_obtain, args=(tmp_path, build)) for _unused in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert build.built == ["bookworm"]


def test_the_cache_is_where_users_expect_it() -> None:
    assert image_build.cache_folder({"XDG_CACHE_HOME": "/c"}) == "/c/sottovoce/images"
    assert image_build.cache_folder({}).endswith("/.cache/sottovoce/images")


# Build process


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_a_failing_mmdebstrap_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "mmdebstrap").write_text("#!/bin/sh\necho 'E: no such host' >&2\nexit 7\n", encoding="ascii")
    (tools / "mmdebstrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    with pytest.raises(image_build.BuildError, match=r"(?s)exit status 7.*E: no such host") as caught:
        image_build.build_rootfs(RECIPE, str(tmp_path / "out"))
    assert "apt-get update" in str(caught.value)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_the_output_is_compressed_and_a_hanging_build_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    script = tools / "mmdebstrap"
    script.write_text("#!/bin/sh\nprintf tarball\n", encoding="ascii")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    image_build.build_rootfs(RECIPE, str(tmp_path / "out"))
    raw = subprocess.run(["zstd", "-dcq", str(tmp_path / "out")], capture_output=True, check=True).stdout
    assert raw == b"tarball"
    script.write_text("#!/bin/sh\nexec sleep 60\n", encoding="ascii")
    with pytest.raises(image_build.BuildError, match="too long"):
        image_build.build_rootfs(RECIPE, str(tmp_path / "out"), timeout=0.5)


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(image_build.BuildError, match="mmdebstrap and zstd"):
        image_build.build_rootfs(RECIPE, str(tmp_path / "out"))


def test_the_proxy_of_the_host_is_used() -> None:
    def run(*_args: Any, **_more: Any) -> Any:
        return subprocess.CompletedProcess([], 0, "H='http://proxy.example:3142'\nS='DIRECT'\n", "")

    assert image_build.apt_proxy_environment(run) == {"http_proxy": "http://proxy.example:3142"}


# Import


class ImageServer:
    """The few routes that an import uses."""

    def __init__(self) -> None:
        self.images: dict[str, dict[str, Any]] = {}
        self.aliases: dict[str, str] = {}
        self.uploads = 0

    def get(self, path: str, **_more: Any) -> Response:
        name = path.rpartition("/")[2].replace("%2F", "/")
        if "/aliases/" in path:
            if name not in self.aliases:
                raise IncusNotFound(path, code=404)
            return Response(200, {"target": self.aliases[name]})
        if name not in self.images:
            raise IncusNotFound(path, code=404)
        named = [{"name": alias} for alias, target in self.aliases.items() if target == name]
        return Response(200, {**self.images[name], "aliases": named})

    def upload(
        self, method: str, path: str, source: Any, *, length: int, headers: dict[str, str], **_more: Any
    ) -> Response:
        data = b"".join(iter(lambda: source.read(1000), b""))
        assert (method, path, len(data)) == ("POST", "/1.0/images", length)
        boundary = headers["Content-Type"].partition("boundary=")[2].encode()
        parts = data.split(b"\r\n--" + boundary)[1:-1]
        bodies = [part.partition(b"\r\n\r\n")[2] for part in parts]
        assert [b'name="metadata"' in parts[0], b'name="rootfs"' in parts[1]] == [True, True]
        self.uploads += 1
        self.images[hashlib.sha256(b"".join(bodies)).hexdigest()] = {
            "properties": {image_build.RECIPE_PROPERTY: "x"}
        }
        return Response(202, None, operation="/1.0/operations/1")

    def wait(self, *_args: Any, **_more: Any) -> None:
        pass

    def request(self, method: str, path: str, *, body: dict[str, Any]) -> None:
        name = body.get("name") or path.rpartition("/")[2].replace("%2F", "/")
        self.aliases[name] = body["target"]

    def run(self, method: str, path: str) -> None:
        assert method == "DELETE"
        del self.images[path.rpartition("/")[2]]


def test_import_then_refresh_drops_the_old_one(tmp_path: Path) -> None:
    server: Any = ImageServer()
    first = image_build.import_image(server, _obtain(tmp_path, Builder()), ALIAS)
    assert server.aliases == {ALIAS: first}
    # The same files again: nothing is sent.
    image_build.import_image(server, _obtain(tmp_path, Builder()), ALIAS)
    assert server.uploads == 1
    second = image_build.import_image(server, _obtain(tmp_path, Builder(), now=5, force=True), ALIAS)
    assert server.aliases == {ALIAS: second}
    assert list(server.images) == [second]


def test_an_image_with_another_name_stays(tmp_path: Path) -> None:
    server: Any = ImageServer()
    first = image_build.import_image(server, _obtain(tmp_path, Builder()), ALIAS)
    server.aliases["mine"] = first
    image_build.import_image(server, _obtain(tmp_path, Builder(), now=5, force=True), ALIAS)
    assert first in server.images

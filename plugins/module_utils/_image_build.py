# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds a bootable container image from Debian's (or Ubuntu's) archive with mmdebstrap.

The recipe has a digest. The built files are cached under it, and the imported image carries it as a
property, so the same recipe is built once per machine and imported once per daemon.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import typing as t
from collections.abc import Callable, Iterable, Iterator, Mapping
from urllib.parse import quote

from ansible_collections.sottovoce.stack.plugins.module_utils._apt_sources import image_sources, read_sources
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    IncusClient,
    IncusError,
    IncusNotFound,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_images import (
    candidates,
    find_alias,
    probe_server,
)

# What a look needs, and how architectures are called where there is no dpkg.
LOOK_SPEC = {
    "alias": {"type": "str", "default": "sottovoce/debian/12"},
    "distribution": {"type": "str", "default": "debian"},
    "release": {"type": "str", "default": "bookworm"},
    "components": {"type": "list", "elements": "str", "default": ["main"]},
    "architecture": {"type": "str", "default": ""},
    "packages": {"type": "list", "elements": "str", "required": True},
    "needed_by": {"type": "list", "elements": "dict"},
    "image_server": {"type": "str", "default": "https://images.linuxcontainers.org"},
    "max_age": {"type": "float", "default": 30},
}
MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "armhf", "riscv64": "riscv64"}

# Part of the digest: raise it whenever HOOKS or the templates change what is built.
RECIPE_FORMAT = 1
RECIPE_PROPERTY = "sottovoce.recipe"
BUILT_PROPERTY = "sottovoce.built"
DAY = 86400
# Below this much free memory the tree is built on disk.
TMPFS_MEMORY = 4 << 30

# A container needs an address before anything is configured in it. The lease follows the network
# card, as Incus' static addresses do, and not an identity that every new container makes up.
NETWORK = r"[Match]\nName=eth0\n\n[Network]\nDHCP=yes\n\n[DHCPv4]\nClientIdentifier=mac\n"

HOOKS = (
    f'mkdir -p "$1/etc/systemd/network" && printf \'{NETWORK}\' > "$1/etc/systemd/network/eth0.network"',
    'chroot "$1" systemctl --quiet enable systemd-networkd systemd-resolved',
    'ln -sf ../run/systemd/resolve/stub-resolv.conf "$1/etc/resolv.conf"',
    'rm -rf "$1"/usr/share/man/* "$1"/usr/share/info/* "$1"/var/log/*.log "$1"/var/log/apt/*'
    ' && find "$1/usr/share/doc" -type f ! -name copyright -delete',
    # Every container makes its own identity at its first boot.
    'rm -rf "$1/etc/hostname" "$1/var/lib/dbus/machine-id" && : > "$1/etc/machine-id"',
    # Empty package lists must look old, or tools that update them "once an hour" find no package. That is
    # why mmdebstrap is told to leave apt's files alone.
    'cd "$1/var/cache/apt" && rm -rf *.bin archives/*.deb && cd "$1/var/lib/apt"'
    " && rm -rf lists/* && mkdir -p lists/partial && touch -d @0 lists",
)

TEMPLATES = {
    "/etc/hostname": ("hostname.tpl", "{{ container.name }}\n"),
    "/etc/hosts": (
        "hosts.tpl",
        "127.0.0.1\tlocalhost\n127.0.1.1\t{{ container.name }}\n\n"
        "::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    ),
}

ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64", "armhf": "armv7l", "riscv64": "riscv64"}


class BuildError(Exception):
    """The image could not be built; str() is the message for the user."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what is in the image."""

    distribution: str
    release: str
    architecture: str
    packages: tuple[str, ...]
    components: tuple[str, ...] = ("main",)
    sources: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        document = {
            "format": RECIPE_FORMAT,
            "hooks": HOOKS,
            "templates": TEMPLATES,
            **dataclasses.asdict(self),
            "packages": sorted(set(self.packages)),
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def command(self) -> list[str]:
        """mmdebstrap, writing a tarball to its standard output."""
        argv = [
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            "--skip=cleanup/apt",
            f"--architectures={self.architecture}",
            f"--components={','.join(self.components)}",
            f"--include={','.join(sorted(set(self.packages)))}",
        ]
        argv += [f"--customize-hook={hook}" for hook in HOOKS]
        # Without sources of the host, mmdebstrap knows the archive of the release and its security suite.
        return [*argv, self.release, "-", *self.sources]

    def metadata(self, alias: str, built: int) -> dict[str, t.Any]:
        """metadata.yaml of the image (JSON is YAML)."""
        return {
            "architecture": ARCHITECTURES.get(self.architecture, self.architecture),
            "creation_date": built,
            "properties": {
                "os": self.distribution,
                "release": self.release,
                "description": f"{alias} of {time.strftime('%Y-%m-%d', time.gmtime(built))}, built here",
                RECIPE_PROPERTY: self.digest,
                BUILT_PROPERTY: str(built),
            },
            "templates": {
                path: {"when": ["create", "copy"], "template": name}
                for path, (name, _unused) in TEMPLATES.items()
            },
        }


def metadata_tarball(recipe: Recipe, alias: str, built: int) -> bytes:
    files = {"metadata.yaml": json.dumps(recipe.metadata(alias, built), indent=1)}
    files |= {f"templates/{name}": text for name, text in TEMPLATES.values()}
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, text in sorted(files.items()):
            data = text.encode()
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), built, 0o644
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


# What is needed


def missing_instances(
    wanted: Iterable[Mapping[str, t.Any]], existing: Iterable[str]
) -> list[Mapping[str, t.Any]]:
    """Declared containers that do not exist. `existing` are the URLs of GET /1.0/instances."""
    there: set[tuple[str, str]] = set()
    for url in existing:
        path, _unused, query = str(url).partition("?")
        project = next((q[8:] for q in query.split("&") if q.startswith("project=")), "default")
        there.add((project, path.rpartition("/")[2]))
    return [
        item
        for item in wanted
        if item.get("type", "container") == "container"
        and (str(item.get("project") or "default"), str(item["name"])) not in there
    ]


def wants_fallback(missing: Iterable[Mapping[str, t.Any]], aliases: list[dict[str, t.Any]]) -> bool:
    """Whether one of the missing containers has an image that no local alias gives."""
    return any(
        not find_alias(candidates(str(item.get("image") or ""), "container"), "container", aliases)
        for item in missing
    )


def is_current(properties: Mapping[str, t.Any], digest: str, max_age: float, now: float) -> tuple[bool, str]:
    """Whether an image (or cache entry) is of this recipe and young enough; else why not."""
    if properties.get(RECIPE_PROPERTY) != digest:
        return False, "it was built from another recipe"
    try:
        age = (now - float(properties.get(BUILT_PROPERTY) or 0)) / DAY
    except ValueError:
        return False, "its age is not known"
    if max_age > 0 and age > max_age:
        return False, f"it is {age:.0f} days old (limit {max_age:g})"
    return True, ""


# Building


def memory_available(meminfo: str = "/proc/meminfo") -> int:
    """MemAvailable in bytes, 0 if not known."""
    with contextlib.suppress(OSError, ValueError), open(meminfo, encoding="ascii") as handle:
        for line in handle:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0


def apt_proxy_environment(run: Callable[..., t.Any] = subprocess.run) -> dict[str, str]:
    """The proxy that the host's apt uses; mmdebstrap reads none of the host's apt configuration."""
    try:
        answer = run(
            ["apt-config", "shell", "H", "Acquire::http::Proxy", "S", "Acquire::https::Proxy"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    found = {}
    for name, value in re.findall(r"^([HS])='([^']*)'$", answer.stdout, re.MULTILINE):
        if value and value != "DIRECT":
            found["http_proxy" if name == "H" else "https_proxy"] = value
    return found


def tools_missing() -> list[str]:
    return [tool for tool in ("mmdebstrap", "zstd") if shutil.which(tool) is None]


def build_rootfs(recipe: Recipe, target: str, *, timeout: float = 900.0) -> None:
    """Run mmdebstrap and compress what it gives (zstd, fast) into the file `target`."""
    missing = tools_missing()
    if missing:
        raise BuildError(
            f"To build an image, {' and '.join(missing)} must be installed (apt install {' '.join(missing)})."
        )
    deadline = time.monotonic() + timeout
    environment = {**os.environ, **apt_proxy_environment(), "LC_ALL": "C.UTF-8"}
    argv = recipe.command()
    scratch = tempfile.mkdtemp(prefix="sottovoce-image-")
    try:
        # mmdebstrap drops root's rights for some steps.
        os.chmod(scratch, 0o711)  # noqa: S103 (nothing can be listed there)
        environment["TMPDIR"] = scratch
        if os.geteuid() == 0 and memory_available() >= TMPFS_MEMORY and _can_mount():
            # dpkg waits for the disk after every file; in memory the build takes a quarter less time.
            # A mount of our own namespace is gone with the process, however that ends.
            script = 'mount -t tmpfs -o mode=0755,size=75% sottovoce-image "$TMPDIR" && exec "$@"'
            argv = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", script, "sh", *argv]
        _pipe(argv, ["zstd", "-1", "-T0", "-q", "-c"], target, environment, deadline)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _can_mount() -> bool:
    probe = ["unshare", "--mount", "--propagation", "private", "--", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(probe, capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def _pipe(first: list[str], second: list[str], target: str, env: Mapping[str, str], deadline: float) -> None:
    with open(target, "wb") as sink, tempfile.TemporaryFile() as log:
        producer = subprocess.Popen(
            first, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=dict(env)
        )
        consumer = subprocess.Popen(second, stdin=producer.stdout, stdout=sink, stderr=log, env=dict(env))
        # Only zstd reads it, so that mmdebstrap notices when zstd ends.
        t.cast(t.IO[bytes], producer.stdout).close()
        try:
            codes = [process.wait(max(deadline - time.monotonic(), 0.1)) for process in (producer, consumer)]
        except subprocess.TimeoutExpired:
            raise BuildError(f"Building the image took too long.{_tail(log)}") from None
        finally:
            for process in (producer, consumer):
                if process.poll() is None:
                    process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(10)
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if any(codes):
            raise BuildError(
                f"mmdebstrap could not build the image (exit status {codes[0] or codes[1]}). Can this machine"
                f" reach its Debian archive (apt-get update)?{_tail(log)}"
            )


def _tail(log: t.BinaryIO, lines: int = 12) -> str:
    log.seek(0)
    text = log.read().decode("utf-8", "replace").splitlines()
    return "".join(f"\n  {line}" for line in text[-lines:])


# The cache: <folder>/<digest>/{rootfs.tar.zst,metadata.tar,properties.json}


def cache_folder(environ: Mapping[str, str] | None = None) -> str:
    env = os.environ if environ is None else environ
    base = env.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "sottovoce", "images")


@dataclasses.dataclass(frozen=True)
class Built:
    """A built image as files."""

    metadata: str
    rootfs: str
    built: int
    from_cache: bool


def read_properties(folder: str) -> dict[str, str]:
    try:
        with open(os.path.join(folder, "properties.json"), encoding="utf-8") as handle:
            document = json.load(handle)
    except (OSError, ValueError):
        return {}
    files = all(os.path.isfile(os.path.join(folder, name)) for name in ("rootfs.tar.zst", "metadata.tar"))
    return document if files and isinstance(document, dict) else {}


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """One builder at a time: the second finds the first one's work in the cache."""
    os.makedirs(folder, mode=0o700, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "w", encoding="ascii") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def obtain(
    recipe: Recipe,
    alias: str,
    *,
    folder: str | None = None,
    max_age: float = 30.0,
    force: bool = False,
    now: Callable[[], float] = time.time,
    build: Callable[[Recipe, str], None] = build_rootfs,
) -> Built:
    """The image as files: from the cache, else built into it (other recipes of that alias go)."""
    root = folder or cache_folder()
    entry = os.path.join(root, recipe.digest)
    with locked(root):
        properties = read_properties(entry)
        current = not force and is_current(properties, recipe.digest, max_age, now())[0]
        if not current:
            fresh = tempfile.mkdtemp(prefix=".new-", dir=root)
            try:
                built = int(now())
                build(recipe, os.path.join(fresh, "rootfs.tar.zst"))
                with open(os.path.join(fresh, "metadata.tar"), "wb") as handle:
                    handle.write(metadata_tarball(recipe, alias, built))
                properties = {RECIPE_PROPERTY: recipe.digest, BUILT_PROPERTY: str(built), "alias": alias}
                with open(os.path.join(fresh, "properties.json"), "w", encoding="utf-8") as text:
                    json.dump(properties, text)
                shutil.rmtree(entry, ignore_errors=True)
                os.rename(fresh, entry)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
            _forget_others(root, entry, alias)
    return Built(
        os.path.join(entry, "metadata.tar"),
        os.path.join(entry, "rootfs.tar.zst"),
        int(properties[BUILT_PROPERTY]),
        current,
    )


def _forget_others(root: str, keep: str, alias: str) -> None:
    """One entry per alias, and nothing of builds that were killed."""
    for name in os.listdir(root):
        path = os.path.join(root, name)
        if path == keep or not os.path.isdir(path):
            continue
        if name.startswith(".new-") or read_properties(path).get("alias") == alias:
            shutil.rmtree(path, ignore_errors=True)


# Importing


class _Chain(io.RawIOBase):
    """Several sources read one after another."""

    def __init__(self, parts: list[t.BinaryIO]) -> None:
        self._parts = parts

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while self._parts:
            block = self._parts[0].read(size)
            if block:
                return block
            self._parts.pop(0)
        return b""


def _fingerprint(paths: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def import_image(client: IncusClient, built: Built, alias: str, *, timeout: float = 300.0) -> str:
    """Import the files (unless the daemon has them) and point the alias at them; gives the fingerprint."""
    fingerprint = _fingerprint((built.metadata, built.rootfs))
    try:
        client.get(f"/1.0/images/{fingerprint}")
    except IncusNotFound:
        boundary = f"sottovoce-{fingerprint[:32]}"
        with open(built.metadata, "rb") as metadata, open(built.rootfs, "rb") as rootfs:
            parts: list[t.BinaryIO] = []
            length = 0
            for name, handle in (("metadata", metadata), ("rootfs", rootfs)):
                head = (
                    f"\r\n--{boundary}\r\n"
                    f'Content-Disposition: form-data; name="{name}"; filename="{name}"\r\n'
                    "Content-Type: application/octet-stream\r\n\r\n"
                ).encode()
                parts += [io.BytesIO(head), handle]
                length += len(head) + os.fstat(handle.fileno()).st_size
            tail = f"\r\n--{boundary}--\r\n".encode()
            parts.append(io.BytesIO(tail))
            response = client.upload(
                "POST",
                "/1.0/images",
                t.cast(t.BinaryIO, _Chain(parts)),
                length=length + len(tail),
                headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
                stall=timeout,
            )
        if response.operation:
            client.wait(response.operation, timeout, what=f"the import of {alias}")
    old = alias_target(client, alias)
    if old is None:
        client.request(
            "POST", "/1.0/images/aliases", body={"name": alias, "type": "container", "target": fingerprint}
        )
    elif old != fingerprint:
        client.request("PUT", f"/1.0/images/aliases/{quote(alias, safe='')}", body={"target": fingerprint})
        _drop_replaced(client, old)
    return fingerprint


def alias_target(client: IncusClient, alias: str) -> str | None:
    try:
        answer = client.get(f"/1.0/images/aliases/{quote(alias, safe='')}").metadata
    except IncusNotFound:
        return None
    return str(answer["target"])


def _drop_replaced(client: IncusClient, fingerprint: str) -> None:
    """The image the alias pointed at before, if it was built here and has no other name."""
    try:
        image = client.get(f"/1.0/images/{fingerprint}").metadata
        if RECIPE_PROPERTY in (image.get("properties") or {}) and not image.get("aliases"):
            client.run("DELETE", f"/1.0/images/{fingerprint}")
    except IncusError:
        # It costs space only, and the new image is in place.
        return


def host_architecture() -> str:
    """Of this machine, as Debian calls it."""
    try:
        answer = subprocess.run(
            ["dpkg", "--print-architecture"], capture_output=True, text=True, timeout=10, check=True
        )
        return answer.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return MACHINES.get(platform.machine(), platform.machine())


@dataclasses.dataclass(frozen=True)
class Look:
    """
    Whether an image must be built: then recipe says of what.

    result: what a module returns of it; target: fingerprint of the image there is, or nothing; before: what
    that image was made of.
    """

    result: dict[str, t.Any]
    recipe: Recipe | None = None
    target: str | None = None
    before: dict[str, t.Any] = dataclasses.field(default_factory=dict)


def look(client: IncusClient, params: Mapping[str, t.Any], *, force: bool = False) -> Look:
    """Ask Incus, and the image server if it matters. params: as LOOK_SPEC says."""
    alias = params["alias"]
    aliases = client.get("/1.0/images/aliases", query={"recursion": 1}).metadata or []
    target = next((str(a["target"]) for a in aliases if a["name"] == alias), None)
    result: dict[str, t.Any] = {
        "changed": False,
        "would_change": False,
        "tools_missing": tools_missing(),
        "needed": True,
        "image": alias if target else "",
        "socket": "" if client.endpoint.url else client.endpoint.path,
    }
    if target:
        result["fingerprint"] = target

    if params["needed_by"] is not None and not force:
        existing = client.get("/1.0/instances", query={"all-projects": True}).metadata or []
        missing = missing_instances(params["needed_by"], existing)
        if not wants_fallback(missing, aliases):
            why = "images of all new containers are local" if missing else "all containers exist"
            return Look({**result, "needed": False, "reason": why})

    recipe = Recipe(
        distribution=params["distribution"],
        release=params["release"],
        architecture=params["architecture"] or host_architecture(),
        packages=tuple(params["packages"]),
        components=tuple(params["components"]),
        sources=tuple(image_sources(read_sources(), params["release"], params["components"])),
    )
    why, before = f"there is no image {alias}", {}
    if target:
        properties = client.get(f"/1.0/images/{target}").metadata.get("properties") or {}
        before = {"alias": alias, **{k: v for k, v in properties.items() if k.startswith("sottovoce.")}}
        current, why = is_current(properties, recipe.digest, params["max_age"], time.time())
        if RECIPE_PROPERTY not in properties and not force:
            # Somebody's own image under that name: it is theirs to refresh.
            reason = f"{alias} is not an image of this module; it is used as it is"
            return Look({**result, "reason": reason}, target=target)
        if current and not force:
            return Look({**result, "reason": "the image is current"}, target=target)
    if force:
        why = "force is set"
    elif params["image_server"]:
        unreachable = probe_server(params["image_server"])
        if not unreachable:
            return Look({**result, "needed": False, "reason": f"{params['image_server']} answers"})
        why += f", and {params['image_server']} does not answer ({unreachable})"
    return Look({**result, "would_change": True, "reason": why}, recipe, target, before)

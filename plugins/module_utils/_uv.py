# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Python environments made by uv from a lock file, redone only when something they are made of changes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

RECORD_NAME = ".sottovoce-uv.json"
RECORD_FORMAT = 1
# Left by editors, tests and builds: not what a package is made of.
IGNORED_FOLDERS = frozenset({"__pycache__", ".git", ".venv", ".pytest_cache", ".mypy_cache", ".ruff_cache"})
IGNORED_AT_THE_TOP = frozenset({"build", "dist"})


class UvError(Exception):
    """A message for the user; ``output`` holds what uv printed."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Inputs:
    """Everything an environment is made of; two equal Inputs give the same environment."""

    python: str
    requirements: str
    build_constraints: str | None = None
    sources: dict[str, str] = field(default_factory=dict)
    compile_bytecode: bool = True
    format: int = RECORD_FORMAT

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Record:
    """What the last finished installation wrote into the environment."""

    digest: str
    packages: list[str]
    python: str = ""  # as it was asked for
    version: str = ""  # of that interpreter

    @classmethod
    def load(cls, path: str) -> Record | None:
        """None when there is no finished installation; a damaged record counts as none."""
        try:
            with open(os.path.join(path, RECORD_NAME), encoding="utf-8") as stream:
                data = json.load(stream)
            return cls(
                digest=str(data["digest"]),
                packages=[str(item) for item in data["packages"]],
                python=str(data["python"]),
                version=str(data.get("version", "")),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, path: str) -> None:
        name = os.path.join(path, RECORD_NAME)
        with open(name + ".new", "w", encoding="utf-8") as stream:
            json.dump(asdict(self), stream, indent=1, sort_keys=True)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name + ".new", name)


@dataclass(frozen=True)
class Plan:
    """What a run has to do: nothing, install into the environment there is, or make it anew."""

    action: str  # "none" | "update" | "create"
    reason: str

    @property
    def changed(self) -> bool:
        return self.action != "none"


def locked_packages(lock: str) -> list[str]:
    """The requirements of a lock without hashes and comments, sorted: ``name==version ; marker``."""
    packages = []
    for line in lock.splitlines():
        if not line.strip() or line.lstrip().startswith(("#", "--")):
            continue
        requirement = re.split(r"\s+(?:--hash=|#|\\$)", line.rstrip())[0]
        packages.append(re.sub(r"\s*;\s*", " ; ", requirement))
    return sorted(packages, key=str.lower)


def unhashed_packages(lock: str) -> list[str]:
    """Requirements that come without a hash (uv would refuse them later, with less to say)."""
    joined = re.sub(r"\\\r?\n", " ", lock)
    return [
        line.split()[0]
        for line in joined.splitlines()
        if line.strip() and not line.lstrip().startswith(("#", "-")) and "--hash=" not in line
    ]


def file_digest(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def source_digest(path: str) -> str:
    """Digest of a wheel, an sdist or a folder: names and contents, not times and owners."""
    if not os.path.isdir(path):
        return file_digest(path)
    digest = hashlib.sha256()
    for folder, folders, files in os.walk(path):
        ignored = IGNORED_FOLDERS | IGNORED_AT_THE_TOP if folder == path else IGNORED_FOLDERS
        folders[:] = sorted(
            name for name in folders if name not in ignored and not name.endswith(".egg-info")
        )
        for name in sorted(files):
            full = os.path.join(folder, name)
            if name.endswith(".pyc") or not os.path.isfile(full):
                continue
            name = os.path.relpath(full, path)
            digest.update(f"{name}\0{file_digest(full)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def make_plan(
    *,
    exists: bool,
    is_environment: bool,
    interpreter_works: bool,
    record: Record | None,
    wanted: str,
    python: str,
) -> Plan:
    """Decide from facts alone. A folder that no one knows as an environment is never taken over."""
    if not exists:
        return Plan("create", "the environment is not there yet")
    if not is_environment:
        raise UvError("the folder exists, is not empty and is no Python environment; nothing was touched")
    if record is None:
        return Plan("create", "an earlier installation did not finish")
    if not interpreter_works:
        return Plan("create", "the interpreter it was made with is gone")
    if record.python != python:
        return Plan("create", f"it is made with {record.python or 'another Python'} and not with {python}")
    if record.digest == wanted:
        return Plan("none", "everything is in place")
    return Plan("update", "what it is made of has changed")


UNREACHABLE = (
    "the Python package index cannot be reached from this machine; check its network, DNS and proxy "
    "(HTTPS_PROXY), or name a mirror in 'index_url'"
)
WORTH_ANOTHER_TRY = 15.0  # seconds

_CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"invalid peer certificate|UnknownIssuer|certificate verify failed|self.signed certificate",
        "the certificate of the package index is not trusted here; put the CA certificate of your network "
        "into /usr/local/share/ca-certificates and run update-ca-certificates (base_system does both)",
    ),
    (
        r"[Hh]ash mismatch",
        "a downloaded package is not the one the lock file was made with; the index (or a proxy) gave "
        "something else and nothing of it was installed",
    ),
    (r"No space left on device|Disk quota exceeded", "the disk is full"),
    (
        r"No interpreter found|No download found|[Pp]ython downloads are"
        r"|Failed to (?:download|install).{0,40}[Cc]"
        r"[Pp]ython|python-build-standalone|request for .?[Pp]ython",
        "there is no such Python on this machine and none could be downloaded (uv fetches its builds from "
        "GitHub); make the machine from an image that has it (os_image: Debian 12 has 3.11, Ubuntu 24.04 has "
        "3.12, Debian 13 has 3.13), name a mirror (python-install-mirror in its /etc/uv/uv.toml), or give "
        "the path of an interpreter in 'python'",
    ),
    (
        r"401 Unauthorized|403 Forbidden|407 Proxy",
        "the package index refused the request; check its credentials and the proxy settings",
    ),
    (
        r"dns error|tcp connect error|Connection refused|Network is unreachable|No route to host|timed? ?out"
        r"|error sending request|Failed to fetch|client error \(Connect\)|Request failed after",
        UNREACHABLE,
    ),
    (
        r"not found in the package registry|because .{1,200} was not found|no version of"
        r"|no wheels? with a matching|unsatisfiable",
        "the package index does not have what the lock file asks for on this platform",
    ),
)


def explain(output: str) -> str:
    """One sentence for the user from what uv printed."""
    flat = re.sub(r"\s+", " ", output)
    for pattern, message in _CAUSES:
        if re.search(pattern, flat):
            return message
    return "uv failed"


Runner = Callable[[Sequence[str], dict[str, str], float], "subprocess.CompletedProcess[str]"]


def run_command(
    argv: Sequence[str], environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            list(argv),
            env=environment,
            timeout=timeout,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UvError(f"{' '.join(argv[:3])} did not finish in {timeout:.0f} s and was stopped") from error
    except OSError as error:
        raise UvError(f"{argv[0]} cannot be run: {error.strerror}") from error


@dataclass(frozen=True)
class Settings:
    """How to install; nothing here changes what the environment is made of."""

    uv: str
    path: str
    requirements: str
    python: str
    lock: str | None = None  # text of requirements, which is written with it
    build_constraints: str | None = None
    sources: tuple[str, ...] = ()
    compile_bytecode: bool = True
    build_isolation: bool = True
    cache_dir: str | None = None
    link_mode: str | None = None
    index_url: str | None = None
    python_install_dir: str | None = None
    python_downloads: bool = True
    system_certs: bool = True
    http_timeout: int = 30
    http_retries: int = 1
    timeout: int = 1800


def uv_environ(settings: Settings, base: dict[str, str]) -> dict[str, str]:
    """The environment uv runs in: the caller's, with what the options say on top."""
    environ = {
        **base,
        "UV_NO_PROGRESS": "1",
        "UV_PYTHON_PREFERENCE": "system",
        "UV_PYTHON_DOWNLOADS": "automatic" if settings.python_downloads else "never",
        "UV_SYSTEM_CERTS": "true" if settings.system_certs else "false",
        "UV_HTTP_TIMEOUT": str(settings.http_timeout),
        "UV_HTTP_CONNECT_TIMEOUT": str(min(settings.http_timeout, 2)),
        "UV_HTTP_RETRIES": str(settings.http_retries),
    }
    environ.pop("VIRTUAL_ENV", None)
    environ.pop("PYTHONPATH", None)
    if settings.cache_dir:
        environ["UV_CACHE_DIR"] = settings.cache_dir
    if settings.link_mode:
        environ["UV_LINK_MODE"] = settings.link_mode
    if settings.index_url:
        environ["UV_DEFAULT_INDEX"] = settings.index_url
    if settings.python_install_dir:
        environ["UV_PYTHON_INSTALL_DIR"] = settings.python_install_dir
    return environ


def uv_commands(settings: Settings, action: str) -> list[list[str]]:
    """The command lines of one run, in order."""
    interpreter = os.path.join(settings.path, "bin", "python")
    commands: list[list[str]] = []
    if action == "create":
        commands.append(
            [settings.uv, "venv", "--clear", "--no-project", "--python", settings.python, settings.path]
        )
    sync = [
        settings.uv,
        "pip",
        "sync",
        "--python",
        interpreter,
        "--require-hashes",
        "--allow-empty-requirements",
    ]
    if settings.build_constraints:
        sync += ["--build-constraints", settings.build_constraints]
    if settings.compile_bytecode:
        sync.append("--compile-bytecode")
    commands.append([*sync, settings.requirements])
    if settings.sources:
        install = [settings.uv, "pip", "install", "--python", interpreter, "--no-deps", "--reinstall"]
        if not settings.build_isolation:
            install.append("--no-build-isolation")
        if settings.compile_bytecode:
            install.append("--compile-bytecode")
        commands.append([*install, *settings.sources])
    return commands


def read_inputs(settings: Settings) -> tuple[Inputs, str]:
    """The Inputs of these settings, and the text of the lock."""
    try:
        lock = settings.lock
        if lock is None:
            with open(settings.requirements, encoding="utf-8") as stream:
                lock = stream.read()
        constraints = file_digest(settings.build_constraints) if settings.build_constraints else None
        sources = {source: source_digest(source) for source in settings.sources}
    except OSError as error:
        raise UvError(f"{error.filename}: {error.strerror}") from error
    bare = unhashed_packages(lock)
    if bare:
        raise UvError(
            f"{settings.requirements}: without a hash: {', '.join(bare[:5])}; lock with --generate-hashes"
        )
    inputs = Inputs(
        python=settings.python,
        requirements=hashlib.sha256(lock.encode()).hexdigest(),
        build_constraints=constraints,
        sources=sources,
        compile_bytecode=settings.compile_bytecode,
    )
    return inputs, lock


def look(path: str, wanted: str, python: str) -> tuple[Plan, Record | None]:
    """Read what is there and decide."""
    exists = os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path))
    record = Record.load(path)
    try:
        plan = make_plan(
            exists=exists,
            is_environment=record is not None or os.path.isfile(os.path.join(path, "pyvenv.cfg")),
            interpreter_works=os.access(os.path.join(path, "bin", "python"), os.X_OK),
            record=record,
            wanted=wanted,
            python=python,
        )
    except UvError as error:
        raise UvError(f"{path}: {error}") from error
    return plan, record


def run_step(
    settings: Settings, argv: list[str], environ: dict[str, str], runner: Runner, clock: Callable[[], float]
) -> None:
    """A connection that breaks in the middle of long downloads is worth another try: what has come stays
    in the cache. One that fails at once is not: the user should hear of it within seconds."""
    for remaining in (2, 1, 0):
        started = clock()
        done = runner(argv, environ, settings.timeout)
        if done.returncode == 0:
            return
        output = (done.stderr or "") + (done.stdout or "")
        cause = explain(output)
        if done.returncode < 0:
            cause = f"uv was ended by signal {-done.returncode}; the next run starts anew"
        if remaining == 0 or cause != UNREACHABLE or clock() - started < WORTH_ANOTHER_TRY:
            raise UvError(f"{settings.path}: {cause}", output.strip())


def apply(
    settings: Settings,
    plan: Plan,
    record: Record,
    runner: Runner = run_command,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Make the environment. The record goes first and comes back last, so that a broken run shows."""
    environ = uv_environ(settings, dict(os.environ))
    previous = os.path.join(settings.path, RECORD_NAME)
    if os.path.exists(previous):
        os.unlink(previous)
    if settings.lock is not None:
        os.makedirs(os.path.dirname(settings.requirements), mode=0o755, exist_ok=True)
        with open(settings.requirements, "w", encoding="utf-8") as stream:
            stream.write(settings.lock)
    if plan.action == "create":
        os.makedirs(os.path.dirname(settings.path), mode=0o755, exist_ok=True)
    for argv in uv_commands(settings, plan.action):
        run_step(settings, argv, environ, runner, clock)
    interpreter = os.path.join(settings.path, "bin", "python")
    version = runner([interpreter, "-c", "import platform; print(platform.python_version())"], environ, 60)
    if version.returncode != 0:
        raise UvError(f"{settings.path}: its interpreter does not run", (version.stderr or "").strip())
    replace(record, python=settings.python, version=version.stdout.strip()).save(settings.path)


def result(settings: Settings, plan: Plan, before: Record | None, packages: list[str]) -> dict[str, Any]:
    """What the module returns; the diff is the list of packages before and after."""

    def text(items: Sequence[str]) -> str:
        return "".join(f"{item}\n" for item in items)

    return {
        "changed": plan.changed,
        "action": plan.action,
        "reason": plan.reason,
        "path": settings.path,
        "diff": {
            "before_header": settings.path,
            "after_header": settings.path,
            "before": text(before.packages if before else []),
            "after": text(packages),
        },
    }

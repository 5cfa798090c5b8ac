# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""
Where the program Ollama comes from: a local archive, the release archive, or its Go module.

Runs on the controller.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible.module_utils import urls
from ansible_collections.sottovoce.stack.plugins.module_utils._deadline import NoAnswer, within

MODULE = "github.com/ollama/ollama"
ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
SOURCES = ("auto", "archive", "release", "go")
# The first version of Go that fetches the one a module asks for.
GO_SWITCHES = (1, 21)
GO_NEEDED = (1, 26)
REPORT_EVERY = 10.0

Say = Callable[[str], None]


class SourceError(Exception):
    """This source cannot be used; the text says why and what to do."""


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    version: str
    arch: str
    source: str = "auto"
    archive: str = ""
    archive_sha256: str = ""
    release_url: str = ""
    pins: Mapping[str, str] = field(default_factory=dict)
    go: str = ""
    cache: str = ""
    reach_timeout: float = 5.0
    timeout: float = 3600.0
    check: bool = False


@dataclass
class Found:
    """A source that works: the file on the controller and the name of the release it makes."""

    kind: str
    release: str
    src: str
    fetched: bool = False
    seconds: float = 0.0


def cache_folder(cache: str, environ: Mapping[str, str] | None = None) -> Path:
    if cache:
        return Path(cache).expanduser()
    environ = os.environ if environ is None else environ
    base = environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "sottovoce" / "ollama"


def release_name(version: str, kind: str, sha256: str, pinned: str) -> str:
    """Name of the folder under /opt/ollama/releases; says what is in it, so that one look at it is enough."""
    if kind == "go":
        return f"{version}-go"
    return version if sha256 == pinned else f"{version}-{sha256[:8]}"


def accepted(installed: str, request: Request) -> bool:
    """Whether what is installed is what is asked for; with `auto` whatever source it came from will do."""
    pinned = request.pins.get(request.arch, "")
    sha256 = request.archive_sha256 or pinned
    if request.source == "go":
        return installed == release_name(request.version, "go", "", "")
    if request.source in ("archive", "release") or request.archive:
        return bool(sha256) and installed == release_name(request.version, "release", sha256, pinned)
    if request.archive_sha256 and installed == release_name(request.version, "release", sha256, pinned):
        return True
    return installed in (request.version, release_name(request.version, "go", "", ""))


def wanted_sources(request: Request) -> list[str]:
    if request.source != "auto":
        return [request.source]
    return (["archive"] if request.archive else []) + ["release", "go"]


def find(request: Request, say: Say) -> tuple[Found | None, list[dict[str, str]]]:
    """The first source that works, and why those before it did not."""
    names = {
        "archive": "Ollama from the local archive",
        "release": "Ollama's release archive",
        "go": "Ollama from its Go module",
    }
    tried = {"archive": from_archive, "release": from_release, "go": from_go}
    skipped: list[dict[str, str]] = []
    for source in wanted_sources(request):
        start = time.monotonic()
        try:
            found = tried[source](request, say)
        except SourceError as error:
            skipped.append({"what": names[source], "why": str(error)})
            continue
        found.seconds = round(time.monotonic() - start, 1)
        return found, skipped
    return None, skipped


# --- archives --------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expected_sha256(request: Request) -> str:
    expected = request.archive_sha256.removeprefix("sha256:").lower() or request.pins.get(request.arch, "")
    if not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise SourceError(
            f"no SHA-256 is known for Ollama {request.version} on {request.arch}: "
            "set ollama_archive_sha256 to the line of that archive in the release's sha256sum.txt"
        )
    return expected


def from_archive(request: Request, say: Say) -> Found:
    if not request.archive:
        raise SourceError("ollama_archive is not set: give the path of the archive on the controller")
    path = Path(request.archive).expanduser()
    if not path.is_file():
        raise SourceError(f"ollama_archive: {path} is no file on the controller")
    expected = expected_sha256(request)
    actual = sha256_of(path)
    if actual != expected:
        raise SourceError(
            f"ollama_archive: {path} has the SHA-256 {actual}, expected is {expected}; "
            "if it is what you want, set ollama_archive_sha256"
        )
    name = release_name(request.version, "archive", actual, request.pins.get(request.arch, ""))
    return Found("archive", name, str(path))


def archive_url(request: Request) -> str:
    return f"{request.release_url.rstrip('/')}/v{request.version}/ollama-linux-{request.arch}.tar.zst"


def open_url(url: str, timeout: float, method: str = "GET") -> Any:
    """An answer within the time limit, name lookup and redirections included."""
    if not url.startswith(("https://", "http://")):
        raise SourceError(f"{url} is no http(s) URL")
    host = urllib.parse.urlsplit(url).netloc
    try:
        return within(timeout, lambda: urls.open_url(url, method=method, timeout=timeout))
    except NoAnswer:
        raise SourceError(f"{host} has not answered for {timeout:g} s") from None
    except urllib.error.HTTPError as error:
        raise SourceError(f"{url} answers {error.code} {error.reason}") from error
    except (OSError, ValueError, urls.ConnectionError) as error:
        raise SourceError(f"{host} cannot be reached: {getattr(error, 'reason', error)}") from error


def from_release(request: Request, say: Say) -> Found:
    expected = expected_sha256(request)
    name = release_name(request.version, "release", expected, request.pins.get(request.arch, ""))
    folder = cache_folder(request.cache) / f"{request.version}-{request.arch}"
    target = folder / f"ollama-linux-{request.arch}.tar.zst"
    if target.is_file() and sha256_of(target) == expected:
        return Found("release", name, str(target))
    url = archive_url(request)
    if request.check:
        open_url(url, request.reach_timeout, "HEAD").close()
        return Found("release", name, str(target), fetched=True)
    with locked(folder, request.timeout):
        if not (target.is_file() and sha256_of(target) == expected):
            download(url, target, expected, request, say)
    return Found("release", name, str(target), fetched=True)


def download(url: str, target: Path, expected: str, request: Request, say: Say) -> None:
    deadline = time.monotonic() + request.timeout
    partial = target.with_suffix(".part")
    digest = hashlib.sha256()
    with contextlib.closing(open_url(url, request.reach_timeout)) as answer:
        total = int(answer.headers.get("Content-Length") or 0)
        reported, done = time.monotonic(), 0
        say(f"fetching {url}" + (f" ({total >> 20} MiB)" if total else ""))
        try:
            with partial.open("wb") as file:
                while block := answer.read(1 << 20):
                    digest.update(block)
                    file.write(block)
                    done += len(block)
                    if time.monotonic() - reported >= REPORT_EVERY:
                        reported = time.monotonic()
                        say(f"{done >> 20} of {total >> 20} MiB")
                    if time.monotonic() > deadline:
                        raise SourceError(f"{url} was not finished after {request.timeout:g} s")
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise SourceError(f"{url}: the download broke off after {done >> 20} MiB: {error}") from error
        except SourceError:
            partial.unlink(missing_ok=True)
            raise
    actual = digest.hexdigest()
    if actual != expected:
        partial.unlink(missing_ok=True)
        raise SourceError(f"{url} has the SHA-256 {actual}, expected is {expected}; nothing of it was used")
    partial.replace(target)


@contextlib.contextmanager
def locked(folder: Path, timeout: float) -> Iterator[None]:
    """One at a time per folder: hosts are provisioned in parallel and share what one of them fetches."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    with (folder / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SourceError(f"{folder} is in use by another run for {timeout:g} s") from None
                time.sleep(0.2)
        yield


# --- the Go module ---------------------------------------------------------------------------------------


def go_version(text: str) -> tuple[int, int]:
    match = re.search(r"\bgo(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def find_go(asked: str) -> tuple[str, tuple[int, int]]:
    places = [asked] if asked else ["go", "/usr/local/go/bin/go", "/usr/lib/go/bin/go"]
    for place in places:
        path = shutil.which(str(Path(place).expanduser()) if "/" in place else place)
        if path:
            break
    else:
        raise SourceError(
            f"no Go toolchain on the controller (looked for {', '.join(places)}): "
            f"install Go {GO_NEEDED[0]}.{GO_NEEDED[1]} or newer, or set ollama_go to its path"
        )
    try:
        # Outside of any module, so that nothing is switched yet.
        output = subprocess.run(
            [path, "version"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            cwd="/",
            env={**os.environ, "GOTOOLCHAIN": "local"},
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise SourceError(f"{path} does not run: {error}") from error
    version = go_version(output)
    if version < GO_SWITCHES:
        raise SourceError(
            f"{path} is Go {version[0]}.{version[1]}; {GO_NEEDED[0]}.{GO_NEEDED[1]} is needed "
            f"(one from {GO_SWITCHES[0]}.{GO_SWITCHES[1]} on fetches it by itself)"
        )
    return path, version


def go_environment(version: tuple[int, int], arch: str) -> dict[str, str]:
    environ = dict(os.environ)
    # Settings of a user's own projects must not reach this build.
    for name in ("GOFLAGS", "GOWORK", "GOOS", "GOARCH", "GOEXPERIMENT"):
        environ.pop(name, None)
    environ |= {"GO111MODULE": "on", "GOWORK": "off", "GOFLAGS": "", "CGO_ENABLED": "1"}
    environ |= {"GOOS": "linux", "GOARCH": arch}
    if version < GO_NEEDED:
        environ["GOTOOLCHAIN"] = "auto"
    return environ


def from_go(request: Request, say: Say) -> Found:
    name = release_name(request.version, "go", "", "")
    folder = cache_folder(request.cache) / f"{request.version}-{request.arch}"
    target = folder / "ollama"
    pin = request.pins.get("go", "")
    if not pin.startswith("h1:"):
        raise SourceError(f"no checksum of the Go module is known for version {request.version}")
    if is_built(target, pin):
        return Found("go", name, str(target))
    machine = ARCHITECTURES.get(platform.machine(), platform.machine())
    if machine != request.arch:
        raise SourceError(f"the controller is {machine}, the instance {request.arch}: no building across")
    go, version = find_go(request.go)
    compiler = os.environ.get("CC", "gcc")
    if not shutil.which(compiler.split()[0]):
        raise SourceError(f"building Ollama needs a C compiler on the controller; {compiler} was not found")
    environ = go_environment(version, request.arch)
    # A few bytes that tell whether the proxy answers; Go keeps them for offline use.
    ask = [go, "list", "-m", f"{MODULE}@v{request.version}"]
    run_go(ask, environ, request.reach_timeout, "the Go module proxy")
    if request.check:
        return Found("go", name, str(target), fetched=True)
    with locked(folder, request.timeout):
        if not is_built(target, pin):
            build(go, environ, target, pin, request, say)
    return Found("go", name, str(target), fetched=True)


def record_of(target: Path) -> Path:
    return target.with_suffix(".json")


def is_built(target: Path, pin: str) -> bool:
    """Whether an earlier build of this very module is in the cache, unchanged."""
    try:
        record = json.loads(record_of(target).read_text("utf-8"))
        return bool(record["module"] == pin and record["sha256"] == sha256_of(target))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_go(argv: list[str], environ: Mapping[str, str], timeout: float, what: str) -> str:
    with tempfile.TemporaryDirectory(prefix="sottovoce-go-") as empty:
        try:
            done = subprocess.run(
                argv,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
                cwd=empty,
                env=dict(environ),
            )
        except subprocess.TimeoutExpired as error:
            raise SourceError(f"{what} has not answered for {timeout:g} s") from error
        except OSError as error:
            raise SourceError(f"{argv[0]} does not run: {error}") from error
    if done.returncode != 0:
        message = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise SourceError(f"{what} cannot be used: {message[-1].strip() if message else done.returncode}")
    return done.stdout


def build(go: str, environ: Mapping[str, str], target: Path, pin: str, request: Request, say: Say) -> None:
    """
    Build in the module's own folder: its go.sum is part of what the pinned checksum covers, so that every
    dependency is pinned too.
    """
    start = time.monotonic()
    say(f"building Ollama {request.version} from its Go module (one to five minutes on two cores)")
    fetch = [go, "mod", "download", "-json", f"{MODULE}@v{request.version}"]
    module = json.loads(run_go(fetch, environ, request.timeout, "the Go module"))
    if module.get("Sum") != pin:
        raise SourceError(f"the Go module has the checksum {module.get('Sum')}, expected is {pin}")
    # Also fetches the dependencies; their number is what the progress is measured against.
    list_all = [go, "list", "-C", module["Dir"], "-deps", "."]
    listing = run_go(list_all, environ, request.timeout, "a dependency")
    partial = target.with_suffix(".part")
    argv = [
        go, "build", "-C", module["Dir"], "-v", "-trimpath", "-buildvcs=false", "-mod=readonly",
        "-ldflags", f"-s -w -X={MODULE}/version.Version={request.version}", "-o", str(partial), ".",
    ]  # fmt: skip
    watch(argv, environ, start + request.timeout, len(listing.split()), say)
    partial.chmod(0o755)
    partial.replace(target)
    record = {"module": pin, "sha256": sha256_of(target), "seconds": round(time.monotonic() - start, 1)}
    record_of(target).write_text(json.dumps(record) + "\n", "utf-8")


def watch(argv: list[str], environ: Mapping[str, str], deadline: float, total: int, say: Say) -> None:
    """Run a build and tell how many packages are done; past the deadline it and its children are ended."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    last: list[str] = []
    packages, reported = 0, time.monotonic()
    try:
        process = subprocess.Popen(
            argv,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(environ),
            start_new_session=True,
        )
    except OSError as error:
        raise SourceError(f"{argv[0]} does not run: {error}") from error

    def read() -> None:
        for line in process.stderr or ():
            lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            if time.monotonic() > deadline:
                raise SourceError("the build was not finished in time: raise ollama_fetch_timeout")
            with contextlib.suppress(queue.Empty):
                line = lines.get(timeout=1)
                if line is None:
                    break
                packages += not line.startswith("go: ")
                last = [*last[-4:], line]
            if time.monotonic() - reported >= REPORT_EVERY:
                reported = time.monotonic()
                say(f"{packages} of at most {total} packages compiled")
        if process.wait(timeout=30) != 0:
            raise SourceError(f"the build failed: {' / '.join(last)}")
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

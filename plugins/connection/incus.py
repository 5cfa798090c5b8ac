# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: incus
short_description: Run tasks in Incus instances through the REST API
description:
  - Runs commands and transfers files in Incus containers and virtual machines over the daemon's own API,
    with nothing but the Python standard library. No C(incus) command is needed on the controller.
  - Modules are always pipelined, whatever C(ansible.cfg) says, so a task costs one command in the instance.
  - A command that is interrupted (Ctrl-C, a task's C(timeout), O(exec_timeout)) is killed in the
    instance together with everything it started.
author:
  - The sottovoce.stack contributors (@sottovoce)
version_added: 0.1.0
notes:
  - The user who runs Ansible needs access to the daemon's socket (group C(incus-admin), or root).
  - C(ansible_host) does not choose the instance, as it often holds an IP address.
options:
  instance:
    description:
      - Name of the instance, if it is not the host's name in the inventory.
    type: str
    vars:
      - name: ansible_incus_instance
  remote_addr:
    description:
      - Name of the instance when O(instance) is not given. It is taken as it is and never cut at a dot.
    type: str
    default: inventory_hostname
    vars:
      - name: inventory_hostname
  delegated_short_name:
    description:
      - Under C(delegate_to) Ansible leaves C(inventory_hostname) as it was. By this it is found out.
    type: str
    vars:
      - name: inventory_hostname_short
  delegated_addr:
    description:
      - The name that C(delegate_to) gave. Looked at under C(delegate_to) only.
    type: str
    vars:
      - name: ansible_host
  project:
    description:
      - Project of the instance.
    type: str
    default: default
    vars:
      - name: ansible_incus_project
  socket:
    description:
      - Path of the daemon's unix socket.
      - Without it, E(INCUS_SOCKET), then V(unix.socket) in E(INCUS_DIR), then
        V(/var/lib/incus/unix.socket) or V(/run/incus/unix.socket) is taken, as the C(incus) command does.
    type: path
    vars:
      - name: ansible_incus_socket
  remote_url:
    description:
      - Address of a remote server, such as V(https://gpu-host:8443). Then O(socket) is not used.
    type: str
    vars:
      - name: ansible_incus_url
  client_cert:
    description:
      - Client certificate (PEM file) that the remote server trusts.
      - Without it, V(client.crt) and V(client.key) in E(INCUS_CONF) or V(~/.config/incus) are taken if
        they exist.
    type: path
    vars:
      - name: ansible_incus_client_cert
  client_key:
    description:
      - Key (PEM file) of O(client_cert).
    type: path
    vars:
      - name: ansible_incus_client_key
  server_cert:
    description:
      - The remote server's certificate, as a PEM file or as its SHA-256 fingerprint; no other is accepted.
      - Without it, the certificate must be valid for the system's certificate authorities.
    type: str
    vars:
      - name: ansible_incus_server_cert
  remote_user:
    description:
      - User in the instance. A name is switched to with C(su); a number (V(1000), or V(1000:1000) with
        a group) is handed to Incus and needs no entry in the instance's user database.
    type: str
    default: root
    vars:
      - name: ansible_user
      - name: ansible_incus_user
    env:
      - name: ANSIBLE_REMOTE_USER
    ini:
      - section: defaults
        key: remote_user
    keyword:
      - name: remote_user
  executable:
    description:
      - Shell in the instance that runs the commands.
    type: str
    default: /bin/sh
    vars:
      - name: ansible_executable
      - name: ansible_incus_executable
    env:
      - name: ANSIBLE_EXECUTABLE
    ini:
      - section: defaults
        key: executable
  timeout:
    description:
      - Seconds that an answer of the daemon, or the prompt of a become method, may take.
    type: int
    default: 10
    vars:
      - name: ansible_timeout
      - name: ansible_incus_timeout
    env:
      - name: ANSIBLE_TIMEOUT
    ini:
      - section: defaults
        key: timeout
  exec_timeout:
    description:
      - Seconds that a whole command may take; V(0) sets no limit.
      - File transfers have no limit as a whole; one that stands still for two minutes fails.
    type: int
    default: 0
    vars:
      - name: ansible_incus_exec_timeout
  pipelining:
    description:
      - Send modules over standard input instead of copying them first. Only to be switched off
        to look into a problem.
      - This connection does not follow the general pipelining setting, as it has no reason to be off.
    type: bool
    default: true
    vars:
      - name: ansible_incus_pipelining
"""

EXAMPLES = r"""
# inventory: the instance "gpu-server" in the project "ai-tools"
# all:
#   hosts:
#     gpu.home.arpa:
#       ansible_connection: sottovoce.stack.incus
#       ansible_incus_instance: gpu-server
#       ansible_incus_project: ai-tools

- name: Look at a machine that is not in the inventory
  hosts: gpu-server
  connection: sottovoce.stack.incus
  vars:
    ansible_incus_project: ai-tools
  tasks:
    - name: Ask for the kernel's name
      ansible.builtin.command: uname -r
      changed_when: false
"""

import contextlib
import os
import re
import shlex
import signal
import stat
import threading
import typing as t
from collections.abc import Callable, Iterator
from urllib.parse import quote

from ansible.errors import (
    AnsibleAuthenticationFailure,
    AnsibleConnectionFailure,
    AnsibleError,
    AnsibleFileNotFound,
)
from ansible.plugins.connection import ConnectionBase
from ansible.utils.display import Display
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    Endpoint,
    IncusClient,
    IncusError,
    IncusForbidden,
    IncusNotFound,
    IncusTimeout,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_websocket import (
    CommandResult,
    Gate,
    Interrupted,
    run_command,
)

display = Display()

# Seconds without a single byte after which a file transfer is given up.
_STALL = 120.0
_NUMBERS = re.compile(r"(\d+)(?::(\d+))?")
# How su (util-linux, busybox, shadow) complains; commands run with LANG=C.UTF-8.
_NO_USER = re.compile(rb"^su: .*(does not exist|unknown user|no passwd entry|must be run)", re.MULTILINE)
_STATES = {
    "Stopped": "is stopped. Start it: incus start {name}{project}",
    "Frozen": "is frozen (paused). Resume it: incus resume {name}{project}",
    "Freezing": "is being frozen (paused). Resume it: incus resume {name}{project}",
    "Starting": "is starting. Try again in a moment (ansible.builtin.wait_for_connection does)",
    "Stopping": "is stopping or restarting. Try again in a moment (ansible.builtin.wait_for_connection"
    " does), or start it: incus start {name}{project}",
    "Aborting": "is stopping after a failure. Look at: incus info {name}{project} --show-log",
    "Error": "is in an error state. Look at: incus info {name}{project} --show-log",
}


def instance_name(instance: str | None, host: str, short: str | None, addr: str | None) -> str:
    """The instance's name, also under delegate_to, where `host` is still the original host.

    Only the short name is then the delegated host's; its whole name is in ansible_host, unless
    the inventory sets that.
    """
    if instance:
        return str(instance)
    if not short or host.partition(".")[0] == short:
        return host
    return addr if addr and addr.partition(".")[0] == short else short


def state_message(name: str, project: str, status: str) -> str | None:
    """What a user should know of an instance that runs no commands; None if it is running."""
    text = _STATES.get(status)
    if text is None:
        return None
    option = "" if project == "default" else f" --project {project}"
    return f"Instance {name!r} in project {project!r} {text.format(name=name, project=option)}."


def missing_message(name: str, project: str, detail: str) -> str:
    """What to do about an instance (or a project) that is not there."""
    if "project" in detail.lower() and "instance" not in detail.lower():
        return (
            f"There is no Incus project {project!r} ({detail}). Correct ansible_incus_project;"
            " `incus project list` shows what is there."
        )
    advice = f"`incus list --project {project}` shows what is there."
    if "." in name:
        advice = f"Names of instances have no dots: set ansible_incus_instance for this host. {advice}"
    return f"There is no instance {name!r} in Incus project {project!r}. {advice}"


class _Password(Gate):
    """Answers a become method's prompt, then lets the module through."""

    def __init__(self, become: t.Any) -> None:
        self._become = become
        self._sent_at: tuple[int, int] | None = None

    def decide(self, stdout: bytes, stderr: bytes) -> bytes | bool:
        if self._become.check_success(stdout):
            return True
        if self._become.check_incorrect_password(stdout + stderr):
            raise AnsibleAuthenticationFailure("Incorrect become password (ansible_become_password).")
        _check_missing(self._become, stdout + stderr)
        seen = self._sent_at or (0, 0)
        fresh = stdout[seen[0] :], stderr[seen[1] :]
        if not any(part and self._become.check_password_prompt(part) for part in fresh):
            return False
        if self._sent_at is not None:
            raise AnsibleAuthenticationFailure("Incorrect become password (ansible_become_password).")
        self._sent_at = len(stdout), len(stderr)
        return str(self._become.get_option("become_pass") or "").encode() + b"\n"


def _check_missing(become: t.Any, output: bytes) -> None:
    if become.check_missing_password(output):
        raise AnsibleAuthenticationFailure("Missing become password: set ansible_become_password.")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make the signals that end a worker an exception, so that the remote command is killed first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, t.Any] = {}

    def interrupt(signum: int, _frame: t.Any) -> t.NoReturn:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # once is enough: cleaning up takes a second at most
        raise Interrupted(signum)

    caught: int | None = None
    number: int
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.getsignal(number)
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    except Interrupted as exc:
        caught = exc.signum
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    if caught is not None:
        os.kill(os.getpid(), caught)
        raise AnsibleError("Interrupted.")


class Connection(ConnectionBase):  # type: ignore[misc]
    """Commands and files in an Incus instance."""

    transport = "sottovoce.stack.incus"
    has_pipelining = True
    has_tty = False
    _connected: bool
    default_user = "root"

    def __init__(self, *args: t.Any, **kwargs: t.Any) -> None:
        super().__init__(*args, **kwargs)
        self._client: IncusClient | None = None

    # what Ansible calls

    def _connect(self) -> Connection:
        if not self._connected:
            try:
                # Nothing is sent yet: the first command finds out whether the instance is there.
                self._client = IncusClient(
                    Endpoint.from_params(
                        {
                            name: self.get_option(name)
                            for name in ("socket", "remote_url", "client_cert", "client_key", "server_cert")
                        }
                    ),
                    timeout=float(self.get_option("timeout") or 10),
                )
            except IncusError as exc:
                raise AnsibleConnectionFailure(str(exc)) from None
            self._connected = True
            display.vvv(f"ESTABLISH INCUS CONNECTION FOR USER: {self._user}", host=self._name)
        return self

    def exec_command(
        self, cmd: str, in_data: bytes | None = None, sudoable: bool = True
    ) -> tuple[int, bytes, bytes]:
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        display.vvv(f"EXEC {cmd}", host=self._name)
        gate: Gate | None = None
        if sudoable and self.become is not None and self.become._id and self.become.expect_prompt():
            gate = _Password(self.become)
        limit = int(self.get_option("exec_timeout") or 0)
        result = self._run(cmd, stdin=in_data, gate=gate, timeout=limit or None)
        if (
            result.returncode
            and not result.stdout
            and sudoable
            and self.become is not None
            and self.become._id
        ):
            _check_missing(self.become, result.stderr)
        return result.returncode, result.stdout, result.stderr

    def put_file(self, in_path: str, out_path: str) -> None:
        super().put_file(in_path, out_path)
        display.vvv(f"PUT {in_path} TO {out_path}", host=self._name)
        what = f"{in_path} to {out_path} in instance {self._name!r}"
        target = shlex.quote(out_path)
        # The size that arrived is looked at, as `cat` cannot tell a broken stream from its end.
        script = f"cat > {target} && if [ -f {target} ]; then wc -c < {target}; fi"
        with _local_file(in_path, os.O_RDONLY) as source:
            counted = _Counted(source)
            result = self._transfer(what, script, stdin=t.cast("t.BinaryIO", counted))
        arrived = result.stdout.strip()
        if not result.input_sent or (arrived and int(arrived) != counted.total):
            raise AnsibleError(
                f"Could not copy {what}: {int(arrived or 0)} of {counted.total} bytes arrived. Check the"
                " free space there."
            )

    def fetch_file(self, in_path: str, out_path: str) -> None:
        super().fetch_file(in_path, out_path)
        display.vvv(f"FETCH {in_path} TO {out_path}", host=self._name)
        what = f"{in_path} of instance {self._name!r} to {out_path}"
        with _local_file(out_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as sink:
            try:
                self._transfer(
                    what, f"cat < {shlex.quote(in_path)}", stdout=lambda block: _write_all(sink, block)
                )
            except OSError as exc:
                _remove(out_path, sink)
                raise AnsibleError(f"Could not copy {what}: {exc.strerror or exc}") from exc
            except BaseException:
                _remove(out_path, sink)
                raise

    def reset(self) -> None:
        self.close()

    def close(self) -> None:
        client, self._client = self._client, None
        self._connected = False
        if client is not None:
            client.close()

    # inner

    @property
    def _name(self) -> str:
        return instance_name(
            self.get_option("instance"),
            str(self.get_option("remote_addr")),
            self.get_option("delegated_short_name"),
            self.get_option("delegated_addr"),
        )

    @property
    def _project(self) -> str:
        return str(self.get_option("project") or "default")

    @property
    def _user(self) -> str:
        return str(self.get_option("remote_user") or "root")

    def _transfer(
        self,
        what: str,
        script: str,
        *,
        stdin: t.BinaryIO | None = None,
        stdout: Callable[[bytes], t.Any] | None = None,
    ) -> CommandResult:
        result = self._run(script, stdin=stdin, stdout=stdout, stall=_STALL)
        if result.returncode != 0:
            said = (result.stderr or result.stdout).decode("utf-8", "replace").strip()
            message = f"Could not copy {what}: {said or f'exit code {result.returncode}'}"
            if stdout is not None and ("No such file" in said or "cannot open" in said):
                raise AnsibleFileNotFound(message)
            raise AnsibleError(message)
        if stdout is not None and not result.output_whole:
            raise AnsibleError(f"Could not copy {what}: the stream from Incus ended before the file did.")
        return result

    def _run(
        self,
        cmd: str,
        *,
        stdin: bytes | t.BinaryIO | None = None,
        stdout: Callable[[bytes], t.Any] | None = None,
        gate: Gate | None = None,
        timeout: float | None = None,
        stall: float | None = None,
    ) -> CommandResult:
        client = self._client
        if client is None:
            raise AnsibleConnectionFailure("The connection is closed.")
        shell = str(self.get_option("executable") or "/bin/sh")
        user, command, ids = self._user, [shell, "-c", cmd], _NUMBERS.fullmatch(self._user)
        uid = gid = None
        cwd: str | None = None
        if ids:
            uid = int(ids[1])
            gid = int(ids[2] or ids[1])
            cwd = "/"
        elif user != "root":
            # su and not Incus' own user: it knows names, further groups and the home directory.
            cwd = "/"
            command = ["su", "-s", shell, "-c", f'cd "$HOME" 2>/dev/null; {cmd}', user]
        try:
            with _interruptible():
                result = run_command(
                    client,
                    self._name,
                    command,
                    project=self._project,
                    cwd=cwd,
                    user=uid,
                    group=gid,
                    stdin=stdin,
                    stdout=stdout,
                    timeout=timeout,
                    stall=stall,
                    gate=gate,
                    gate_timeout=client.timeout,
                )
        except IncusError as exc:
            # Without its cause: the message is whole, and Ansible would print it once more.
            raise self._explained(exc, client) from None
        if result.returncode in (126, 127) and not result.stdout and not result.stderr:
            self._require(client, command[0], uid, gid)
        if command[0] == "su" and result.returncode == 1 and _NO_USER.search(result.stderr):
            raise AnsibleConnectionFailure(
                f"Instance {self._name!r} has no user {user!r}. Create it as root first"
                " (ansible_user: root), or correct ansible_user."
            )
        return result

    def _require(self, client: IncusClient, program: str, uid: int | None, gid: int | None) -> None:
        """Raise if the shell or su is missing: a command may end with the same exit code."""
        probe = [program, "-c", ":"] if program != "su" else ["su", "-c", ":", "root"]
        try:
            result = run_command(client, self._name, probe, project=self._project, user=uid, group=gid)
        except IncusError:
            return
        if result.returncode in (126, 127) and not result.stderr:
            advice = "use root or a numeric user id" if program == "su" else "set ansible_executable"
            raise AnsibleConnectionFailure(
                f"Instance {self._name!r} cannot run {program}. Install it there, or {advice}."
            )

    def _explained(self, exc: IncusError, client: IncusClient) -> AnsibleError:
        """The failure as a user's message; asks for the instance's state only now that something failed."""
        name, project = self._name, self._project
        if isinstance(exc, IncusNotFound) and exc.method == "POST":
            return AnsibleConnectionFailure(missing_message(name, project, exc.detail or str(exc)))
        if isinstance(exc, IncusForbidden):
            return AnsibleConnectionFailure(str(exc))
        if isinstance(exc, IncusTimeout) and exc.path is None:
            return AnsibleError(str(exc))  # the command itself took too long: the host is there
        status = ""
        try:
            client.close()
            answer = client.request(
                "GET", f"/1.0/instances/{quote(name, safe='')}/state", project=project, timeout=5.0
            )
            status = str((answer.metadata or {}).get("status"))
        except IncusNotFound as gone:
            return AnsibleConnectionFailure(missing_message(name, project, gone.detail or ""))
        except IncusError:
            pass  # the first failure says it
        message = state_message(name, project, status)
        if message is None:
            message = str(exc) if not status else f"Instance {name!r} in project {project!r}: {exc}"
        return AnsibleConnectionFailure(message)


@contextlib.contextmanager
def _local_file(path: str, flags: int) -> Iterator[t.BinaryIO]:
    """A file on the controller; a failure to open it is told as such."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    except FileNotFoundError as exc:
        raise AnsibleFileNotFound(f"The local file {path} does not exist.") from exc
    except OSError as exc:
        raise AnsibleError(f"Cannot open the local file {path}: {exc.strerror}") from exc
    # Without a buffer: a full disk is met where it can be told, not at closing.
    with os.fdopen(descriptor, "rb" if flags == os.O_RDONLY else "wb", buffering=0) as handle:
        yield t.cast("t.BinaryIO", handle)


def _write_all(sink: t.BinaryIO, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[sink.write(view) :]


class _Counted:
    """A source that knows how much was taken from it."""

    def __init__(self, source: t.BinaryIO) -> None:
        self._source = source
        self.total = 0

    def read(self, size: int = -1) -> bytes:
        block = self._source.read(size)
        self.total += len(block)
        return block


def _remove(path: str, handle: t.BinaryIO) -> None:
    """Leave no half of a file behind (and no device without its node)."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
            os.unlink(path)

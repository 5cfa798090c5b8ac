# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
import resource
import signal
import threading
import time
import typing as t
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from ansible import constants
from ansible.errors import AnsibleAuthenticationFailure, AnsibleConnectionFailure, AnsibleError
from ansible.playbook.play_context import PlayContext
from ansible_collections.sottovoce.stack.plugins.connection import incus as plugin
from ansible_collections.sottovoce.stack.plugins.connection.incus import instance_name, state_message
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    Endpoint,
    IncusClient,
    IncusNotFound,
    IncusTimeout,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_websocket import (
    BINARY,
    PING,
    TEXT,
    FrameReader,
    WebSocketError,
    encode_frame,
    run_command,
)
from fake_incus import Answer, FakeIncus, Request, error, frame
from hypothesis import given
from hypothesis import strategies as st

Make = t.Callable[..., t.Any]
NAME = "sottovoce.stack.incus"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeIncus]:
    fake = FakeIncus(tmp_path)
    fake.instance("box")
    yield fake
    fake.close()


@pytest.fixture
def client(daemon: FakeIncus) -> Iterator[IncusClient]:
    with IncusClient(Endpoint(socket=daemon.socket), timeout=5) as it:
        yield it


@pytest.fixture
def make(daemon: FakeIncus) -> Iterator[Make]:
    opened = []
    # What Ansible's plugin loader does.
    options = yaml.safe_load(plugin.DOCUMENTATION)["options"]
    constants.config.initialize_plugin_configuration_definitions("connection", NAME, options)

    def build(**variables: t.Any) -> t.Any:
        connection = plugin.Connection(PlayContext())
        connection._load_name = NAME
        host = variables.pop("inventory_hostname", "box")
        connection.set_options(
            var_options={"inventory_hostname": host, "ansible_incus_socket": daemon.socket, **variables}
        )
        opened.append(connection)
        return connection

    yield build
    for connection in opened:
        connection.close()


# frames


@given(
    st.lists(st.tuples(st.sampled_from([TEXT, BINARY, PING]), st.binary(max_size=70000)), max_size=5),
    st.data(),
)
def test_frames_survive_any_fragmentation(frames: list[tuple[int, bytes]], data: st.DataObject) -> None:
    wire = b"".join(encode_frame(opcode, payload) for opcode, payload in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=6)))
    reader, seen = FrameReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        seen += reader.feed(wire[start:end])
    assert seen == frames


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_frames_of_a_server_and_of_a_client_at_the_limits(size: int) -> None:
    payload = os.urandom(size)
    assert FrameReader().feed(frame(BINARY, payload)) == [(BINARY, payload)]
    assert encode_frame(BINARY, payload)[1] & 0x80


def test_frames_that_are_not_understood_are_refused() -> None:
    with pytest.raises(WebSocketError, match="extension"):
        FrameReader().feed(b"\xc2\x00")
    with pytest.raises(WebSocketError, match="too large"):
        FrameReader().feed(b"\x82\x7f\x7f\xff\xff\xff\xff\xff\xff\xff")


def test_masked_frames_are_read() -> None:
    assert FrameReader().feed(b"\x82\x82\x01\x02\x03\x04" + bytes([0x61 ^ 1, 0x62 ^ 2])) == [(BINARY, b"ab")]


# commands


def test_a_command_costs_five_requests(daemon: FakeIncus, client: IncusClient) -> None:
    result = run_command(client, "box", ["/bin/sh", "-c", "cat; echo err >&2; exit 7"], stdin=b"in")
    assert (result.returncode, result.stdout, result.stderr) == (7, b"in", b"err\n")
    assert result.input_sent
    assert result.output_whole
    assert client.requests == 5
    assert daemon.connections == 4
    body = daemon.log[0].json
    assert body["wait-for-websocket"] is True
    assert body["interactive"] is False
    # The connection is kept, and the next command uses it.
    run_command(client, "box", ["true"])
    assert daemon.connections == 7


def test_large_input_and_large_output_at_the_same_time(client: IncusClient) -> None:
    data = os.urandom(20_000_000)
    result = run_command(client, "box", ["cat"], stdin=data, timeout=60)
    assert result.stdout == data


def test_output_that_nobody_asked_for_while_input_waits(client: IncusClient) -> None:
    script = "head -c 5000000 /dev/zero; cat | wc -c"
    result = run_command(client, "box", ["/bin/sh", "-c", script], stdin=b"x" * 5_000_000, timeout=60)
    assert result.stdout == b"\0" * 5_000_000 + b"5000000\n"


def test_a_command_that_does_not_read_its_input(client: IncusClient) -> None:
    result = run_command(
        client, "box", ["/bin/sh", "-c", "exec <&-; echo no"], stdin=b"x" * 10_000_000, timeout=30
    )
    assert (result.returncode, result.stdout) == (0, b"no\n")
    assert not result.input_sent


def test_input_is_reported_as_sent_even_if_the_end_races_with_a_ping(client: IncusClient) -> None:
    for _unused in range(20):
        result = run_command(client, "box", ["wc", "-c"], stdin=b"x" * 200_000, timeout=30)
        assert result.input_sent
        assert int(result.stdout) == 200_000


def test_a_child_that_holds_the_output_open_does_not_hold_the_command(client: IncusClient) -> None:
    begin = time.monotonic()
    result = run_command(client, "box", ["/bin/sh", "-c", "sleep 20 & echo hi"])
    assert result.stdout == b"hi\n"
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("code", [126, 127])
def test_exit_codes_that_incus_takes_for_its_own(daemon: FakeIncus, client: IncusClient, code: int) -> None:
    result = run_command(client, "box", ["/bin/sh", "-c", f"echo said; exit {code}"])
    assert (result.returncode, result.stdout) == (code, b"said\n")


def test_a_missing_program(client: IncusClient) -> None:
    assert run_command(client, "box", ["/does/not/exist"]).returncode == 127


def test_a_timeout_kills_the_command_and_what_it_started(client: IncusClient, tmp_path: Path) -> None:
    note = tmp_path / "pids"
    script = f"echo $$ >> {note}; sleep 61 & echo $! >> {note}; sh -c 'echo $$ >> {note}; sleep 62; true'"
    begin = time.monotonic()
    with pytest.raises(IncusTimeout, match=r"did not end within 0.5 s and was killed"):
        run_command(client, "box", ["/bin/sh", "-c", script], timeout=0.5)
    assert time.monotonic() - begin < 10
    pids = [int(line) for line in note.read_text().split()]
    assert len(pids) == 3
    assert [pid for pid in pids if _alive(pid)] == []


def test_a_timeout_holds_while_output_flows(client: IncusClient) -> None:
    got = 0

    def count(block: bytes) -> None:
        nonlocal got
        got += len(block)

    with pytest.raises(IncusTimeout):
        run_command(client, "box", ["yes"], stdout=count, timeout=0.5)
    assert got > 0


def test_a_transfer_that_stands_still_is_given_up(client: IncusClient) -> None:
    with pytest.raises(IncusTimeout, match=r"stood still for 0.3 s"):
        run_command(client, "box", ["sleep", "20"], stall=0.3)


def test_a_missing_instance_is_not_found(client: IncusClient) -> None:
    with pytest.raises(IncusNotFound):
        run_command(client, "nobody", ["true"])


# the plugin


def test_exec_always_pipelines(make: Make) -> None:
    assert make().is_pipelining_enabled()
    assert make(ansible_pipelining=False).is_pipelining_enabled()
    assert not make(ansible_incus_pipelining=False).is_pipelining_enabled()


def test_exec_command(make: Make) -> None:
    connection = make()
    assert connection.exec_command("cat; exit 3", in_data=b"abc", sudoable=False) == (3, b"abc", b"")
    connection.reset()
    assert connection.exec_command("echo $1; echo ü")[1] == "\nü\n".encode()


def test_instance_and_project_are_passed_on(daemon: FakeIncus, make: Make) -> None:
    make(inventory_hostname="a.b.c", ansible_incus_instance="box", ansible_incus_project="p").exec_command(
        "true"
    )
    assert daemon.log[0].path == "/1.0/instances/box/exec"
    assert daemon.log[0].query == {"project": "p"}


def test_a_numeric_user_is_given_to_incus(daemon: FakeIncus, make: Make) -> None:
    make(ansible_user="1000:1001").exec_command("true")
    make(ansible_user="1000").exec_command("true")
    bodies = [request.json for request in daemon.log if request.method == "POST"]
    assert [(body["user"], body["group"], body["cwd"]) for body in bodies] == [
        (1000, 1001, "/"),
        (1000, 1000, "/"),
    ]


def test_a_named_user_is_switched_to(daemon: FakeIncus, make: Make) -> None:
    seen: list[list[str]] = []

    def refuse(request: Request) -> Answer:
        seen.append(request.json["command"])
        assert "user" not in request.json
        return error(400, "seen")

    daemon.route("POST", "/1.0/instances/box/exec", refuse)
    for user in ("root", "alice"):
        with pytest.raises(AnsibleConnectionFailure):
            make(ansible_user=user).exec_command("echo 'a b'")
    assert seen[0] == ["/bin/sh", "-c", "echo 'a b'"]
    assert seen[1][:4] == ["su", "-s", "/bin/sh", "-c"]
    assert seen[1][4].endswith("; echo 'a b'")
    assert seen[1][5] == "alice"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("Stopped", "is stopped. Start it: incus start box"),
        ("Frozen", "is frozen .paused.. Resume it: incus resume box"),
        ("Stopping", "is stopping or restarting. Try again"),
        ("Starting", "is starting. Try again"),
        ("Error", "error state. Look at: incus info box --show-log"),
    ],
)
def test_each_state_has_its_own_message(daemon: FakeIncus, make: Make, status: str, words: str) -> None:
    daemon.instance("box", status)
    with pytest.raises(AnsibleConnectionFailure, match=words):
        make().exec_command("true")


def test_the_project_is_in_the_advice() -> None:
    assert "incus start a --project p" in str(state_message("a", "p", "Stopped"))
    assert "--project" not in str(state_message("a", "default", "Stopped"))
    assert state_message("a", "p", "Running") is None


def test_a_missing_instance_and_one_with_dots(daemon: FakeIncus, make: Make) -> None:
    with pytest.raises(AnsibleConnectionFailure, match=r"no instance 'nobody' in Incus project 'p'"):
        make(inventory_hostname="nobody", ansible_incus_project="p").exec_command("true")
    with pytest.raises(AnsibleConnectionFailure, match=r"no instance 'box.lan'.*set ansible_incus_instance"):
        make(inventory_hostname="box.lan").exec_command("true")
    daemon.route("POST", "/1.0/instances/box/exec", error(404, "Project not found"))
    with pytest.raises(AnsibleConnectionFailure, match="no Incus project 'q'"):
        make(ansible_incus_project="q").exec_command("true")


def test_no_daemon(make: Make) -> None:
    with pytest.raises(AnsibleConnectionFailure, match="not running or not installed"):
        make(ansible_incus_socket="/nowhere/socket").exec_command("true")


def test_a_missing_shell(make: Make) -> None:
    with pytest.raises(AnsibleConnectionFailure, match=r"cannot run /no/shell.*set ansible_executable"):
        make(ansible_executable="/no/shell").exec_command("true")


def test_exit_127_without_output_is_the_commands_own(make: Make) -> None:
    assert make().exec_command("exit 127") == (127, b"", b"")


def test_files_go_and_come_back(make: Make, tmp_path: Path) -> None:
    source, there, back = tmp_path / "source", tmp_path / "it's there", tmp_path / "back"
    source.write_bytes(os.urandom(3_000_001))
    connection = make()
    connection.put_file(str(source), str(there))
    connection.fetch_file(str(there), str(back))
    assert there.read_bytes() == back.read_bytes() == source.read_bytes()
    source.write_bytes(b"")
    connection.put_file(str(source), str(there))
    assert there.read_bytes() == b""


def test_a_large_file_needs_little_memory(make: Make, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as handle:
        handle.truncate(200_000_000)
    connection = make()
    connection.exec_command("true")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection.put_file(str(source), str(tmp_path / "there"))
    connection.fetch_file(str(tmp_path / "there"), str(tmp_path / "back"))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert (tmp_path / "back").stat().st_size == 200_000_000
    assert grown < 60_000  # KiB, and this process is the fake daemon, too


@pytest.mark.parametrize(
    "transfer",
    [
        lambda c, folder: c.put_file(str(folder / "source"), str(folder / "none" / "x")),
        lambda c, folder: c.put_file(str(folder / "missing"), str(folder / "x")),
        lambda c, folder: c.fetch_file(str(folder / "missing"), str(folder / "x")),
        lambda c, folder: c.fetch_file(str(folder), str(folder / "x")),
        lambda c, folder: c.fetch_file(str(folder / "source"), str(folder / "none" / "x")),
        lambda c, folder: c.fetch_file(str(folder / "source"), "/dev/full"),
        lambda c, folder: c.fetch_file(str(folder / "small"), "/dev/full"),
        lambda c, folder: c.put_file(str(folder / "source"), "/dev/full"),
    ],
)
def test_a_failed_transfer_always_raises(
    make: Make, tmp_path: Path, transfer: Callable[[t.Any, Path], None]
) -> None:
    (tmp_path / "source").write_bytes(b"data" * 100_000)
    (tmp_path / "small").write_bytes(b"data")
    device = os.stat("/dev/full").st_rdev
    with pytest.raises(AnsibleError) as caught:
        transfer(make(), tmp_path)
    assert not (tmp_path / "x").exists()
    assert "/" in str(caught.value)
    assert os.stat("/dev/full").st_rdev == device


def test_a_stream_that_breaks_on_the_way_raises(daemon: FakeIncus, make: Make, tmp_path: Path) -> None:
    # `cat` ends with 0 on what it got: only the sizes tell.
    daemon.swallow_after = 500_000
    source = tmp_path / "source"
    source.write_bytes(b"x" * 5_000_000)
    with pytest.raises(AnsibleError, match="Could not copy"):
        make().put_file(str(source), str(tmp_path / "there"))


def test_a_stop_of_the_instance_during_a_transfer_raises(
    daemon: FakeIncus, make: Make, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    connection = make()
    failure: list[BaseException] = []

    def fetch() -> None:
        try:
            connection.fetch_file(str(tmp_path / "fifo"), str(tmp_path / "back"))
        except AnsibleError as exc:
            failure.append(exc)

    thread = threading.Thread(target=fetch)
    thread.start()
    time.sleep(0.3)
    for command in daemon.execs.values():
        command.kill()
    thread.join(15)
    assert failure
    assert not (tmp_path / "back").exists()


def test_a_signal_kills_the_command_then_is_delivered(make: Make, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    connection = make()
    delivered: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: delivered.append(number))
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        with pytest.raises(AnsibleError, match="Interrupted"):
            connection.exec_command(f"echo $$ > {note}; sleep 63; true")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert delivered == [signal.SIGTERM]
    assert not _alive(int(note.read_text()))


class Become:
    """What a become plugin with a password is to a connection."""

    _id = "x"

    def expect_prompt(self) -> bool:
        return True

    def check_success(self, output: bytes) -> bool:
        return b"BECOME-SUCCESS" in output

    def check_incorrect_password(self, output: bytes) -> bool:
        return b"Sorry" in output

    def check_missing_password(self, output: bytes) -> bool:
        return b"required" in output

    def check_password_prompt(self, output: bytes) -> bool:
        return b"Password:" in output

    def get_option(self, _name: str) -> str:
        return "secret"


_ASK = 'printf Password: >&2; read -r word; [ "$word" = secret ] || { echo Sorry >&2; sleep 5; exit 1; };'


def test_the_become_password_goes_first_then_the_module(make: Make) -> None:
    connection = make()
    connection.set_become_plugin(Become())
    code, out, _err = connection.exec_command(f"{_ASK} echo BECOME-SUCCESS; cat", in_data=b"module")
    assert (code, out) == (0, b"BECOME-SUCCESS\nmodule")


def test_a_wrong_become_password_is_told_at_once(make: Make) -> None:
    connection = make()
    connection.set_become_plugin(Become())
    begin = time.monotonic()
    with pytest.raises(AnsibleAuthenticationFailure, match="Incorrect become password"):
        connection.exec_command(_ASK.replace("= secret", "= other"), in_data=b"module")
    assert time.monotonic() - begin < 4


def test_a_missing_become_password_is_named(make: Make) -> None:
    connection = make()
    become = Become()
    connection.set_become_plugin(become)
    become.expect_prompt = lambda: False  # type: ignore[method-assign]
    with pytest.raises(AnsibleAuthenticationFailure, match="Missing become password"):
        connection.exec_command("echo 'a password is required' >&2; exit 1", in_data=b"module")


def test_a_become_method_that_never_asks(make: Make) -> None:
    connection = make(ansible_timeout=1)
    connection.set_become_plugin(Become())
    with pytest.raises(AnsibleError, match=r"did not get ready within 1 s.*what\?"):
        connection.exec_command("echo what?; sleep 20", in_data=b"module")


@pytest.mark.parametrize(
    ("instance", "host", "short", "addr", "expected"),
    [
        (None, "box", "box", None, "box"),
        (None, "box", "box", "10.0.0.1", "box"),
        (None, "box.lan", "box", "10.0.0.1", "box.lan"),
        ("other", "box.lan", "box", "10.0.0.1", "other"),
        (None, "first", "second", "second", "second"),
        (None, "first", "second", "10.0.0.2", "second"),
        (None, "first.lan", "second", "second.lan", "second.lan"),
        (None, "box", None, None, "box"),
    ],
)
def test_which_instance_is_meant(
    instance: str | None, host: str, short: str | None, addr: str | None, expected: str
) -> None:
    assert instance_name(instance, host, short, addr) == expected


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

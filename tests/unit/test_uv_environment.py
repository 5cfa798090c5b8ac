"""uv_environment: what an environment is made of, when it is made again, and what the user reads."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _uv as uv
from hypothesis import given
from hypothesis import strategies as st

LOCK = """\
idna==3.20 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
colorama==0.4.6 ; os_name == 'nt' or sys_platform == 'win32' \\
    --hash=sha256:cc
    # via something
# a comment
Six==1.17.0 --hash=sha256:dd
"""


def settings(tmp_path: Path, **more: object) -> uv.Settings:
    lock = tmp_path / "requirements.lock"
    if not lock.exists():
        lock.write_text(LOCK)
    values = {
        "uv": "/opt/uv/bin/uv",
        "path": str(tmp_path / "venv"),
        "requirements": str(lock),
        "python": "3.11",
    }
    return uv.Settings(**{**values, **more})  # type: ignore[arg-type]


class FakeUv:
    """Stands in for the commands: makes the interpreter where uv venv would, and can fail."""

    def __init__(self, venv: Path, failures: Sequence[tuple[str, str]] = ()) -> None:
        self.venv = venv
        self.failures = list(failures)
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []

    def __call__(
        self, argv: Sequence[str], environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        self.commands.append(list(argv))
        self.environments.append(environment)
        if self.failures and self.failures[0][0] in argv:
            return subprocess.CompletedProcess(argv, 2, "", self.failures.pop(0)[1])
        if argv[1] == "venv":
            (self.venv / "bin").mkdir(parents=True, exist_ok=True)
            (self.venv / "pyvenv.cfg").write_text("home = /usr/bin\n")
            interpreter = self.venv / "bin/python"
            interpreter.unlink(missing_ok=True)
            interpreter.write_text("#!/bin/sh\n")
            interpreter.chmod(0o755)
        return subprocess.CompletedProcess(argv, 0, "3.11.2\n", "")


def converge(made: uv.Settings, runner: FakeUv) -> uv.Plan:
    inputs, lock = uv.read_inputs(made)
    plan, _unused = uv.look(made.path, inputs.digest(), made.python)
    if plan.changed:
        uv.apply(made, plan, uv.Record(inputs.digest(), uv.locked_packages(lock)), runner)
    return plan


def test_packages_of_a_lock() -> None:
    assert uv.locked_packages(LOCK) == [
        "colorama==0.4.6 ; os_name == 'nt' or sys_platform == 'win32'",
        "idna==3.20",
        "Six==1.17.0",
    ]


def test_packages_without_a_hash_are_found() -> None:
    assert uv.unhashed_packages(LOCK) == []
    assert uv.unhashed_packages("six==1.17.0\nidna==3.20 \\\n    --hash=sha256:aa\n") == ["six==1.17.0"]


def test_made_once_then_left_alone(tmp_path: Path) -> None:
    made, runner = settings(tmp_path), FakeUv(tmp_path / "venv")
    assert converge(made, runner).action == "create"
    commands = len(runner.commands)
    assert converge(made, runner).action == "none"
    assert len(runner.commands) == commands


def test_a_new_lock_updates_the_environment_in_place(tmp_path: Path) -> None:
    made, runner = settings(tmp_path), FakeUv(tmp_path / "venv")
    converge(made, runner)
    Path(made.requirements).write_text(LOCK.replace("3.20", "3.21"))
    runner.commands.clear()
    assert converge(made, runner).action == "update"
    assert [command[1] for command in runner.commands] == ["pip", "-c"]


@pytest.mark.parametrize("change", [{"python": "3.12"}, {"compile_bytecode": False}])
def test_options_that_shape_the_environment_are_part_of_it(tmp_path: Path, change: dict[str, object]) -> None:
    runner = FakeUv(tmp_path / "venv")
    converge(settings(tmp_path), runner)
    assert converge(settings(tmp_path, **change), runner).changed


@pytest.mark.parametrize(
    "change", [{"http_retries": 7}, {"index_url": "http://mirror/simple"}, {"uv": "/opt/uv2"}]
)
def test_options_that_only_say_how_are_not(tmp_path: Path, change: dict[str, object]) -> None:
    runner = FakeUv(tmp_path / "venv")
    converge(settings(tmp_path), runner)
    assert not converge(settings(tmp_path, **change), runner).changed


def test_another_python_makes_the_environment_anew(tmp_path: Path) -> None:
    runner = FakeUv(tmp_path / "venv")
    converge(settings(tmp_path), runner)
    runner.commands.clear()
    assert converge(settings(tmp_path, python="3.12"), runner).action == "create"
    assert runner.commands[0][:3] == ["/opt/uv/bin/uv", "venv", "--clear"]


def test_a_lock_given_as_text_is_written_when_something_is_installed(tmp_path: Path) -> None:
    runner = FakeUv(tmp_path / "venv")
    from_file = settings(tmp_path)
    converge(from_file, runner)
    text = Path(from_file.requirements).read_text(encoding="utf-8")
    other = str(tmp_path / "elsewhere/requirements.lock")
    # The same text is the same environment, wherever it came from.
    assert not converge(settings(tmp_path, requirements=other, lock=text), runner).changed
    assert not Path(other).exists()
    newer = settings(tmp_path, requirements=other, lock=text + "# newer\n")
    assert converge(newer, runner).action == "update"
    assert Path(other).read_text(encoding="utf-8") == text + "# newer\n"
    assert any(command[-1] == other for command in runner.commands)


def test_an_interrupted_installation_is_done_again(tmp_path: Path) -> None:
    made = settings(tmp_path)
    broken = FakeUv(tmp_path / "venv", [("pip", "error: something else")])
    with pytest.raises(uv.UvError):
        converge(made, broken)
    runner = FakeUv(tmp_path / "venv")
    plan = converge(made, runner)
    assert (plan.action, plan.reason) == ("create", "an earlier installation did not finish")


def test_an_update_that_breaks_leaves_no_record(tmp_path: Path) -> None:
    made = settings(tmp_path)
    converge(made, FakeUv(tmp_path / "venv"))
    Path(made.requirements).write_text(LOCK.replace("3.20", "3.21"))
    with pytest.raises(uv.UvError):
        converge(made, FakeUv(tmp_path / "venv", [("pip", "error: broken")]))
    assert uv.Record.load(made.path) is None
    assert converge(made, FakeUv(tmp_path / "venv")).action == "create"


def test_an_interpreter_that_is_gone_makes_it_anew(tmp_path: Path) -> None:
    made, runner = settings(tmp_path), FakeUv(tmp_path / "venv")
    converge(made, runner)
    interpreter = tmp_path / "venv/bin/python"
    interpreter.unlink()
    interpreter.symlink_to("/nonexistent/python3.11")
    assert converge(made, runner).reason == "the interpreter it was made with is gone"


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    made = settings(tmp_path)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/photos").write_text("keep me")
    with pytest.raises(uv.UvError, match="no Python environment; nothing was touched"):
        converge(made, FakeUv(tmp_path / "venv"))
    assert (tmp_path / "venv/photos").read_text() == "keep me"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"digest": "x"}', '{"digest": "x", "packages": 5, "python": ""}']
)
def test_a_damaged_record_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / uv.RECORD_NAME).write_text(content)
    assert uv.Record.load(str(tmp_path)) is None


def test_sources_count_by_content(tmp_path: Path) -> None:
    source = tmp_path / "project"
    (source / "pkg/__pycache__").mkdir(parents=True)
    (source / "pkg/a.py").write_text("1")
    made, runner = settings(tmp_path, sources=(str(source),)), FakeUv(tmp_path / "venv")
    converge(made, runner)
    install = next(command for command in runner.commands if command[1:3] == ["pip", "install"])
    assert "--no-deps" in install
    assert install[-1] == str(source)
    (source / "pkg/a.py").touch()
    (source / "pkg/__pycache__/a.pyc").write_text("x")
    (source / "build").mkdir()
    (source / "build/left.py").write_text("x")
    assert not converge(made, runner).changed
    (source / "pkg/a.py").rename(source / "pkg/b.py")
    assert converge(made, runner).changed


def test_the_environment_of_uv(tmp_path: Path) -> None:
    made = settings(
        tmp_path, cache_dir="/var/cache/uv", link_mode="hardlink", index_url="http://mirror/simple"
    )
    environ = uv.uv_environ(made, {"PATH": "/bin", "VIRTUAL_ENV": "/other"})
    assert environ["UV_SYSTEM_CERTS"] == "true"
    assert environ["UV_PYTHON_PREFERENCE"] == "system"
    assert environ["UV_CACHE_DIR"] == "/var/cache/uv"
    assert environ["UV_LINK_MODE"] == "hardlink"
    assert environ["UV_DEFAULT_INDEX"] == "http://mirror/simple"
    assert environ["PATH"] == "/bin"
    assert "VIRTUAL_ENV" not in environ


NO_ROUTE = """error: Request failed after 1 retry in 2.1s
  cause: Failed to fetch: http://10.199.0.77:81/simple/six/
  cause: error sending request for url (http://10.199.0.77:81/simple/six/)
  cause: client error (Connect)
  cause: tcp connect error
  cause: No route to host (os error 113)"""


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (NO_ROUTE, "index cannot be reached"),
        ("error: Failed to fetch\n cause: invalid peer certificate: UnknownIssuer", "certificate"),
        ("error: Hash mismatch for `six==1.17.0`", "not the one the lock file was made with"),
        ("error: Failed to download `https://x/python-build-standalone/x.tar.gz`\n cause: dns error",
         "no such Python"),
        ("error: No interpreter found for Python 3.12 in search path", "no such Python"),
        ("Because idna was not found in the package registry and you require idna==3.20", "does not have"),
        ("error: No space left on device (os error 28)", "disk is full"),
        ("error: something nobody has seen", "uv failed"),
    ],
)  # fmt: skip
def test_causes_are_told_apart(output: str, message: str) -> None:
    assert message in uv.explain(output)


def test_an_index_that_is_away_from_the_start_is_asked_once(tmp_path: Path) -> None:
    made = settings(tmp_path)
    runner = FakeUv(tmp_path / "venv", [("sync", NO_ROUTE)] * 3)
    with pytest.raises(uv.UvError, match="cannot be reached") as error:
        converge(made, runner)
    assert "No route to host" in error.value.output
    assert sum("sync" in command for command in runner.commands) == 1


def test_a_connection_lost_after_long_downloads_is_tried_again(tmp_path: Path) -> None:
    made = settings(tmp_path)
    runner = FakeUv(tmp_path / "venv", [("sync", NO_ROUTE)] * 2)
    ticks = iter(range(0, 10_000, 60))
    inputs, lock = uv.read_inputs(made)
    plan, _unused = uv.look(made.path, inputs.digest(), made.python)
    record = uv.Record(inputs.digest(), uv.locked_packages(lock))
    uv.apply(made, plan, record, runner, clock=lambda: float(next(ticks)))
    assert sum("sync" in command for command in runner.commands) == 3
    assert uv.Record.load(made.path) is not None


def test_a_step_that_never_ends_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(uv.UvError, match="did not finish in 0 s"):
        uv.run_command(["sleep", "30"], {"PATH": "/usr/bin:/bin"}, 0.2)


def test_uv_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(uv.UvError, match="/nonexistent/uv cannot be run"):
        uv.run_command(["/nonexistent/uv"], {}, 5)


def test_the_diff_lists_packages(tmp_path: Path) -> None:
    made = settings(tmp_path)
    before = uv.Record("old", ["idna==3.19"])
    shown = uv.result(made, uv.Plan("update", "x"), before, ["idna==3.20"])
    assert shown["diff"]["before"] == "idna==3.19\n"
    assert shown["diff"]["after"] == "idna==3.20\n"
    assert shown["changed"] is True


def test_the_record_survives_a_round_trip(tmp_path: Path) -> None:
    record = uv.Record("digest", ["a==1", "b==2"], ">=3.11", "3.11.2")
    record.save(str(tmp_path))
    assert uv.Record.load(str(tmp_path)) == record
    assert json.loads((tmp_path / uv.RECORD_NAME).read_text())["version"] == "3.11.2"


@given(st.text(max_size=400))
def test_no_lock_text_breaks_the_reader(text: str) -> None:
    assert isinstance(uv.locked_packages(text), list)
    assert isinstance(uv.unhashed_packages(text), list)
    assert isinstance(uv.explain(text), str)


def test_uv_that_was_killed(tmp_path: Path) -> None:
    def killed(
        argv: Sequence[str], environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, -9, "", "")

    made = settings(tmp_path)
    plan = uv.Plan("create", "")
    with pytest.raises(uv.UvError, match="ended by signal 9"):
        uv.apply(made, plan, uv.Record("x", []), killed)

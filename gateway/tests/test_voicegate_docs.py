"""docs/speech-api.md does what it says: each section's commands are run, and what they print is compared.

A block marked `bash` is run; one marked `output` right behind it is what it prints, where an ellipsis
stands for anything. All bash blocks of a section (##) are one script, so variables go on from one to another.
Blocks marked `python` are scripts of their own. The address is the only thing replaced. Other marks and
indented blocks are not run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from voicegate_support import (
    CLIPS,
    MODEL,
    PYANNOTE_STANDIN,
    ROOT,
    Server,
    conversation,
    environment,
    long_audio,
)

PAGE = ROOT / "docs" / "speech-api.md"
ADDRESS = "localhost:8000"
MARK = "-- end of block --"


@dataclass
class Block:
    line: int
    kind: str
    text: str
    output: str | None = None


@dataclass
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)


def sections(page: str) -> list[Section]:
    found = [Section("")]
    block: Block | None = None
    for number, line in enumerate(page.splitlines(), start=1):
        if block is not None:
            if line != "```":
                block.text += line + "\n"
                continue
            previous = found[-1].blocks[-1] if found[-1].blocks else None
            if block.kind == "output":
                assert previous is not None, f"line {block.line}: output of nothing"
                previous.output = block.text
            elif block.kind in ("bash", "python"):
                found[-1].blocks.append(block)
            block = None
        elif line.startswith("```"):
            block = Block(number, line[3:].strip(), "")
        elif line.startswith("## "):
            found.append(Section(line[3:]))
    assert block is None, f"line {block.line}: a block without an end"
    return [section for section in found if section.blocks]


def compare(block: Block, printed: str) -> None:
    if block.output is None:
        return
    pattern = "".join(".*" if part == "…" else re.escape(part) for part in re.split("(…)", block.output))
    # JSON ends without a line break, a block in the page always with one.
    matches = re.fullmatch(pattern, printed, re.DOTALL) or re.fullmatch(pattern, printed + "\n", re.DOTALL)
    assert matches, (
        f"{PAGE.name}, line {block.line}:\n{block.text}\nprinted\n{printed}\nand not\n{block.output}"
    )


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Everything that has to be switched on is."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "secret").write_text("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n")
    (folder / "config.yaml").write_text("{}")
    server = Server(
        "--model", str(MODEL), "--data-dir", str(folder / "data"),
        "--webhook-secret-file", str(folder / "secret"),
        "--diarization", "pyannote", "--diarization-model", str(folder), env=PYANNOTE_STANDIN,
    )  # fmt: skip
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with what the commands need: recordings, and a curl that fails where the server refuses."""
    shutil.copy(CLIPS / "D009.wav", tmp_path / "speech.wav")
    (tmp_path / "meeting.wav").write_bytes(conversation())
    (tmp_path / "long.wav").write_bytes(long_audio(60))
    (tmp_path / ".curlrc").write_text("fail-with-body\nmax-time = 30\nsilent\nshow-error\n")
    return tmp_path


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("section", sections(PAGE.read_text("utf-8")), ids=lambda section: section.title)
def test_section_as_written(documented: Server, workplace: Path, section: Section) -> None:
    env = environment({"CURL_HOME": str(workplace)})
    # A proxy that the environment names has no part in this.
    env = {name: value for name, value in env.items() if not name.lower().endswith("_proxy")}
    shell = [block for block in section.blocks if block.kind == "bash"]
    script = "".join(f"{block.text}printf '%s\\n' '{MARK}'\n" for block in shell)
    done = _run(["bash", "-eu", "-o", "pipefail", "-c", script], documented, workplace, env)
    printed = done.stdout.split(MARK + "\n")
    assert done.returncode == 0, f"line {shell[len(printed) - 1].line}: {printed[-1]}{done.stderr}"
    for block, text in zip(shell, printed, strict=False):
        compare(block, text)
    for block in section.blocks:
        if block.kind == "python":
            done = _run([sys.executable, "-c", block.text], documented, workplace, env)
            assert done.returncode == 0, f"line {block.line}: {done.stderr}"
            compare(block, done.stdout)


def _run(
    command: list[str], server: Server, folder: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [part.replace(ADDRESS, f"127.0.0.1:{server.port}") for part in command],
        cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def test_output_that_differs_is_found() -> None:
    [section] = sections("## A\n```bash\necho 1\n```\n\n```output\nid …\n```\n```text\nnot run\n```\n")
    [block] = section.blocks
    compare(block, "id 7\n")
    compare(block, "id 7")
    with pytest.raises(AssertionError, match=r"line 2:(.|\n)*printed"):
        compare(block, "x 7\n")

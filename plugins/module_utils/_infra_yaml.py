# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""YAML as a tree that remembers its lines.

Built from PyYAML's events and not by its composer: that is faster, needs no recursion (a deeply
nested file crashes the composer of the C library), and the size of what aliases expand to is known
before anything is expanded.
"""

from __future__ import annotations

import math
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils._infra_schema import InfraError, Problem

try:
    import yaml
except ImportError:  # only the controller reads infra.yml, and Ansible itself needs PyYAML there
    yaml = None  # type: ignore[assignment]

MAX_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 64
_CORE = "tag:yaml.org,2002:"
_STR, _MERGE = _CORE + "str", _CORE + "merge"
_ALLOWED_TAGS = {_CORE + t for t in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}


class Node:
    """A scalar, a mapping or a sequence, with its place."""

    __slots__ = ("file", "kind", "line", "open", "plain", "size", "tag", "value")

    def __init__(
        self, file: str, line: int, kind: str, value: Any, plain: bool = False, tag: str | None = None
    ) -> None:
        self.file = file
        self.line = line
        self.kind = kind  # "scalar", "mapping" or "sequence"
        self.value = value  # str, list[tuple[Node, Node]] or list[Node]
        self.plain = plain
        self.tag = tag
        self.size = 1
        self.open = kind != "scalar"


def _resolve(text: str) -> str:
    """The tag of a plain scalar."""
    if text and text[0] in "abcdeghijklmpqrsuvwxzABCDEGHIJKLMPQRSUVWXZ/_$%@^(":
        return _STR  # cannot begin any other type; spares the regular expressions (not f, n, o, t, y…)
    return str(_RESOLVER.resolve(yaml.ScalarNode, text, (True, False)))


_RESOLVER: Any = yaml.resolver.Resolver() if yaml is not None else None
_CONSTRUCTOR: Any = yaml.constructor.SafeConstructor() if yaml is not None else None


def scalar_value(node: Node) -> Any:
    """str, int, float, bool or None. A date stays the text it was written as."""
    if not node.plain and node.tag is None:
        return node.value
    tag = node.tag or _resolve(node.value)
    if tag == _STR:
        return node.value
    if tag == _CORE + "null":
        return None
    scalar = yaml.ScalarNode(tag, node.value)
    try:
        if tag == _CORE + "bool":
            return _CONSTRUCTOR.construct_yaml_bool(scalar)
        if tag == _CORE + "int":
            return _CONSTRUCTOR.construct_yaml_int(scalar)
        if tag == _CORE + "float":
            return _CONSTRUCTOR.construct_yaml_float(scalar)
    except (ValueError, KeyError, IndexError, OverflowError):
        return node.value  # matches the shape of a number and is none: 0x_, or more digits than Python reads
    return node.value


def is_null(node: Node) -> bool:
    return node.kind == "scalar" and (node.plain or node.tag is not None) and scalar_value(node) is None


def kind_of(node: Node) -> str:
    """A word for messages."""
    if node.kind == "mapping":
        return "a mapping"
    if node.kind == "sequence":
        return "a list"
    value = scalar_value(node)
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    text = node.value if len(node.value) <= 60 else node.value[:57] + "..."
    if isinstance(value, (int, float)):
        return f"the number {text}"
    return repr(text)


def _line_of(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def decode(data: bytes, file: str) -> str:
    if len(data) > MAX_BYTES:
        raise InfraError(file, [Problem(file, 0, "", f"the file is larger than {MAX_BYTES // 2**20} MiB")])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = _line_of(data, error.start)
        message = f"not UTF-8 text (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        raise InfraError(file, [Problem(file, line, "", message)]) from None


def _explain(error: Any, text: str, file: str) -> Problem:
    """A syntax error in the words of somebody who edits the file."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:  # the reader's complaint about a character
        position = getattr(error, "position", 0)
        line = text.count("\n", 0, position) + 1 if isinstance(position, int) else 0
        character = getattr(error, "character", None)
        if isinstance(character, int):
            return Problem(file, line, "", f"a control character (U+{character:04X}) is not allowed in YAML")
        control = next(
            (i for i, c in enumerate(text) if (c < " " and c not in "\t\r\n") or c == "\x7f"), None
        )
        if control is not None:
            line = text.count("\n", 0, control) + 1
            return Problem(
                file, line, "", f"a control character (U+{ord(text[control]):04X}) is not allowed in YAML"
            )
        return Problem(file, line, "", f"not YAML: {' '.join(str(error).split())[:200]}")
    line = mark.line + 1
    problem = str(getattr(error, "problem", "") or "")
    context = str(getattr(error, "context", "") or "")
    lines = text.split("\n")
    at = lines[mark.line] if mark.line < len(lines) else ""
    indent = at[: len(at) - len(at.lstrip())]
    if "\t" in indent or "'\\t'" in problem or "\t" in at[max(0, mark.column - 1) : mark.column + 1]:
        return Problem(file, line, "", "a tab where YAML wants spaces; indent with spaces")
    told = f"not YAML: {problem}" if problem else "not YAML"
    if context:
        told += f" ({context})"
    context_mark = getattr(error, "context_mark", None)
    if context_mark is not None and context_mark.line != mark.line:
        told += f", see line {context_mark.line + 1}"
    return Problem(file, line, "", told)


class _Builder:
    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.anchors: dict[str, Node] = {}
        self.stack: list[Node] = []
        self.keys: list[Node | None] = []
        self.root: Node | None = None

    def problem(self, line: int, message: str) -> None:
        self.problems.append(Problem(self.file, line, "", message))

    def add(self, node: Node) -> None:
        if not self.stack:
            self.root = node
            return
        parent = self.stack[-1]
        parent.size += node.size
        if parent.kind == "sequence":
            parent.value.append(node)
        elif self.keys[-1] is None:
            self.keys[-1] = node
        else:
            parent.value.append((self.keys[-1], node))
            self.keys[-1] = None

    def tag(self, event: Any, line: int) -> str | None:
        tag: str | None = event.tag
        if tag is None or tag == "!":
            return None
        if tag not in _ALLOWED_TAGS:
            short = tag.replace(_CORE, "!!")
            self.problem(line, f"the YAML tag {short} is not supported here; put such values in host_vars/")
            return _STR
        return tag

    def feed(self, events: Any) -> None:
        for event in events:
            name = type(event).__name__
            if name == "ScalarEvent":
                line = event.start_mark.line + 1
                tag = None if event.tag is None else self.tag(event, line)
                plain = event.tag is None and event.implicit[0]
                node = Node(self.file, line, "scalar", event.value, plain, tag)
                if event.anchor:
                    self.anchors[event.anchor] = node
                self.add(node)
            elif name in ("MappingStartEvent", "SequenceStartEvent"):
                line = event.start_mark.line + 1
                kind = "mapping" if name == "MappingStartEvent" else "sequence"
                node = Node(self.file, line, kind, [], False, self.tag(event, line))
                node.tag = None
                if event.anchor:
                    self.anchors[event.anchor] = node
                if len(self.stack) >= MAX_DEPTH:
                    raise InfraError(
                        self.file,
                        [
                            *self.problems,
                            Problem(self.file, line, "", f"nested deeper than {MAX_DEPTH} levels"),
                        ],
                    )
                self.stack.append(node)
                self.keys.append(None)
            elif name in ("MappingEndEvent", "SequenceEndEvent"):
                node = self.stack.pop()
                self.keys.pop()
                node.open = False
                self.add(node)
            elif name == "AliasEvent":
                line = event.start_mark.line + 1
                target = self.anchors.get(event.anchor)
                if target is None:
                    self.problem(line, f"the alias *{event.anchor} refers to no anchor before it")
                    target = Node(self.file, line, "scalar", "", True)
                elif target.open:
                    self.problem(line, f"the alias *{event.anchor} refers to the value that contains it")
                    target = Node(self.file, line, "scalar", "", True)
                self.add(target)
            elif name == "DocumentStartEvent" and self.root is not None:
                line = event.start_mark.line + 1
                self.problem(line, "a second YAML document ('---'); one file holds one document")
                return


def compose(data: bytes, file: str) -> Node | None:
    """The tree of a file; None when it holds nothing but comments. InfraError when it is no YAML."""
    text = decode(data, file)
    builder = _Builder(file)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        builder.feed(yaml.parse(text, Loader=loader))
    except yaml.YAMLError as error:
        raise InfraError(file, [*builder.problems, _explain(error, text, file)]) from None
    except (ValueError, RecursionError, OverflowError) as error:  # what the scanner does not guard itself
        raise InfraError(file, [*builder.problems, Problem(file, 0, "", f"not YAML: {error}")]) from None
    root = builder.root
    # Without aliases a file cannot hold more values than bytes; a page of them can mean billions.
    if root is not None and root.size > 100_000 + 10 * len(data):
        builder.problem(root.line, f"its aliases expand to {root.size:,} values")
    if builder.problems:
        raise InfraError(file, builder.problems)
    return root


def entries(node: Node, path: str, problems: list[Problem]) -> dict[str, tuple[Node, Node]]:
    """A mapping's keys as text -> (key, value), merge keys applied; duplicates are problems."""
    found: dict[str, tuple[Node, Node]] = {}
    merges: list[Node] = []
    for key, value in node.value:
        if key.kind != "scalar":
            problems.append(Problem(key.file, key.line, path, f"a key must be text, not {kind_of(key)}"))
            continue
        text = key.value
        if text == "<<" and key.plain:
            merges.append(value)
            continue
        if text in found:
            first = found[text][0].line
            where = f"{path}.{text}" if path else text
            problems.append(
                Problem(key.file, key.line, where, f"the key is there twice (first on line {first})")
            )
            continue
        found[text] = (key, value)
    for merge in merges:
        for source in merge.value if merge.kind == "sequence" else [merge]:
            if source.kind != "mapping":
                problems.append(
                    Problem(source.file, source.line, path, f"'<<' merges mappings, not {kind_of(source)}")
                )
                continue
            for text, pair in entries(source, path, problems).items():
                found.setdefault(text, pair)
    return found


def plain_value(node: Node, path: str, problems: list[Problem]) -> Any:
    """Plain Python data, for what is handed on as it is (`vars`)."""
    if node.kind == "mapping":
        return {
            k: plain_value(v, f"{path}.{k}", problems)
            for k, (_key, v) in entries(node, path, problems).items()
        }
    if node.kind == "sequence":
        return [plain_value(v, f"{path}[{i}]", problems) for i, v in enumerate(node.value)]
    value = scalar_value(node)
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(Problem(node.file, node.line, path, f"{node.value} cannot be handed on as JSON"))
        return None
    return value

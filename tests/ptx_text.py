"""PTX text as statements that know their place in it, so that one of them can be replaced."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LABEL = re.compile(r"\s*[\w$%]+:")
_MARK = re.compile(r"[{};]|:(?!:)|\.loc\b[^\n]*\n")  # what ends a statement, a scope, a label, or a line about sources
_STATEMENT = re.compile(r"(?:@(?P<guard>!?[\w$%]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.DOTALL)
_ENTRY = re.compile(r"(?:\.(?:visible|weak)\s+)?\.entry\s+(?P<name>[\w$]+)\s*(\([^)]*\))?[^{]*")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class Statement:
    """An instruction of a kernel, without its labels. start, end: its place in the text, guard to semicolon."""

    kernel: str
    start: int
    end: int
    guard: str  # "%p1", "!%p1" or empty
    opcode: str
    operands: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    def text(self, opcode: str | None = None, operands: tuple[str, ...] | None = None) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{opcode or self.opcode} {', '.join(self.operands if operands is None else operands)};"


def statements(text: str) -> Iterator[Statement]:
    """Of all kernels, in their order."""
    bare = _without_comments(text)
    for entry in _ENTRY.finditer(bare):
        for start, end in _spans(bare, entry.end()):
            if found := _STATEMENT.fullmatch(bare[start : end - 1].strip()):
                operands = tuple(_operands(found["operands"]))
                yield Statement(entry["name"], start, end, found["guard"] or "", found["opcode"], operands)


def without_others(text: str, kernel: str) -> str:
    """The text with no kernel but this one."""
    bare, parts, at = _without_comments(text), [], 0
    for entry in _ENTRY.finditer(bare):
        if entry["name"] != kernel:
            parts.append(text[at : entry.start()])
            *_, (_, last) = _spans(bare, entry.end())
            at = bare.index("}", last) + 1
    return "".join([*parts, text[at:]])


def _without_comments(text: str) -> str:
    return _COMMENT.sub(lambda comment: " " * len(comment[0]), text)


def _spans(text: str, at: int) -> Iterator[tuple[int, int]]:
    """What ends in a semicolon within the braces that open at `at`. A brace where a statement could begin is a scope;
    any other belongs to an operand."""
    depth, start, vector = 0, at, False
    for mark in _MARK.finditer(text, at):
        character, here = mark[0][-1], mark.start()
        if vector:
            vector = character != "}"
        elif character == ";":
            while text[start].isspace():
                start += 1
            yield start, mark.end()
            start = mark.end()
        elif character == "{" and text[start:here].strip():
            vector = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
            start = mark.end()
            if not depth:
                return
        elif character == "\n" or _LABEL.fullmatch(text[start : mark.end()]):
            start = mark.end()


def _operands(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            yield text[start:at].strip()
            start = at + 1
    if text[start:].strip():
        yield text[start:].strip()

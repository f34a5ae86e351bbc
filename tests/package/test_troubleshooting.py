"""docs/troubleshooting.md has each message of the package, word for word, and no other.

The messages are those of raise statements and warnings, the reasons why a backend cannot run, and the reasons why the
build makes no library. An expression in a message is "…" on the page.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.build import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
#: Calls whose text arguments are messages. The others raise what they are given.
REPORTS = {"warn", "exit", "BuildError", "LeftOut", "Library", "Kernels"}
#: Names of functions that return a reason, and of variables that hold one.
REASON = re.compile(r"why_not|reason|cause|too_large|^_open$|^_cache$|^build_of$|^_copy$|^_lost$")
#: The shortest message in words. Shorter texts are names and parts.
WORDS = 3


def messages(source: str) -> set[str]:
    """The messages of a Python file, each with "…" for every expression."""
    tree = ast.parse(source)
    texts = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value, (ast.Constant, ast.JoinedStr))
    }

    def templates(node: ast.expr | None) -> Iterator[str]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else inner(part) for part in node.values)
        elif isinstance(node, ast.IfExp):
            yield from templates(node.body)
            yield from templates(node.orelse)
        elif isinstance(node, ast.BoolOp):
            for value in node.values:
                yield from templates(value)

    def inner(part: ast.expr) -> str:
        """The text of a constant of the module, "…" for any other expression."""
        value = part.value if isinstance(part, ast.FormattedValue) else part
        known = texts.get(value.id) if isinstance(value, ast.Name) else None
        return next(templates(known)) if isinstance(known, (ast.Constant, ast.JoinedStr)) else "…"

    def reported() -> Iterator[ast.expr | None]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                yield from node.exc.args
            elif isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in REPORTS:
                    yield from node.args
            elif isinstance(node, ast.FunctionDef) and REASON.search(node.name):
                yield from (inside.value for inside in ast.walk(node) if isinstance(inside, ast.Return))
            elif isinstance(node, ast.Assign) and any(REASON.search(ast.unparse(target)) for target in node.targets):
                yield node.value

    found = {" ".join(text.split()) for node in reported() for text in templates(node)}
    return {text for text in found if len(text.split()) >= WORDS}


def sources() -> list[Path]:
    return [ROOT / "setup.py", *sorted((ROOT / "steam_kernels").rglob("*.py"))]


def entries(page: str) -> list[str]:
    """The messages of a page: the code that begins an item of a list."""
    found = re.findall(r"(?ms)^- (`+)(.+?)\1(?!`)", page)
    return [" ".join(text.split()) for _, text in found]


def test_every_message_has_an_entry() -> None:
    found = {text: path.name for path in sources() for text in messages(path.read_text())}
    assert len(found) > 90
    page = set(entries(PAGE.read_text()))
    assert {text: name for text, name in found.items() if text not in page} == {}


def test_every_entry_is_a_message() -> None:
    found = {text for path in sources() for text in messages(path.read_text())}
    page = entries(PAGE.read_text())
    assert [text for text in page if text not in found] == []
    assert len(page) == len(set(page))


def test_every_entry_says_what_to_do() -> None:
    text = re.sub(r"\n\n(?!- ).*?(?=\n- |\Z)", "", PAGE.read_text(), flags=re.DOTALL)
    items = re.findall(r"(?ms)^- (.*?)(?=^- |\Z)", text)
    advice = [item.partition(" — ")[2] for item in items]
    assert len(items) == len(entries(PAGE.read_text())) and all(len(said.split()) >= 3 for said in advice)


def test_the_collector_sees_messages() -> None:
    source = """
PREFIX = "a part of"
def f(x):
    if x:
        raise ValueError(f"{PREFIX} the text, got {x!r}")
    warnings.warn("a warning of "
        f"two {x} literals", stacklevel=2)
    raise RuntimeError(x.reason)
def why_not(call):
    if call:
        return f"{call} is the first reason" if call else "this is the second"
    cause = "a third, kept in a name" if call else ""
    return Library(path, reason or "the fourth of these")
def other():
    return "not a message at all"
"""
    assert messages(source) == {
        "a part of the text, got …",
        "a warning of two … literals",
        "… is the first reason",
        "this is the second",
        "a third, kept in a name",
        "the fourth of these",
    }


@pytest.mark.parametrize("tick", ["`", "``"])
def test_the_page_is_read(tick: str) -> None:
    assert entries(f"text `code`\n\n- {tick}a message\n  of … lines{tick} — what `to` do\n") == ["a message of … lines"]

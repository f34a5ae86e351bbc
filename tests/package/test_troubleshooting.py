"""docs/troubleshooting.md has each message of the package, word for word, and no other.

The messages are those of raise statements and warnings, the reasons why a backend cannot run, the reasons why the
build makes no library, and the errors of the compiled code. An expression in a message is "…" on the page.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.build import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
#: Calls whose text arguments are messages. The others raise what they are given.
REPORTS = {"warn", "exit", "BuildError", "LeftOut", "Library", "Kernels"}
#: Names of functions that return a reason, and of variables that hold one.
REASON = re.compile(r"why_not|reason|cause|too_large|^_open$|^_cache$|^build_of$|^_copy$|^_lost$")
#: What a format of C replaces: one value, or the digits of a number that are values one after the other.
FORMAT = re.compile(r"(?:%d)+0|%(?:l*[dsugz]+)?")
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


def arguments(source: str, start: int) -> list[str]:
    """The arguments of a call in C++ whose open bracket ends at ``start``. Operands of + count as arguments."""
    depth, found = 1, [""]
    for match in re.compile(r'"(?:[^"\\]|\\.)*"|.', re.DOTALL).finditer(source, start):
        token = match[0]
        depth += (token in "([{") - (token in ")]}")
        if depth == 0 or token == ";":
            break
        if depth == 1 and token in ",+":
            found.append("")
        else:
            found[-1] += token
    return found


def messages_in_c(source: str) -> set[str]:
    """The messages of a file of C++: of checks, of formats, and of texts that a function returns."""
    source = re.sub(r"(?m)^ *//.*$", "", source)
    found = set()
    for call in re.finditer(r'\b(?:(STD_TORCH_CHECK|snprintf|fail)\(|return (?="))', source):
        parts = []
        for argument in arguments(source, call.end()):
            joined = re.sub(r'"\s*PRI\w+', '"', re.sub(r'"\s*PRI\w+\s*"', "", argument))
            literals = re.findall(r'"((?:[^"\\]|\\.)*)"', joined)
            parts.append(re.sub(FORMAT, "…", "".join(literals)) if literals else "…")
        texts = [part for part in parts if part != "…"]
        formatted = call[1] in ("snprintf", "fail")
        found.add(texts[0] if formatted and texts else "".join(parts[call[1] == "STD_TORCH_CHECK" :]))
    # paths of the system's files are no messages
    return {text for text in found if len(text.split()) >= WORDS and not text.startswith("/")}


def all_messages() -> dict[str, str]:
    """Each message, with the name of a file that has it."""
    python = [ROOT / "setup.py", *sorted((ROOT / "steam_kernels").rglob("*.py"))]
    compiled = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
    found = {text: path.name for path in python for text in messages(path.read_text())}
    return found | {text: path.name for path in compiled for text in messages_in_c(path.read_text())}


def entries(page: str) -> list[str]:
    """The messages of a page: the code that begins an item of a list."""
    found = re.findall(r"(?ms)^- (`+)(.+?)\1(?!`)", page)
    return [" ".join(text.split()) for _, text in found]


def test_every_message_has_an_entry() -> None:
    found = all_messages()
    assert len(found) > 130
    page = set(entries(PAGE.read_text()))
    assert {text: name for text, name in found.items() if text not in page} == {}


def test_every_entry_is_a_message() -> None:
    found = all_messages()
    page = entries(PAGE.read_text())
    assert [text for text in page if text not in found] == []
    assert len(page) == len(set(page))


def test_every_entry_says_what_to_do() -> None:
    text = re.sub(r"\n\n(?!- ).*?(?=\n- |\Z)", "", PAGE.read_text(), flags=re.DOTALL)
    items = [" ".join(item.split()) for item in re.findall(r"(?ms)^- (.*?)(?=^- |\Z)", text)]
    assert len(items) == len(entries(PAGE.read_text()))
    assert [item for item in items if len(item.partition(" — ")[2].split()) < 3] == []


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


def test_the_collector_sees_messages_in_c() -> None:
    source = """
// STD_TORCH_CHECK(false, "a comment is no message");
STD_TORCH_CHECK(a == f(b, c), "steam: ", name, " must be (", shape,
                ")");
std::snprintf(text, sizeof(text), "there are %zu bytes, for %" PRId64 " x %" PRId64 " of %d%d0",
              bytes, "NCHW");
return report.fail(STATUS, "the field must be finite, got %g", p.scale);
std::snprintf(path, sizeof(path), "/sys/%s a b c", name);
return "the reach is " + std::to_string(reach) + " nodes";
"""
    assert messages_in_c(source) == {
        "steam: … must be (…)",
        "there are … bytes, for … x … of …",
        "the field must be finite, got …",
        "the reach is … nodes",
    }

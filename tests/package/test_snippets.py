"""The Python code of the documentation runs without changes.

A comment ``<!-- needs: package -->`` above a block names the packages that it imports besides torch and this package.
If a package is missing, the block runs with the stub of that name in tests/support/stubs. Without a stub it is skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import re
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]
STUBS = pathlib.Path(__file__).parents[1] / "support" / "stubs"
PAGES = [
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in path.read_text()
]


class Snippet(NamedTuple):
    page: str
    heading: str
    line: int
    needs: list[str]
    code: str


def snippets(page: str) -> list[Snippet]:
    found: list[Snippet] = []
    heading, needs, code, start = "", [], None, 0
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        if code is not None:
            if line.rstrip() == "```":
                found.append(Snippet(page, heading, start, needs, "\n".join(code)))
                needs, code = [], None
            else:
                code.append(line)
        elif line.startswith("## "):
            heading = line[3:].strip()
        elif comment := re.fullmatch(r"<!-- needs: (.*) -->", line.strip()):
            needs = re.split(r"[,\s]+", comment[1].strip())
        elif line.startswith("```python"):
            code, start = [], number
    assert code is None, f"{page}: the block at line {start} does not end"
    return found


SNIPPETS = [snippet for page in PAGES for snippet in snippets(page)]


def test_every_page_has_snippets() -> None:
    assert {snippet.page for snippet in SNIPPETS} == set(PAGES) and len(PAGES) >= 4
    blocks = sum((ROOT / page).read_text().count("```python") for page in PAGES)
    assert len(SNIPPETS) == blocks


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: f"{s.page}:{s.line}:{s.heading}")
def test_snippet(snippet: Snippet, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stubs = [name for name in snippet.needs if importlib.util.find_spec(name) is None]
    for name in stubs:
        if not (STUBS / name).is_dir():
            pytest.importorskip(name)  # a missing package fails in CI
    if stubs:
        monkeypatch.syspath_prepend(str(STUBS))
    before = set(sys.modules)
    try:
        # The blank lines make a traceback show the line of the page.
        exec(compile("\n" * snippet.line + snippet.code, snippet.page, "exec"), {"__name__": "__main__"})
    finally:
        for module in set(sys.modules) - before:
            if stubs and (module.split(".")[0] in stubs or module.rpartition(".")[2] in stubs):
                del sys.modules[module]


def test_a_missing_package_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        pytest.importorskip("no_such_package")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no_such_package"):
        pytest.importorskip("no_such_package")

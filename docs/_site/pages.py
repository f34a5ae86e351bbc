"""Hooks of mkdocs: they make site pages of the pages that are written for GitHub.

The site has pages from the root of the project, and its links lead where the links on GitHub lead. A link to another
file of the project leads to a copy of the file in the site. A link to a folder becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
#: The site's pages that are files in the root of the project.
FROM_ROOT = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
#: The site's folder of copies of other files.
COPIES = "source"

_SOURCE_OF = {page: source for source, page in FROM_ROOT.items()}
_FENCE = re.compile(r"(?ms)(^```.*?^```$)")
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s]+)\)")
_ITEM = re.compile(r"[*-] |\d+\. ")


def source_of(page: str) -> str:
    """The path of a page's file from the root of the project."""
    return _SOURCE_OF.get(page, f"docs/{page}")


def in_site(link: str, page: str) -> str | None:
    """The link of a file ``page`` as a link of the site. None stands for a link to a folder."""
    path, hash_, anchor = link.partition("#")
    if re.match(r"\w+:", link) or not path:
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(page)), path))
    if target in FROM_ROOT:
        there = FROM_ROOT[target]
    elif target.startswith("docs/"):
        there = target.removeprefix("docs/")
    elif (ROOT / target).is_dir():
        return None
    else:
        there = f"{COPIES}/{target}"
    return there + hash_ + anchor


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """``markdown`` with ``change`` applied to the parts that are not blocks of code."""
    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def for_site(markdown: str, page: str) -> str:
    """The Markdown of a page as the site's Markdown."""

    def link(found: re.Match[str]) -> str:
        there = in_site(found[3], page)
        return found[2] if there is None else f"{found[1]}[{found[2]}]({there})"

    return outside_code(markdown, lambda text: _LINK.sub(link, separated(text)))


def separated(text: str) -> str:
    """``text`` with an empty line before each list, which GitHub does not need and Python's Markdown does."""
    lines = text.split("\n")
    kept: list[str] = []
    for i, line in enumerate(lines):
        before = lines[i - 1] if i else ""
        inside = any(_ITEM.match(above) for above in _paragraph_above(lines, i))
        if _ITEM.match(line) and before.strip() and not inside:
            kept.append("")
        kept.append(line)
    return "\n".join(kept)


def _paragraph_above(lines: list[str], i: int) -> list[str]:
    above = []
    while i and lines[i - 1].strip():
        i -= 1
        above.append(lines[i])
    return above


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of the root, and copies of the files that pages link to."""
    for source, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page in [file.src_uri for file in files.documentation_pages()]:
        text = (ROOT / source_of(page)).read_text()
        for _, _, link in _LINK.findall(_FENCE.sub("", text)):
            there = (in_site(link, page) or "").partition("#")[0]
            path = ROOT / there.removeprefix(f"{COPIES}/")
            if there.startswith(f"{COPIES}/") and path.is_file() and files.get_file_from_path(there) is None:
                files.append(File.generated(config, there, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return for_site(markdown, page.file.src_uri)

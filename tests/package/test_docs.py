"""All files, headings and folders that the pages name exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"(?m)^#+ (.*)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path) -> list[str]:
    """The links of a page to files or headings that do not exist."""
    bad = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            bad.append(link)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title: 7×7\n[a](#a-title-77) [b](#other) [c](none.md) [d](page.md#none) [e](https://x.org/y)\n"
    )
    assert broken(page) == ["#other", "none.md", "page.md#none"]


def test_the_map_has_every_folder_and_page() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where to find what")[2].partition("\n## ")[0]
    mapped = re.findall(r"(?m)^\| `([^`]+)/` \|", text)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        assert set(mapped) == {name.partition("/")[0] for name in listed.stdout.splitlines() if "/" in name}
    assert mapped and all((ROOT / folder).is_dir() for folder in mapped)
    linked = re.findall(r"\]\(docs/([^)#]+)\)", text)
    assert sorted(linked) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_first_screen_of_the_readme_says_once_that_no_gpu_has_run_the_kernels() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(re.findall("(?i)no gpu has", text)) == 1
    assert "No GPU has run" in "\n".join(text.splitlines()[:20])


def test_the_readme_has_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert re.findall(r"(?m)^    make ([\w-]+)", text) == ["demo", "test"]

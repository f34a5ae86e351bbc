"""The site of the documentation: `make docs` builds it without a warning, and its pages read well."""

from __future__ import annotations

import ast
import html
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.build import ROOT

#: What the build reads.
INPUTS = ("mkdocs.yml", "docs", "steam_kernels", *(page.name for page in sorted(ROOT.glob("*.md"))))


def build(tree: Path, target: Path) -> subprocess.CompletedProcess[str]:
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(ROOT, target)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def part(name: str) -> ModuleType:
    """A file of docs/_site as a module."""
    for needed in ("mkdocs", "griffe"):
        pytest.importorskip(needed)
    spec = importlib.util.spec_from_file_location(f"docs_site_{name}", ROOT / "docs" / "_site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def raw(page: str) -> list[str]:
    """Texts of a built page that show markup: roles, literals, links, lists or tables that were not recognised."""
    article = re.search(r"<article.*?</article>", page, re.DOTALL)
    if article is None:
        return []
    text = re.sub(r"<pre.*?</pre>", "", article[0], flags=re.DOTALL)
    text = re.sub(r"<code.*?</code>", "", text, flags=re.DOTALL)
    blocks = (html.unescape(re.sub("<[^>]+>", "", block)) for block in re.split(r"</(?:p|li|td|th|h\d|div)>", text))
    markup = re.compile(r":\w+:`|``|\]\(|\*\*|::$|\n *[*|-] |\n *\d+\. |^ *```", re.MULTILINE)
    return [block.strip() for block in blocks if markup.search(block)]


def loaded(page: str) -> list[str]:
    """What a built page loads from another server."""
    tags = re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", page)
    return [tag for tag in tags if re.search(r'(?:src|href)="(?:https?:)?//', tag) and 'rel="canonical"' not in tag]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_has_every_page(site: Path) -> None:
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} | {"index", "changelog", "contributing", "security"}
    assert pages <= {page.stem for page in site.glob("*.html")}
    assert not (site / "_site").exists()
    linked = {path.split("#")[0] for path in re.findall(r'href="([^":]+)"', (site / "index.html").read_text())}
    assert all((site / path).exists() for path in linked if path and path != ".")


@pytest.mark.slow
def test_no_page_shows_markup_or_loads_from_another_server(site: Path) -> None:
    pages = {page.name: page.read_text() for page in site.glob("*.html")}
    assert len(pages) > 20
    assert {name: found for name, text in pages.items() if (found := raw(text))} == {}
    assert {name: found for name, text in pages.items() if (found := loaded(text))} == {}
    styles = [path for path in site.rglob("*.css") if re.search(r"url\([\"']?(?:https?:)?//", path.read_text())]
    assert styles == []


@pytest.mark.slow
def test_the_reference_has_the_public_names_and_the_marks_stay(site: Path) -> None:
    import steam_kernels

    api = (site / "api.html").read_text()
    entries = {name.rpartition(".")[2] for name in re.findall(r'id="(steam_kernels\.[\w.]+)"', api)}
    assert {*steam_kernels.__all__, *steam_kernels.models.__all__} - entries == set()
    text = (site / "reconstruction.html").read_text() + (site / "math.html").read_text()
    assert all(text.count(f"[{mark}]") >= 3 for mark in ("paper", "second-hand", "derived", "ours"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "planted",
    [
        {
            "docs/models.md": "[a](no_such_page.md) [b](cost.md#no-such-heading)",
            "README.md": "[c](docs/cost.md#no-heading-like-this)",
            "docs/api.md": "[d][steam_kernels.no_such_name]",
            "docs/new_page.md": "# A page that is in no menu",
        },
        {"docs/api.md": "::: steam_kernels.no_such_object"},
    ],
    ids=["links", "object"],
)
def test_a_broken_link_or_reference_fails(tmp_path: Path, planted: dict[str, str]) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for source in INPUTS:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tree / source, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / source, tree)
    for name, text in planted.items():
        with open(tree / name, "a") as page:
            page.write(f"\n{text}\n")
    done = build(tree, tmp_path / "site")
    assert done.returncode != 0
    wanted = re.findall(r"no[-_](?:such|heading)[\w-]*|new_page", " ".join(f"{k} {v}" for k, v in planted.items()))
    assert wanted and [text for text in wanted if text not in done.stdout + done.stderr] == []


def test_markup_and_other_servers_are_seen() -> None:
    shown = ("a :class:`x` b", "``x``", "[a](b.md)", "**a**", "so:\n- a\n- b", "a table\n| a | b |", "this::")
    for text in shown:
        assert raw(f"<article><p>{text}</p></article>") == [text]
    assert raw("<article><p>a - b | c [ours]</p><pre>- a\n**b**</pre><p><code>``</code></p></article>") == []
    assert len(loaded('<script src="https://x.org/a.js"></script><link href="//x.org/b.css"><img src="a.png">')) == 2


def test_links_lead_where_they_lead_on_github() -> None:
    pages = part("pages")
    assert pages.in_site("docs/math.md#forward", "index.md") == "math.md#forward"
    assert pages.in_site("../CONTRIBUTING.md#prose", "math.md") == "contributing.md#prose"
    assert pages.in_site("images/speedup.svg", "benchmarks.md") == "images/speedup.svg"
    assert pages.in_site("LICENSE", "index.md") == "source/LICENSE"
    assert pages.in_site("../examples/cpp", "cpp.md") is None
    assert pages.in_site("https://x.org/y", "index.md") == "https://x.org/y"
    text = "See [a](docs/math.md), ![b](docs/images/c.svg) and [d](examples).\n```\n[a](docs/math.md)\n```\n"
    wanted = "See [a](math.md), ![b](images/c.svg) and d.\n```\n[a](docs/math.md)\n```\n"
    assert pages.for_site(text, "index.md") == wanted


def test_lists_begin_after_an_empty_line() -> None:
    pages = part("pages")
    assert pages.separated("so:\n- a\n  b\n- c\n\n1. d\n2. e") == "so:\n\n- a\n  b\n- c\n\n1. d\n2. e"


def test_docstrings_become_markdown() -> None:
    text = """See :class:`steam_kernels.FusedSTEAM`, :func:`ring` and docs/math.md. A block::

        code

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    found = part("docstrings").markdown(text)
    assert '<autoref optional identifier="steam_kernels.FusedSTEAM"><code>FusedSTEAM</code></autoref>' in found
    assert "`ring` and [math.md](math.md). A block:\n" in found
    assert "        TypeError | ValueError: an argument" in found


def test_make_docs_is_strict_and_installs_the_extra() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (command,) = re.findall(r"mkdocs build (.*)", makefile)
    assert "--strict" in command and "--quiet" not in command  # mkdocs counts no warning if it is quiet
    (pattern,) = re.findall(r"sed -n '(.*)' pyproject\.toml", makefile)
    command = ["sed", "-n", pattern.replace("$$", "$"), str(ROOT / "pyproject.toml")]
    done = subprocess.run(command, capture_output=True, text=True)
    (listed,) = re.findall(r"(?m)^docs = (\[.*\])$", (ROOT / "pyproject.toml").read_text())
    assert done.returncode == 0 and shlex.split(done.stdout) == ast.literal_eval(listed)

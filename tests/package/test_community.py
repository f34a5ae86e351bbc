"""The workflows, the forms of issues and the citation agree with the Makefile and with each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.build import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
#: Files that name targets of make.
NAMING = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / ".ci" / "run", *WORKFLOWS]


def read(path: Path) -> Any:
    return pytest.importorskip("yaml").safe_load(path.read_text())


def targets() -> set[str]:
    return set(re.findall(r"(?m)^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text()))


def named(text: str) -> set[str]:
    """The targets of make in commands: in code, in blocks of code, in steps, and in lines of a script."""
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"(?m)^(?: *- run: | {4})(.*)", text)
    code += re.findall(r"(?m)^make .*", text)
    command = re.compile(r"(?:^|&& |; )(?:[A-Z_]+=\S+ )*make ([a-z][\w-]*)")
    return {target for line in code for target in command.findall(line)}


def test_every_named_target_exists() -> None:
    there = targets()
    assert {"demo", "test", "test-all", "lint", "docs", "wheel"} <= there
    missing = {path.name: lost for path in NAMING if (lost := named(path.read_text()) - there)}
    assert missing == {}


def test_a_target_that_does_not_exist_is_found() -> None:
    text = "Run `X=1 make one X=1`, `cmake two`.\n\n    make three  # make a tree\n"
    text += "      - run: make four\nmake five\nwe make six\n"
    assert named(text) == {"one", "three", "four", "five"}


def test_the_workflows_call_the_targets_of_ci() -> None:
    steps = [
        (path.stem, job, step) for path in WORKFLOWS for job in read(path)["jobs"].values() for step in job["steps"]
    ]
    called = {name: {step["run"] for at, _, step in steps if at == name and "run" in step} for name, _, _ in steps}
    (installs,) = (step for step in called["wheels"] if step.startswith("sudo "))
    assert called == {
        "docs": {"make docs"},
        "test": {"make lint", "make test", "make test-all"},
        "wheels": {"make wheel", ".ci/check_wheel_aarch64", installs},
    }
    needed = re.search(r'(?m)^packages="(.*)"$', (ROOT / ".ci" / "check_wheel_aarch64").read_text())
    assert needed is not None and installs.endswith(f" {needed.group(1)}")
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for _, _, step in steps if "uses" in step)
    for path in WORKFLOWS:
        assert read(path)["permissions"] == {"contents": "read"}, path.name
        assert all("runs-on" in job for job in read(path)["jobs"].values()), path.name


def test_the_tests_run_on_both_processors_with_both_compilers() -> None:
    job = read(ROOT / ".github" / "workflows" / "test.yml")["jobs"]["test"]
    runs = {(row["runner"].endswith("-arm"), row["compiler"]) for row in job["strategy"]["matrix"]["include"]}
    assert runs == {(arm, compiler) for arm in (False, True) for compiler in ("g++", "clang++")}
    assert job["env"]["CXX"] == "${{ matrix.compiler }}"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_each_form_asks_for_the_report(path: Path) -> None:
    form = read(path)
    assert form["name"] and form["description"]
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert all({"id", "attributes"} <= part.keys() and part["attributes"]["label"] for part in fields)
    assert len({part["id"] for part in fields}) == len(fields)
    assert any("python -m steam_kernels.env_report" in part["attributes"]["label"] for part in fields)


def test_the_citation_agrees_with_the_readme_and_the_licence() -> None:
    citation, readme = read(ROOT / "CITATION.cff"), (ROOT / "README.md").read_text()
    (paper,) = citation["references"]
    plain = re.sub(r"[{}\\]", "", readme)
    assert f"= {paper['title']}," in plain and f"= {citation['title']}," in plain
    authors = " and ".join(f"{each['family-names']}, {each['given-names']}" for each in paper["authors"])
    assert f"= {authors}," in plain
    (number,) = re.findall(r"eprint +=\s*(\S+),", plain)
    assert paper["url"] == f"https://arxiv.org/abs/{number}" and paper["identifiers"][0]["value"] == f"arXiv:{number}"
    project = (ROOT / "pyproject.toml").read_text()
    assert f'license = "{citation["license"]}"' in project and f'Paper = "{paper["url"]}"' in project


def test_the_classifiers_are_what_the_readme_says_was_tried() -> None:
    project, readme = (ROOT / "pyproject.toml").read_text(), (ROOT / "README.md").read_text()
    (row,) = re.findall(r"(?m)^\| Python \| CPython ([\d., ]+)\|", readme)
    assert re.findall(r"Python :: (3\.\d+)", project) == re.findall(r"3\.\d+", row)
    assert re.findall(r"Operating System :: ([^\"]*)", project) == ["POSIX :: Linux"]
    assert re.findall(r"Implementation :: (\w+)", project) == ["CPython"]

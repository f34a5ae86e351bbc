"""The rules of the code that a linter does not know: lengths of files, numbers of parameters, imports of test files."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.build import ROOT

LINES, PARAMETERS = 500, 10
CODE = {".py", ".h", ".c", ".cpp", ".cu", ".cuh"}
#: What stands between the parameters of a function in C++ and its body.
DEFINITION = re.compile(r"(const|noexcept|override|->\s*[\w:<>*& ]+|\s)*[{:]")
#: Public signatures, which name every option.
PUBLIC = {("steam_kernels/functional.py", "steam"), ("steam_kernels/layer.py", "__init__")}


@pytest.fixture(scope="module")
def files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("the tree is not a git checkout")
    found = [ROOT / name for name in listed.stdout.splitlines() if Path(name).suffix in CODE]
    return [path for path in found if path.is_file()]


def is_kernel(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def crowded(source: str, name: str) -> list[str]:
    """Functions with too many parameters, other than kernels and public signatures."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [
        f"{name}: {f.name}"
        for f in functions
        if len(f.args.posonlyargs + f.args.args + f.args.kwonlyargs) > PARAMETERS
        and not is_kernel(f)
        and (name, f.name) not in PUBLIC
    ]


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)


def crowded_in_c(source: str, name: str) -> list[str]:
    """The same for the definitions of functions in C++ and CUDA. A kernel is __global__."""
    source, found = without_comments(source), []
    for match in re.finditer(r"(\w+)\(", source):
        depth, end, commas = 1, match.end(), 0
        while depth and end < len(source):
            # Commas between < and > count too: no type of a parameter here has that many of them.
            depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(source[end], 0)
            commas += depth == 1 and source[end] == ","
            end += 1
        before = source[max(source.rfind(mark, 0, match.start()) for mark in ";}") + 1 : match.start()]
        is_definition = DEFINITION.match(source, end)
        if commas >= PARAMETERS and is_definition and "__global__" not in before:
            found.append(f"{name}: {match[1]}")
    return found


def test_no_file_is_long(files: list[Path]) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    assert len(files) > 150 and {path: n for path, n in lengths.items() if n > LINES} == {}


def test_no_function_has_many_parameters(files: list[Path]) -> None:
    python = [path for path in files if path.suffix == ".py"]
    assert [f for path in python for f in crowded(path.read_text(), str(path.relative_to(ROOT)))] == []


def test_no_function_in_c_has_many_parameters(files: list[Path]) -> None:
    compiled = [path for path in files if path.suffix in CODE - {".py"}]
    assert len(compiled) > 40
    assert [f for path in compiled for f in crowded_in_c(path.read_text(), str(path.relative_to(ROOT)))] == []


def test_a_function_in_c_with_many_parameters_is_found() -> None:
    parameters = ", ".join(f"Pair<int, {i}> a{i} = {{1, 2}}" for i in range(11))
    source = (
        f"int few(int a, int b) {{ return call({parameters}); }}\n"
        f"template <class T>\nint many({parameters}) const {{\n}}\n"
        f"struct S {{ S({parameters}) : a_(a) {{}} }};\n"
        f"template <class T>\n__global__ void __launch_bounds__(256, kMost) kernel({parameters}) {{}}\n"
    )
    assert crowded_in_c(source, "file.cu") == ["file.cu: many", "file.cu: S"]


def test_a_function_with_many_parameters_is_found() -> None:
    parameters = ", ".join("abcdefghijk")
    source = f"def few(a): pass\n\ndef many({parameters}): pass\n\n@triton.jit\ndef kernel({parameters}): pass\n"
    assert crowded(source, "file.py") == ["file.py: many"]


def test_test_files_do_not_import_each_other(files: list[Path]) -> None:
    """Except the tests of the GPU suite, whose subject is a test file."""
    found = set()
    for path in files:
        if path.name.startswith("test_") and path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
                    if any(module.rpartition(".")[2].startswith("test_") for module in modules):
                        found.add(path.name)
    assert found <= {"test_gpu_suite.py"}


def test_what_make_runs_keeps_the_bytecode_of_modules() -> None:
    """pip writes none. A process that writes none either compiles torch for many seconds, each time."""
    shown = subprocess.run(
        ["make", "--no-print-directory", "--eval", "show:; @env", "show"],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "STEAM_KERNELS_BUILD=" in shown and "PYTHONDONTWRITEBYTECODE" not in shown

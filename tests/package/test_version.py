"""Only steam_kernels/__init__.py states the version, and everything that is built from the tree reads it there."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

import steam_kernels
from tests.support.build import ROOT, setup_py, tool

PLANTED = "7.8.9"
SOURCE = "steam_kernels/__init__.py"


def plant(tree: Path, version: str = PLANTED) -> None:
    path = tree / SOURCE
    text, count = re.subn(r'(?m)^__version__ = ".*"$', f'__version__ = "{version}"', path.read_text())
    assert count == 1
    path.write_text(text)


def test_no_other_file_of_the_build_or_the_package_has_the_version() -> None:
    files = [ROOT / name for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "MANIFEST.in")]
    for folder in ("steam_kernels", "csrc", "include", "cmake", "examples"):
        files += [f for f in (ROOT / folder).rglob("*") if f.is_file() and f.suffix not in (".so", ".pyc")]
    version = re.compile(rf"(?<![\d.]){re.escape(steam_kernels.__version__)}(?![\d.])")
    assert [str(f.relative_to(ROOT)) for f in files if version.search(f.read_text())] == [SOURCE]


def test_the_changelog_describes_the_version() -> None:
    titles = re.findall(r"(?m)^## \[?([^]\n ]+)", (ROOT / "CHANGELOG.md").read_text())
    assert steam_kernels.__version__ in titles[:2]  # the first title may be Unreleased


def test_the_sdist_and_the_wheel_built_from_it_have_the_version(tree: Path) -> None:
    """The build works without a torch that can be imported, as in an isolated build."""
    plant(tree)
    (tree.parent / "modules" / "torch" / "__init__.py").write_text("raise ImportError")
    done = setup_py(tree, "sdist", STEAM_KERNELS_BUILD="skip")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").iterdir()
    assert archive.name == f"steam_kernels-{PLANTED}.tar.gz"
    with tarfile.open(archive) as packed:
        packed.extractall(tree / "unpacked", filter="data")
    unpacked = tree / "unpacked" / f"steam_kernels-{PLANTED}"
    shutil.copytree(tree.parent / "modules", unpacked.parent / "modules")  # setup_py finds the stub of torch there
    done = setup_py(unpacked, "bdist_wheel", STEAM_KERNELS_BUILD="skip")
    assert done.returncode == 0, done.stderr
    assert [wheel.name for wheel in (unpacked / "dist").iterdir()] == [f"steam_kernels-{PLANTED}-py3-none-any.whl"]


def cmake_version(build: Path) -> str:
    (version,) = re.findall(r'(?m)^set\(PACKAGE_VERSION "(.*)"\)', (build / "steamConfigVersion.cmake").read_text())
    return version


def test_the_cmake_package_has_the_version_and_follows_it(tree: Path, tmp_path: Path) -> None:
    cmake, ninja = tool("cmake"), tool("ninja")
    build = tmp_path / "build"

    def run(*arguments: str | Path) -> None:
        done = subprocess.run([cmake, *map(str, arguments)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    plant(tree)
    run("-S", tree, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DSTEAM_CUDA=OFF")
    assert cmake_version(build) == PLANTED
    plant(tree, "7.9.0")
    run("--build", build, "--target", "build.ninja")
    assert cmake_version(build) == "7.9.0"


@pytest.mark.parametrize("line", ['VERSION = "1.2.3"', "__version__ = read()", '__version__ = "1.2"'])
def test_cmake_refuses_a_version_that_it_cannot_read(tree: Path, tmp_path: Path, line: str) -> None:
    (tree / SOURCE).write_text(line + "\n")
    command = [tool("cmake"), "-S", str(tree), "-B", str(tmp_path / "build")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert 'no line of the form __version__ = "1.2.3"' in " ".join(done.stderr.split())

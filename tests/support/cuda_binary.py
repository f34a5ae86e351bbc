"""Figures of the compiled CUDA kernels: registers, shared memory, spills and wide accesses, from the build's objects.

    python -m tests.support.cuda_binary [TARGET...] prints the table; fails if a kernel spills or lacks a target (of
                                                    all that are recorded, or the given ones: 80 120), or if a figure is
                                                    worse than the recorded one of the same nvcc
    python -m tests.support.cuda_binary --record    records the figures and writes docs/cuda_verification.md's table

No GPU is needed, and no figure is a speed. cuobjdump and nvdisasm come from the PATH or from triton's wheel.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.tables import fill_marks

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / "cmake" / "CMakeFiles" / "steam_cuda_objects.dir" / "csrc" / "cuda"
SOURCES = ("forward", "backward")
BUDGETS = Path(__file__).with_name("cuda_budgets.json")
PAGE = ROOT / "docs" / "cuda_verification.md"
TARGETS = (75, 80, 90, 100, 120)


class Figures(NamedTuple):
    """The figures of one kernel on one target."""

    registers: int
    #: The shared memory of every block in bytes. A launch adds more, depending on the call.
    static_shared: int
    #: Instructions that load from or store to local memory.
    spills: int
    #: The percentage of 128-bit accesses in the bytes that global loads and stores in the code move.
    wide: int

    def worse_than(self, budget: Figures) -> list[str]:
        """The names of the figures that are worse than the recorded ones."""
        more = [name for name in self._fields[:3] if getattr(self, name) > getattr(budget, name)]
        return more + ["wide"] * (self.wide < budget.wide)


#: The figures by kernel and target.
Table = dict[str, dict[int, Figures]]


def tool(name: str) -> str | None:
    """The path of a program from the PATH or from triton's wheel."""
    triton = importlib.util.find_spec("triton")
    places = triton.submodule_search_locations if triton and triton.submodule_search_locations else []
    wheel = [str(Path(place) / "backends" / "nvidia" / "bin") for place in places]
    return shutil.which(name) or shutil.which(name, path=":".join(wheel) or "/nowhere")


def why_not() -> str:
    """ "" if the build's objects can be read, else the reason."""
    if missing := [name for name in ("cuobjdump", "nvdisasm", "c++filt") if tool(name) is None]:
        return f"{', '.join(missing)}: not found on the PATH or in triton's wheel"
    if missing := [name for name in SOURCES if not (OBJECTS / f"{name}.cu.o").is_file()]:
        return f"the CUDA library was not built in this tree ({', '.join(missing)}.cu.o is not there)"
    return ""


def run(name: str, *arguments: str | Path, **options: str | Path) -> str:
    program = tool(name)
    assert program is not None, name
    return subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, text=True, **options).stdout  # type: ignore[call-overload, no-any-return]


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """The mangled names of kernels in the short form `kernel<arguments>`."""
    names = list(mangled)
    lines = run("c++filt", *names).splitlines() if names else []
    found = [
        re.search(r"(\w+(?:<[^(]*>)?)\(", re.sub(r"\(anonymous namespace\)::|steam::", "", line)) for line in lines
    ]
    return {
        name: match.group(1).replace("__nv_bfloat16", "bfloat16").replace("__half", "half") if match else name
        for name, match in zip(names, found, strict=True)
    }


def read_code(code: str) -> dict[str, tuple[int, int]]:
    """Spills and the percentage of wide bytes by mangled kernel name, from the output of nvdisasm."""
    out = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", code, flags=re.MULTILINE)[1:]:
        name = re.split(r"[,\s]", section, maxsplit=1)[0]
        spills = len(re.findall(r"\b(?:LDL|STL)\b", section))
        moved: dict[int, int] = defaultdict(int)
        for suffix in re.findall(r"\b(?:LDG|STG)((?:\.\w+)*)", section):
            bits = re.search(r"\.[US]?(8|16|64|128|256)\b", suffix)
            width = int(bits.group(1)) if bits else 32
            moved[width] += width
        total = sum(moved.values())
        out[name] = spills, round(100 * sum(b for width, b in moved.items() if width >= 128) / total) if total else 0
    return out


def read_objects(paths: Iterable[Path]) -> Table:
    """The figures of every kernel and target in object files, without the kernel that only probes a device."""
    table: Table = defaultdict(dict)
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            run("cuobjdump", "-xelf", "all", path.resolve(), cwd=folder)
            for cubin in sorted(Path(folder).glob("*.cubin")):
                target = re.search(r"sm_(\d+)", cubin.name)
                assert target is not None, cubin.name
                usage = run("cuobjdump", "--dump-resource-usage", cubin)
                resources = {
                    name: (int(registers), int(shared))
                    for name, registers, shared in re.findall(r"Function (\S+):\s+REG:(\d+).*? SHARED:(\d+)", usage)
                }
                code = read_code(run("nvdisasm", "-c", cubin))
                names = short_names(resources)
                for mangled, (registers, shared) in resources.items():
                    table[names[mangled]][int(target.group(1))] = Figures(registers, shared, *code[mangled])
    return dict(sorted(table.items()))


def compiler() -> str:
    """The version of the nvcc that made the objects, such as 13.0.88."""
    described = (ROOT / "build" / "cmake" / "CMakeCache.txt").read_text()
    found = re.search(r"^STEAM_NVCC_VERSION:INTERNAL=(.*)$", described, flags=re.MULTILINE)
    assert found is not None, "CMake did not write down nvcc's version"
    return found.group(1)


def recorded() -> tuple[str, Table]:
    """The nvcc version of the recorded figures, and the figures."""
    content = json.loads(BUDGETS.read_text())
    kernels = content["kernels"]
    return content["nvcc"], {k: {int(t): Figures(*f) for t, f in row.items()} for k, row in kernels.items()}


def spilling(table: Mapping[str, Mapping[int, Figures]]) -> list[str]:
    """Every kernel and target with spills. No spills are recorded, so no version of nvcc may spill."""
    return sorted(
        f"{kernel} on sm_{target}: {figures.spills} spills"
        for kernel, row in table.items()
        for target, figures in row.items()
        if figures.spills
    )


def complaints(table: Mapping[str, Mapping[int, Figures]], budgets: Mapping[str, Mapping[int, Figures]]) -> list[str]:
    """A complaint for each kernel that only the objects or only the budgets have, and for each worse figure."""
    out = [f"{kernel}: no figures are recorded" for kernel in table if kernel not in budgets]
    out += [f"{kernel}: recorded, but not in the objects" for kernel in budgets if kernel not in table]
    for kernel in table.keys() & budgets.keys():
        for target, figures in table[kernel].items():
            if target not in budgets[kernel]:
                continue  # the build has a target that is not recorded
            budget = budgets[kernel][target]
            out += [
                f"{kernel} on sm_{target}: {name} {getattr(figures, name)}, recorded {getattr(budget, name)}"
                for name in figures.worse_than(budget)
            ]
    return sorted(out)


def markdown(table: Table, nvcc: str) -> str:
    """A table with a row for each kernel and a column for each target: registers, spills if any, wide percentage."""
    targets = sorted({target for row in table.values() for target in row})
    lines = [f"nvcc {nvcc}. Registers of a thread · percentage of bytes in 128-bit accesses.", ""]
    lines += ["| kernel | " + " | ".join(f"sm_{t}" for t in targets) + " |", "|---|" + "---|" * len(targets)]
    for kernel, row in table.items():
        cells = [
            f"{f.registers} · {f.wide} %" + (f" · {f.spills} spills" if f.spills else "")
            for f in (row[t] for t in targets)
        ]
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page_with(table: Table, nvcc: str) -> str:
    """The text of the documentation page with these figures."""
    return fill_marks(PAGE.read_text(), "figures", markdown(table, nvcc))


def main() -> int:
    if reason := why_not():
        print(f"CUDA kernels NOT EXAMINED: {reason}")
        return 1
    table, nvcc = read_objects(OBJECTS / f"{name}.cu.o" for name in SOURCES), compiler()
    print(markdown(table, nvcc))
    if spills := spilling(table):
        print("\n".join(spills))
        return 1
    given = sys.argv[1:]
    targets = TARGETS if not given or given == ["--record"] else tuple(map(int, given))
    missing = [t for t in targets if any(t not in row for row in table.values())]
    if missing:
        print(f"not built for {', '.join(f'sm_{t}' for t in missing)} (CMAKE_CUDA_ARCHITECTURES)")
        return 1
    table = {kernel: {t: row[t] for t in targets} for kernel, row in table.items()}
    if given == ["--record"]:
        rows = ",\n".join(f"    {json.dumps(kernel)}: {json.dumps(row)}" for kernel, row in table.items())
        BUDGETS.write_text(f'{{\n  "nvcc": "{nvcc}",\n  "kernels": {{\n{rows}\n  }}\n}}\n')
        PAGE.write_text(page_with(table, nvcc))
        return 0
    recorded_nvcc, budgets = recorded()
    if nvcc != recorded_nvcc:
        print(f"NOT COMPARED: the figures are of nvcc {recorded_nvcc}, the objects of {nvcc}")
        return 0
    found = complaints(table, budgets)
    print("\n".join(found) or f"{len(table)} kernels, {len(targets)} targets: no figure is worse than recorded")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())

"""Checks that no code of one CPU variant can run in place of another's: `python .ci/check_symbols.py BUILD_DIR`.

The variants are the same sources, compiled with different -march flags; float64 is compiled once. If the objects of
two variants have the same weak symbol (an inline function, a template instance), the linker keeps one of them for
both, and a processor without AVX-512 may run AVX-512 code. So an object of a variant must have no weak symbol, and
exports only the name <source>_<variant>, which dispatch.cpp calls.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

VARIANTS = ("avx512", "avx2", "generic")
COMPILED_ONCE = "float64"
SOURCES = ("forward", "backward")


def complaints(path: Path, entry: str) -> list[str]:
    """What is wrong with the symbols of one object file of a variant, whose one export is `entry`."""
    listing = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout
    bad, entries = [], 0
    for line in listing.splitlines():
        found = re.match(r"[0-9a-fA-F]*\s+(\S) (.*)", line)
        if found is None:
            bad.append(f"cannot read this line of nm: {line!r}")
            continue
        kind, name = found.groups()
        if kind in "WVu":
            bad.append(f"weak symbol ({kind}): {name}")
        elif kind.isupper() and kind != "U":
            if re.search(rf"\b{entry}\b", name):
                entries += 1
            else:
                bad.append(f"exported beside {entry} ({kind}): {name}")
    if entries != 1:
        bad.append(f"exports {entry} {entries} times")
    return [f"{path}: {text}" for text in bad]


def check(build_dir: Path) -> tuple[list[str], list[Path]]:
    """The complaints about a CMake build folder, and the objects that were read."""
    bad, objects = [], []
    folders = {name: build_dir / "CMakeFiles" / f"steam_cpu_{name}.dir" for name in (*VARIANTS, COMPILED_ONCE)}
    if not any(folders[variant].is_dir() for variant in VARIANTS):
        bad.append(f"{build_dir}: it has no variant of the CPU kernels")
    for variant, folder in folders.items():
        if not folder.is_dir() and variant != COMPILED_ONCE:
            continue  # CMake leaves out a variant that this compiler does not have, or that was not asked for
        found = sorted(folder.rglob("*.o"))
        if sorted(path.name for path in found) != sorted(f"{source}.cpp.o" for source in SOURCES):
            bad.append(f"{folder}: expected the objects of {', '.join(SOURCES)}, found {[path.name for path in found]}")
        for path in found:
            bad += complaints(path, f"{path.name.removesuffix('.cpp.o')}_{variant}")
        objects += found
    return bad, objects


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} BUILD_DIR")
    bad, objects = check(Path(sys.argv[1]))
    if bad:
        sys.exit("\n".join(bad))
    print(f"{len(objects)} objects of the CPU variants: no weak symbols, nothing exported but their entries")

"""The command line that the scripts share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for ``python -m benchmarks.<name>``; ``description`` is the module's docstring, of which it shows the
    first line."""
    return argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(description or "").splitlines()[0])


def add_run_options(parser: argparse.ArgumentParser, quick: str) -> None:
    """``--quick`` and ``--json``, which every measurement has; ``quick`` says what a quick run leaves out."""
    parser.add_argument("--quick", action="store_true", help=f"{quick}; the times of a quick run mean nothing")
    parser.add_argument("--json", type=Path, help="write the rows to this file")


def run_options(name: str, description: str | None, quick: str) -> argparse.Namespace:
    """The options of a measurement that has no others, from the command line."""
    parser = parser_of(name, description)
    add_run_options(parser, quick)
    return parser.parse_args()


def choices(parser: argparse.ArgumentParser, option: str, text: str, allowed: Iterable[str]) -> list[str]:
    """The values of a comma-separated option; a value that is not allowed ends the program with one sentence."""
    allowed = list(allowed)
    given = [v.strip() for v in text.split(",") if v.strip()]
    for value in given:
        if value not in allowed:
            parser.error(f"{option} {value!r}: allowed are {', '.join(allowed)}")
    return given

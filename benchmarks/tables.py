"""Text of the benchmarks: progress lines, plain tables, Markdown tables, and numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def say(text: str = "") -> None:
    """Prints a progress line without delay."""
    print(text, flush=True)


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Plain text with aligned columns; all columns but the first are aligned to the right."""
    cells = [[c if isinstance(c, str) else number(c) for c in row] for row in rows]
    widths = [max(len(h), *(len(r[i]) for r in cells)) if cells else len(h) for i, h in enumerate(head)]

    def line(row: Sequence[str]) -> str:
        aligned = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(aligned)

    return "\n".join([title, line(head), "  ".join("-" * w for w in widths), *map(line, cells)])


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table and an empty line; all columns but the first are aligned to the right."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    return [line(head), line(["---"] + ["---:"] * (len(head) - 1)), *map(line, rows), ""]


def number(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return str(value)


def micro(seconds: float) -> str:
    """Seconds as microseconds or milliseconds."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"

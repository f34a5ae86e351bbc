"""Text of the benchmarks: progress lines, plain tables, Markdown tables, and numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

#: The columns of a terminal that a plain table fits.
WIDTH = 100
#: The distance of the quartiles over the median above which a table marks a time.
NOISY = 0.25


def say(text: str = "") -> None:
    """Prints a progress line without delay."""
    print(text, flush=True)


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]], width: int | None = WIDTH) -> str:
    """Plain text with aligned columns; all columns but the first are aligned to the right.

    If the lines are longer than ``width``, the first column is narrower than its longest cells. Such a cell has a line
    of its own, above the other cells of its row.
    """
    cells = [[c if isinstance(c, str) else number(c) for c in row] for row in rows]
    widths = [max(len(h), *(len(r[i]) for r in cells)) if cells else len(h) for i, h in enumerate(head)]
    if width is not None:
        room = width - sum(w + 2 for w in widths[1:])
        if widths[0] > room:
            widths[0] = max([len(head[0]), *(len(r[0]) for r in cells if len(r[0]) <= room)])

    def line(row: Sequence[str]) -> str:
        first, others = row[0], [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        if len(first) > widths[0]:
            return first + "\n" + "  ".join([" " * widths[0], *others])
        return "  ".join([first.ljust(widths[0]), *others])

    return "\n".join([title, line(head), "  ".join("-" * w for w in widths), *map(line, cells)])


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table and an empty line; all columns but the first are aligned to the right."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    return [line(head), line(["---"] + ["---:"] * (len(head) - 1)), *map(line, rows), ""]


def fill_marks(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between its comments with the name, <!-- name --> and <!-- end of name -->.

    Raises:
        ValueError: the text lacks a comment.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"must have the lines {begin.strip()} and {end}")
    return before + begin + content + end + after


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


def spread(value: float) -> str:
    """A spread in per cent, with an exclamation mark if it is above :data:`NOISY`."""
    return f"{100 * value:.0f}%" + (" !" if value > NOISY else "  ")

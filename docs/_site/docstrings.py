"""An extension of griffe: it rewrites the parts of docstrings that are no Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
_ERRORS = re.compile(r"(?m)^ +[A-Z]\w+(?:, [A-Z]\w+)+(?=: )")
_PAGE = re.compile(r"docs/(\w+\.md)")
_LITERAL_BLOCK = re.compile(r"(?m)::$")


def markdown(text: str) -> str:
    """The text of a docstring with Markdown in place of roles, and ``:`` in place of ``::`` above a block of code.

    A full name becomes a link, if the API page has an entry of that name. Another name becomes code. The path of a page
    becomes a link to the page. Errors with one description become one expression, as in ``TypeError | ValueError``.
    """

    def named(found: re.Match[str]) -> str:
        name = found[1]
        if not name.startswith("steam_kernels."):
            return f"`{name.lstrip('.')}`"
        return f'<autoref optional identifier="{name}"><code>{name.removeprefix("steam_kernels.")}</code></autoref>'

    text = _ERRORS.sub(lambda found: found[0].replace(",", " |"), _ROLE.sub(named, text))
    return _LITERAL_BLOCK.sub(":", _PAGE.sub(r"[\1](\1)", text))


class Docstrings(griffe.Extension):
    """Rewrites each docstring when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

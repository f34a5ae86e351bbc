"""Runs a call in a new thread, which has fresh working memory and its own floating-point mode."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_a_thread(call: Callable[[], None]) -> None:
    """Runs ``call`` in a new thread with new helper threads, and raises its exception here."""
    errors: list[BaseException] = []

    def target() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]

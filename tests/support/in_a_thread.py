"""What a thread has of its own (working memory, a floating-point mode), tried in a new one."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_a_thread(call: Callable[[], None]) -> None:
    """Runs it in a new thread, whose helpers are new too; what it raises is raised here."""
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

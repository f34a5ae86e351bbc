"""The version of Triton that tests know: its private names, and the code that it emits."""

from __future__ import annotations

import os

import pytest
import triton

TRITON = "3.8.0"


def needs_known_triton(what: str) -> None:
    """Skips the test under another version of Triton. In CI that is an error, because CI would test less unseen."""
    if triton.__version__ == TRITON:
        return
    sentence = f"{what} of Triton {TRITON}, and this is Triton {triton.__version__}"
    if os.environ.get("CI"):
        pytest.fail(f"{sentence}: bring tests/support up to date")
    pytest.skip(sentence)

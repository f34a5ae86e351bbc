"""A stub of detectron2 for tests: the real one is not on PyPI."""

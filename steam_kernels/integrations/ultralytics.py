"""Ultralytics: the name ``FusedSTEAM`` in the YAML file of a YOLO.

Importing this module makes the name known; then a row of ``backbone`` or ``head`` is::

    - [-1, 1, FusedSTEAM, []]

The row's arguments are positional, and the first is the number of channels: leave them out, and the unit takes any.
Ultralytics looks the names of layers up among the globals of ``ultralytics.nn.tasks`` and offers no other place to
register one. Each process that reads the YAML file needs this import, those that a training on several GPUs starts too.
Checkpoints hold the layer by its class and load without it.
"""

from __future__ import annotations

from ultralytics.nn import tasks

from ..module import FusedSTEAM

tasks.FusedSTEAM = FusedSTEAM

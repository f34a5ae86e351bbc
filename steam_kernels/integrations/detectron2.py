"""detectron2: residual blocks with a unit at the end of the branch, before the addition.

They replace block classes of detectron2 and take the options of a unit in ``steam``::

    ResNet.make_stage(
        SteamBottleneckBlock, 3, in_channels=64, out_channels=256, bottleneck_channels=64, steam=dict(window=16)
    )

For a model that is already built, ``insert_steam(model.backbone, window=16)`` is enough, without this module.
"""

from __future__ import annotations

from typing import Any

from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

from ..models import insert_steam


class SteamBasicBlock(BasicBlock):
    """detectron2's ``BasicBlock`` with a unit on the output of ``conv2`` (which has its norm inside).

    Args:
        in_channels, out_channels, options: the arguments of ``BasicBlock``.
        steam: options of :func:`steam_kernels.insert_steam`, such as ``{"window": 16}``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, steam: dict[str, Any] | None = None, **options: Any
    ) -> None:
        super().__init__(in_channels, out_channels, **options)
        insert_steam(self, "blocks", **(steam or {}))


class SteamBottleneckBlock(BottleneckBlock):
    """detectron2's ``BottleneckBlock`` with a unit on the output of ``conv3``; see :class:`SteamBasicBlock`."""

    def __init__(
        self, in_channels: int, out_channels: int, *, steam: dict[str, Any] | None = None, **options: Any
    ) -> None:
        super().__init__(in_channels, out_channels, **options)
        insert_steam(self, "blocks", **(steam or {}))

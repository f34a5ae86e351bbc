"""mmengine and the toolkits on top of it (mmdet, mmseg, ...): ``FusedSTEAM`` in the registry ``MODELS``.

Importing this module registers the layer. This config::

    custom_imports = dict(imports=["steam_kernels.integrations.mmengine"])
    model = dict(
        backbone=dict(
            plugins=[
                dict(cfg=dict(type="FusedSTEAM", window=16), stages=(True, True, True, True), position="after_conv3")
            ]
        )
    )

puts a unit into each bottleneck of a ResNet, after its third convolution and norm, before the addition. ``cfg`` takes
the options of :class:`steam_kernels.FusedSTEAM`. The toolkit gives ``in_channels`` and names the layer ``steam``.
"""

from __future__ import annotations

from typing import Any

from mmengine.registry import MODELS

from ..module import FusedSTEAM


@MODELS.register_module(name="FusedSTEAM")
class STEAMPlugin(FusedSTEAM):
    """:class:`steam_kernels.FusedSTEAM` as a plugin layer. Its argument ``channels`` has the name ``in_channels``."""

    #: The name of the layer in its block. mmcv appends the ``postfix`` of the config.
    _abbr_ = "steam"

    def __init__(self, in_channels: int | None = None, **unit: Any) -> None:
        super().__init__(in_channels, **unit)

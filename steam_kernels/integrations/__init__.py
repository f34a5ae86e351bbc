"""Adapters for toolkits that build networks from configurations: one module each, imported by whoever has the toolkit.

=======================  ===============================================================================
``.mmengine``            a plugin layer for the blocks of mmdet, mmseg and the like
``.detectron2``          residual blocks with a unit
``.ultralytics``         the name ``FusedSTEAM`` in the YAML file of a YOLO
=======================  ===============================================================================

Nothing is imported here. torchvision, timm, segmentation_models_pytorch and Lightning need no adapter:
:func:`steam_kernels.insert_steam` takes their models as they are. docs/use_it_in.md has a snippet for each.
"""

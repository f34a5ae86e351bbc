"""Adapters for toolkits that build networks from configurations. Each adapter is a module that imports its toolkit.

=======================  ===============================================================================
``.mmengine``            a plugin layer for the blocks of mmdet, mmseg and the like
``.detectron2``          residual blocks with a unit
``.ultralytics``         the name ``FusedSTEAM`` in the YAML file of a YOLO
=======================  ===============================================================================

This package imports none of them. torchvision, timm, segmentation_models_pytorch and Lightning need no adapter, because
:func:`steam_kernels.insert_steam` takes their models directly. docs/use_it_in.md has a snippet for each.
"""

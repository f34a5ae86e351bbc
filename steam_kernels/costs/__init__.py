"""What gates add to whole networks, as ``python -m steam_kernels.costs`` prints, and handles for FLOP counters.

:func:`steam_kernels.cost` has the count of one unit.
"""

"""The costs of gates in whole networks, and handles for FLOP counters.

``python -m steam_kernels.costs`` prints the costs. :func:`steam_kernels.cost` gives the cost of one unit.
"""

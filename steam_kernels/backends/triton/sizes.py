"""The integer arguments of the kernels."""

#: Sizes that change from call to call. Alignment that kernels rely on is told by constants, so no size needs a kernel
#: of its own.
DO_NOT_SPECIALIZE = (
    "samples",
    "channels",
    "area",
    "width",
    "grid_h",
    "grid_w",
    "heads",
    "head_width",
    "ring_first",
    "ring_count",
)

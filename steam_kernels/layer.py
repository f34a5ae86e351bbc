"""The base class of FusedSTEAM and reference.STEAM: parameters, options and scale of one unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .config import Inputs, Options, check_embed_dim, check_flag, check_integer, make_options
from .scale import ScaledModule
from .tracing import looked_into

_PARAMETER_DTYPES: Iterable[torch.dtype] = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Option:
    """An attribute of a layer that reads and sets one of its options. Setting it checks the value."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: Layer | None, owner: type) -> Any:
        return self if layer is None else getattr(layer._options, self._name)

    def __set__(self, layer: Layer, value: Any) -> None:
        layer._options = layer._options.but(**{self._name: value})


class Layer(ScaledModule):
    """One STEAM unit as a layer. Subclasses add the code that runs it; see :class:`steam_kernels.FusedSTEAM`."""

    channel_weight: nn.Parameter
    spatial_weight: nn.Parameter
    #: The function that computes the unit. It takes the inputs, the options, and optionally the scale as a
    #: tensor, which replaces the scale of the options.
    _run: Callable[..., Tensor]

    num_heads = _Option()
    grid_size = _Option()
    window = _Option()
    channel_radius = _Option()
    spatial_neighbors = _Option()
    self_loops = _Option()
    order = _Option()
    activation = _Option()
    #: The name of the backend that must run this unit, or None for the first backend that can.
    backend = _Option()

    def __init__(
        self,
        channels: int | None = None,
        *,
        embed_dim: int = 8,
        num_heads: int = 4,
        grid_size: int | tuple[int, int] | None = None,
        window: int | None = None,
        channel_radius: int = 1,
        spatial_neighbors: int = 4,
        self_loops: bool = True,
        order: str = "sequential",
        identity_init: bool = False,
        activation: str | None = None,
        inplace: bool = False,
        backend: str | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device)
        if channels is not None:
            check_integer("channels", channels)
        check_flag("identity_init", identity_init)
        if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in _PARAMETER_DTYPES):
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype!r}")
        graphs = num_heads, grid_size, window, channel_radius, spatial_neighbors, self_loops
        self._options = make_options(*graphs, order, 1.0, activation, inplace, backend)
        check_embed_dim(embed_dim, num_heads)
        self.channels = channels
        self.embed_dim = embed_dim
        self.identity_init = identity_init
        self.channel_weight = nn.Parameter(torch.empty(4, embed_dim, device=device, dtype=dtype))
        self.spatial_weight = nn.Parameter(torch.empty(4, embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def options(self) -> Options:
        """The options of a call, with the current scale of the layer."""
        options, scale = self._options, self.host_scale()
        if torch.compiler.is_compiling():
            # The compiler must meet the scale here. It cannot make a symbol of it inside the autograd function.
            return options.but(scale=scale)
        if options.scale != scale:
            options = self._options = options.but(scale=scale)
        return options

    @property
    def inplace(self) -> bool:
        """This attribute can be set, and setting checks it. Reading it raises AttributeError.

        Some tools set ``inplace`` on every module that has such an attribute; Ultralytics does at loading. These tools
        assume an activation, whose input is read by no other module. The input of a unit may be read by another module.
        """
        raise AttributeError(f"{type(self).__name__}.inplace can be set, but not read")

    @inplace.setter
    def inplace(self, value: bool) -> None:
        self._options = self._options.but(inplace=value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_options" not in state:  # an older version pickled the layer, with an attribute for each option
            old = {name.lstrip("_"): state.pop(name) for name in _ATTRIBUTES if name in state}
            state["_options"] = Options(**old)
        super().__setstate__(state)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new parameters and resets the scale [ours].

        Query, key and value rows are uniform in ±1 (fan-in 1). Output rows are uniform in ±1/sqrt(d), or 0 with
        ``identity_init``.
        """
        for weight in (self.channel_weight, self.spatial_weight):
            nn.init.uniform_(weight[:3], -1.0, 1.0)
            if self.identity_init:
                nn.init.zeros_(weight[3])
            else:
                bound = 1.0 / math.sqrt(self.embed_dim)
                nn.init.uniform_(weight[3], -bound, bound)
        # With zero output rows both gates are sigma(0) = 1/2, and 4 * 1/2 * 1/2 = 1 keeps every bit of x.
        self.scale = 4.0 if self.identity_init else 1.0  # type: ignore[assignment]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y of the shape ``(N, C, H, W)``, dtype and memory format of x; see :func:`steam_kernels.steam`."""
        if self.channels is not None:
            check_channels(x, self.channels)
        inputs = Inputs(x, self.channel_weight, self.spatial_weight, residual)
        if looked_into():
            return self._run(inputs, self._options, self.scale)
        return self._run(inputs, self.options)

    def attention_maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gates of :meth:`forward`, without the scale. They are differentiable and computed in plain PyTorch.

        Args:
            x: ``(N, C, H, W)``.

        Returns:
            The channel gate ``(N, C)`` and the spatial gate ``(N, gh, gw)``, in float32 (float64 for float64 x).

        Raises:
            TypeError, ValueError: as :meth:`forward`.
        """
        from .reference import maps  # not at the top: reference imports this module

        if self.channels is not None:
            check_channels(x, self.channels)
        inputs = Inputs(x, self.channel_weight, self.spatial_weight)
        return maps(inputs, self._options, self._options.check(inputs))

    def __prepare_scriptable__(self) -> NoReturn:
        """Raises RuntimeError: ``torch.jit.script`` calls this method, and it cannot compile the code of a unit."""
        raise RuntimeError(
            f"torch.jit.script cannot compile a {type(self).__name__}: use torch.jit.trace, whose trace serves maps of "
            "every size, or torch.export"
        )

    def extra_repr(self) -> str:
        """The constructor's arguments, without those that have their default value."""
        options = self._options
        given = [] if self.channels is None else [str(self.channels)]
        given += [f"embed_dim={self.embed_dim}", f"num_heads={options.num_heads}"]
        given.append(f"grid_size={options.grid_size}" if options.window is None else f"window={options.window}")
        for name, default in Options().given().items():
            value = getattr(options, name)
            if name not in ("num_heads", "grid_size", "window", "scale") and value != default:
                given.append(f"{name}={value!r}")
        if (scale := self.host_scale()) != 1.0:
            given.append(f"scale={scale}")
        return ", ".join(given)


#: The attributes that hold the options in layers which an older version pickled.
_ATTRIBUTES = [name for name, value in vars(Layer).items() if isinstance(value, _Option)]
_ATTRIBUTES += ["inplace", "_inplace", "_backend"]


def check_channels(x: Tensor, channels: int) -> None:
    """Raises ValueError if ``x`` has 4 dimensions and its number of channels is not ``channels``."""
    if isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] != channels:
        raise ValueError(f"x must have the {channels} channels that the unit was built for, got shape {tuple(x.shape)}")

"""ONNX graphs in onnxruntime equal the unit, for both exporters, with static and dynamic sizes, grids and windows.

The legacy exporter (``dynamo=False``) converts a trace, in which sizes are tensors. The other exporter converts an
exported program, in which sizes are symbols. These tests show differences from Python, such as a division of negative
integers or a size that became a constant.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from steam_kernels import FusedSTEAM, reference, steam
from tests.support.tolerances import judge, to_float64

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

# torch warns that a trace makes values constant, and that tracing is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

#: Sizes that most grids divide, odd, prime and ragged sizes, sizes below a grid on one or both axes, and the smallest.
SIZES = [(14, 28), (13, 13), (17, 23), (24, 13), (5, 26), (5, 3), (1, 9), (1, 1)]
#: Channels and options. Every option occurs with a grid and with a window.
UNITS: list[tuple[int, dict[str, Any]]] = [
    (8, {}),
    (8, {"window": 4}),
    (6, {"grid_size": (3, 5), "self_loops": False, "spatial_neighbors": 8}),
    (3, {"window": 5, "self_loops": False, "order": "parallel", "channel_radius": 2}),
    (5, {"grid_size": (2, 30), "order": "parallel", "activation": "relu", "num_heads": 2}),
    (2, {"window": 20, "spatial_neighbors": 8}),
    (1, {"grid_size": 1, "self_loops": False}),
    (4, {"window": 1, "channel_radius": 0, "activation": "relu", "inplace": True}),
]
EXPORTERS = ["legacy", "dynamo"]
AXES = {0: "batch", 2: "height", 3: "width"}


def make(channels: int | None, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> FusedSTEAM:
    unit = FusedSTEAM(channels, dtype=dtype, **options).eval().requires_grad_(False)
    nn.init.normal_(unit.channel_weight)
    nn.init.normal_(unit.spatial_weight)
    return unit


def inputs(unit: FusedSTEAM, channels: int, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, and a residual if the unit has a tail. The tokens are far from zero, as after a ReLU."""
    x = (torch.randn(2, channels, *size) + 2).to(dtype)
    return [x] if unit.activation is None else [x, torch.randn(2, channels, *size).to(dtype)]


class Session:
    """A model in onnxruntime, on one thread."""

    def __init__(self, model: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, given: Iterable[Tensor]) -> Tensor:
        names = [node.name for node in self.session.get_inputs()]
        return torch.from_numpy(
            self.session.run(None, {k: v.numpy() for k, v in zip(names, given, strict=True)})[0].copy()
        )


@torch.no_grad()
def export(
    exporter: str,
    model: nn.Module,
    example: list[Tensor],
    axes: dict[int, str] | None = None,
    opset: int | None = None,
    least: int = 1,
) -> Session:
    """Exports the model. ``axes`` are the dynamic axes of every input, with sizes from ``least`` on."""
    buffer = io.BytesIO()
    names = ["x", "residual"][: len(example)]
    if exporter == "legacy":
        dynamic = {} if axes is None else dict.fromkeys([*names, "y"], axes)
        torch.onnx.export(
            model,
            tuple(example),
            buffer,
            dynamo=False,
            opset_version=17 if opset is None else opset,
            input_names=names,
            output_names=["y"],
            dynamic_axes=dynamic,
        )
        return Session(buffer.getvalue())
    dims = {axis: Dim(name, min=1 if axis == 0 else least, max=512) for axis, name in (axes or {}).items()}
    program = torch.onnx.export(
        model,
        tuple(example),
        dynamo=True,
        opset_version=opset,
        input_names=names,
        dynamic_shapes=(dims,) * len(example) if axes else None,
        verbose=False,
    )
    assert program is not None
    program.save(buffer)
    return Session(buffer.getvalue())


def check(unit: FusedSTEAM, given: list[Tensor], y: Tensor, label: object, scale: float = 1.0) -> None:
    """Checks ``y`` against float64 by the rule of tests/support/tolerances.py."""
    x = given[0]
    options: dict[str, Any] = {
        name: getattr(unit, name)
        for name in ("num_heads", "grid_size", "window", "channel_radius", "spatial_neighbors", "self_loops", "order")
    }
    options |= {"scale": scale, "activation": unit.activation}
    values = {"x": x, "channel_weight": unit.channel_weight, "spatial_weight": unit.spatial_weight}
    values |= {"residual": given[1]} if len(given) == 2 else {}
    assert y.dtype == x.dtype
    truth = {"y": reference.steam(**to_float64(values), **options)}
    judge(truth, values, options).check({"y": y}, str(label))


#: An export by dynamo takes seconds, so most run only in `make test-all`.
SLOWLY = ["legacy", pytest.param("dynamo", marks=pytest.mark.slow)]


def every_unit(quick: int) -> list[Any]:
    """Every unit with both exporters. The quick tests have only the first ``quick`` units with dynamo."""
    return [
        pytest.param(exporter, *unit, marks=[pytest.mark.slow] if exporter == "dynamo" and i >= quick else [])
        for exporter in EXPORTERS
        for i, unit in enumerate(UNITS)
    ]


@pytest.mark.parametrize("exporter,channels,options", every_unit(0))
def test_static_sizes(exporter: str, channels: int, options: dict[str, Any]) -> None:
    unit = make(channels, options)
    for size in SIZES if exporter == "legacy" else SIZES[1::2]:
        model = export(exporter, unit, inputs(unit, channels, size))
        given = inputs(unit, channels, size)
        check(unit, given, model(given), size)


@pytest.mark.parametrize("exporter,channels,options", every_unit(2))
def test_dynamic_sizes(exporter: str, channels: int, options: dict[str, Any]) -> None:
    """A graph that is exported at one size is right at every other size, also if the grid differs."""
    unit = make(channels, options)
    model = export(exporter, unit, inputs(unit, channels, (24, 26)), AXES)
    for size in [(24, 26), *SIZES]:
        given = inputs(unit, channels, size)
        check(unit, given, model(given), size)


@pytest.mark.parametrize("example", [(13, 30), (1, 9)])
@pytest.mark.parametrize("channels,options", UNITS)
def test_dynamic_sizes_from_a_small_example(channels: int, options: dict[str, Any], example: tuple[int, int]) -> None:
    """The example has fewer cells than later maps. The trace must not keep its grid or its cells without neighbours."""
    unit = make(channels, options)
    model = export("legacy", unit, inputs(unit, channels, example), AXES)
    for size in SIZES:
        given = inputs(unit, channels, size)
        check(unit, given, model(given), size)


@pytest.mark.slow
@pytest.mark.parametrize("example", [(5, 3), (13, 30), (1, 9)])
@pytest.mark.parametrize("channels,options", UNITS)
def test_small_examples_are_right_or_refused(channels: int, options: dict[str, Any], example: tuple[int, int]) -> None:
    """torch.export makes sizes of one pixel or cell constants. The graph then refuses other sizes and is right."""
    unit = make(channels, options)
    try:
        model = export("dynamo", unit, inputs(unit, channels, example), AXES)
    except torch.onnx.OnnxExporterError:
        assert "window" in options
        return
    for size in [example, *SIZES]:
        given = inputs(unit, channels, size)
        try:
            y = model(given)
        except Exception as error:
            assert type(error).__module__.startswith("onnxruntime") and size != example
        else:
            check(unit, given, y, size)


@pytest.mark.parametrize("axes", [None, AXES], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "exporter,opset",
    [("legacy", opset) for opset in (9, 11, 13, 17, 20)]
    + [pytest.param("legacy", opset, marks=pytest.mark.slow) for opset in (10, 12, 14, 15, 16, 18, 19)]
    + [pytest.param("dynamo", opset, marks=pytest.mark.slow) for opset in (11, 13, 17, 18, 20, 23)],
)
def test_opsets(exporter: str, opset: int, axes: dict[int, str] | None) -> None:
    unit = make(6, {"grid_size": 5, "self_loops": False, "activation": "relu"})
    model = export(exporter, unit, inputs(unit, 6, (13, 17)), axes, opset)
    for size in [(13, 17)] if axes is None else [(13, 17), (29, 8), (2, 1)]:
        given = inputs(unit, 6, size)
        check(unit, given, model(given), size)


class Scaled(nn.Module):
    """A unit times a number that float32 cannot represent."""

    scale = 1.1

    def __init__(self, unit: FusedSTEAM) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        return steam(x, self.unit.channel_weight, self.unit.spatial_weight, scale=self.scale)


@pytest.mark.parametrize(
    "exporter,dtype,own",
    [
        ("legacy", torch.float16, True),
        ("legacy", torch.float16, False),
        ("legacy", torch.float64, True),
        ("dynamo", torch.float64, True),
        pytest.param("dynamo", torch.float64, False, marks=pytest.mark.slow),
        pytest.param("dynamo", torch.float16, False, marks=pytest.mark.slow),
    ],
)
def test_dtypes(exporter: str, dtype: torch.dtype, own: bool) -> None:
    """Constants have the right dtype too. With ``dynamo=True`` the exporter rounds any Python float to float32."""
    unit = make(6, {}, dtype if own else torch.float32)
    model = export(exporter, Scaled(unit), inputs(unit, 6, (13, 17), dtype), AXES)
    for size in [(13, 17), (4, 30)]:
        given = inputs(unit, 6, size, dtype)
        check(unit, given, model(given), size, Scaled.scale)


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("self_loops", [True, False])
def test_dynamic_channels(channels: int, radius: int, self_loops: bool) -> None:
    """The ring may be smaller than its neighbourhood, in the example or in later maps."""
    unit = make(None, {"channel_radius": radius, "self_loops": self_loops})
    model = export("legacy", unit, inputs(unit, channels, (9, 8)), {1: "channels"})
    for other in (1, 2, 3, 4, 5, 9):
        given = inputs(unit, other, (9, 8))
        check(unit, given, model(given), other)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("exporter", SLOWLY)
def test_one_dynamic_axis(exporter: str, axis: int) -> None:
    unit = make(4, {"window": 4})
    model = export(exporter, unit, inputs(unit, 4, (13, 14)), {axis: "size"})
    for other in (13, 14, 31, 2):
        size = (other, 14) if axis == 2 else (13, other)
        given = inputs(unit, 4, size)
        check(unit, given, model(given), size)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("exporter", SLOWLY)
def test_example_layouts(exporter: str, layout: str) -> None:
    unit = make(4, {})
    (x,) = inputs(unit, 4, (26, 22))
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x[:, :, ::2, ::2]
    model = export(exporter, unit, [x], AXES)
    given = inputs(unit, 4, (13, 17))
    check(unit, given, model(given), layout)


@pytest.mark.parametrize("exporter", SLOWLY)
def test_network(exporter: str) -> None:
    """Units follow convolutions, pooling and other units, and the graph computes their sizes."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, stride=2, padding=1), make(8, {}), nn.Conv2d(8, 6, 3, padding=1)]
    layers += [make(6, {"window": 3}), make(6, {"self_loops": False}), nn.MaxPool2d(2), make(6, {"order": "parallel"})]
    net = nn.Sequential(*layers).eval().requires_grad_(False)
    model = export(exporter, net, [torch.randn(2, 3, 40, 52)], AXES, least=8)
    for batch, height, width in ((2, 40, 52), (1, 33, 71), (3, 64, 10), (5, 9, 9), (1, 97, 8)):
        x = torch.randn(batch, 3, height, width)
        truth = nn.Sequential(*layers).double()(x.double())
        net.float()
        # Four units and two convolutions in float32 have a few dozen roundings of eps / 2, each of the largest value.
        assert (model([x]) - truth).abs().max() <= 16 * torch.finfo(torch.float32).eps * truth.abs().max()

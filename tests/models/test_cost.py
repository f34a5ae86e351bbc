"""The costs of gates: counts by hand, by timm's modules and by three counters, and the page of the documentation."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import steam_kernels
from steam_kernels import FusedSTEAM, insert_steam
from steam_kernels.costs import networks
from steam_kernels.costs.counters import as_operators, count_in_torchinfo, fvcore_handles, ptflops_hooks, thop_ops

torchvision = pytest.importorskip("torchvision")
ROOT = Path(__file__).resolve().parents[2]


# ---- the tables


def test_the_page_holds_the_tables() -> None:
    """docs/cost.md contains the output of the command, and its sentences have the ratios of these numbers."""
    pytest.importorskip("timm")
    command = [sys.executable, "-m", "steam_kernels.costs", "--model", "all", "--size", "224"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stderr == ""
    page = (ROOT / "docs" / "cost.md").read_text()
    assert all(f"**{name}, 224 × 224**" in ran.stdout for name in networks.NETWORKS)
    assert ran.stdout.strip() in page
    rows = {row.gate: row for row in networks.table("resnet50", 224)}
    text = " ".join(page.split())
    on_maps = rows["ECA"].on_maps / rows["STEAM"].on_maps
    assert rows["ECA"].on_maps == rows["GCT"].on_maps
    assert f"On the maps STEAM has {on_maps:.1f} times fewer" in text
    for gate in ("ECA", "GCT"):
        assert f"{rows[gate].flops / rows['STEAM'].flops:.1f} times fewer than {gate}" in text
    ratio = networks.steam(256, 56, 56)[1] / networks.eca(256, 56, 56)[1]
    assert ratio > 1 and f"{ratio:.2f} times as much at 256×56×56" in text
    assert all(row.flops < 0.005 * rows["plain"].flops for gate, row in rows.items() if gate != "plain")


def test_the_command_names_what_is_wrong() -> None:
    command = [sys.executable, "-m", "steam_kernels.costs", "--size", "0"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 2 and "size must be at least 1, got 0" in ran.stderr
    with pytest.raises(ValueError, match=r"model must be one of 'resnet18'.*got 'vgg11'"):
        networks.table("vgg11", 224)


@pytest.mark.parametrize("channels", [16, 24, 64, 96, 160, 320, 2048])
@pytest.mark.parametrize("gate", ["SE", "CBAM", "ECA"])
def test_parameters_and_products_are_timms(gate: str, channels: int) -> None:
    """The formulas agree with the modules in all parameters, and in the FLOPs without the elementwise ones."""
    pytest.importorskip("timm")
    module = networks.timm_gate(gate, channels)
    assert module is not None
    parameters, flops = networks.GATES[gate](channels, 14, 9)
    assert parameters == sum(p.numel() for p in module.parameters())
    area = 14 * 9
    reduced = module.fc1.out_channels if gate == "SE" else 0
    pixels, sigmoid, mean = channels * area, 3 * channels, channels
    elementwise = {
        "SE": 2 * pixels + sigmoid + mean + reduced + channels,  # the biases
        "ECA": 2 * pixels + sigmoid + mean,
        "CBAM": 4 * pixels + sigmoid + mean + channels + area * (1 + 2 + 3),  # a mean, a normalisation, a sigmoid
    }[gate]
    counted = networks.counted(gate, (channels, 14, 9))
    assert counted and flops == counted + elementwise


def test_gct_by_hand() -> None:
    # 2 x 3 x 1: pool 6 and 2; mean 2 and 1; variance 6 and 1; standard deviation 2, divisions 2; gate 6; product 6
    assert networks.gct(2, 3, 1) == (0, 6 + 2 + 3 + 7 + 4 + 6 + 6)


@pytest.mark.parametrize("name,blocks", [("resnet18", 8), ("resnet50", 16), ("mobilenet_v2", 17)])
def test_sites(name: str, blocks: int) -> None:
    """Other gates have every block as a site, and STEAM has the sites of insert_steam."""
    measured = networks.network(name, 96)
    assert len(measured.blocks) == blocks
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None).eval()
    assert measured.plain.parameters == sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        insert_steam(model)
    seen: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, FusedSTEAM):
            module.register_forward_hook(lambda _module, _args, y: seen.append(tuple(y.shape[1:])))
    with torch.no_grad():
        model(torch.empty(1, 3, 96, 96, device="meta"))
    assert measured.adaptive == seen


def test_no_module_has_the_name_of_the_function() -> None:
    assert importlib.util.find_spec("steam_kernels.cost") is None
    assert importlib.import_module("steam_kernels.costs.counters") and steam_kernels.cost(64, 7, 7).parameters == 64


def test_steam_row_is_the_sum_of_cost() -> None:
    row = networks.table("resnet50", 224)[-1]
    shapes = ((256, 56), (512, 28), (1024, 14), (1024, 14), (2048, 7))
    costs = [steam_kernels.cost(channels, side, side) for channels, side in shapes]
    assert (row.gate, row.sites, row.parameters) == ("STEAM", 5, 320)
    assert row.flops == row.counted == sum(c.flops for c in costs)
    assert row.bytes == sum(c.bytes for c in costs)


# ---- other counters


def with_and_without() -> tuple[torch.nn.Module, torch.nn.Module]:
    plain = torchvision.models.resnet18(weights=None).eval()
    return insert_steam(torchvision.models.resnet18(weights=None)).eval(), plain


def expected(samples: int) -> int:
    shapes = ((64, 16, 25), (128, 8, 13), (256, 4, 7), (512, 2, 4))  # the maps of a 64 x 97 image
    return samples * sum(steam_kernels.cost(*shape).flops for shape in shapes)


def test_fvcore(backend: str) -> None:
    counters = pytest.importorskip("fvcore.nn")
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    x = torch.randn(2, 3, 64, 97)

    def total(model: torch.nn.Module) -> int:
        return int(counters.FlopCountAnalysis(model, x).set_op_handle(**fvcore_handles()).total())

    model, plain = with_and_without()
    with as_operators():
        assert total(model) - total(plain) == expected(2)
        tail = FusedSTEAM(64, activation="relu")
        analysis = counters.FlopCountAnalysis(tail, (torch.randn(3, 64, 9, 9), torch.randn(3, 64, 9, 9)))
        assert (
            analysis.set_op_handle(**fvcore_handles()).total() == 3 * steam_kernels.cost(64, 9, 9, residual=True).flops
        )
        window = counters.FlopCountAnalysis(FusedSTEAM(6, window=4), torch.randn(2, 6, 13, 9))
        assert window.set_op_handle(**fvcore_handles()).total() == 2 * steam_kernels.cost(6, 13, 9, window=4).flops
    traced = torch.jit.trace(FusedSTEAM(6), torch.randn(1, 6, 9, 9), check_trace=False)
    assert "steam_kernels::" not in str(traced.inlined_graph)


@pytest.mark.parametrize("engine", ["pytorch", "aten"])
def test_ptflops(backend: str, engine: str) -> None:
    ptflops = pytest.importorskip("ptflops")

    def total(model: torch.nn.Module, size: tuple[int, ...] = (3, 64, 97)) -> int:
        options: dict[str, Any] = {"as_strings": False, "print_per_layer_stat": False, "backend": engine}
        return ptflops.get_model_complexity_info(model, size, custom_modules_hooks=ptflops_hooks(), **options)[0]

    model, plain = with_and_without()
    assert total(model) - total(plain) == expected(1)
    unit = FusedSTEAM(16, window=4, num_heads=2, channel_radius=2, spatial_neighbors=8, self_loops=False)
    options = {"window": 4, "num_heads": 2, "channel_radius": 2, "spatial_neighbors": 8, "self_loops": False}
    assert total(unit, (16, 18, 13)) == steam_kernels.cost(16, 18, 13, **options).flops


ODD = {"window": 4, "num_heads": 2, "channel_radius": 2, "spatial_neighbors": 8, "self_loops": False}


@pytest.mark.parametrize("sites", ["adaptive", "blocks"])
def test_thop(backend: str, sites: str) -> None:
    """Without a handle thop counts 0 for a unit. With it, the count of a network includes the units."""
    thop = pytest.importorskip("thop")

    def total(model: torch.nn.Module, *x: torch.Tensor, ops: Any = None) -> float:
        return thop.profile(model, inputs=x, custom_ops=ops, verbose=False)[0]

    x = torch.randn(2, 3, 64, 97)
    plain = torchvision.models.resnet18(weights=None).eval()
    before = total(plain, x)
    model = insert_steam(plain, sites)
    assert total(model, x) == before
    assert total(model, x, ops=thop_ops()) == before + expected(2) * (1 if sites == "adaptive" else 2)
    assert total(FusedSTEAM(16, **ODD), x.new_ones(1, 16, 18, 13), ops=thop_ops()) == cost_of(16, 18, 13)
    residual = total(FusedSTEAM(16, **ODD), x.new_ones(1, 16, 18, 13), x.new_ones(1, 16, 18, 13), ops=thop_ops())
    assert residual == cost_of(16, 18, 13, residual=True)


def cost_of(*shape: int, **options: Any) -> int:
    return steam_kernels.cost(*shape, **ODD, **options).flops


@pytest.mark.parametrize("sites", ["adaptive", "blocks"])
def test_torchinfo(backend: str, sites: str) -> None:
    """torchinfo guesses the count of a unit, and leaves out a layer with a unit. The handle corrects both."""
    torchinfo = pytest.importorskip("torchinfo")

    def summary(model: torch.nn.Module, *size: int) -> Any:
        return torchinfo.summary(model, size, verbose=0)

    plain = torchvision.models.resnet18(weights=None).eval()
    before = summary(plain, 2, 3, 64, 97).total_mult_adds
    model = insert_steam(plain, sites)
    right = before + expected(2) * (1 if sites == "adaptive" else 2)
    assert summary(model, 2, 3, 64, 97).total_mult_adds != right
    statistics = count_in_torchinfo(summary(model, 2, 3, 64, 97))
    assert statistics.total_mult_adds == right
    counts = [layer.macs for layer in statistics.summary_list]
    again = count_in_torchinfo(statistics)
    assert again.total_mult_adds == right and [layer.macs for layer in again.summary_list] == counts
    assert count_in_torchinfo(summary(FusedSTEAM(16, **ODD), 3, 16, 18, 13)).total_mult_adds == 3 * cost_of(16, 18, 13)

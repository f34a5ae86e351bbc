"""Runs a ResNet-50 with five STEAM units on a photo, and compares the kernels with the reference: results and times.

    python examples/quickstart.py [--out build/quickstart]

The network (torchvision's ResNet-50, random weights from a fixed seed, training mode) runs on one batch with the fused
kernels, with the reference in the same dtype, and with the reference in float64, which counts as exact.

Bounds: the error of a float32 result against float64 may be at most twice the error of the float32 reference, plus the
effect of rounding. This effect is measured. A value passes about eight dependent roundings of eps/2, so the float64
unit runs again with each input changed by 4 eps with random signs, and the change of its result is the effect. (A whole
network has the reference's float32 error in place of this effect.) The printed difference from the reference may be at
most the bound on the error plus the reference's error.

Gradients are compared for each unit alone, on its real activations and its real upstream gradient, both captured in the
fused run. Rounding grows from layer to layer in a random network with batch normalisation, so the gradients of the
whole network would measure the network rather than the units. The output of the whole network has a bound. Its gradient
is printed for information only.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from steam_kernels import FusedSTEAM, available_backends, insert_steam, reference, steam

SEED = 0
BATCH = 8
SIDE = 224
NAMES = ("output", "x", "channel_weight", "spatial_weight")
START = time.perf_counter()


def progress(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


class Site(NamedTuple):
    """One unit, the map that came into it and the gradient that came back to it."""

    name: str
    unit: FusedSTEAM
    x: Tensor
    dy: Tensor


# ---- data and model --------------------------------------------------------------------------------------------------


def photo_batch() -> tuple[Tensor, np.ndarray]:
    """A normalised (8, 3, 224, 224) batch of four crops of scikit-learn's china.jpg and their mirror images, and the
    first crop as a picture."""
    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1) / 255
    height, width = photo.shape[1:]
    crops = []
    for top, left, size in ((0, (width - height) // 2, height), (0, 0, 320), (60, 300, 320), (100, 120, SIDE)):
        crop = photo[None, :, top : top + size, left : left + size]
        crops.append(nn.functional.interpolate(crop, (SIDE, SIDE), mode="bilinear", antialias=True)[0])
    batch = torch.stack([*crops, *(c.flip(-1) for c in crops)])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (batch - mean[:, None, None]) / std[:, None, None], crops[0].permute(1, 2, 0).clamp(0, 1).numpy()


def units_of(model: nn.Module) -> dict[str, FusedSTEAM]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedSTEAM)}


def set_backend(model: nn.Module, backend: str | None) -> None:
    for unit in units_of(model).values():
        unit.backend = backend


def train_step(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Logits, the gradient of the images, and each unit's input and upstream gradient."""
    inputs: dict[str, Tensor] = {}
    upstream: dict[str, Tensor] = {}
    hooks = []
    for name, unit in units_of(model).items():

        def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            inputs[name] = args[0].detach()
            output.register_hook(lambda gradient: upstream.__setitem__(name, gradient.detach()))

        hooks.append(unit.register_forward_hook(remember))
    images = images.detach().requires_grad_()
    logits = model(images)
    loss = nn.functional.cross_entropy(logits, torch.arange(len(images)))
    gradient = torch.autograd.grad(loss, [images, *model.parameters()])[0]
    for hook in hooks:
        hook.remove()
    return logits.detach(), gradient, {name: (inputs[name], upstream[name]) for name in inputs}


# ---- the comparison --------------------------------------------------------------------------------------------------


def largest(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def results(run: Callable[..., Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output of ``run`` and its gradients to x and both weights."""
    leaves = [tensors[k].detach().requires_grad_() for k in NAMES[1:]]
    y = run(*leaves)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, tensors["dy"])), strict=True))


def moved(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every input in float64, moved by 4 eps of itself: maps with one random sign per channel and per pixel row, so
    that none averages out."""
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1

    step = 4 * torch.finfo(torch.float32).eps
    out = {}
    for name, value in tensors.items():
        if value.dim() == 4:
            n, c, h, _ = value.shape
            sign = signs(n, c, 1, 1) + signs(n, 1, h, 1)
        else:
            sign = signs(*value.shape)
        out[name] = value.double() * (1 + step * sign)
    return out


class Comparison(NamedTuple):
    difference: float  # fused from reference, both float32
    bound: float  # on that difference
    error: float  # fused from float64
    error_bound: float
    size: float


def compare_unit(site: Site) -> dict[str, Comparison]:
    """Output and every gradient of one unit on its own activations: fused, reference, and float64."""
    tensors = {
        "x": site.x,
        "dy": site.dy,
        "channel_weight": site.unit.channel_weight.detach(),
        "spatial_weight": site.unit.spatial_weight.detach(),
    }
    fused, plain = results(steam, tensors), results(reference.steam, tensors)
    truth = results(reference.steam, {k: v.double() for k, v in tensors.items()})
    perturbed = [results(reference.steam, moved(tensors, seed)) for seed in range(2)]
    out = {}
    for name in NAMES:
        size = truth[name].abs().max().item()
        own = largest(plain[name], truth[name])
        rounding = torch.finfo(torch.float32).eps * size + max(largest(p[name], truth[name]) for p in perturbed)
        error_bound = 2 * own + rounding
        out[name] = Comparison(
            largest(fused[name], plain[name]), error_bound + own, largest(fused[name], truth[name]), error_bound, size
        )
    return out


def report(comparisons: Mapping[str, Mapping[str, Comparison]]) -> bool:
    """Print the table, and return whether every bound holds."""
    sound = True
    print(f"\n{'unit':<12}{'result':<28}{'difference':>12}{'bound':>12}{'error':>12}{'bound':>12}{'size':>12}")
    for unit, rows in comparisons.items():
        for name, c in rows.items():
            ok = c.difference <= c.bound and c.error <= c.error_bound
            sound &= ok
            label = name if name == "output" else f"gradient of {name}"
            figures = "".join(f"{v:12.2e}" for v in c)
            print(f"{unit:<12}{label:<28}{figures}{'' if ok else '   BOUND BROKEN'}")
    print(
        "difference: largest |fused - reference|, both float32. error: largest |fused - float64|. size: largest value\n"
        "The bound of an error is 2 x the reference's error + the change for inputs changed by 4 eps + a rounding\n"
        "(for the network: 2 x the reference's error). The bound of a difference is larger by the reference's error.\n"
        "Each unit is compared on its own activations and upstream gradient: rounding grows through random layers."
    )
    return sound


# ---- time and picture ------------------------------------------------------------------------------------------------


def times(sites: list[Site], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds for all units once, forward (no grad) and forward + backward: medians of interleaved rounds."""
    runs = {"fused": steam, "reference": reference.steam}
    samples: dict[str, dict[str, list[float]]] = {
        kind: {k: [] for k in runs} for kind in ("forward", "forward+backward")
    }

    def step(run: Callable[..., Tensor], site: Site, train: bool) -> None:
        weights = (site.unit.channel_weight, site.unit.spatial_weight)
        if not train:
            with torch.no_grad():
                run(site.x, *weights)
            return
        x = site.x.detach().requires_grad_()
        torch.autograd.grad(run(x, *weights), [x, *weights], site.dy)

    for i in range(rounds + 1):
        for name, run in runs.items():
            for kind, values in samples.items():
                start = time.perf_counter()
                for site in sites:
                    step(run, site, kind != "forward")
                if i:  # the first round warms up
                    values[name].append(time.perf_counter() - start)
    return {kind: {name: statistics.median(v) for name, v in values.items()} for kind, values in samples.items()}


def draw(sites: list[Site], photo: np.ndarray, path: Path) -> None:
    """Draws the photo, and the spatial gate of each unit over the photo, each with its own colour range."""
    figure, axes = plt.subplots(1, len(sites) + 1, figsize=(3.1 * (len(sites) + 1), 3.5), constrained_layout=True)
    axes[0].imshow(photo)
    axes[0].set_title("photo", fontsize=9)
    for axis, site in zip(axes[1:], sites, strict=True):
        with torch.no_grad():
            gate = site.unit.attention_maps(site.x[:1])[1][0].numpy()
        axis.imshow(photo)
        shown = axis.imshow(gate, cmap="magma", alpha=0.6, extent=(0, SIDE, SIDE, 0), interpolation="nearest")
        shape = "x".join(map(str, site.x.shape[1:]))
        axis.set_title(f"{site.name}, {shape}\ngate {gate.min():.4f} to {gate.max():.4f}", fontsize=9)
        figure.colorbar(shown, ax=axis, shrink=0.7, format="%.3f")
    for axis in axes:
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("build/quickstart"), help="folder for the picture (build/quickstart)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (3)")
    args = parser.parse_args()

    torch.manual_seed(SEED)
    plain_model = torchvision.models.resnet50(weights=None)
    before = sum(p.numel() for p in plain_model.parameters())
    model = insert_steam(plain_model, sites="adaptive").train()
    added = sum(p.numel() for p in model.parameters()) - before
    reasons = available_backends()
    chosen = next(name for name, reason in reasons.items() if not reason)
    images, photo = photo_batch()
    print(f"backend: {chosen}; " + "; ".join(f"{k}: {v or 'available'}" for k, v in reasons.items() if k != chosen))
    print(f"parameters added: {added} in {len(units_of(model))} units, to {before}")

    progress(f"ResNet-50, batch {BATCH} at {SIDE}x{SIDE}: forward and backward with the fused units")
    twin = copy.deepcopy(model)
    logits, gradient, captured = train_step(model, images)
    progress("the same with the reference, float32")
    set_backend(twin, "reference")
    logits_reference, gradient_reference, _ = train_step(twin, images)
    progress("forward with the reference, float64")
    with torch.no_grad():
        logits_truth = twin.double()(images.double())

    sites = [Site(name.removesuffix(".steam"), unit, *captured[name]) for name, unit in units_of(model).items()]
    comparisons = {}
    for site in sites:
        progress(f"comparing {site.name}, {tuple(site.x.shape)}")
        comparisons[site.name] = compare_unit(site)
    own = largest(logits_reference, logits_truth)
    network = Comparison(
        largest(logits, logits_reference),
        3 * own,
        largest(logits, logits_truth),
        2 * own,
        logits_truth.abs().max().item(),
    )
    sound = report({**comparisons, "network": {"output": network}})
    print(
        "for information, without a bound: gradient of the images through the whole network, "
        "largest |fused - reference| "
        f"{largest(gradient, gradient_reference):.2e} (size {gradient_reference.abs().max().item():.2e})\n"
    )

    progress(f"timing the five units alone, {torch.get_num_threads()} threads, {args.rounds} interleaved rounds")
    for kind, measured in times(sites, args.rounds).items():
        fused, plain = measured["fused"], measured["reference"]
        print(
            f"{kind + ':':<18} fused {fused * 1e3:8.2f} ms   reference {plain * 1e3:8.2f} ms   "
            f"{plain / fused:.1f} times as fast"
        )

    path = (args.out / "spatial_gates.png").resolve()
    draw(sites, photo, path)
    print(f"picture of the five spatial gates: {path}")
    progress("done" if sound else "A BOUND IS BROKEN")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())

"""Training tools on networks with units: autocast, scalers, checkpointing, EMA, torch.func, dtypes, conversions.

tests/unit/test_contexts.py has the same tests for one unit.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import steam_kernels
from steam_kernels import FusedSTEAM, insert_steam, steam_sites
from tests.support import networks

pytest.importorskip("torchvision")
X = (2, 3, 64, 72)


def units(model: nn.Module) -> dict[str, FusedSTEAM]:
    return {name: m for name, m in model.named_modules() if isinstance(m, FusedSTEAM)}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def same(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=rtol, atol=rtol * value.abs().max().item()), name


# ---- precision


def test_autocast(any_backend: str) -> None:
    """Units take bfloat16 maps from autocast's convolutions and return bfloat16. Their float32 parameters learn."""
    model = networks.resnet(backend=any_backend)
    seen: list[torch.dtype] = []
    for unit in units(model).values():
        unit.register_forward_hook(lambda _unit, args, y: seen.extend((args[0].dtype, y.dtype)))
    x, labels = torch.randn(*X), torch.tensor([1, 7])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), labels)
    # BatchNorm keeps the dtype of its input, so the whole path is bfloat16.
    assert seen == [torch.bfloat16] * 8
    found = gradients(model, loss)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
    assert all(found[f"{name}.{w}_weight"].abs().max() > 0 for name in units(model) for w in ("channel", "spatial"))


def test_grad_scaler_skips_a_step_that_overflows(any_backend: str) -> None:
    """An overflow makes gradients Inf or NaN, so the scaler skips the step and halves its scale."""
    model = networks.resnet(backend=any_backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(*X)

    def step(factor: float) -> None:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(x).float().square().mean() * factor
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    first = units(model)["layer1.1.steam"].channel_weight
    before = first.detach().clone()
    step(1e38)
    assert not first.grad.isfinite().all()
    assert torch.equal(first, before) and scaler.get_scale() == 2.0**9
    step(1.0)
    assert first.grad.isfinite().all() and not torch.equal(first, before) and scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_and_bfloat16_models(any_backend: str, dtype: torch.dtype) -> None:
    model = networks.settle(networks.resnet(backend=any_backend))
    x = torch.randn(*X)
    with torch.no_grad():
        expected = model(x)
        low = model.half() if dtype == torch.float16 else model.bfloat16()
        got = low(x.to(dtype))
    assert all(unit.channel_weight.dtype == dtype for unit in units(low).values())
    # Twenty layers each round to dtype. The errors add up like a random walk, and the bound is twice its deviation.
    bound = 2 * 20**0.5 * torch.finfo(dtype).eps * expected.abs().max()
    assert got.dtype == dtype and (got.float() - expected).abs().max() <= bound


# ---- memory


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_stages(any_backend: str, reentrant: bool) -> None:
    """The backward pass runs the stages with their units again, and gives the same bits and the same gradients."""
    model = networks.resnet(backend=any_backend, norm=lambda channels: nn.GroupNorm(8, channels))
    x = torch.randn(*X)
    y = model(x)
    expected = gradients(model, y.square().mean())
    calls: list[str] = []
    for name, unit in units(model).items():
        unit.register_forward_pre_hook(lambda _unit, _args, name=name: calls.append(name))
    h = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        h = checkpoint(stage, h, use_reentrant=reentrant)
    got = model.fc(model.avgpool(h).flatten(1))
    assert torch.equal(got, y) and calls == list(units(model))
    got.square().mean().backward()
    assert calls == [*units(model), *reversed(units(model))]
    same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected, 1e-5)


# ---- averages


def test_exponential_moving_average(any_backend: str) -> None:
    model = networks.resnet(backend=any_backend, identity_init=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    name = "layer3.1.steam"
    kept = units(model)[name].channel_weight.detach().clone()
    for _ in range(2):
        model(torch.randn(*X)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        now = units(model)[name].channel_weight.detach()
        kept = now.clone() if average.n_averaged == 1 else 0.9 * kept + 0.1 * now
    averaged = units(average.module)[name]
    assert torch.allclose(averaged.channel_weight, kept) and not torch.equal(averaged.channel_weight, now)
    assert averaged.scale == 4.0
    update_bn([torch.randn(*X)], average)
    other = AveragedModel(networks.resnet(backend=any_backend))
    other.load_state_dict(average.state_dict())
    x = torch.randn(*X)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), average.eval()(x))


# ---- torch.func


def small(backend: str) -> nn.Module:
    model = networks.resnet(backend=backend, norm=lambda channels: nn.GroupNorm(8, channels), dtype=torch.float64)
    return model.double()


def test_functional_call_and_grad(any_backend: str) -> None:
    model, x = small(any_backend), torch.randn(*X, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return functional_call(model, given, (x,)).square().mean()

    expected = gradients(model, model(x).square().mean())
    same(grad(loss)(parameters), expected, 1e-8)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    found = torch.autograd.grad(loss(leaves), list(leaves.values()))
    same(dict(zip(leaves, found, strict=True)), expected, 1e-8)


def test_vmap_per_sample_gradients_and_ensemble(any_backend: str) -> None:
    model, x = small(any_backend), torch.randn(2, 3, 40, 33, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, given, (sample[None],)).square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for n in range(len(x)):
        same({name: g[n] for name, g in found.items()}, gradients(model, model(x[n : n + 1]).square().mean()), 1e-8)

    members = [small(any_backend) for _ in range(2)]
    stacked, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(stacked, buffers)
    with torch.no_grad():
        for member, output in zip(members, outputs, strict=True):
            assert torch.allclose(output, member(x), rtol=1e-8, atol=1e-10)


def test_forward_mode(any_backend: str) -> None:
    """A Jacobian-vector product of the network agrees with its reverse-mode gradient."""
    model, x = small(any_backend), torch.randn(1, 3, 40, 33, dtype=torch.float64)
    direction = torch.randn_like(x)
    _, tangent = jvp(lambda x: model(x).square().sum(), (x,), (direction,))
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    assert torch.allclose(tangent, (found * direction).sum(), rtol=1e-8)


# ---- replicas and conversions


def test_data_parallel(any_backend: str) -> None:
    """Without GPUs DataParallel calls the module itself. A replica, which is a shallow copy, is tested for one unit."""
    model = networks.settle(networks.resnet(backend=any_backend, identity_init=True))
    x = torch.randn(*X)
    with torch.no_grad():
        assert torch.equal(nn.DataParallel(model)(x), model(x))
    unit = units(model)["layer1.1.steam"]
    # This does the same as torch.nn.parallel.replicate, except for the broadcast, which needs GPUs.
    replica = unit._replicate_for_data_parallel()
    for name, parameter in unit._parameters.items():
        setattr(replica, name, parameter.detach().clone().requires_grad_())
    h = torch.randn(2, 64, 16, 18)
    assert replica.scale == 4.0 and torch.equal(replica(h), unit(h))
    replica(h).sum().backward()
    assert replica.channel_weight.grad is not None and unit.channel_weight.grad is None


def test_sync_batch_norm_conversion_leaves_units_alone() -> None:
    model = networks.resnet(identity_init=True)
    x = torch.randn(*X)
    expected = copy.deepcopy(model)(x)
    before = {name: (unit, unit.channel_weight) for name, unit in units(model).items()}
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    after = {name: (unit, unit.channel_weight) for name, unit in units(converted).items()}
    assert before == after and len(after) == 4
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    # Without a process group SyncBatchNorm computes BatchNorm. Several processes would need GPUs.
    assert torch.equal(converted(x), expected)


def test_quantisation_aware_preparation_leaves_units_in_float() -> None:
    """prepare_qat_fx puts fake quantisers around a unit. It puts none into the unit or in place of the weights."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    model = networks.resnet(identity_init=True)
    x = torch.randn(*X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization calls itself deprecated
        prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (x,))
    calls = [node for node in prepared.graph.nodes if node.target is steam_kernels.steam]
    assert len(calls) == 4
    for node in calls:
        weights = [prepared.get_parameter(str(given.target)) for given in node.args[1:3]]
        assert all(weight.shape == (4, 8) and weight.dtype == torch.float32 for weight in weights)
        assert node.kwargs["scale"] == 4.0
    loss = prepared(x).square().mean()
    found = gradients(prepared, loss)
    assert sum("steam" in name and g.abs().max() > 0 for name, g in found.items()) == 8


def test_quantisation_aware_preparation_leaves_norms_with_units_in_float() -> None:
    """With "blocks" a norm has the unit. Norm and unit are neither fused into the convolution nor quantised."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx
    from torchvision import models

    torch.manual_seed(0)
    block = models.resnet.BasicBlock
    model = networks.strengthen(insert_steam(models.ResNet(block, [1, 1, 1, 1], num_classes=3), "blocks"))
    x = torch.randn(*X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization calls itself deprecated
        prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (x,))
    sites = steam_sites(prepared)
    assert list(sites) == [f"layer{i}.0.bn2" for i in (1, 2, 3, 4)]
    called = [node.target for node in prepared.graph.nodes if node.op == "call_module"]
    for name, unit in sites.items():
        norm = prepared.get_submodule(name)
        assert called.count(name) == 1 and isinstance(norm, nn.BatchNorm2d) and norm.weight.dtype == torch.float32
        assert [child for child, _ in norm.named_modules()] == ["", "steam"] and not unit._modules
    found = gradients(prepared, prepared(x).square().mean())
    assert sum("steam" in name and g.abs().max() > 0 for name, g in found.items()) == 8


# ---- adapters


@pytest.mark.parametrize("sites", ["adaptive", "stages", "blocks"])
def test_lora_beside_units(sites: str) -> None:
    """With peft's adapters on convolutions, units stay and learn as modules_to_save, and merging keeps both."""
    peft = pytest.importorskip("peft")
    x = torch.randn(*X)
    model = networks.settle(networks.resnet(sites=sites))
    names, plain = list(steam_sites(model)), model(x)
    config = peft.LoraConfig(
        r=4, target_modules=["conv1", "conv2"], modules_to_save=["steam"], init_lora_weights=False, lora_alpha=1
    )
    adapted = peft.get_peft_model(model, config)
    adapted.eval()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad and ".steam." in name]
    assert len(trained) == 2 * len(names)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    start = {name: adapted.get_parameter(name).detach().clone() for name in trained}
    adapted(x).square().mean().backward()
    optimizer.step()
    assert all((adapted.get_parameter(name) != start[name]).any() for name in trained)
    saved = peft.get_peft_model_state_dict(adapted)
    assert sum(".steam." in name and name.endswith("l_weight") for name in saved) == len(trained)
    expected = adapted(x)
    assert not torch.allclose(expected, plain, rtol=1e-2)
    merged = adapted.merge_and_unload()
    assert list(steam_sites(merged)) == names
    assert torch.allclose(merged(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_lora_beside_a_convolution_with_a_unit() -> None:
    peft = pytest.importorskip("peft")
    others = peft.LoraConfig(r=4, target_modules=["conv1"])
    assert list(steam_sites(peft.get_peft_model(networks.resnet(sites=["layer1.0.conv2"]), others))) == [
        "base_model.model.layer1.0.conv2"
    ]


def test_placements_by_name_leave_convolutions_alone() -> None:
    """Adapters need convolutions and linear layers, so placements by name put units on other modules if possible."""
    from torchvision import models

    for name in (
        "resnet50",
        "mobilenet_v3_small",
        "shufflenet_v2_x1_0",
        "convnext_tiny",
        "densenet121",
        "vgg11",
        "maxvit_t",
    ):
        for sites in ("adaptive", "stages", "blocks"):
            if sites == "blocks" and name in ("densenet121", "vgg11", "maxvit_t"):
                continue
            with torch.device("meta"):
                model = getattr(models, name)(weights=None)
            hosts = [model.get_submodule(site) for site in steam_sites(insert_steam(model, sites))]
            # The stem of MaxViT ends in a convolution without a norm.
            assert sum(isinstance(host, (nn.Conv2d, nn.Linear)) for host in hosts) == (name == "maxvit_t")

"""The unit's scale is a buffer for tools and a float for the call. It is never lost and never read needlessly."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from steam_kernels import FusedSTEAM, reference, scale
from tests.support import networks

X = (2, 6, 9, 8)
State = dict[str, Tensor]


class Net(nn.Module):
    """A convolution and a unit. With a scale of 4 and zero output rows the unit is the identity."""

    def __init__(self, identity_init: bool = False) -> None:
        super().__init__()
        self.convolution, self.unit = nn.Conv2d(6, 6, 1), FusedSTEAM(identity_init=identity_init)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.convolution(x))  # type: ignore[no-any-return]


@torch.no_grad()
def is_identity(model: Net) -> bool:
    x = torch.randn(*X).to(model.convolution.weight.dtype)
    same = torch.equal(model(x), model.convolution(x))
    return bool(same and model.unit.scale == 4.0 and model.unit.host_scale() == 4.0)


class Reads:
    """Reads the buffer and counts the reads."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, buffer: Tensor) -> float:
        self.count += 1
        return buffer.item()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Counts reads as if all buffers were on a GPU, where each read is a synchronisation."""
    found = Reads()
    monkeypatch.setattr(scale, "_read", found)
    monkeypatch.setattr(scale, "_on_host", lambda buffer: False)
    return found


@pytest.mark.parametrize("cls", [FusedSTEAM, reference.STEAM])
def test_it_is_a_persistent_buffer(cls: type[FusedSTEAM]) -> None:
    unit = cls(identity_init=True)
    assert list(dict(unit.named_buffers())) == ["scale"] and "scale" in unit.state_dict()
    assert unit.scale.shape == () and unit.scale.dtype == torch.float32 and unit.scale == 4.0
    assert [name for name, _ in unit.named_parameters()] == ["channel_weight", "spatial_weight"]


def test_it_may_be_set_and_written(reads: Reads) -> None:
    unit, x = FusedSTEAM(), torch.randn(*X)
    before = unit(x)
    unit.scale = 2  # type: ignore[assignment]
    assert torch.allclose(unit(x), 2 * before) and isinstance(unit.scale, Tensor) and reads.count == 0
    unit.scale *= 1.5
    assert torch.allclose(unit(x), 3 * before)
    with torch.no_grad():
        unit.scale.fill_(0.5)
    assert torch.allclose(unit(x), 0.5 * before) and reads.count == 2
    for wrong in (None, "2", math.inf, math.nan, True):
        with pytest.raises(TypeError, match="scale must be a finite number"):
            unit.scale = wrong  # type: ignore[assignment]
    assert torch.allclose(unit(x), 0.5 * before) and reads.count == 2


def test_a_call_uses_what_a_checkpoint_holds() -> None:
    unit, twin = FusedSTEAM(), FusedSTEAM()
    unit.scale = 1 / 3  # type: ignore[assignment]
    twin.load_state_dict(unit.state_dict())
    assert unit.host_scale() == twin.host_scale() == unit.scale.item()


# ---- loading ---------------------------------------------------------------------------------------------------------


def _load(state: State, folder: Path) -> Net:
    model = Net()
    model.load_state_dict(state)
    return model


def _assign(state: State, folder: Path) -> Net:
    with torch.device("meta"):
        model = Net()
    model.load_state_dict(state, assign=True)
    return model


def _to_empty(state: State, folder: Path) -> Net:
    with torch.device("meta"):
        model = Net()
    model.to_empty(device="cpu").load_state_dict(state)
    return model


def _in_place(state: State, folder: Path) -> Net:
    model = Net()
    for name, value in model.state_dict().items():
        value.copy_(state[name])
    return model


def _functional(state: State, folder: Path) -> Net:
    model = Net()

    class Call(nn.Module):
        convolution, unit = model.convolution, model.unit

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.functional_call(model, state, (x,))  # type: ignore[no-any-return]

    call = Call()
    assert not is_identity(model)
    x = torch.randn(*X)
    convolved = torch.func.functional_call(
        model.convolution, {"weight": state["convolution.weight"], "bias": state["convolution.bias"]}, (x,)
    )
    assert torch.equal(call(x), convolved)
    model.load_state_dict(state)
    return model


def _safetensors(state: State, folder: Path) -> Net:
    files = pytest.importorskip("safetensors.torch")
    source, model = Net(), Net()
    source.load_state_dict(state)
    files.save_model(source, str(folder / "model.safetensors"))
    files.load_model(model, str(folder / "model.safetensors"))
    return model


def _accelerate(state: State, folder: Path) -> Net:
    accelerate, files = pytest.importorskip("accelerate"), pytest.importorskip("safetensors.torch")
    files.save_file(state, str(folder / "model.safetensors"))
    with accelerate.init_empty_weights(include_buffers=True):
        model = Net()
    accelerate.load_checkpoint_in_model(model, str(folder / "model.safetensors"), device_map={"": "cpu"})
    return model


def _hub(state: State, folder: Path) -> Net:
    hub = pytest.importorskip("huggingface_hub")

    class Published(Net, hub.PyTorchModelHubMixin):  # type: ignore[misc,name-defined]
        pass

    source = Published()
    source.load_state_dict(state)
    source.save_pretrained(folder)
    return Published.from_pretrained(folder)  # type: ignore[no-any-return]


def _distributed_checkpoint(state: State, folder: Path) -> Net:
    import torch.distributed.checkpoint as dcp

    dcp.save(dict(state), checkpoint_id=str(folder))
    model = Net()
    loaded = model.state_dict()
    dcp.load(loaded, checkpoint_id=str(folder))
    model.load_state_dict(loaded)
    return model


WAYS: dict[str, Callable[[State, Path], Net]] = {
    "load_state_dict": _load,
    "assign": _assign,
    "to_empty": _to_empty,
    "in place": _in_place,
    "functional_call": _functional,
    "safetensors": _safetensors,
    "accelerate": _accelerate,
    "hub": _hub,
    "distributed checkpoint": _distributed_checkpoint,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_loading_into_a_network_without_it(way: str, tmp_path: Path) -> None:
    """A network without ``identity_init`` takes the scale of the weights that any tool loads."""
    model = WAYS[way](Net(identity_init=True).state_dict(), tmp_path)
    assert is_identity(model)


def test_checkpoints_of_older_versions(tmp_path: Path) -> None:
    """Older state_dicts have no scale buffer or a CPU scalar, and older versions pickled whole modules."""
    state = Net(identity_init=True).state_dict()
    old = {name: value for name, value in state.items() if name != "unit.scale"}
    model = Net()
    model.load_state_dict(old | {"unit.scale": torch.tensor(4.0)}, strict=True)
    assert is_identity(model)
    model.load_state_dict(old, strict=True)  # the weights were trained without a scale
    assert model.unit.scale == 1.0 == model.unit.host_scale()

    unit = FusedSTEAM(identity_init=True)
    pickled = unit.__dict__.copy()
    options = pickled.pop("_options").but(order="parallel", backend="reference").given()
    del pickled["_seen"], pickled["_seen_version"], pickled["_value"]
    x = torch.randn(*X)
    for of_inplace, of_backend in (("inplace", "backend"), ("_inplace", "_backend")):
        old = {k: v for k, v in options.items() if k not in ("inplace", "backend")}
        old |= {of_inplace: False, of_backend: "reference", "scale": 4.0, "_buffers": {}}
        older = FusedSTEAM.__new__(FusedSTEAM)
        older.__setstate__(pickled | old)
        assert older.scale == 4.0 and torch.equal(older(x), x)
        assert older.order == "parallel" and older.backend == "reference" and older.num_heads == unit.num_heads
        assert not {"order", "num_heads", of_inplace, of_backend} & older.__dict__.keys()


def test_weights_of_a_network_without_units_leave_it_alone() -> None:
    """``strict=False`` reports only the parameters as missing, and the unit stays the identity."""
    model = Net(identity_init=True)
    found = model.load_state_dict({k: v for k, v in model.state_dict().items() if "unit" not in k}, strict=False)
    assert found.missing_keys == ["unit.channel_weight", "unit.spatial_weight"] and is_identity(model)


# ---- copies and conversions ------------------------------------------------------------------------------------------


def _saved(model: Net) -> Net:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


CONVERSIONS: dict[str, Callable[[Net], Net]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to_empty": lambda m: _filled(m.to_empty(device="cpu")),
    "meta and back": lambda m: _filled(m.to("meta").to_empty(device="cpu")),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": _saved,
    "share_memory": lambda m: m.share_memory(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "inference_mode": lambda m: _in_inference_mode(False).float(),
    "loaded in inference_mode": lambda m: _in_inference_mode(True),
    "written, then deepcopy": lambda m: copy.deepcopy(_written()),
    "written, then pickle": lambda m: pickle.loads(pickle.dumps(_written())),
    "written, then half": lambda m: _written().half(),
    "written by data": lambda m: _written(lambda scale: scale.data.copy_(torch.tensor(4.0))),
    "written in shared memory": lambda m: _written(lambda scale: scale.numpy().fill(4.0)),
}


def _written(write: Callable[[Tensor], object] = lambda scale: scale.fill_(4.0)) -> Net:
    """A network with the weights of the identity. Its scale was 1 first, and ``write`` then wrote the buffer."""
    model = Net(identity_init=True)
    model.unit.scale = 1.0  # type: ignore[assignment]
    model(torch.randn(*X))
    with torch.no_grad():
        write(model.unit.scale)
    return model


def _filled(model: Net) -> Net:
    """The network after an initialiser that resets only parameters."""
    for name, parameter in model.named_parameters():
        nn.init.zeros_(parameter) if "unit" in name else nn.init.ones_(parameter)
    return model


def _in_inference_mode(load: bool) -> Net:
    with torch.inference_mode():
        if not load:
            return Net(identity_init=True)
        model = Net()
        model.load_state_dict(Net(identity_init=True).state_dict())
        return model


@pytest.mark.parametrize("way", CONVERSIONS)
def test_conversions_keep_it(way: str) -> None:
    model = CONVERSIONS[way](Net(identity_init=True))
    assert is_identity(model) and model.unit.scale.dtype == torch.float32


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999, 0.9999])
def test_averages_keep_it(decay: float) -> None:
    """The averages of PyTorch (with and without buffers), timm (two kinds) and Ultralytics keep the scale."""
    model = Net(identity_init=True)
    averages = [
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)),
    ]
    timm = pytest.importorskip("timm.utils")
    averages += [timm.ModelEmaV2(model, decay), timm.ModelEmaV3(model, decay)]
    ultralytics = pytest.importorskip("ultralytics.utils.torch_utils").ModelEMA(model, decay, tau=1)
    for _ in range(50):
        for average in averages:
            average.update_parameters(model) if isinstance(average, AveragedModel) else average.update(model)
        ultralytics.update(model)
    for average in (*(average.module for average in averages), ultralytics.ema):
        assert is_identity(average.float())


# ---- no needless reads -----------------------------------------------------------------------------------------------


def test_a_buffer_that_does_not_change_is_not_read(reads: Reads) -> None:
    model, x = Net(identity_init=True), torch.randn(*X)
    for _ in range(3):
        model(x).sum().backward()
    copy.deepcopy(model.state_dict())
    model.half().float().eval()
    model(x)
    assert reads.count == 0
    model.load_state_dict(Net().state_dict())
    assert reads.count == 1
    model(x)
    assert reads.count == 1


def test_replicas_of_data_parallel_are_not_read(reads: Reads) -> None:
    unit, x = FusedSTEAM(identity_init=True), torch.randn(*X)
    replica = unit._replicate_for_data_parallel()
    for name, value in (*unit._parameters.items(), *unit._buffers.items()):
        getattr(replica, "_buffers" if name == "scale" else "_parameters")[name] = value.detach().clone()
    assert torch.equal(replica(x), x) and reads.count == 0


class Broadcasting:
    """Stands in for the DistributedDataParallel whose call runs, as far as the module asks it."""

    def will_sync_module_buffers(self) -> bool:
        return True


def test_broadcasts_of_each_call_are_not_read_from_a_gpu(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module reads DDP's first broadcast and any other change, but not the broadcasts of each call."""
    unit, x = FusedSTEAM(), torch.randn(*X)

    def broadcast(value: float) -> None:
        with torch.no_grad():
            unit.scale.copy_(torch.tensor(value))

    def call() -> float:
        broadcast(unit.scale.item())
        monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", Broadcasting())
        unit(x)
        monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        return unit.host_scale()

    broadcast(4.0)  # DDP is made after the first rank has loaded a checkpoint
    assert call() == 4.0 and reads.count == 1
    assert [call() for _ in range(5)] == [4.0] * 5 and reads.count == 1
    broadcast(2.0)  # another checkpoint is loaded in place
    assert call() == 2.0 and reads.count == 2


# ---- compiled --------------------------------------------------------------------------------------------------------


def test_blocks_that_are_compiled_one_by_one_share_their_code(backend: str) -> None:
    """Regional compilation works for a network with more blocks than the limit of recompilations."""
    counter = torch._dynamo.testing.CompileCounter()
    for _ in range(10):
        unit = FusedSTEAM(backend=backend, identity_init=True)
        unit.compile(fullgraph=True, backend=counter)
        x = torch.randn(*X)
        assert torch.equal(unit(x), x)
    assert counter.frame_count == 1


def test_compiled_finds_a_buffer_written_in_place_after_host_scale(backend: str) -> None:
    unit, x = FusedSTEAM(backend=backend, identity_init=True), torch.randn(*X)
    fast = torch.compile(unit, fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(x), x)
    unit.scale.fill_(2.0)
    assert unit.host_scale() == 2.0 and torch.equal(fast(x), x / 2)


def test_compiled_after_a_tool_replaced_the_buffer(backend: str) -> None:
    """The compiled code uses the buffer's value without an earlier eager call, and a later value too."""
    model = Net()
    model.unit.backend = backend
    nn.init.zeros_(model.unit.channel_weight), nn.init.zeros_(model.unit.spatial_weight)
    model.unit._buffers["scale"] = torch.tensor(4.0)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(*X)
    assert torch.allclose(fast(x), model.convolution(x))
    model.load_state_dict({**model.state_dict(), "unit.scale": torch.tensor(2.0)})
    assert torch.allclose(fast(x), model.convolution(x) / 2)


def test_function_transforms_take_the_buffers_that_they_are_given() -> None:
    """An ensemble has three scales, and its base module on the meta device has a fourth scale."""
    members, x = [Net(identity_init=True) for _ in range(3)], torch.randn(3, *X)
    for factor, member in enumerate(members):
        member.unit.scale = 4.0 * factor  # type: ignore[assignment]
    base = Net().to("meta")

    def call(state: State, x: Tensor) -> Tensor:
        return torch.func.functional_call(base, state, (x,))  # type: ignore[no-any-return]

    parameters, buffers = torch.func.stack_module_state(members)
    got = torch.func.vmap(call)({**parameters, **buffers}, x)
    expected = torch.stack([k * member.convolution(h) for k, (member, h) in enumerate(zip(members, x, strict=True))])
    assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("how", ["replaced", "written"])
def test_export_takes_the_buffer(how: str, strict: bool) -> None:
    """An export takes a buffer that changed after the last call. The program has it as an ordinary buffer."""
    model, x = Net(identity_init=True), torch.randn(*X)
    model.unit.scale = 1.0  # type: ignore[assignment]
    if how == "replaced":
        model.unit._buffers["scale"] = torch.tensor(4.0)
    else:
        model.unit.scale.data.fill_(4.0)
    exported = torch.export.export(model, (x,), strict=strict)
    assert exported.state_dict["unit.scale"] == 4.0
    assert torch.allclose(exported.module()(x), model.convolution(x), atol=1e-6)
    traced = torch.jit.trace(model, (x,))
    assert torch.allclose(traced(x), model.convolution(x), atol=1e-6)


def test_networks_with_units_average_and_load() -> None:
    """The same holds for a ResNet with inserted units, whose norms have buffers too."""
    pytest.importorskip("torchvision")
    model = networks.settle(networks.resnet(identity_init=True))
    other = networks.settle(networks.resnet())
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))

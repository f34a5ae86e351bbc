"""Each toolkit is tested with the real package if it can be installed, else with a stub whose name says so."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from steam_kernels import FusedSTEAM, insert_steam, remove_steam, steam_sites
from steam_kernels.models import reattach_steam
from tests.support import networks

STUBS = pathlib.Path(__file__).parents[1] / "support" / "stubs"


# ---- mmengine, mmdet -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry() -> Any:
    pytest.importorskip("mmengine")
    importlib.import_module("steam_kernels.integrations.mmengine")
    from mmengine.registry import MODELS

    return MODELS


def test_mmengine_registry(registry: Any) -> None:
    unit = registry.build({"type": "FusedSTEAM", "in_channels": 32, "window": 4})
    assert isinstance(unit, FusedSTEAM) and unit.channels == 32 and unit.window == 4
    assert unit(torch.randn(1, 32, 9, 11)).shape == (1, 32, 9, 11)
    plain = FusedSTEAM(32)
    plain.load_state_dict(unit.state_dict())


def stub_of_build_plugin_layer(cfg: dict[str, Any], postfix: str = "", **given: Any) -> tuple[str, nn.Module]:
    """A stub of mmcv.cnn.build_plugin_layer: it takes the class from the registry and the name from ``_abbr_``."""
    from mmengine.registry import MODELS

    options = dict(cfg)
    with MODELS.switch_scope_and_registry(None) as registry:
        cls = registry.get(options.pop("type"))
    return cls._abbr_ + postfix, cls(**given, **options)


class StubOfMmdetBottleneck(nn.Module):
    """A stub of mmdet's ResNet bottleneck, which builds plugins after conv3 and runs them before the addition."""

    def __init__(self, build_plugin_layer: Any, plugins: list[dict[str, Any]]) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.after_conv3_plugin_names = []
        for plugin in plugins:
            plugin = plugin.copy()
            name, layer = build_plugin_layer(plugin, in_channels=8, postfix=plugin.pop("postfix", ""))
            self.add_module(name, layer)
            self.after_conv3_plugin_names.append(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv3(x)
        for name in self.after_conv3_plugin_names:
            y = getattr(self, name)(y)
        return y + x


@pytest.mark.parametrize("which", ["mmcv", "stub"])
def test_mmdet_plugin(registry: Any, which: str) -> None:
    """The block is a stub, because mmdet needs mmcv's compiled operators, and PyPI has only their source."""
    if which == "mmcv":
        build_plugin_layer = pytest.importorskip(
            "mmcv.cnn", reason="mmcv (or mmcv-lite) is not installed"
        ).build_plugin_layer
    else:
        build_plugin_layer = stub_of_build_plugin_layer
    plugins = [{"type": "FusedSTEAM", "window": 4}, {"type": "FusedSTEAM", "postfix": "_second"}]
    block = StubOfMmdetBottleneck(build_plugin_layer, plugins)
    assert [name for name, _ in block.named_children()] == ["conv3", "steam", "steam_second"]
    assert block.steam.channels == 8 and block.steam.window == 4
    x = torch.randn(2, 8, 9, 11)
    block(x).square().sum().backward()
    assert all(p.grad is not None for p in block.parameters())


# ---- detectron2 ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stub_of_detectron2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stub in tests/support/stubs/detectron2 under the real names, because detectron2 is not on PyPI."""
    ours = "steam_kernels.integrations.detectron2"
    for name in [name for name in sys.modules if name.split(".")[0] == "detectron2" or name == ours]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(STUBS))
    importlib.invalidate_caches()
    yield importlib.import_module(ours)
    for name in [name for name in sys.modules if name.split(".")[0] == "detectron2" or name == ours]:
        del sys.modules[name]


def test_detectron2_blocks_on_a_stub(stub_of_detectron2: Any) -> None:
    from detectron2.modeling.backbone import resnet

    block = stub_of_detectron2.SteamBottleneckBlock(
        8, 16, bottleneck_channels=4, steam={"window": 4, "identity_init": True}
    )
    plain = resnet.BottleneckBlock(8, 16, bottleneck_channels=4)
    missing, unexpected = block.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and sorted(missing) == ["conv3.steam.channel_weight", "conv3.steam.spatial_weight"]
    x = torch.randn(2, 8, 9, 11)
    assert torch.equal(block(x), plain(x))
    unit = block.conv3.steam
    assert unit.channels == 16 and unit.window == 4
    with torch.no_grad():
        unit.channel_weight.fill_(1)
        expected = torch.relu(
            unit(plain.conv3(torch.relu(plain.conv2(torch.relu(plain.conv1(x)))))) + plain.shortcut(x)
        )
        assert torch.allclose(block(x), expected, rtol=1e-4, atol=1e-5)
    basic = stub_of_detectron2.SteamBasicBlock(8, 8)
    assert list(steam_sites(basic)) == ["conv2"] and basic(x).shape == x.shape

    backbone = nn.ModuleDict(
        {"res2": nn.Sequential(*(resnet.BottleneckBlock(8, 8, bottleneck_channels=4) for _ in "1234"))}
    )
    assert list(steam_sites(insert_steam(backbone))) == ["res2.2"]


def test_detectron2_missing() -> None:
    if importlib.util.find_spec("detectron2"):
        pytest.skip("detectron2 is installed")
    with pytest.raises(ModuleNotFoundError, match="detectron2"):
        importlib.import_module("steam_kernels.integrations.detectron2")


# ---- ultralytics -----------------------------------------------------------------------------------------------------

NET = """
nc: 1
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, FusedSTEAM, []]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [-1, 2, FusedSTEAM, []]
  - [[3, 5], 1, Detect, [nc]]
"""


@pytest.fixture
def detection(tmp_path: pathlib.Path) -> dict[str, Any]:
    """The options of Ultralytics' train() and val() for four random images with one box each."""
    ultralytics = pytest.importorskip("ultralytics")
    image = pytest.importorskip("PIL.Image")
    ultralytics.settings.update({"sync": False})
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "labels" / split).mkdir(parents=True)
        for i in range(2):
            pixels = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8)
            image.fromarray(pixels.numpy()).save(tmp_path / "images" / split / f"{i}.png")
            (tmp_path / "labels" / split / f"{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (tmp_path / "data.yaml").write_text(
        f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: {{0: thing}}\n"
    )
    options = {"data": str(tmp_path / "data.yaml"), "project": str(tmp_path / "runs"), "imgsz": 64, "batch": 2}
    return options | {"device": "cpu", "workers": 0, "plots": False, "verbose": False}


#: Options of a training: one step for each image, and no check of mixed precision, which would download a network.
TRAIN: dict[str, Any] = {"warmup_epochs": 0, "nbs": 2, "amp": False, "deterministic": False}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().float().clone() for k, v in model.state_dict().items() if k.endswith("l_weight")}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> bool:
    after = weights(model)
    return after.keys() == before.keys() and all((after[k] != before[k]).any() for k in before)


def test_ultralytics_yaml(tmp_path: pathlib.Path, detection: dict[str, Any]) -> None:
    """A YOLO from a YAML file trains one step and validates, on generated images."""
    import ultralytics

    importlib.import_module("steam_kernels.integrations.ultralytics")
    (tmp_path / "net.yaml").write_text(NET)
    model = ultralytics.YOLO(str(tmp_path / "net.yaml"))
    units = [m for m in model.model.modules() if isinstance(m, FusedSTEAM)]
    assert len(units) == 3 and isinstance(model.model.model[3], FusedSTEAM)
    start: dict[str, torch.Tensor] = {}
    model.add_callback("on_train_start", lambda trainer: start.update(weights(trainer.model)))
    model.add_callback("on_train_end", lambda trainer: start.update(changed=changed(dict(start), trainer.model)))
    model.train(**detection, **TRAIN, epochs=1, name="train")
    assert len(start) == 7 and start["changed"]
    assert model.val(**detection).box.map >= 0
    loaded = ultralytics.YOLO(str(tmp_path / "runs" / "train" / "weights" / "last.pt"))
    assert sum(isinstance(m, FusedSTEAM) for m in loaded.model.modules()) == 3


def test_ultralytics_loading_sets_no_unit_in_place(tmp_path: pathlib.Path) -> None:
    """Ultralytics sets "inplace" on modules that have it. A unit in place would overwrite a map that is read later."""
    ultralytics = pytest.importorskip("ultralytics")
    importlib.import_module("steam_kernels.integrations.ultralytics")
    net = "nc: 1\nbackbone:\n  - [-1, 1, Conv, [8, 3, 2]]\n  - [-1, 1, FusedSTEAM, []]\nhead:\n"
    (tmp_path / "net.yaml").write_text(net + "  - [[0, 1], 1, Detect, [nc]]\n")
    model = ultralytics.YOLO(str(tmp_path / "net.yaml"))
    model.save(tmp_path / "net.pt")
    loaded = ultralytics.YOLO(tmp_path / "net.pt").model
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x)[0], model.model.half().float().eval()(x)[0])
    loaded.train()(x)  # a unit in place would refuse a call with gradients


#: Sites in real networks: at the ends of the backbone's stages, in the neck, and inside a block.
YOLOS = {
    "yolov8n": ["model.2", "model.4.m.0", "model.6", "model.9", "model.16"],
    "yolo11n": ["model.4", "model.6", "model.10"],
    "yolo12n": ["model.4", "model.6", "model.8"],
    "yolo26n": ["model.0", "model.4", "model.6", "model.10"],
}


@pytest.mark.parametrize("name", list(YOLOS))
def test_ultralytics_training_keeps_units(name: str, tmp_path: pathlib.Path, detection: dict[str, Any]) -> None:
    """The trainer builds the network anew from its YAML file.

    The network has the units in training, averaging, saving, validation and export.
    """
    import ultralytics

    yolo = ultralytics.YOLO(f"{name}.yaml")
    insert_steam(yolo.model, YOLOS[name], window=4)
    start = weights(yolo.model)
    assert len(start) == 2 * len(YOLOS[name])
    seen: list[bool] = []
    yolo.add_callback(
        "on_train_end", lambda trainer: seen.extend((changed(start, trainer.model), changed(start, trainer.ema.ema)))
    )
    # MuSGD is the default of Ultralytics for long runs.
    yolo.train(**detection, **TRAIN, epochs=1, name="train", optimizer="MuSGD" if name == "yolo26n" else "auto")
    assert seen == [True, True] and changed(start, yolo.model)
    for checkpoint in ("best.pt", "last.pt"):
        loaded = ultralytics.YOLO(tmp_path / "runs" / "train" / "weights" / checkpoint)
        assert list(steam_sites(loaded.model)) == YOLOS[name] and changed(start, loaded.model)
        assert all(unit.window == 4 for unit in steam_sites(loaded.model).values())

    calls: list[nn.Module] = []
    handles = [u.register_forward_hook(lambda u, a, y: calls.append(u)) for u in steam_sites(yolo.model).values()]
    yolo.val(**detection)
    assert len(set(calls)) == len(YOLOS[name])  # the calls of the copy that is validated
    for handle in handles:
        handle.remove()

    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        expected = networks.settle(networks.strengthen(yolo.model))(x)[0]
        exported = torch.jit.load(yolo.export(format="torchscript", imgsz=64, device="cpu"))(x)
        plain = remove_steam(yolo.model)(x)[0]
    assert exported.shape == expected.shape
    assert (exported - expected).abs().max() < 1e-3 * (plain - expected).abs().max()


FINE_TUNE = """
import json, sys
import ultralytics
yolo = ultralytics.YOLO(sys.argv[1])
yolo.train(**json.loads(sys.argv[2]))
print(sorted(name for name, _ in yolo.model.named_modules() if name.endswith(".steam")))
"""


def test_ultralytics_checkpoints_keep_units(tmp_path: pathlib.Path, detection: dict[str, Any]) -> None:
    """Checkpoints keep units if a process that imports only Ultralytics fine-tunes, resumes or loads them."""
    import ultralytics
    from ultralytics.models.yolo.detect import DetectionTrainer

    from steam_kernels.integrations.ultralytics import keep_units

    yolo = ultralytics.YOLO("yolov8n.yaml")
    insert_steam(yolo.model, ["model.2", "model.9"], identity_init=True)
    yolo.train(**detection, **TRAIN, epochs=2, name="first", save_period=1)
    folder = tmp_path / "runs" / "first" / "weights"
    start = weights(yolo.model)

    options = json.dumps({**detection, **TRAIN, "epochs": 1, "name": "second"})
    command = [sys.executable, "-c", FINE_TUNE, str(folder / "best.pt"), options]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "['model.2.steam', 'model.9.steam']"
    second = ultralytics.YOLO(tmp_path / "runs" / "second" / "weights" / "last.pt")
    assert changed(start, second.model) and all(u.scale == 4.0 for u in steam_sites(second.model).values())

    resumed = ultralytics.YOLO(folder / "epoch0.pt")
    start = weights(resumed.model)
    resumed.train(resume=True)
    assert changed(start, resumed.model)

    best = ultralytics.YOLO(folder / "best.pt")
    plain = ultralytics.YOLO("yolov8n.yaml")
    with pytest.raises(ValueError, match=r"weights .*\['model\.2', 'model\.9'\].*remove_steam"):
        plain.load(folder / "best.pt")
    with pytest.raises(ValueError, match=r"weights .*\['model\.2', 'model\.9'\]"):
        DetectionTrainer(overrides={**detection, **TRAIN, "model": str(folder / "best.pt"), "name": "t"}).train()
    plain.model.load(remove_steam(best.model))  # remove_steam drops the units deliberately

    best = ultralytics.YOLO(folder / "best.pt")
    overrides = {**detection, **TRAIN, "model": str(folder / "best.pt"), "epochs": 1, "name": "third"}
    trainer = keep_units(DetectionTrainer, steam_sites(best.model))(overrides=overrides)
    trainer.setup_model()
    assert all(torch.equal(v, weights(best.model)[k]) for k, v in weights(trainer.model).items())
    assert list(steam_sites(trainer.model)) == ["model.2", "model.9"]

    other = {name: FusedSTEAM(window=4) for name in ("model.2", "model.9")}
    for units, said in (
        ({"model.2": other["model.2"]}, r"\['model\.9'\]"),
        (other, r"grid_size=\(7, 7\) at 'model\.2'"),
    ):
        with pytest.raises(ValueError, match=f"weights must be .*{said}"):
            keep_units(DetectionTrainer, units)(overrides=overrides | {"name": "fourth"}).setup_model()


def test_an_ultralytics_that_is_not_known_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """insert_steam still works, also in other models. The warning describes the effect on training."""
    import ultralytics.nn.tasks  # noqa: F401

    from steam_kernels.models import insert

    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'ultralytics.engine'")

    monkeypatch.setattr(insert.importlib, "import_module", fail)
    with pytest.warns(UserWarning, match=r"YOLO\.train\(\) would build its network without units"):
        insert_steam(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1)), ["0"])


def test_ultralytics_trainers_with_units_reach_other_processes() -> None:
    """A training on several GPUs sends the generated class of the trainer by cloudpickle."""
    cloudpickle = pytest.importorskip("cloudpickle")
    detect = pytest.importorskip("ultralytics.models.yolo.detect")
    from steam_kernels.integrations.ultralytics import keep_units

    kept = keep_units(detect.DetectionTrainer, {"model.9": FusedSTEAM(256)})
    twin = pickle.loads(cloudpickle.dumps(kept))
    trainer = twin.__new__(twin)
    trainer.data, trainer.args = {"nc": 1, "channels": 3, "names": {0: "thing"}}, types.SimpleNamespace()
    assert list(steam_sites(trainer.get_model("yolov8n.yaml", verbose=False))) == ["model.9"]


@pytest.mark.parametrize("name", ["yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n"])
def test_ultralytics_every_layer_of_a_backbone_has_a_unit(name: str) -> None:
    """Units act also after fuse() and an export replace forward by forward_fuse and forward_split."""
    ultralytics = pytest.importorskip("ultralytics")
    # Both in float64: fuse() rounds otherwise, and a network of random weights makes the difference large.
    model = networks.settle(ultralytics.YOLO(f"{name}.yaml").model).double()
    x = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        plain = model(x)[0]
        sites = [f"model.{i}" for i in range(len(model.yaml["backbone"]))]
        insert_steam(model, sites, identity_init=True)
        assert torch.equal(model(x)[0], plain)
        for unit in steam_sites(model).values():
            unit.channel_weight.fill_(1.0)
        expected = model(x)[0]
        difference = (expected - plain).abs().max()
        calls: list[nn.Module] = []
        for unit in steam_sites(model).values():
            unit.register_forward_hook(lambda unit, args, y: calls.append(unit))
        model.fuse(verbose=False)
        for module in model.modules():
            if hasattr(module, "forward_split"):
                module.forward = module.forward_split  # the exporter does the same
        calls.clear()
        got = model(x)[0]
    assert calls == list(steam_sites(model).values()) and len(calls) == len(sites)
    assert (got - expected).abs().max() < 1e-3 * difference


def test_ultralytics_sites_that_fuse_does_without_are_refused() -> None:
    """fuse() makes a convolution anew, and drops its norm and the branches of a RepConv."""
    modules = pytest.importorskip("ultralytics.nn.modules")
    layers = nn.Sequential(modules.Conv(4, 4), modules.RepConv(4, 4))
    for name, owner in (("0.conv", "Conv"), ("0.bn", "Conv"), ("0.act", "Conv"), ("1.conv1.act", "RepConv")):
        with pytest.raises(ValueError, match=rf"sites .*'{name}'.* a {owner} .*forward_fuse"):
            insert_steam(layers, [name])
    assert not steam_sites(layers)


# ---- segmentation_models_pytorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["resnet18", "tu-mobilenetv3_small_050", "tu-resnet18"])
def test_segmentation_models_pytorch_encoder(encoder: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    options = {"encoder_name": encoder, "encoder_weights": None, "classes": 2}
    torch.manual_seed(0)
    plain = smp.Unet(**options).eval()
    model = smp.Unet(**options)
    insert_steam(model.encoder, window=4, identity_init=True)
    assert len(steam_sites(model.encoder)) >= 4
    missing, unexpected = nn.Module.load_state_dict(model, plain.state_dict(), strict=False)
    assert missing and not unexpected and all(".steam." in name for name in missing)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain(x))
    model.train()(x).square().mean().backward()
    assert all(unit.channel_weight.grad is not None for unit in steam_sites(model).values())
    assert list(remove_steam(model).state_dict()) == list(plain.state_dict())


# ---- Lightning -------------------------------------------------------------------------------------------------------


def test_lightning_fit(tmp_path: pathlib.Path) -> None:
    lightning = pytest.importorskip("lightning")
    torchvision = pytest.importorskip("torchvision")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            block = torchvision.models.resnet.BasicBlock
            self.net = insert_steam(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=3))

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 33, 47), torch.tensor([0, 1, 2, 0]))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    model = Classifier()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=2, enable_model_summary=False, default_root_dir=tmp_path, **options)
    trainer.fit(model, loader)
    assert trainer.global_step == 2
    assert len(steam_sites(model)) == 4 and all((p != before[name]).any() for name, p in model.named_parameters())
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    loaded = Classifier.load_from_checkpoint(checkpoint)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_lightning_sync_batchnorm(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning converts norms after the module is built and before on_fit_start, and converts them back at the end."""
    # DDP refuses SyncBatchNorm on a CPU. This test does not run it, so the check is off.
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *_: None)
    lightning = pytest.importorskip("lightning")
    torchvision = pytest.importorskip("torchvision")
    block = torchvision.models.resnet.BasicBlock
    acting: list[int] = []

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = insert_steam(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=3), "blocks")

        def on_fit_start(self) -> None:
            assert isinstance(self.net.bn1, nn.SyncBatchNorm)
            acting.append(len(steam_sites(reattach_steam(self))))

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
            raise AssertionError("SyncBatchNorm needs a GPU")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 3, 33, 47)))
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    options |= {"strategy": "ddp", "sync_batchnorm": True, "enable_checkpointing": False}
    trainer = lightning.Trainer(max_steps=0, enable_model_summary=False, default_root_dir=tmp_path, **options)
    model = Classifier()
    try:
        trainer.fit(model, loader)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert acting == [4]
    assert not isinstance(model.net.bn1, nn.SyncBatchNorm) and len(steam_sites(reattach_steam(model))) == 4

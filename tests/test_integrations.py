"""Toolkits: each with the real package where it can be installed, else with a stub that says so in its name."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from steam_kernels import FusedSTEAM, insert_steam, remove_steam, steam_sites
from steam_kernels.models import reattach_steam

pytestmark = pytest.mark.usefixtures("environment")

STUBS = pathlib.Path(__file__).parent / "stubs"


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
    """A stub of mmcv.cnn.build_plugin_layer: the class from the registry of the scope, its ``_abbr_`` as the name."""
    from mmengine.registry import MODELS

    options = dict(cfg)
    with MODELS.switch_scope_and_registry(None) as registry:
        cls = registry.get(options.pop("type"))
    return cls._abbr_ + postfix, cls(**given, **options)


class StubOfMmdetBottleneck(nn.Module):
    """A stub of what mmdet's ResNet bottleneck does with plugins after conv3: built, named, run before the addition."""

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
    """mmdet itself needs mmcv's compiled operators, which PyPI has as a source only: its block is a stub here."""
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
    """detectron2 is not on PyPI: its blocks are the stub in tests/stubs/detectron2, at their own names."""
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


def test_ultralytics_yaml(tmp_path: pathlib.Path) -> None:
    """A YOLO from YAML: one step of training and its validation, on images made here."""
    ultralytics = pytest.importorskip("ultralytics")
    image = pytest.importorskip("PIL.Image")
    importlib.import_module("steam_kernels.integrations.ultralytics")
    ultralytics.settings.update({"sync": False})
    (tmp_path / "net.yaml").write_text(NET)
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

    model = ultralytics.YOLO(str(tmp_path / "net.yaml"))
    units = [m for m in model.model.modules() if isinstance(m, FusedSTEAM)]
    assert len(units) == 3 and isinstance(model.model.model[3], FusedSTEAM)
    start: list[torch.Tensor] = []
    end: list[torch.Tensor] = []

    def weights(trainer: Any) -> list[torch.Tensor]:
        return [
            p.detach().clone() for m in trainer.model.modules() if isinstance(m, FusedSTEAM) for p in m.parameters()
        ]

    model.add_callback("on_train_start", lambda trainer: start.extend(weights(trainer)))
    model.add_callback("on_train_end", lambda trainer: end.extend(weights(trainer)))
    common = {
        "data": str(tmp_path / "data.yaml"),
        "imgsz": 64,
        "batch": 2,
        "device": "cpu",
        "workers": 0,
        "plots": False,
    }
    common |= {"project": str(tmp_path / "runs"), "verbose": False}
    model.train(**common, epochs=1, warmup_epochs=0, nbs=2, amp=False, deterministic=False, name="train")
    assert len(start) == 6 and all((a != b).any() for a, b in zip(start, end, strict=True))
    assert model.val(**common).box.map >= 0
    loaded = ultralytics.YOLO(str(tmp_path / "runs" / "train" / "weights" / "last.pt"))
    assert sum(isinstance(m, FusedSTEAM) for m in loaded.model.modules()) == 3


FUSED = """
nc: 1
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16, True]]
  - [-1, 1, SPPF, [16, 5]]
head:
  - [[2, 3], 1, Detect, [nc]]
"""


def test_ultralytics_fuse_and_export_keep_units(tmp_path: pathlib.Path) -> None:
    """fuse() puts forward_fuse in forward's place and drops norms, an export forward_split: such sites are refused."""
    ultralytics = pytest.importorskip("ultralytics")
    (tmp_path / "net.yaml").write_text(FUSED)
    model = ultralytics.YOLO(str(tmp_path / "net.yaml")).model.eval()
    for name in ("model.0", "model.0.conv", "model.0.bn"):
        with pytest.raises(ValueError, match=rf"sites .*'{name}'.*forward_fuse"):
            insert_steam(model, [name])
    branches = nn.Sequential(ultralytics.nn.modules.RepConv(4, 4))
    with pytest.raises(ValueError, match=r"sites .*'0\.conv1\.act'.*a RepConv .*forward_fuse"):
        insert_steam(branches, ["0.conv1.act"])
    with pytest.raises(ValueError, match=r"sites .*'model\.2', a C2f.*forward_split"):
        insert_steam(model, ["model.2"])
    assert not steam_sites(model)

    insert_steam(model, ["model.2.m.0", "model.3"])
    calls: list[nn.Module] = []
    for unit in steam_sites(model).values():
        unit.register_forward_hook(lambda unit, args, y: calls.append(unit))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)[0]
        model.fuse(verbose=False)
        for module in model.modules():
            if hasattr(module, "forward_split"):
                module.forward = module.forward_split  # as the exporter does
        calls.clear()
        got = model(x)[0]
    assert calls == list(steam_sites(model).values()) and len(calls) == 2
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


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
    # DDP would refuse SyncBatchNorm on a CPU; nothing is run through it here
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

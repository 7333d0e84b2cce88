import sys
import types

import pytest
import torch
from torch import nn

from mbnorm import convert
from mbnorm.experiments.data import digits, load
from mbnorm.experiments.dataset import Data
from mbnorm.experiments.models import MODELS, build, why_not

OF_PIXELS = {"segment": "segments", "unet2d": "segments", "unet3d": "volumes"}


def data_of(*shape, classes=4):
    inputs = torch.randn(2, *shape)
    return Data(inputs, torch.zeros(2).long(), inputs, torch.zeros(2).long(), classes)


@pytest.mark.parametrize("name", MODELS)
def test_every_net_gives_logits_of_its_data(name):
    data = load(OF_PIXELS.get(name, "digits"))
    x = data.train_inputs[:2]
    y = build(name, data)(x)
    assert y.shape == (2, data.classes, *data.train_targets.shape[1:])


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 9, 13), (3, 32, 32)], ids=str)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in OF_PIXELS])
def test_every_net_takes_channels_sides_and_classes_of_its_data(name, shape):
    data = data_of(*shape)
    assert build(name, data)(data.train_inputs).shape == (2, 4)


@pytest.mark.parametrize("name", MODELS)
def test_every_net_can_be_converted_whole(name):
    model = build(name, load(OF_PIXELS.get(name, "digits")))
    convert(model, "matched")
    assert not any(type(m) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) for m in model.modules())


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mlp", 2),
        ("mlp6", 6),
        ("cnn", 9),
        ("vgg-small", 5),
        ("resnet8", 9),
        ("resnet20", 21),
        ("resnet18", 20),
        ("resnet50", 53),
        ("vgg16", 13),
    ],
)
def test_a_net_has_the_batch_norms_of_its_name(name, layers):
    model = build(name, digits())
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) == layers


@pytest.mark.parametrize(("name", "sides"), [("vgg-small", 2), ("segment", 1)])
def test_norms_of_1x1_maps_see_one_value_per_image(name, sides):
    data = load(OF_PIXELS.get(name, "digits"))
    model = build(name, data)
    maps = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda layer, args, y: maps.append(tuple(y.shape[2:])))
    model(data.train_inputs[:2])
    assert maps.count((1, 1)) == sides


def test_the_first_nets_start_as_they_always_did():
    """Results of earlier versions are of these weights."""
    torch.manual_seed(0)
    mlp = build("mlp", digits())
    torch.manual_seed(0)
    cnn = build("cnn", digits())
    sums = [sum(p.double().abs().sum().item() for p in net.parameters()) for net in (mlp, cnn)]
    assert sums == pytest.approx([1158.3679000796155, 987.1279085511364], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "sides", "multiple"),
    [("segment", (8, 12), 4), ("unet2d", (8, 24), 8), ("unet3d", (12, 8, 4), 4)],
)
def test_sides_that_a_net_cannot_halve_are_refused(name, sides, multiple):
    def data(*sides):
        return data_of(1, *sides)._replace(train_targets=torch.zeros(2, *sides).long())

    assert why_not(name, data(*sides)) is None
    odd = (*sides[:-1], sides[-1] + multiple // 2)
    assert f"sides that are multiples of {multiple}" in why_not(name, data(*odd))


def test_the_small_resnet_halves_its_maps_twice_and_ends_64_wide():
    net = build("resnet8", data_of(3, 32, 32))
    maps = []
    net[-3].register_forward_hook(lambda layer, args, y: maps.append(args[0].shape))
    net(torch.randn(2, 3, 32, 32))
    assert maps == [(2, 64, 8, 8)]


def test_the_unet_of_images_is_8_to_64_wide():
    net = build("unet2d", load("segments"))
    assert [block[0].out_channels for block in net.down] == [8, 16, 32, 64]


def test_large_images_are_pooled_first():
    assert isinstance(build("resnet18", data_of(3, 96, 96))[3], nn.MaxPool2d)
    assert not isinstance(build("resnet18", data_of(3, 32, 32))[3], nn.MaxPool2d)


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("lenet", "digits", "expected mlp, cnn,"),
        ("timm:", "digits", "expected mlp, cnn,"),
        ("mlp", "segments", "a class per image, and these data have one per pixel"),
        ("unet3d", "digits", "a class per pixel, and these data have one per image"),
        ("segment", "volumes", "segment takes images, got inputs of shape"),
        ("unet2d", "volumes", "unet2d takes images, got inputs of shape"),
        ("unet3d", "segments", "unet3d takes volumes, got inputs of shape"),
    ],
)
def test_a_net_that_does_not_fit_the_data_is_refused(name, data, why):
    assert why in why_not(name, load(data))
    with pytest.raises(ValueError, match=why):
        build(name, load(data))


@pytest.fixture
def timm(monkeypatch):
    """A stand-in: timm imports torchvision, which not every machine has for its torch."""

    def create_model(name, num_classes, in_chans):
        if name != "tiny":
            raise RuntimeError(f"Unknown model ({name})\nmore")
        return nn.Sequential(nn.Conv2d(in_chans, num_classes, 8), nn.Flatten())

    module = types.ModuleType("timm")
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)


def test_timm_builds_for_the_data(timm):
    assert build("timm:tiny", digits())(digits().train_inputs[:2]).shape == (2, 10)


def test_a_model_that_timm_does_not_know_gives_one_line(timm):
    with pytest.raises(ValueError, match=r"timm has no model 'huge' for such data: Unknown model \(huge\)$"):
        build("timm:huge", digits())


def test_without_timm_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm:tiny needs a timm that can be imported: .*"):
        build("timm:tiny", digits())

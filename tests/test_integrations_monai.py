import warnings

import pytest
import torch
from torch import nn

from mbnorm import DoubleForward, MatchedBatchNorm3d, MemorizedBatchNorm3d, MomentumBatchNorm3d, revert
from mbnorm.integrations.monai import register

with warnings.catch_warnings():
    # its dependencies', at import
    warnings.simplefilter("ignore")
    nets = pytest.importorskip("monai.networks.nets", reason="needs MONAI: pip install monai")
    from monai.networks.layers import get_norm_layer
    from monai.networks.layers.factories import Norm

KINDS = {"momentum": MomentumBatchNorm3d, "memorized": MemorizedBatchNorm3d, "matched": MatchedBatchNorm3d}
NORMS = [("momentum", {"history_weight": 0.9}), ("memorized", {"memory_size": 16}), "matched"]
on_every_norm = pytest.mark.parametrize("norm", NORMS, ids=KINDS)


@pytest.fixture(autouse=True)
def registered():
    register()


def unet(norm):
    return nets.UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(4, 8),
        strides=(2,),
        num_res_units=1,
        norm=norm,
    )


def dynunet(norm):
    three = [3, 3, 3]
    return nets.DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        kernel_size=three,
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        filters=[4, 8, 8],
        norm_name=norm,
    )


def segresnet(norm):
    return nets.SegResNet(
        spatial_dims=3,
        init_filters=4,
        in_channels=1,
        out_channels=2,
        blocks_down=(1, 1),
        blocks_up=(1,),
        norm=norm,
    )


def count(model, kind):
    return sum(type(m) is kind for m in model.modules())


def name_of(norm):
    return norm if isinstance(norm, str) else norm[0]


@on_every_norm
@pytest.mark.parametrize("build", [unet, dynunet, segresnet])
def test_a_3d_net_trains_at_batch_size_2(build, norm):
    torch.manual_seed(0)
    model = build(norm)
    kind = KINDS[name_of(norm)]
    assert count(model, kind) == count(build("batch"), nn.BatchNorm3d) > 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(2, 1, 8, 8, 8)
    y = (x[:, 0] > 0).long()
    losses = []
    with DoubleForward(model, optimizer):
        for _ in range(12):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    with torch.no_grad():
        want = model(x)
        revert(model)
        assert count(model, kind) == 0
        assert torch.equal(model(x), want)


@on_every_norm
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_factory_gives_the_layer_of_the_dimension(norm, dim):
    layer = get_norm_layer(norm, spatial_dims=dim, channels=5)
    assert type(layer).__name__ == KINDS[name_of(norm)].__name__.replace("3d", f"{dim}d")
    assert layer.num_features == 5
    if norm == "matched":
        assert (layer.matched_batch_size, layer.measured, layer.early_weight) == (128, True, 8)
    elif name_of(norm) == "memorized":
        assert layer.memory_size == 16
    else:
        assert float(layer.history_weight) == pytest.approx(0.9)


def test_registering_again_changes_nothing():
    names = Norm.names
    register()
    assert Norm.names == names
    assert {"MOMENTUM", "MEMORIZED", "MATCHED"} <= set(names)

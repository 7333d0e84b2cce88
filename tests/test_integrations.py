"""What holds for all integrations: thin, optional, and the classes found by a dotted path."""

import importlib
import json
import pydoc
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mbnorm
from mbnorm.convert import revert

HERE = Path(mbnorm.__file__).parent / "integrations"
NEEDS = {
    "lightning": ("lightning.pytorch", "pip install lightning"),
    "lightning_sync": ("lightning.pytorch.plugins", "pip install lightning"),
    "monai": ("monai.networks.layers.factories", "pip install monai"),
    "mmengine": ("mmengine.hooks", "pip install mmengine"),
}


def test_every_integration_says_what_it_needs_and_is_thin():
    sizes = {p.stem: len(p.read_text().splitlines()) for p in HERE.glob("*.py") if p.stem != "__init__"}
    assert sizes.keys() == NEEDS.keys()
    assert max(sizes.values()) <= 80


def use(name):
    importlib.import_module(f"mbnorm.integrations.{name}").register()


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_package_gives_one_line_that_says_what_to_install(name, monkeypatch):
    package, install = NEEDS[name]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"mbnorm.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=install) as raised:
        use(name)
    assert "\n" not in str(raised.value)


# what plans.json of nnU-Net v2 says of a norm; its net builder resolves the path with pydoc.locate
PLANS = json.loads("""{
    "momentum": {"norm_op": "mbnorm.MomentumBatchNorm3d", "norm_op_kwargs":
        {"eps": 1e-05, "affine": true, "history_weight": 0.9}},
    "matched": {"norm_op": "mbnorm.MatchedBatchNorm3d", "norm_op_kwargs":
        {"eps": 1e-05, "affine": true, "matched_batch_size": 128, "measured": true, "early_weight": 8}},
    "memorized": {"norm_op": "mbnorm.MemorizedBatchNorm2d", "norm_op_kwargs":
        {"eps": 1e-05, "affine": true, "memory_size": 64}}
}""")


class ConvDropoutNormReLU(nn.Module):
    """A block as nnU-Net's dynamic-network-architectures builds it: norm_op(channels, **kwargs)."""

    def __init__(self, conv_op, channels, norm_op, norm_op_kwargs):
        super().__init__()
        self.conv = conv_op(1, channels, 3, padding=1)
        self.norm = norm_op(channels, **norm_op_kwargs)

    def forward(self, x):
        return nn.functional.leaky_relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("method", PLANS)
def test_nnunets_plans_name_the_layers_by_their_path(method):
    plan = PLANS[method]
    norm_op = pydoc.locate(plan["norm_op"])
    assert issubclass(norm_op, nn.Module)
    dim = int(plan["norm_op"][-2])
    block = ConvDropoutNormReLU((nn.Conv2d, nn.Conv3d)[dim - 2], 4, norm_op, plan["norm_op_kwargs"])
    for _ in range(3):
        block(torch.randn(2, 1, *[6] * dim)).square().mean().backward()
    assert int(block.norm.num_batches_tracked) == 3
    x = torch.randn(2, 1, *[6] * dim)
    want = block.eval()(x)
    revert(block)
    assert torch.equal(block(x), want)


def test_the_path_of_a_class_is_the_one_it_was_found_by():
    for name in ("MatchedBatchNorm3d", "MomentumBatchNorm3d", "MemorizedBatchNorm3d"):
        layer = getattr(mbnorm, name)
        assert pydoc.locate(f"{layer.__module__}.{layer.__qualname__}") is layer

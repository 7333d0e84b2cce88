"""A training step asks the device for nothing: the host never waits, and a CUDA graph can hold the step."""

from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mbnorm import (
    DoubleForward,
    MatchedBatchNorm2d,
    MemorizedBatchNorm2d,
    MomentumBatchNorm2d,
    MomentumSchedule,
)
from mbnorm.backends import triton

METHODS = {
    "momentum": (MomentumBatchNorm2d, {"history_weight": 0.5}),
    "matched": (MatchedBatchNorm2d, {"matched_batch_size": 128, "measured": False, "early_weight": 0.0}),
    "matched, early": (MatchedBatchNorm2d, {"matched_batch_size": 128, "measured": False}),
    "measured": (MatchedBatchNorm2d, {"matched_batch_size": 128, "early_weight": 0.0}),
    "memorized": (MemorizedBatchNorm2d, {"memory_size": 4}),
    "memorized, ema": (MemorizedBatchNorm2d, {"memory_size": 4, "memory_values": 32}),
}
on_every_method = pytest.mark.parametrize("method", METHODS)
# these give the host a value or a shape that depends on one
ASKING = (
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique",
    "allclose",
)
VIEWS = ("view", "detach", "alias", "unbind", "select", "slice", "expand", "t", "as_strided", "unsqueeze")


class Watch(TorchDispatchMode):
    """Counts the operators that launch something, and refuses those that ask or cross to another device."""

    def __init__(self):
        super().__init__()
        self.launches = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().partition("::")[2].partition(".")[0]
        assert not name.startswith(ASKING), f"{name} waits for the device"
        result = operator(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        assert len(devices) < 2, f"{name} goes from one device to another: {devices}"
        if name not in VIEWS and not name.startswith(("device", "empty", "new_empty", "_unsafe_view")):
            self.launches[name] += 1
        return result


def layer_of(method, backend="aten", device="cpu"):
    if method is None:
        return nn.BatchNorm2d(3, device=device)
    layer, options = METHODS[method]
    return layer(3, backend=backend, device=device, **options)


def steps(net, optimizer, count, schedule=None):
    for _ in range(count):
        net(torch.randn(2, 3, 4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


@pytest.mark.parametrize("refreshed", [False, True], ids=["", "double forward"])
@on_every_method
def test_a_training_step_asks_for_nothing(method, refreshed):
    net = nn.Sequential(layer_of(method), nn.Conv2d(3, 3, 3), layer_of(method))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if refreshed:
        DoubleForward(net, optimizer)
    schedule = MomentumSchedule(net, 9, batch_size=2) if method == "momentum" else None
    # the first steps may ask: whether a memory is empty, say
    steps(net, optimizer, 2, schedule)
    with Watch():
        steps(net, optimizer, 5, schedule)


def test_what_waits_for_the_device_is_noticed():
    with Watch(), pytest.raises(AssertionError, match="_local_scalar_dense waits for the device"):
        bool(torch.ones(()))
    with (
        FakeTensorMode(),
        Watch(),
        pytest.raises(AssertionError, match="goes from one device to another"),
    ):
        torch.ones(2, device="cuda").cpu()


@pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
@on_every_method
def test_triton_does_a_whole_forward_in_one_operator_that_stays_on_the_device(method):
    assert triton.missing() is None
    # fake tensors of a device that need not be there; autograd would ask for it
    with FakeTensorMode(), torch.no_grad():
        layer, x = layer_of(method, "triton", "cuda"), torch.empty(2, 3, 4, 4, device="cuda")
        layer(x)
        with Watch() as watch:
            layer(x)
    operator = "forward_with_ring" if "memorized" in method else "forward_with_average"
    assert watch.launches == {operator: 1}

"""Nets, data and questions shared by the tests of states that come through other hands."""

import copy
import warnings

import pytest
import torch
from torch import nn

from mbnorm import convert

METHODS = {
    "momentum": ("momentum", {"history_weight": 0.7}),
    "matched": ("matched", {}),
    "memorized": ("memorized", {"memory_size": 6}),
    "memorized-ema": ("memorized", {"memory_size": 6, "inference": "ema"}),
}
on_every_method = pytest.mark.parametrize("method", METHODS)
CHANNELS = 8


def package(name):
    with warnings.catch_warnings():
        # its dependencies', at import
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"needs {name}: pip install {name}")


def data_of_a(m=8):
    return 3 + 2 * torch.randn(m, CHANNELS, 4, 4)


def data_of_b(m=8):
    return -6 + 0.3 * torch.randn(m, CHANNELS, 4, 4)


def stock():
    return nn.Sequential(nn.BatchNorm2d(CHANNELS))


def ours(method, model=None):
    """A new net of a layer with a memory, or ``model`` converted."""
    model = stock() if model is None else model
    name, options = METHODS[method]
    convert(model, name, **options)
    return model


def trained(model, data, steps=60):
    with torch.no_grad():
        for _ in range(steps):
            model(data())
    return model


def memory_of(model):
    """The memory of a net's only layer, by name."""
    layer = model[0]
    return {name: t.clone() for name, t in zip(layer.memory.buffers, layer.state, strict=True)}


def seeded(method, mean, var, batches=60):
    """The memory that starts from running statistics."""
    model = stock()
    model[0].running_mean.copy_(mean)
    model[0].running_var.copy_(var)
    model[0].num_batches_tracked.fill_(batches)
    return memory_of(ours(method, model))


def seed_of(method, model):
    """The memory that starts from those of a net."""
    layer = model[0]
    return seeded(method, layer.running_mean, layer.running_var, int(layer.num_batches_tracked))


def assert_memory(model, expected, rtol=1e-6):
    """Check a memory after what a training forward does before it reads it."""
    model.train()
    for name, value in memory_of(model).items():
        torch.testing.assert_close(value.to(expected[name].dtype), expected[name], rtol=rtol, atol=1e-6)


def assert_same_state(model, other):
    """Check that two nets have the same state and go on alike, bit for bit."""
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    # what no state_dict has, too
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


def copies(model, count):
    return [copy.deepcopy(model) for _ in range(count)]

"""What a layer holds beside its parameters and buffers: records of forwards whose backward is to come."""

import gc
from types import BuiltinFunctionType, FunctionType, ModuleType

import pytest
import torch
from helpers import BACKENDS, layout_id, make_input
from torch import Tensor

from mbnorm import DoubleForward, MatchedBatchNorm2d, MemorizedBatchNorm2d, MomentumBatchNorm2d

CHANNELS = 11
ROW = CHANNELS * torch.float32.itemsize
SHAPES = [(2, CHANNELS, 4, 4), (3, CHANNELS, 5, 2), (1, CHANNELS, 7, 7)]
LAYERS = {
    "momentum": lambda **options: MomentumBatchNorm2d(CHANNELS, history_weight=0.75, **options),
    "matched": lambda **options: MatchedBatchNorm2d(CHANNELS, **options),
    "memorized": lambda **options: MemorizedBatchNorm2d(CHANNELS, memory_size=4, **options),
}
on_every_method = pytest.mark.parametrize("method", LAYERS)
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
of_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=layout_id)


def record(layer):
    """Bytes: statistics of the batch and those that normalized it, what both passes have read."""
    return (7 + (3 if layer.gradient == "remembered" else 0)) * ROW


def tensors_of(layer):
    """Return every tensor that is reached from a layer's attributes, slots and closures included."""
    found, seen, ahead = [], {}, [vars(layer)]
    while ahead:
        item = ahead.pop()
        if id(item) in seen or isinstance(item, (ModuleType, type, BuiltinFunctionType)):
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, FunctionType):
            ahead += item.__closure__ or ()
        else:
            ahead += gc.get_referents(item)
    return found


def bytes_of(tensors):
    storages = (t.untyped_storage() for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def bytes_beside_the_state(layer):
    return bytes_of(tensors_of(layer)) - bytes_of([*layer.parameters(), *layer.buffers()])


def forward(layer, shape, seed=0):
    return layer(make_input(shape, torch.float32, seed=seed).requires_grad_())


def backward(y):
    y.backward(torch.randn_like(y))


@on_every_backend
@of_both_dtypes
@on_every_method
def test_after_training_a_layer_holds_its_state_and_one_record(method, dtype, backend):
    layer = LAYERS[method](backend=backend, dtype=dtype)
    for shape in SHAPES * 2:
        # the first forward of a kind is prepared, the others run as that was
        for seed in range(3):
            backward(forward(layer, shape, seed))
            assert bytes_beside_the_state(layer) <= record(layer)


@on_every_backend
@on_every_method
def test_there_is_a_record_for_each_forward_whose_backward_is_to_come(method, backend):
    layer = LAYERS[method](backend=backend)
    for _ in range(2):
        outputs = [forward(layer, shape) for shape in SHAPES]
        assert 0 < bytes_beside_the_state(layer) <= len(SHAPES) * record(layer)
        for y in outputs:
            backward(y)
        backward(forward(layer, SHAPES[0]))
        assert bytes_beside_the_state(layer) <= record(layer)


@on_every_backend
@of_both_dtypes
@on_every_method
def test_forwards_without_a_graph_leave_nothing(method, dtype, backend):
    layer = LAYERS[method](backend=backend, dtype=dtype)
    for shape in SHAPES * 2:
        with torch.no_grad():
            forward(layer, shape)
        forward(layer.eval(), shape)
        layer.train()
        assert bytes_beside_the_state(layer) == 0


@on_every_backend
@on_every_method
def test_refreshes_and_what_came_before_them_leave_one_record(method, backend):
    layer = LAYERS[method](backend=backend)
    double_forward = DoubleForward(layer)
    for _ in range(3):
        for shape in SHAPES:
            backward(forward(layer, shape))
        double_forward.refresh()
        assert bytes_beside_the_state(layer) <= record(layer)


@on_every_method
def test_a_copy_holds_its_state_alone(method):
    layer = LAYERS[method]()
    forward(layer, SHAPES[0])
    twin = LAYERS[method]()
    twin.__setstate__(layer.__getstate__())
    assert bytes_beside_the_state(twin) == 0

"""Which backend CUDA tensors get; they are fake ones, so that no device is needed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mbnorm import MomentumBatchNorm1d, functional
from mbnorm.backends import triton
from mbnorm.functional import backend_for, choose


@pytest.fixture
def on_cuda():
    with FakeTensorMode():
        return torch.empty(4, 3, device="cuda")


def test_cuda_gets_aten_unless_triton_is_asked_for(on_cuda, monkeypatch):
    monkeypatch.setattr(triton, "missing", lambda: None)
    assert backend_for(on_cuda) == "aten"
    assert choose(on_cuda, "triton") == "triton"


def test_it_takes_one_line_to_prefer_triton(on_cuda, monkeypatch):
    monkeypatch.setitem(functional.OWN_KERNELS, "cuda", ("triton", triton))
    monkeypatch.setattr(triton, "missing", lambda: None)
    assert backend_for(on_cuda) == choose(on_cuda, "auto") == "triton"
    monkeypatch.setattr(triton, "DTYPES", (torch.float64,))
    assert backend_for(on_cuda) == "aten"
    monkeypatch.undo()
    monkeypatch.setitem(functional.OWN_KERNELS, "cuda", ("triton", triton))
    monkeypatch.setattr(triton, "missing", lambda: "the package triton is not installed")
    assert backend_for(on_cuda) == "aten"


def test_an_explicit_triton_says_that_it_is_not_installed(on_cuda, monkeypatch):
    monkeypatch.setattr(triton, "missing", lambda: "the package triton is not installed")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot be used: the package triton is not"):
        choose(on_cuda, "triton")


def test_an_explicit_triton_refuses_other_devices():
    layer = MomentumBatchNorm1d(3, history_weight=0.5, backend="triton")
    with pytest.raises(ValueError, match=r"on CUDA and ROCm, got torch.float32 on cpu"):
        layer(torch.randn(4, 3))

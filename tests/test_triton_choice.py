"""Which backend CUDA tensors get; they are fake ones, so that no device is needed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mbnorm import MomentumBatchNorm1d, trial
from mbnorm.backends import triton
from mbnorm.functional import backend_for, choose


@pytest.fixture
def on_cuda():
    with FakeTensorMode():
        return torch.empty(4, 3, device="cuda")


def test_auto_takes_triton_where_it_has_passed(on_cuda, monkeypatch):
    monkeypatch.setattr(trial, "_failures", {on_cuda.device: None})
    assert backend_for(on_cuda) == choose(on_cuda, "auto") == "triton"


def test_auto_takes_aten_where_triton_fails(on_cuda, monkeypatch):
    monkeypatch.setattr(trial, "_failures", {on_cuda.device: "its kernels do not run"})
    assert backend_for(on_cuda) == choose(on_cuda, "auto") == "aten"


def test_auto_takes_aten_for_what_triton_does_not_know(on_cuda, monkeypatch):
    monkeypatch.setattr(trial, "_failures", {on_cuda.device: None})
    monkeypatch.setattr(triton, "DTYPES", (torch.float64,))
    assert backend_for(on_cuda) == "aten"


def test_a_device_that_is_not_there_is_not_tried(on_cuda, monkeypatch):
    monkeypatch.setattr(trial, "_failures", {})
    monkeypatch.setattr(triton, "missing", lambda: None)
    with FakeTensorMode():
        assert backend_for(on_cuda) == "aten"
    assert trial._failures == {}


def test_an_explicit_triton_is_not_tried(on_cuda, monkeypatch):
    monkeypatch.setattr(triton, "missing", lambda: None)
    monkeypatch.setattr(trial, "_try_all", None)
    assert choose(on_cuda, "triton") == "triton"


def test_an_explicit_triton_says_that_it_is_not_installed(on_cuda, monkeypatch):
    monkeypatch.setattr(triton, "missing", lambda: "the package triton is not installed")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot be used: the package triton is not"):
        choose(on_cuda, "triton")


def test_an_explicit_triton_refuses_other_devices():
    layer = MomentumBatchNorm1d(3, history_weight=0.5, backend="triton")
    with pytest.raises(ValueError, match=r"on CUDA and ROCm, got torch.float32 on cpu"):
        layer(torch.randn(4, 3))

"""Whether "auto" may use the Triton kernels on a device: what they are found to do there decides.

Where no GPU is there, they are stood in for, or interpreted (`make test-triton`).
"""

import os
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mbnorm import trial
from mbnorm.backends import triton

CPU = torch.device("cpu")
CUDA = torch.cuda.is_available()
RUNS = find_spec("triton") is not None and (CUDA or os.environ.get("TRITON_INTERPRET") == "1")


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(trial, "_failures", {})


@pytest.fixture
def stand_in(monkeypatch):
    """Triton's kernels, as plain PyTorch on the CPU has them."""
    monkeypatch.setattr(triton, "missing", lambda: None)
    monkeypatch.setattr(trial, "_by_triton", trial._by_aten)


@pytest.mark.skipif(not RUNS, reason="Triton's kernels do not run here")
def test_the_kernels_pass():
    assert triton.missing() is None
    assert trial.failure_on(torch.device("cuda", 0) if CUDA else CPU) is None


def test_kernels_that_agree_pass(stand_in):
    assert trial.failure_on(CPU) is None
    assert trial.triton_works_for(torch.empty(2, 3))


RESULTS = ["y", "dx", "dw", "db", *("state" for _ in range(9))]


@pytest.mark.parametrize("number", range(len(RESULTS)))
@pytest.mark.parametrize("off", [1, torch.nan])
def test_one_wrong_number_fails_them_and_is_told(stand_in, monkeypatch, number, off):
    def one_off(*arguments):
        results = trial._by_aten(*arguments)
        exact = results[number].is_floating_point()
        results[number].view(-1)[-1:].add_(1e-3 * off if exact else 1)
        return results

    monkeypatch.setattr(trial, "_by_triton", one_off)
    with pytest.warns(UserWarning, match="mbnorm leaves Triton alone"):
        assert trial.failure_on(CPU).startswith(f"its {RESULTS[number]} has an error of ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not trial.triton_works_for(torch.empty(2, 3))


def test_kernels_that_do_not_run_are_no_error(stand_in, monkeypatch):
    def no_compiler(*arguments):
        raise OSError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(trial, "_by_triton", no_compiler)
    assert trial.failure_on(CPU) == "its kernels do not run on cpu: OSError: Failed to find C compiler."
    assert not trial.triton_works_for(torch.empty(2, 3))


def test_a_device_is_tried_once(stand_in, monkeypatch):
    assert trial.failure_on(CPU) is None
    monkeypatch.setattr(trial, "_by_triton", None)
    assert trial.failure_on(CPU) is None


def test_nothing_is_tried_where_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr(triton, "missing", lambda: "the package triton is not installed")
    monkeypatch.setattr(trial, "_try_all", None)
    assert not trial.triton_works_for(torch.empty(2, 3))
    assert trial.failure_on(CPU) == "the package triton is not installed"


@pytest.mark.parametrize("around", [FakeTensorMode, torch.inference_mode], ids=lambda a: a.__name__)
def test_where_kernels_cannot_be_looked_at_none_are_tried_and_nothing_is_concluded(stand_in, around):
    with around():
        assert not trial.triton_works_for(torch.empty(2, 3))
    assert trial.triton_works_for(torch.empty(2, 3))


def test_the_capture_of_a_graph_is_no_time_to_try(stand_in, monkeypatch):
    class OnCuda(torch.Tensor):
        is_cuda = True

    x = torch.empty(2, 3).as_subclass(OnCuda)
    monkeypatch.setattr(triton, "is_plain", lambda x: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not trial.triton_works_for(x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert trial.triton_works_for(x)


def test_a_trial_leaves_no_trace(stand_in):
    saved = []
    before = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        trial.failure_on(CPU)
    # checkpoints count what is saved, and would find other numbers in the recompute
    assert saved == []
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not RUNS, reason="Triton's kernels do not run here")
@pytest.mark.filterwarnings("ignore:mbnorm leaves Triton alone")
def test_statistics_that_differ_from_one_forward_to_another_fail_them(monkeypatch):
    assert triton.missing() is None
    forward = triton.forward

    def rounded_otherwise(*arguments):
        y, record = forward(*arguments)
        return y, torch.nextafter(record, record + 1)

    monkeypatch.setattr(triton, "forward", rounded_otherwise)
    device = torch.device("cuda", 0) if CUDA else CPU
    assert trial.failure_on(device).startswith("its statistics of a batch differ")

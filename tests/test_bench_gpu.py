import pytest
import torch

from mbnorm.experiments.bench import gpu, gpu_report
from mbnorm.experiments.bench.cases import RESNET50, Case
from mbnorm.experiments.bench.gpu_steps import GpuTrainer

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SMALL = Case((2, 8, 5, 5), "float32", "channels_last")


def test_every_shape_of_resnet50_is_there_at_every_batch_size():
    cases = gpu.gpu_cases()
    for batch in (2, 8, 32):
        assert {(batch, *s[1:]) for s in RESNET50} == {c.shape for c in cases if c.shape[0] == batch}


def test_compiled_layers_run_shapes_of_resnet50():
    assert {c.shape[1:] for c in gpu.compiled_cases()} <= {s[1:] for s in RESNET50}


@pytest.mark.parametrize("backend", ["traceable", "aten"])
def test_backends_are_checked_against_float64(backend):
    errors = gpu.errors_of(backend, SMALL, "cpu")
    assert errors.keys() == {"y", "dx", "dw", "db"}
    assert 0 < max(errors.values()) < 1e-5


def test_a_wrong_backend_is_not_measured(monkeypatch):
    monkeypatch.setattr(gpu, "errors_of", lambda backend, case, device: {"y": 0.0, "dx": float("nan")})
    with pytest.raises(ArithmeticError, match="traceable on Case"):
        list(gpu.check("cpu"))


@no_gpu
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main([str(tmp_path / "out")]) == 2
    assert "torch sees none" in capsys.readouterr().err


def layer(provider, seconds, shape=(2, 64, 112, 112), peak=100):
    return {
        "kind": "layer",
        "provider": provider,
        "shape": shape,
        "dtype": "float32",
        "layout": "contiguous",
        "threads": "eager",
        "mode": "both",
        "median_s": seconds,
        "bytes": 200e6,
        "copy_bytes_per_s": 2e9,
        "peak_bytes": peak,
    }


def test_the_table_has_ratios_shares_and_what_did_not_run():
    rows = [
        layer("batch_norm", 1.0),
        layer("momentum", 0.5, peak=101),
        layer("batch_norm", 1.0, (2, 64, 56, 56)),
        layer("momentum", 2.0, (2, 64, 56, 56)),
        {"kind": "step", "method": "batch", "threads": "graph", "median_s": 0.01, "peak_bytes": 10},
        {"kind": "step", "method": "momentum", "threads": "graph", "median_s": 0.02, "peak_bytes": 11},
        {"kind": "failure", "of": "step", "what": "memorized, graph", "why": "no time left"},
    ]
    text = gpu_report.table([{**row, "torch": "2", "mbnorm": "0"} for row in rows])
    assert "| eager, 2, float32, contiguous | 1.00 (2.00) | 1.010 | 0.25 |" in text
    assert "| graph, momentum | 20.00 | 2.00 | 1.100 |" in text
    assert "- step memorized, graph: no time left" in text


@pytest.mark.parametrize("method", ["momentum", "memorized+df"])
def test_a_resnet50_trains_a_step(method):
    trainer = GpuTrainer(method, "cpu", side=64)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step()
    assert any(not torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))

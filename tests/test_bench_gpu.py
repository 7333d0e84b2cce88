import time

import pytest
import torch

from mbnorm.experiments.bench import gpu, gpu_check, gpu_layers, gpu_report
from mbnorm.experiments.bench.cases import RESNET50, Case
from mbnorm.experiments.bench.gpu_steps import GpuTrainer
from mbnorm.experiments.bench.rows import failure, read

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SMALL = Case((2, 8, 5, 5), "float32", "channels_last")


def test_every_shape_of_resnet50_is_there_at_every_batch_size():
    cases = gpu_layers.gpu_cases()
    for batch in (2, 8, 32):
        assert {(batch, *s[1:]) for s in RESNET50} == {c.shape for c in cases if c.shape[0] == batch}


def test_compiled_layers_run_shapes_of_resnet50():
    assert {c.shape[1:] for c in gpu_layers.compiled_cases()} <= {s[1:] for s in RESNET50}


def test_what_is_called_momentum_runs_the_triton_kernels():
    for name in ("momentum", "memorized"):
        assert gpu_layers.EAGER[name](SMALL).backend == "triton"


@pytest.mark.parametrize("backend", ["traceable", "aten"])
def test_backends_are_checked_against_float64(backend):
    errors = gpu_check.errors_of(backend, SMALL, "cpu")
    assert errors.keys() == {"y", "dx", "dw", "db"}
    assert 0 < max(errors.values()) < 1e-5


def test_a_wrong_backend_and_one_that_does_not_run_are_told_and_the_others_go_on(monkeypatch):
    def errors(backend, case, device):
        if backend == "triton":
            raise RuntimeError("no such kernel")
        return {"y": 0.0, "dx": float("nan" if backend == "aten" else "0")}

    monkeypatch.setattr(gpu_check, "errors_of", errors)
    rows = list(gpu_check.check([(b, SMALL) for b in ("aten", "triton", "traceable")], "cpu"))
    assert [row["kind"] for row in rows] == ["error", "failure", "failure", "error"]
    assert "aten on Case" in rows[1]["what"]
    assert rows[2]["why"] == "RuntimeError: no such kernel"


def test_all_checks_are_shared_out_once():
    pairs = gpu_check.checked_cases()
    shares = [pairs[share :: gpu.CHECKERS] for share in range(gpu.CHECKERS)]
    assert sum(map(len, shares)) == len(pairs) == len(set(pairs))


@no_gpu
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main([str(tmp_path / "out")]) == 2
    assert "torch sees none" in capsys.readouterr().err


@no_gpu
def test_a_part_that_cannot_run_becomes_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {"layers": 30.0, "cuts": 30.0})
    gpu.measure(tmp_path, 60.0)
    rows = read(tmp_path / "gpu.jsonl")
    assert [(row["kind"], row["what"]) for row in rows] == [("failure", "layers"), ("failure", "cuts")]
    assert all("exit status 2; this measures a GPU, and torch sees none" in row["why"] for row in rows)
    assert "- part layers: RuntimeError: exit status 2" in (tmp_path / "gpu.md").read_text()


@no_gpu
def test_a_part_without_time_is_stopped(tmp_path):
    (row,) = gpu.run("layers", tmp_path, time.monotonic() + 0.2)
    assert "killed: no time left" in row["why"]


def test_what_is_measured_is_written_row_by_row(tmp_path, monkeypatch):
    def rows(part, until, share):
        yield {"kind": "cut", "share": share}
        yield failure("layer", part, MemoryError())
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(gpu, "rows_of", rows)
    with pytest.raises(RuntimeError, match="the device is gone"):
        gpu.do("layers", tmp_path, 1.0, 3)
    first, second = read(tmp_path / "gpu.jsonl")
    assert (first["share"], second["why"]) == (3, "MemoryError: MemoryError")
    assert first["torch"] == torch.__version__


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
        {"kind": "cut", "cut": "1024, 4", "shape": (2, 3, 4, 5), "layout": "contiguous", "median_s": 2e-6},
        {"kind": "failure", "of": "step", "what": "memorized, graph", "why": "no time left"},
    ]
    text = gpu_report.table([{**row, "torch": "2", "mbnorm": "0"} for row in rows])
    assert "| eager, 2, float32, contiguous | 1.00 (2.00) | 1.010 | 0.25 |" in text
    assert "| graph, momentum | 20.00 | 2.00 | 1.100 |" in text
    assert "| 2x3x4x5, contiguous | 2.0 |" in text
    assert "- step memorized, graph: no time left" in text


@pytest.mark.parametrize("method", ["momentum", "memorized+df"])
def test_a_resnet50_trains_a_step(method):
    trainer = GpuTrainer(method, "cpu", side=64)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step()
    assert any(not torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))

"""The benchmark of a GPU, where the CPU has to pass for one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gpu, layers, memory, steps
from benchmarks.cases import LAYOUTS, PROVIDERS, RESNET50, Case
from benchmarks.rows import read
from benchmarks.timing import GRAPH
from mbnorm.functional import backend_for

ROOT = Path(__file__).parents[1]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SMALL = Case((2, 8, 5, 5), "float32", "channels_last")


@pytest.mark.parametrize("batch", [2, 8, 32])
def test_every_shape_of_resnet50_is_there_at_every_batch_size(batch):
    names = [name for name, _ in gpu.jobs("cuda", quick=False)]
    for dtype in ("float32", "bfloat16"):
        for layout in LAYOUTS:
            wanted = {f"layers on {Case((batch, *shape[1:]), dtype, layout)}" for shape in RESNET50}
            assert wanted <= set(names)


def test_compiled_layers_run_shapes_of_resnet50():
    assert set(gpu.COMPILED_SHAPES) <= {shape[1:] for shape in RESNET50}


def test_what_runs_without_a_backend_is_told():
    (row,) = gpu.backend("cpu")
    assert row["backend"] == backend_for(torch.empty(2, 3))
    assert row["seconds"] >= 0
    (said, versions) = gpu.tables([row | {"triton": None}])
    assert f"Without `backend=` {row['backend']} runs" in said
    assert "backend aten: available" in versions


@pytest.fixture
def pretended(monkeypatch):
    """The name of a device that is the CPU, and passes for a GPU that counts its memory."""
    for module in (layers, steps):
        monkeypatch.setattr(module, "captured", lambda call: call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 142)
    return "cpu:0"


def test_layers_are_timed_launched_and_replayed(pretended, monkeypatch):
    def broken(case):
        raise RuntimeError("no such layer")

    monkeypatch.setitem(PROVIDERS, "broken", broken)
    names = ("batch_norm", "broken", "momentum")
    told, *rows = layers.measure(SMALL, names, rounds=1, seconds_a_round=0.0, device=pretended)
    assert (told["what"], told["why"]) == (f"broken on {SMALL}", "RuntimeError: no such layer")
    assert [(row["how"], row["provider"]) for row in rows] == [
        ("eager", "batch_norm"),
        ("eager", "momentum"),
        (GRAPH, "batch_norm"),
        (GRAPH, "momentum"),
    ]
    assert all(row["median_s"] > 0 and row["copy_gb_per_s"] > 0 for row in rows)
    assert all(row["peak_bytes"] == 42 for row in rows)


def test_steps_are_timed_with_their_memory(pretended):
    rows = list(
        steps.measure("two convolutions", ("batch_norm", "memorized+df"), GRAPH, rounds=1, device=pretended)
    )
    assert [(row["norm"], row["how"], row["peak_bytes"]) for row in rows] == [
        ("batch_norm", GRAPH, 42),
        ("memorized+df", GRAPH, 42),
    ]


def test_a_capture_that_fails_becomes_a_row(pretended, monkeypatch):
    def refuses(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(layers, "captured", refuses)
    rows = list(layers.measure(SMALL, ("momentum",), rounds=1, seconds_a_round=0.0, device=pretended))
    assert [row["kind"] for row in rows] == ["layer", "failure"]
    assert rows[1]["what"] == f"momentum on {SMALL}, {GRAPH}"


def test_the_peak_of_a_gpu_leaves_out_what_was_there(pretended):
    assert memory.peak_bytes(lambda: None, pretended) == 42


def layer(provider, seconds, shape=(32, 64, 112, 112), how=GRAPH):
    return {
        "kind": "layer",
        "provider": provider,
        "shape": shape,
        "dtype": "float32",
        "layout": "contiguous",
        "how": how,
        "median_s": seconds,
        "gb_per_s": 400.0 / seconds,
        "copy_gb_per_s": 2000.0,
        "saved_bytes": 100,
        "peak_bytes": 100 * seconds,
    }


def cells(page, start):
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_ratios_rates_and_what_did_not_run():
    rows = [
        layer("batch_norm", 1.0),
        layer("momentum", 0.5),
        layer("batch_norm", 1.0, (32, 64, 56, 56)),
        layer("momentum", 2.0, (32, 64, 56, 56)),
        layer("batch_norm", 1.0, how="eager"),
        layer("momentum", 3.0, how="eager"),
        {
            "kind": "step",
            "net": "resnet50",
            "norm": "batch_norm",
            "how": GRAPH,
            "median_s": 0.01,
            "peak_bytes": 10,
        },
        {
            "kind": "step",
            "net": "resnet50",
            "norm": "matched",
            "how": GRAPH,
            "median_s": 0.02,
            "peak_bytes": 11,
        },
        {"kind": "failure", "of": "gpu", "what": "steps of resnet50", "why": "TimeoutError: over"},
    ]
    where = {"processor": "p", "cores": 2, "torch": "2", "mbnorm": "0", "device": "d", "triton": "3"}
    page = command.page_of("gpu", [row | where for row in rows])
    assert cells(page, "float32, contiguous, batch 32, CUDA graph")[1:] == ["1.00 (2.00)"]
    assert cells(page, "float32, contiguous, batch 32, eager")[1:] == ["3.00 (3.00)"]
    assert cells(page, "32x64x112x112")[1:] == ["0.50", "800.0", "2000.0", "1.00", "0.50"]
    assert cells(page, "resnet50, CUDA graph | matched")[2:] == ["20.00", "2.00", "-", "1.100"]
    assert "- gpu steps of resnet50: TimeoutError: over" in page


def test_a_quick_run_measures_steps_and_layers():
    rows = list(gpu.measure("cpu", quick=True, seconds=float("inf")))
    assert [row["kind"] for row in rows if row["kind"] == "failure"] == []
    assert {row["norm"] for row in rows if row["kind"] == "step"} == set(gpu.NORMS)
    assert {row["provider"] for row in rows if row["kind"] == "layer"} == set(gpu.LAYERS)
    assert all("triton" in row for row in rows)


def test_jobs_that_the_time_does_not_suffice_for_are_told():
    rows = list(gpu.measure("cpu", quick=True, seconds=-1.0))
    assert [row["what"] for row in rows] == [name for name, _ in gpu.jobs("cpu", quick=True)]
    assert all(row["why"] == "TimeoutError: the -1 seconds are over" for row in rows)


def test_a_job_that_raises_becomes_a_row_with_its_traceback(monkeypatch):
    def raises():
        yield {"job": 1}
        raise MemoryError("no more")

    jobs = [("first", raises()), ("second", iter([{"job": 2}]))]
    monkeypatch.setattr(gpu, "jobs", lambda device, quick: jobs)
    first, told, second = gpu.measure("cpu", quick=True, seconds=float("inf"))
    assert (first["job"], second["job"]) == (1, 2)
    assert (told["of"], told["what"], told["why"]) == ("gpu", "first", "MemoryError: no more")
    assert told["traceback"].startswith("Traceback")


def test_a_run_that_hangs_ends_in_time_and_has_lost_no_row(tmp_path):
    code = f"""
import time, torch
from benchmarks import __main__ as command, gpu

def hangs():
    yield {{"kind": "step", "number": 1}}
    time.sleep(1000)

torch.cuda.is_available = lambda: True
gpu.machine = dict
gpu.SECONDS = 0.5
gpu.jobs = lambda device, quick: [("hanging", hangs())]
gpu.SECONDS_OF_THE_LAST = -100.0
command.main(["gpu", {str(tmp_path)!r}])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1
    assert "Timeout" in result.stderr
    assert "in hangs" in result.stderr
    (row,) = read(tmp_path / "gpu.jsonl")
    assert row["number"] == 1


@no_gpu
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match="no GPU: this measures one, and torch sees none"):
        command.main(["gpu", str(tmp_path / "out")])

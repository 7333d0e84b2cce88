import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from mbnorm.backends import cpu
from mbnorm.experiments.bench import memory, rows, timing
from mbnorm.experiments.bench.cases import PROVIDERS, RESNET50, Case, cases
from mbnorm.experiments.bench.steps import METHODS, STEPS, Trainer
from mbnorm.experiments.commands import app

SMALL = Case((2, 32, 5, 5), "float32", "channels_last")


def test_every_shape_of_resnet50_is_there_in_both_layouts():
    found = cases(["float32"], ["contiguous", "channels_last"])
    for layout in ("contiguous", "channels_last"):
        assert set(RESNET50) <= {c.shape for c in found if c.layout == layout}


def test_inputs_have_the_layout_of_their_case():
    assert SMALL.tensor(0).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", [n for n in PROVIDERS if n != "compiled_batch_norm"])
def test_every_layer_agrees_with_its_float64_copy(name):
    assert timing.contestants(SMALL, [name])[name].error() < 1e-4


def test_a_wrong_layer_is_not_timed(monkeypatch):
    class Wrong(nn.Module):
        def forward(self, x):
            return x * (2 if x.dtype == torch.float32 else 1)

    monkeypatch.setitem(PROVIDERS, "wrong", lambda case: Wrong())
    with pytest.raises(ArithmeticError, match=r"wrong on .*nothing timed"):
        timing.contestants(SMALL, ["wrong"])


def test_momentum_saves_no_more_for_the_backward_than_batch_norm():
    ready = timing.contestants(SMALL, ["batch_norm", "momentum"])
    saved = {name: contestant.saved_bytes() for name, contestant in ready.items()}
    per_channel = 32 * 4
    assert saved["momentum"] - saved["batch_norm"] <= 8 * per_channel


def test_a_race_times_every_contestant_in_every_mode():
    ready = timing.contestants(SMALL, ["batch_norm", "momentum"])
    found = dict(timing.race(ready, rounds=3, seconds_a_round=0.001))
    assert found.keys() == ready.keys()
    for timings in found.values():
        assert tuple(timings) == timing.MODES
        assert all(0 < t.low <= t.median <= t.high for t in timings.values())


def test_the_peak_counts_what_lives_at_once():
    def call():
        a = torch.zeros(1000)
        b = a + 1
        del a
        return b * 2

    assert 8000 <= memory.peak_bytes(call) < 9000


def test_no_layer_takes_more_memory_than_batch_norm_and_its_statistics():
    ready = timing.contestants(SMALL, ["batch_norm", "momentum"])
    peak = {name: contestant.peak_bytes() for name, contestant in ready.items()}
    assert peak["momentum"] - peak["batch_norm"] <= 12 * 32 * 4


def test_ratios_compare_rows_of_the_same_shape_and_threads():
    def row(provider, shape, seconds):
        return {"kind": "layer", "provider": provider, "shape": shape, "threads": 1, "median_s": seconds}

    measured = [row("a", [2, 3], 1.0), row("b", [2, 3], 4.0), row("a", [5, 3], 2.0), row("b", [5, 3], 2.0)]
    assert rows.ratios(measured, "a", "b") == {((2, 3), 1): 0.25, ((5, 3), 1): 1.0}
    assert rows.geometric_mean([0.25, 1.0]) == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_steps_train_with_every_norm(method):
    trainer = Trainer(STEPS[1], method)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    assert trainer.step() > 0
    assert any(not torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))
    assert trainer.activation_bytes() > 0


def test_the_command_writes_rows_a_table_and_a_plot(tmp_path):
    threads = torch.get_num_threads()
    arguments = ["bench", "--quick", "--out", str(tmp_path), "--providers", "momentum", "--threads", "1"]
    result = CliRunner().invoke(app, [*arguments, "--dtypes", "float32"])
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    measured = rows.read(tmp_path / "bench.jsonl")
    assert {r["provider"] for r in measured if r["kind"] == "layer"} == {"batch_norm", "momentum"}
    assert all(r["torch"] == torch.__version__ and r["processor"] for r in measured)
    assert "2x2048x7x7" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
def test_what_is_around_the_kernels_is_measured(capsys):
    before = torch.get_num_threads()
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "overhead.py"))
    try:
        script["main"](calls=2, rounds=1)
    finally:
        torch.set_num_threads(before)
    assert len(capsys.readouterr().out.splitlines()) == 5

from functools import partial

import pytest
import torch

from mbnorm import MomentumBatchNorm2d
from mbnorm.backends import triton_cut
from mbnorm.experiments.bench import gpu, gpu_check, gpu_layers, gpu_report, gpu_steps, gpu_verdicts
from mbnorm.experiments.bench.cases import PROVIDERS, RESNET50, Case
from mbnorm.experiments.bench.gpu_parts import Job, Note
from mbnorm.experiments.bench.gpu_steps import GpuTrainer
from mbnorm.experiments.bench.rows import read
from mbnorm.functional import backend_for

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SMALL = Case((2, 8, 5, 5), "float32", "channels_last")


def test_every_shape_of_resnet50_is_there_at_every_batch_size():
    cases = gpu_layers.gpu_cases()
    for batch in (2, 8, 32):
        assert {(batch, *s[1:]) for s in RESNET50} == {c.shape for c in cases if c.shape[0] == batch}


def test_compiled_layers_run_shapes_of_resnet50():
    assert {c.shape[1:] for c in gpu_layers.compiled_cases()} <= {s[1:] for s in RESNET50}


def test_what_is_checked_runs_the_triton_kernels():
    for name in gpu_check.REMEMBERING:
        assert gpu_layers.EAGER[name](SMALL).backend == "triton"


@pytest.mark.parametrize("backend", ["traceable", "aten"])
def test_backends_are_checked_against_float64(backend):
    errors = gpu_check.errors_of(backend, SMALL, "cpu")
    assert errors.keys() == {"y", "dx", "dw", "db"}
    assert 0 < max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", gpu_check.REMEMBERING)
def test_layers_are_checked_against_float64_with_what_they_store(name, monkeypatch):
    errors = gpu_check.layer_errors(PROVIDERS[name], SMALL, "cpu")
    assert errors.keys() == {"y", "dx", "dw", "db", "state"}
    assert all(0 < error < 1e-5 for error in errors.values())


@pytest.mark.parametrize("name", gpu_check.REMEMBERING)
def test_layers_are_checked_inside_checkpoints(name):
    errors = gpu_check.checkpointed_errors(PROVIDERS[name], SMALL, "cpu")
    assert errors == {"y": 0, "dx": 0, "dw": 0, "db": 0, "state": 0}


def test_a_recompute_that_reads_something_else_is_noticed():
    class Careless(MomentumBatchNorm2d):
        def _repeat(self, *arguments):
            return None

    def build(case):
        return Careless(case.shape[1], history_weight=0.5, backend="aten")

    assert gpu_check.checkpointed_errors(build, SMALL, "cpu")["state"] > 0.1


def test_what_auto_takes_is_told():
    (row,) = gpu_check.auto_rows("cpu")
    assert row["backend"] == backend_for(torch.empty(2, 3))
    line = verdict_on("no backend is asked for", [{**row, "backend": "triton", "why_not_triton": None}])
    assert line == "- met: triton where no backend is asked for: triton in 0 s"
    assert verdict_on("no backend is asked for", [row]).startswith("- missed: ")


def test_a_layer_that_stores_something_else_is_noticed():
    class Forgetful(MomentumBatchNorm2d):
        def _commit(self, *arguments):
            if self.backend != "traceable":
                super()._commit(*arguments)

    def build(case):
        return Forgetful(case.shape[1], history_weight=0.5, backend="aten")

    assert gpu_check.layer_errors(build, SMALL, "cpu")["state"] > 0.1


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_errors_that_are_too_large_are_told(wrong, monkeypatch):
    monkeypatch.setattr(gpu_check, "errors_of", lambda *_: {"y": 0.0, "dx": wrong})
    error, told = gpu_check.check("aten", SMALL, "cpu")
    assert error["kind"] == "error"
    assert told["what"] == f"aten on {SMALL}"
    assert told["why"].startswith("ArithmeticError: errors")


def test_all_checks_are_shared_out_once():
    shares = [gpu_check.jobs("cuda", share, 12) for share in range(12)]
    first, *names = [job.name for share in shares for job in share]
    assert first == "auto on cuda"
    assert sorted(names) == sorted(f"{name} on {case}" for name, case in gpu_check.checks())
    assert len(names) == len(set(names))
    assert max(map(len, shares)) < 2 * min(map(len, shares))


def test_what_the_caches_do_not_hold_is_timed_first():
    first, *_, last = gpu_layers.layer_jobs(gpu_layers.gpu_cases(), {})
    assert first.name == str(Case((32, 64, 112, 112), "float32", "contiguous"))
    assert last.name == str(Case((32, 2048, 7, 7), "bfloat16", "channels_last"))


class Clock:
    """A CUDA event, of which each comes 3 ms after the one before."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Clock.now += 3.0
        self.time = Clock.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.time - self.time


@pytest.fixture
def pretended(monkeypatch):
    """A GPU that is the CPU, with a clock and a count of its memory."""
    for module in (gpu_layers, gpu_steps):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "captured", lambda call: call)
    monkeypatch.setattr(gpu_steps, "GpuTrainer", partial(GpuTrainer, side=32))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 142)
    return Clock


def test_layers_are_timed_launched_and_replayed(pretended):
    def broken(case):
        raise RuntimeError("no such layer")

    providers = {
        "batch_norm": PROVIDERS["batch_norm"],
        "broken": broken,
        "momentum": PROVIDERS["momentum-aten"],
    }
    told, *rows = gpu_layers.layer_rows(SMALL, providers)
    assert (told["what"], told["why"]) == (f"broken on {SMALL}", "RuntimeError: no such layer")
    assert [(row["threads"], row["provider"]) for row in rows] == [
        ("eager", "batch_norm"),
        ("eager", "momentum"),
        ("graph", "batch_norm"),
        ("graph", "momentum"),
    ]
    # two calls take 3 ms, so six fill a round
    assert all(row["median_s"] == pytest.approx(3e-3 / 6) for row in rows)
    assert all(row["peak_bytes"] == 42 for row in rows)
    assert rows[0]["copy_bytes_per_s"] == pytest.approx(2 * SMALL.bytes / (3e-3 / 6))
    assert gpu_report.table([{**row, "torch": "2", "mbnorm": "0"} for row in rows])


def test_tensors_are_cut_in_other_ways_and_then_as_before(pretended, monkeypatch):
    cuts = []

    def momentum(case):
        cuts.append(triton_cut.cut(64, 32, 3136, False, 132))
        return PROVIDERS["momentum-aten"](case)

    monkeypatch.setattr(gpu_layers, "_momentum", momentum)
    before = triton_cut.cut(64, 32, 3136, False, 132)
    rows = list(gpu_layers.cut_rows(SMALL))
    assert [row["cut"] for row in rows] == list(gpu_layers.CUTS)
    assert cuts[0] == before == triton_cut.cut(64, 32, 3136, False, 132)
    assert len(set(cuts)) > 3


def test_steps_are_timed_in_turns_with_batch_norm(pretended, monkeypatch):
    monkeypatch.setattr(gpu_steps, "ROUNDS", 2)
    monkeypatch.setattr(gpu_steps, "STEPS_A_ROUND", 1)
    first, second = (next(iter(job.rows())) for job in gpu_steps.jobs("graph")[2:4])
    assert (first["method"], second["method"]) == ("memorized", "momentum+df")
    assert (first["threads"], first["peak_bytes"], first["base_peak_bytes"]) == ("graph", 42, 42)
    assert first["median_s"] > 0
    assert first["base_s"] > 0


@no_gpu
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main([str(tmp_path / "out")]) == 2
    assert "no GPU: this measures one, and torch sees none" in capsys.readouterr().err


@no_gpu
def test_a_part_that_cannot_run_becomes_a_row_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    # as much time as a busy machine may need for the imports of a process
    parts = {"layers": gpu.Part(150.0, 150.0), "check": gpu.Part(150.0, 150.0, 2)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    gpu.measure(tmp_path, gpu.SECONDS)
    rows = read(tmp_path / "gpu.jsonl")
    assert [row["of"] for row in rows] == ["layers", "check", "check"]
    assert all(
        (row["what"], row["why"]) == ("before its first job", "RuntimeError: exit status 2") for row in rows
    )
    assert all("torch sees none" in row["traceback"] for row in rows)
    assert "- layers before its first job: RuntimeError: exit status 2" in (tmp_path / "gpu.md").read_text()
    assert "- not measured: numbers of triton" in capsys.readouterr().out


def test_rows_that_no_table_fits_do_not_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", {"layers": gpu.Part(1.0, 1.0), "cuts": gpu.Part(1.0, 1.0)})
    monkeypatch.setattr(gpu, "run", lambda name, *_: [{"kind": "step", "of": name}])
    gpu.measure(tmp_path, 2.0)
    assert [row["of"] for row in read(tmp_path / "gpu.jsonl")] == ["layers", "cuts"]
    assert "KeyError" in capsys.readouterr().out


def test_what_is_measured_is_written_row_by_row(tmp_path, monkeypatch):
    def rows():
        yield {"kind": "cut", "number": 1}
        raise MemoryError("no more")

    monkeypatch.setattr(gpu, "jobs_of", lambda part, share: [Job(f"job of {share}", rows)])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu.do("layers", tmp_path, float("inf"), 3, 0, Note(tmp_path / "note")) == 0
    first, second = read(tmp_path / "gpu.jsonl")
    assert (first["number"], second["what"], second["why"]) == (1, "job of 3", "MemoryError: no more")
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


def step(method, launched, over, peak=10):
    return {
        "kind": "step",
        "method": method,
        "threads": launched,
        "median_s": 0.01 * over,
        "base_s": 0.01,
        "peak_bytes": peak,
        "base_peak_bytes": 10,
    }


def test_the_table_has_ratios_shares_and_what_did_not_run():
    error = {"kind": "error", "backend": "aten", "dtype": "float32", "y": 1e-7, "dx": 2e-7, "dw": 0, "db": 0}
    rows = [
        error,
        {**error, "y": float("nan")},
        layer("batch_norm", 1.0),
        layer("momentum", 0.5, peak=101),
        layer("batch_norm", 1.0, (2, 64, 56, 56)),
        layer("momentum", 2.0, (2, 64, 56, 56)),
        step("momentum", "graph", 2.0, peak=11),
        {"kind": "cut", "cut": "1024, 4", "shape": (2, 3, 4, 5), "layout": "contiguous", "median_s": 2e-6},
        {"kind": "failure", "of": "step", "what": "memorized, graph", "why": "no time left"},
    ]
    text = gpu_report.table([{**row, "torch": "2", "mbnorm": "0"} for row in rows])
    assert "| aten, float32 | nan | 2.0e-07 | 0.0e+00 | 0.0e+00 | - |" in text
    assert "| eager, 2, float32, contiguous | 1.00 (2.00) | 1.010 | 0.40 (0.25) |" in text
    assert "| graph, momentum | 20.00 | 10.00 | 2.000 | 1.100 |" in text
    assert "| 2x3x4x5, contiguous | 2.0 |" in text
    assert "- step memorized, graph: no time left" in text


def verdict_on(what, rows):
    (line,) = [line for line in gpu_verdicts.verdicts(rows) if what in line]
    return line


def test_without_rows_no_goal_is_measured():
    goals = [line for line in gpu_verdicts.verdicts([]) if line.startswith("- ")]
    assert len(goals) > 60
    assert all(line.startswith("- not measured: ") for line in goals)


def test_a_layer_is_judged_by_all_its_shapes():
    what = "momentum over batch norm, eager, batch 2, float32, contiguous"
    rows = [layer("batch_norm", 1.0, shape) for shape in RESNET50]
    rows += [layer("momentum", 0.8, shape) for shape in RESNET50]
    assert verdict_on(f"{what}: mean", rows) == f"- met: {what}: mean 0.800, at most 0.9"
    slow = [*rows, layer("momentum", 1.2, RESNET50[3])]
    assert verdict_on(f"{what}: mean", slow).startswith("- met: ")
    assert verdict_on(f"{what}: worst", slow) == f"- missed: {what}: worst 1.200, at most 1.1"
    few = verdict_on(f"{what}: mean", rows[:-1])
    assert few == f"- not measured: {what}: mean (11 of 12 cases, 0.800 so far), at most 0.9"


@pytest.mark.parametrize(
    ("method", "launched", "over", "met"),
    [
        ("momentum", "eager", 1.0, True),
        ("momentum", "eager", 1.01, False),
        ("memorized+df", "eager", 1.3, True),
        ("memorized+df", "graph", 1.3, False),
        ("memorized+df", "graph", 1.25, True),
    ],
)
def test_steps_are_judged_by_how_they_are_launched(method, launched, over, met):
    line = verdict_on(f"{launched}, {method}: time", [step(method, launched, over)])
    assert line.startswith("- met: " if met else "- missed: ")


def test_steps_are_judged_by_their_memory():
    assert verdict_on("eager, momentum: peak", [step("momentum", "eager", 1.0, peak=11)]).startswith(
        "- missed"
    )
    assert verdict_on("eager, momentum: peak", [step("momentum", "eager", 1.0)]).startswith("- met")


def test_large_layers_are_judged_by_the_copy_rate():
    large = [case for case in gpu_layers.gpu_cases() if case.bytes > gpu_layers.LARGE]
    rows = [layer("momentum", 1.1 * 8 * 200e6 / 2e9, case.shape) for case in large]
    line = verdict_on("share of the copy rate over 100 MB, eager", rows)
    assert line == "- met: share of the copy rate over 100 MB, eager: least 0.91, at least 0.85"
    assert "not measured" in verdict_on("share of the copy rate over 100 MB, eager", rows[1:])


def test_compiled_layers_are_judged_by_compiled_batch_norm():
    shapes = [(2, *shape) for shape in gpu_layers.COMPILED_SHAPES]
    rows = [layer("compiled_batch_norm", 1.0, shape) for shape in shapes]
    rows += [layer("compiled_momentum", 1.1, shape) for shape in shapes]
    assert verdict_on("compiled batch norm, batch 2", rows).startswith("- missed: ")


def test_wrong_numbers_are_a_goal_missed():
    right = {"kind": "error", "backend": "momentum"}
    wrong = {"kind": "failure", "of": "check", "what": "momentum on Case"}
    assert verdict_on("numbers of momentum", [right]).startswith("- met: numbers of momentum: 1 cases, 0 of")
    assert verdict_on("numbers of momentum", [right, wrong]).startswith("- missed: ")


@pytest.mark.parametrize("method", ["momentum", "matched+df", "memorized+df"])
def test_a_resnet50_trains_a_step(method):
    trainer = GpuTrainer(method, "cpu", side=64)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step()
    assert any(not torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))

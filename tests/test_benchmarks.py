import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import layers, memory, overhead, rows, steps, timing
from benchmarks.cases import BASE, LAYOUTS, OTHERS, PROVIDERS, RESNET50, Case, cases
from benchmarks.operators import bare, operators_of
from mbnorm.functional import SLOWER_WITH_ATEN

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SMALL = Case((2, 32, 5, 5), "float32", "channels_last")


def contestant(name, case=SMALL):
    return layers.Contestant(case, PROVIDERS[name](case))


def test_every_shape_of_resnet50_is_there_in_both_layouts():
    found = cases(RESNET50 + OTHERS, ("float32",))
    for layout in LAYOUTS:
        assert set(RESNET50) <= {c.shape for c in found if c.layout == layout}


def test_inputs_have_the_layout_of_their_case():
    assert SMALL.tensor(0).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", layers.EAGER)
def test_every_layer_agrees_with_its_float64_copy(name):
    assert contestant(name).error() < 1e-4


class Wrong(nn.Module):
    def forward(self, x):
        return x * (2 if x.dtype == torch.float32 else 1)


@pytest.fixture
def wrong(monkeypatch):
    monkeypatch.setitem(PROVIDERS, "wrong", lambda case: Wrong())
    return "wrong"


def test_a_wrong_layer_is_not_timed(wrong):
    failed, timed = layers.measure(SMALL, [wrong, "batch_norm"], rounds=1, seconds_a_round=0.0)
    assert (failed["kind"], failed["what"]) == ("failure", f"wrong on {SMALL}")
    assert failed["why"].startswith("ArithmeticError: error ")
    assert failed["traceback"].startswith("Traceback")
    assert timed["provider"] == "batch_norm"


def test_momentum_saves_no_more_for_the_backward_than_batch_norm():
    saved = {}
    for name in ("batch_norm", "momentum"):
        ready = contestant(name)
        saved[name] = memory.saved_bytes(ready.layer, ready.forward)
    per_channel = 32 * 4
    assert saved["momentum"] - saved["batch_norm"] <= 8 * per_channel


def test_what_is_saved_is_counted_once_and_without_parameters():
    x = torch.randn(3, 10)
    linear = nn.Linear(10, 10)
    assert memory.saved_bytes(linear, lambda: linear(x).square() + linear(x)) == 2 * 3 * 10 * 4


def test_a_race_times_calls_in_turns():
    order = []
    found = timing.race({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    assert found.keys() == {"a", "b"}
    assert all(len(measured.times) == 3 and measured.median > 0 for measured in found.values())
    # two calls to warm up before each one that counts; the first of each finds out how often to call
    assert "".join(order) == 4 * "aaabbb"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_race_runs_on_its_number_of_threads_and_leaves_torchs(threads):
    before, found = torch.get_num_threads(), []
    timing.race({"": lambda: found.append(torch.get_num_threads())}, rounds=1, threads=threads)
    assert set(found) == {threads}
    assert torch.get_num_threads() == before


def test_calls_are_repeated_to_fill_a_round():
    calls = []
    (measured,) = timing.race({"": lambda: calls.append(1)}, rounds=2, seconds_a_round=0.001).values()
    assert len(calls) > 20
    assert measured.median < 0.001


def test_the_peak_counts_what_lives_at_once():
    def call():
        a = torch.zeros(1000)
        b = a + 1
        del a
        return b * 2

    assert 8000 <= memory.peak_bytes(call) < 9000


def test_no_layer_takes_more_memory_than_batch_norm_and_its_statistics():
    peak = {name: memory.peak_bytes(contestant(name)) for name in ("batch_norm", "momentum")}
    assert peak["momentum"] - peak["batch_norm"] <= 12 * 32 * 4


def test_the_operators_of_a_call_are_run_again_bare():
    x, y = torch.ones(3, requires_grad=True), torch.zeros(3)

    def call():
        (x * 2).detach().sum()
        y.add_(1)

    names = [name for name, _ in operators_of(call)]
    assert names == ["aten::mul.Tensor", "aten::detach", "aten::sum", "aten::add_.Tensor"]
    again = bare(call)
    again()
    again()
    # twice as they were recorded, and twice bare
    assert y.tolist() == [4.0] * 3


def test_ratios_compare_rows_of_the_same_shape_that_ran_alike():
    def row(provider, shape, seconds, how="1 thread"):
        return {"kind": "layer", "provider": provider, "shape": shape, "how": how, "median_s": seconds}

    measured = [row("a", [2, 3], 1.0), row("b", [2, 3], 4.0), row("a", [5, 3], 2.0), row("b", [5, 3], 2.0)]
    measured += [row("a", [2, 3], 1.0, "2 threads"), row("b", [2, 3], 2.0, "2 threads")]
    found = rows.ratios(measured, "a", "b")
    assert found == {
        ((2, 3), "1 thread"): 0.25,
        ((5, 3), "1 thread"): 1.0,
        ((2, 3), "2 threads"): 0.5,
    }
    assert rows.ratios(measured, "a", "b", how="2 threads") == {((2, 3), "2 threads"): 0.5}
    assert rows.geometric_mean([0.25, 1.0]) == 0.5


@pytest.mark.parametrize(
    ("net", "norm"),
    [
        *(("unet3d", norm) for norm in steps.WITH_REFRESHED),
        *(("resnet50", norm) for norm in ("momentum", "matched+df", "memorized+df")),
    ],
)
def test_steps_train_with_every_norm(net, norm, monkeypatch):
    # at 224 pixels a step takes a second
    monkeypatch.setitem(steps.NETS, "resnet50", steps.NETS["resnet50"]._replace(shape=(2, 3, 64, 64)))
    trainer = steps.Trainer(net, norm)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer()
    assert any(not torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))
    assert memory.saved_bytes(trainer.model, trainer.loss) > 0


def test_a_norm_that_does_not_train_becomes_a_row_and_the_others_go_on():
    failed, timed = steps.measure("two convolutions", ["no such norm", "matched"], "1 thread", rounds=1)
    assert (failed["of"], failed["what"]) == ("step", "two convolutions, no such norm, 1 thread")
    assert failed["why"] == "KeyError: 'no such norm'"
    assert (timed["norm"], timed["how"]) == ("matched", "1 thread")


@pytest.fixture
def few(monkeypatch):
    """Quick runs of two layers and two norms."""
    monkeypatch.setattr(layers, "EAGER", ("batch_norm", "momentum"))
    monkeypatch.setattr(steps, "WITH_REFRESHED", ("batch_norm", "matched"))


def test_the_command_writes_rows_and_a_page_of_layers(few, tmp_path, capsys):
    assert command.main(["layers", str(tmp_path / "out"), "--quick"]) == 0
    measured = rows.read(tmp_path / "out" / "layers.jsonl")
    assert {row["provider"] for row in measured} == {"batch_norm", "momentum"}
    assert all(row["torch"] == torch.__version__ and row["processor"] for row in measured)
    page = (tmp_path / "out" / "layers.md").read_text()
    assert "Written by `python -m benchmarks layers`." in page
    assert "| 2x2048x7x7 | " in page
    printed = capsys.readouterr().out
    assert "layer momentum (8, 1024) float32 contiguous 1 thread: " in printed
    assert printed.endswith(f"\n{page}\n")


def test_the_command_writes_rows_and_a_page_of_steps(few, tmp_path):
    assert command.main(["steps", str(tmp_path), "--quick"]) == 0
    assert [row["norm"] for row in rows.read(tmp_path / "steps.jsonl")] == ["batch_norm", "matched"]
    assert "| small CNN, 1 thread | matched    |" in (tmp_path / "steps.md").read_text()


def test_a_run_that_dies_has_lost_no_row(tmp_path, monkeypatch):
    def dying(quick):
        yield {"kind": "step", "number": 1}
        raise KeyboardInterrupt

    monkeypatch.setitem(command.BENCHMARKS, "steps", command.BENCHMARKS["steps"]._replace(rows=dying))
    with pytest.raises(KeyboardInterrupt):
        command.main(["steps", str(tmp_path)])
    (row,) = rows.read(tmp_path / "steps.jsonl")
    assert row["number"] == 1


def git(folder, *arguments):
    command = ["git", "-C", folder, "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_row_names_its_commit_and_whether_the_tree_has_changed(tmp_path):
    (tmp_path / "code.py").touch()
    git(tmp_path, "init")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--message", "first")
    git(tmp_path, "tag", "--annotate", "v1", "--message", "one")
    short = git(tmp_path, "rev-parse", "--short", "HEAD")
    # what is answered once is not asked again
    assert rows.commit.__wrapped__(tmp_path) == short
    (tmp_path / "code.py").write_text("1")
    assert rows.commit.__wrapped__(tmp_path) == f"{short}+"


def test_outside_a_clone_a_row_has_no_commit(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "unpacked").mkdir()
    assert rows.commit(tmp_path / "unpacked") is None


def test_without_git_a_row_has_no_commit(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert rows.commit(tmp_path) is None


def test_what_did_not_run_is_told_and_is_an_error(few, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "EAGER", (wrong,))
    assert command.main(["layers", str(tmp_path), "--quick"]) == 1
    assert "Did not run:\n\n- layer wrong on Case(shape=" in (tmp_path / "layers.md").read_text()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_a_published_page_is_that_of_the_published_rows(path):
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert page == command.page_of(path.stem, rows.read(path))


def test_what_is_around_the_kernels_is_measured(capsys):
    overhead.show(rounds=1, seconds_a_round=0.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10].strip() for line in lines[:3]] == ["y = 2x", "batch_norm", "matched"]
    assert any(line.startswith("matched, mbnorm") or line.startswith("matched, aten") for line in lines)
    assert all(float(line.split()[-1]) > 0 for line in lines)


@pytest.fixture(scope="module")
def published_layers():
    return rows.read(RESULTS / "layers.jsonl")


def share_of_batch_norm(found, provider, dtype, layout, how="1 thread"):
    of_all = rows.ratios(found, provider, BASE, dtype=dtype, layout=layout, how=how)
    of_these = [ratio for (shape, _), ratio in of_all.items() if shape in RESNET50]
    return rows.geometric_mean(of_these), max(of_these)


KINDS = [(dtype, layout) for dtype in ("float32", "bfloat16") for layout in ("contiguous", "channels_last")]


def test_the_warning_names_the_factor_that_was_measured(published_layers):
    factors = [share_of_batch_norm(published_layers, "matched-aten", *kind)[0] for kind in KINDS]
    assert round(rows.geometric_mean(factors)) == SLOWER_WITH_ATEN


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
@pytest.mark.parametrize("provider", ["matched", "matched-aten"])
def test_the_page_on_speed_has_the_published_shares(provider, kind, published_layers):
    mean, worst = share_of_batch_norm(published_layers, provider, *kind)
    assert f"{mean:.2f} ({worst:.2f})" in (RESULTS.parent.parent / "docs" / "performance.md").read_text()


def span(found, norms, net=None):
    """How long steps take over those with batch norm, as the page on speed writes it."""
    steps = [row for row in found if net in (None, row["net"])]
    base = {(row["net"], row["how"]): row["median_s"] for row in steps if row["norm"] == BASE}
    over = [row["median_s"] / base[row["net"], row["how"]] for row in steps if row["norm"] in norms]
    return " to ".join(dict.fromkeys(f"{end:.2f}" for end in (min(over), max(over))))


def test_the_page_on_speed_has_the_published_steps():
    found = rows.read(RESULTS / "steps.jsonl")
    papers = [norm for norm in steps.OURS if norm != "matched"]
    refreshed = [norm + steps.REFRESHED for norm in steps.OURS]
    page = (RESULTS.parent.parent / "docs" / "performance.md").read_text()
    for net, name in {"resnet18": "ResNet-18", "unet3d": "small 3D U-Net"}.items():
        cells = [span(found, norms, net) for norms in (["matched"], [steps.UNCENTERED], papers, refreshed)]
        assert f"| {name} | {' | '.join(cells)} |" in page


def test_the_page_on_speed_has_the_published_compiled_steps():
    found = rows.read(RESULTS / "compiled-steps.jsonl")
    papers = [norm for norm in steps.OURS if norm != "matched"]
    page = (RESULTS.parent.parent / "docs" / "performance.md").read_text()
    assert f"a step with Matched BN takes {span(found, ['matched'])} of that" in page
    assert f"With the papers' methods it takes {span(found, papers)}\n" in page

"""The evidence: `python -m evidence` on claims that are quick to measure, and each claim's tables."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from helpers import cut_or_covering
from matplotlib.figure import Figure
from torch import nn

from evidence import (
    averages,
    double_forward,
    loss_scale,
    noise,
    oracle,
    orthogonality,
    recommendation,
    staleness,
    suite,
)
from evidence.claim import Claim, as_markdown, draw, mean_cell
from evidence.cli import CLAIMS, main
from evidence.lists import MLP, data_of
from evidence.noise import (
    layer_inputs,
    noise_of_batches,
    noise_with_memory,
    theory_of_memory,
)
from evidence.staleness import ACCUMULATED, Case
from evidence.trained import accuracy_cell, of_setting, trained
from mbnorm import __version__, convert
from mbnorm.experiments.data import digits
from mbnorm.experiments.estimates import INTERVAL, PERCENT
from mbnorm.experiments.grid import Run, Setting
from mbnorm.experiments.records import read, versions
from mbnorm.experiments.training import Outcome, initial_model

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
on_every_claim = pytest.mark.parametrize("name", CLAIMS)
PUBLISHED = [name for name in CLAIMS if (RESULTS / name / "table.md").exists()]
OTHERS = (
    *("staleness", "noise", "averages", "recommendation", "double-forward", "gradient-forms"),
    *("fine-tuning", "fine-tuning-confirmed", "real-data", "rule", "confirmed", "oracle", "orthogonality"),
    *(
        "loss-scale",
        "batches-of-128",
        "whole-cifar10",
        "fine-tuned-statistics",
        "underfitting",
        "regularizer",
    ),
    *("best-noise", "noise-ranking", "noise-of-mobilenet"),
)
OK = Outcome("ok", 1.0, None, 90.0, 0.5, 0.25, 0.125, 91.0, 89.0)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def draws():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_double_forward_leaves_the_share_of_staleness_that_theory_says(k):
    case = Case(k, 0.0125)
    found = [staleness.staleness(case, 0, double_forward, steps=40) for double_forward in (False, True)]
    ratios = [fresh / stale for stale, fresh in zip(*found, strict=True)]
    assert ratios == pytest.approx(case.theory, abs=0.08)


def test_with_accumulation_double_forward_leaves_no_staleness():
    stale, fresh = (staleness.staleness(ACCUMULATED, 0, df, steps=10) for df in (False, True))
    assert min(stale) > 1e-3
    assert max(fresh) < 1e-6


def test_staleness_grows_with_the_learning_rate_and_the_memory():
    low, high, long = (
        staleness.staleness(case, 0, False, steps=20)[0]
        for case in (Case(2, 0.003), Case(2, 0.05), Case(8, 0.003))
    )
    assert low < high
    assert low < long


def test_the_noise_of_independent_values_is_that_of_theory():
    mean, var = noise_of_batches(normal(4000, 50), 8, draws(), batches=2000)
    assert mean == pytest.approx(1 / 8, rel=0.05)
    assert var == pytest.approx(2 * 7 / 64, rel=0.05)


def test_pixels_that_are_all_alike_are_worth_one_value():
    images = normal(4000, 50, 1).expand(-1, -1, 16)
    mean, _ = noise_of_batches(images, 8, draws(), batches=2000)
    assert mean == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize(("kind", "value"), [("lambda", 0.75), ("k", 16)])
def test_a_memory_leaves_the_noise_that_theory_says(kind, value):
    left = noise_with_memory(normal(4000, 50), kind, value, draws(), batches=400)
    assert left == pytest.approx(theory_of_memory(kind, value), rel=0.15)


def test_layer_inputs_are_those_of_all_images():
    inputs = layer_inputs(initial_model(Run("batch", Setting("mlp", 32, "shuffled", 0.1, 1), 0)))
    assert [tuple(x.shape) for x in inputs.values()] == [(len(digits().train_inputs), 100)] * 2


def cells_of(text):
    """The cells of the tables in a Markdown text, line by line."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def rows_of(name):
    """Rows as the claim's measurement would give them, without a training."""
    module = __import__(f"evidence.{name.replace('-', '_')}", fromlist=["SETTINGS"])
    if name == "suite":
        runs = suite.runs(3)
    else:
        runs = [Run(m, s, seed) for s in module.SETTINGS for m in module.METHODS for seed in range(3)]
    return [{"method": r.method, **asdict(r.setting), "seed": r.seed, **asdict(OK)} for r in runs]


@pytest.mark.parametrize("name", [name for name in CLAIMS if name not in OTHERS])
def test_a_claim_that_trains_shows_every_run_and_draws(name, tmp_path):
    rows = rows_of(name)
    text = as_markdown(CLAIMS[name], rows, f"python -m evidence {name}")
    assert (
        text.count("90.0 ± 0.0") >= len({(row["method"], row["lr"], row["batch_size"]) for row in rows}) / 2
    )
    assert "-" not in [cell for line in cells_of(text) for cell in line]
    assert f"`python -m evidence {name}`" in text
    draw(CLAIMS[name], rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_loss_scales_are_compared_with_none_seed_by_seed():
    rows = [
        {"name": name, "seed": seed, "accuracy": 90.0 + number + seed, "skipped": number}
        for number, name in enumerate(loss_scale.SCALES)
        for seed in range(3)
    ]
    ((_, lines),) = CLAIMS["loss-scale"].tables(rows)
    assert [line[2:] for line in lines] == [
        ["-", "0"],
        ["+1.0 ± 0.0", "3"],
        ["+2.0 ± 0.0", "6"],
        ["+3.0 ± 0.0", "9"],
    ]


def test_runs_that_are_known_are_not_trained_again():
    run = Run("batch", Setting("mlp", 64, "shuffled", 0.1, 1), 0)
    (row,) = trained([run], lambda _: None, [])
    assert list(trained([run], lambda _: None, [row])) == []


def test_failures_are_counted():
    failed = asdict(Outcome("failed", 0.0, "no"))
    assert accuracy_cell([asdict(OK), failed]) == "90.0 (1 failed)"
    assert accuracy_cell([failed]) == "- (1 failed)"


def test_a_cell_has_the_interval_within_its_bounds():
    cells = [
        mean_cell(values, 1, PERCENT)
        for values in ([], [90.0, 92.0], [96.0, 97.0, 98.0], [98.0, 99.0, 100.0])
    ]
    assert cells == ["-", "91.0", "97.0 ± 2.5", "99.0 (96.5 to 100)"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_table_says_what_the_sign_means(name):
    text = (RESULTS / name / "table.md").read_text(encoding="utf-8")
    assert INTERVAL in text
    assert "deviation over" not in text


def test_ranks_are_means_over_settings():
    rows = rows_of("suite")
    for row in rows:
        row["accuracy"] = {"group": 95.0, "layer": 99.0 if row["model"] == "mlp" else 91.0}.get(
            row["method"], 90.0
        )
    places = suite.ranks(rows)
    others = len(suite.SETTINGS) - 2
    assert places["group"] == pytest.approx((2 * 2 + others) / len(suite.SETTINGS))
    assert places["matched"] == 3


def test_goals_are_differences_seed_by_seed():
    rows = rows_of("suite")
    for row in of_setting(rows, suite.MLP[0]):
        row["accuracy"] = {"matched": 97.0, "batch": 70.0}.get(row["method"], 90.0)
        row["accuracy"] += row["seed"]
    first, second, *_ = suite.goals(rows)
    assert first[1:] == ["+20", "+27.0 ± 0.0", *["+20.0 ± 0.0"] * 4]
    assert second[1:] == ["+20", *["(+0.0 ± 0.0)"] * 5]


SMALLEST = Setting("mlp", 4, "shuffled", 0.0125, 1)


def recommendation_rows(told, **accuracy):
    """Rows of SMALLEST: [as trained, recalibrated] of each half by candidate, 90 % where nothing is said."""
    told = {"recommendation": told, "layers": 2, "noisy": 1}
    rows = []
    for seed in (0, 1):
        common = {**asdict(SMALLEST), "seed": seed}
        rows.append({**common, "candidate": "untrained", **told})
        for candidate in recommendation.SWEEP:
            found = accuracy.get(candidate.replace(" ", "_"), [[90.0, 90.0], [90.0, 90.0]])
            rows.append({**common, "candidate": candidate, "accuracy": found, "stale": candidate == "batch"})
    return rows


def test_no_seed_has_a_say_in_what_is_best_for_it():
    rows = recommendation_rows(
        "matched",
        matched=[[96.0, 91.0], [97.0, 95.0]],
        memorized_64=[[91.0, 94.0], [91.0, 94.0]],
    )
    for row in rows:
        # the luck of one seed, which is chosen by for the other alone
        if row["candidate"] == "plain 32" and row["seed"] == 0:
            row["accuracy"] = [[100.0, 100.0], [90.0, 90.0]]
    found = recommendation.compared(rows, SMALLEST)
    assert [str(choice) for choice in found.best] == ["matched, recalibrated", "plain 32"]
    assert found.behind == [93.5 - 96.0, 93.5 - 90.0]
    assert found.matched_behind == [93.5 - 96.0, 93.5 - 90.0]
    assert found.nothing_behind == [90.0 - 96.0, 0.0]


def test_what_is_recommended_is_recalibrated_where_the_trained_net_is_stale():
    layers = "(1 of 2 layers are noisy)"
    assert (
        recommendation.in_words(recommendation_rows("none"), SMALLEST) == f"batch norm, recalibrated {layers}"
    )
    rows = recommendation_rows("matched")
    assert recommendation.in_words(rows, SMALLEST) == f"matched {layers}"
    next(row for row in rows if row["candidate"] == "matched")["stale"] = True
    told = f"1 x matched, recalibrated {layers}; 1 x matched {layers}"
    assert recommendation.in_words(rows, SMALLEST) == told


def test_recommendations_are_measured_and_shown_and_known_ones_are_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(recommendation, "SETTINGS", (SMALLEST,))
    monkeypatch.setattr(recommendation, "SWEEP", ("batch", "matched", "memorized 8"))
    claim = CLAIMS["recommendation"]
    told = []
    rows = list(claim.rows(1, told.append, []))
    assert [row["candidate"] for row in rows] == ["untrained", *recommendation.SWEEP]
    assert rows[0]["recommendation"] == "matched"
    assert rows[0]["noisy"] == 2
    assert len(told) == len(recommendation.SWEEP)
    assert all(0 <= half <= 100 for row in rows[1:] for halves in row["accuracy"] for half in halves)
    (again,) = claim.rows(1, told.append, rows[:-1])
    assert (again["candidate"], again["accuracy"]) == (rows[-1]["candidate"], rows[-1]["accuracy"])
    line = cells_of(as_markdown(claim, rows, "python -m evidence recommendation"))[2]
    assert line[0] == str(SMALLEST)
    assert line[1].startswith("matched")
    draw(claim, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_each_half_of_the_test_images_says_which_number_of_values_is_better():
    rows = rows_of("suite")
    for row in rows:
        if row["method"] == "matched-64":
            row["even_accuracy"], row["odd_accuracy"] = 92.0, 89.0 + 3 * (row["seed"] == 1)
    (_, halves, _) = CLAIMS["suite"].tables(rows)
    count = len(suite.SETTINGS)
    best, other = f"{count} of {count}", f"0 of {count}"
    # on the odd images it has the best mean by one seed alone
    assert halves[1] == [
        ["even", "91.00", other, "92.00", best, *["91.00", other] * 3],
        ["odd", "89.00", other, "90.00", other, *["89.00", other] * 3],
    ]


def test_averages_are_followed_as_the_layer_itself_has_them():
    layers = [torch.nn.BatchNorm2d(3) for _ in averages.EARLY_WEIGHTS]
    followed = []
    for early, layer in zip(averages.EARLY_WEIGHTS, layers, strict=True):
        convert(layer, "matched", early_weight=early)
        followed.append(averages.Averages(layer))
    for step in range(20):
        for layer in layers:
            layer.train(step % 5 != 4)(normal(2, 3, 4, 4) * (1 + step) + step)
    for number, layer in enumerate(layers):
        torch.testing.assert_close(followed[0].followers[number].running_mean, layer.running_mean)
        torch.testing.assert_close(followed[0].followers[number].running_var, layer.running_var)


def test_the_table_of_averages_says_how_far_above_exact_statistics_they_are(tmp_path):
    of = dict.fromkeys((*averages.NAMES, averages.MEMORY), 0.75) | {"8": 0.25, averages.EXACT: 0.5}
    rows = [{**asdict(s), "seed": seed, "losses": of} for s in averages.SETTINGS for seed in range(3)]
    ((_, lines),) = averages.CLAIM.tables(rows)
    *settings, largest = lines
    assert len(settings) == len(averages.SETTINGS) + 1
    for line in settings:
        assert line[2:] == ["+0.250 ± 0.000"] * 4 + ["-0.250 ± 0.000"] + ["+0.250 ± 0.000"] * 2
    assert largest[2:] == ["+0.250"] * 4 + ["-0.250"] + ["+0.250"] * 2
    draw(averages.CLAIM, rows, tmp_path / "plot.png")


def test_a_training_ends_with_the_averages_that_were_followed():
    setting = Setting("mlp", 8, "shuffled", 0.0125, 1)
    found = averages.losses(setting, 0)
    (row,) = trained([Run("matched-plain", setting, 0)], lambda _: None, [])
    assert found["8"] == pytest.approx(row["eval_mode_loss"], rel=1e-4)
    assert len({round(loss, 6) for loss in found.values()}) > 4


def tiny(known_before):
    """A claim of which a row is measured at a time."""

    def rows(seeds, tell, known):
        tell("measuring")
        known_before.append(len(known))
        if len(known) < 2:
            yield {"value": fmean(range(seeds + 1))}

    return Claim("It is.", "How.", rows, lambda rows: [(["n"], [[str(len(rows))]])], lambda *_: None, 1)


@pytest.fixture
def known(monkeypatch):
    """How many rows were known whenever the tiny claim, which is called "gap", was measured."""
    found = []
    monkeypatch.setitem(CLAIMS, "gap", tiny(found))
    monkeypatch.setattr("evidence.cli.draw", lambda *a: a[2].write_bytes(b""))
    return found


def test_the_command_writes_data_table_and_plot_and_goes_on_from_them(tmp_path, known, capsys):
    out = tmp_path / "gap"
    assert main(["gap", "--seeds", "1", "--out", str(out)]) == 0
    assert f"1 measured, 0 were there: {out / 'data.jsonl'}" in capsys.readouterr().out
    (row,) = map(json.loads, (out / "data.jsonl").read_text().splitlines())
    assert row["value"] == 0.5
    assert {"processor", "torch", "mbnorm", "commit"} <= row.keys()
    assert "Written by `python -m evidence gap --seeds 1`" in (out / "table.md").read_text()
    assert (out / "plot.png").exists()
    with (out / "data.jsonl").open("a") as file:
        file.write('{"a line that was being writ')
    assert main(["gap", "--out", str(out)]) == 0
    assert known == [0, 1]
    told = capsys.readouterr().out
    assert ["2"] in cells_of(told)
    assert "1 measured, 1 were there" in told
    assert [row["value"] for row in read(out / "data.jsonl", dict)] == [0.5, 2.5]


def test_the_command_says_when_it_has_measured_nothing(tmp_path, known, capsys):
    for _ in range(3):
        assert main(["gap", "--out", str(tmp_path)]) == 0
    assert "0 measured, 2 were there" in capsys.readouterr().out


def test_the_shipped_rows_are_not_taken_over(tmp_path, known, monkeypatch):
    shipped = tmp_path / "docs" / "results" / "gap" / "data.jsonl"
    shipped.parent.mkdir(parents=True)
    shipped.write_bytes((RESULTS / "gap" / "data.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main(["gap"]) == 0
    assert known == [0]
    assert len(read(Path("runs/evidence/gap/data.jsonl"), dict)) == 1
    assert shipped.read_bytes() == (RESULTS / "gap" / "data.jsonl").read_bytes()


@pytest.mark.parametrize("package", ["torch", "mbnorm"])
def test_rows_of_another_version_are_refused_and_named(package, tmp_path, known, capsys):
    data = tmp_path / "data.jsonl"
    row = {"value": 1.0, "torch": torch.__version__, "mbnorm": __version__, package: "0.0.1"}
    data.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as stopped:
        main(["gap", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"{data} has rows of torch {row['torch']} and mbnorm {row['mbnorm']}" in capsys.readouterr().err
    assert read(data, dict) == [row]
    assert known == []


def test_the_commits_of_the_rows_that_were_there_are_named(tmp_path, known, capsys):
    rows = [{"value": 1.0, "commit": commit} for commit in ("abc", None, "def+", "abc")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row | versions()) + "\n" for row in rows))
    assert main(["gap", "--out", str(tmp_path)]) == 0
    assert "0 measured, 4 were there, of commits abc, unknown, def+: " in capsys.readouterr().out


def test_rows_of_any_version_are_redrawn(tmp_path, known, capsys):
    (tmp_path / "data.jsonl").write_text('{"value": 1.0, "torch": "1.0", "mbnorm": "0.0.1"}\n')
    assert main(["gap", "--redraw", "--out", str(tmp_path)]) == 0
    assert known == []
    assert "0 measured, 1 were there" in capsys.readouterr().out
    assert (tmp_path / "table.md").exists()


def test_an_interrupted_measurement_keeps_its_rows_and_says_so(tmp_path, monkeypatch, capsys):
    def rows(seeds, tell, known):
        yield {"value": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setitem(CLAIMS, "gap", Claim("It is.", "How.", rows, None, None, 1))
    assert main(["gap", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("interrupted: ")
    assert len(read(tmp_path / "data.jsonl", dict)) == 1


def test_what_a_claim_cannot_be_measured_without_is_named(tmp_path, known, monkeypatch, capsys):
    def check():
        raise ValueError("the weights are missing")

    monkeypatch.setitem(CLAIMS, "gap", replace(CLAIMS["gap"], check=check))
    with pytest.raises(SystemExit) as stopped:
        main(["gap", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(": error: the weights are missing\n")
    assert known == []
    (tmp_path / "data.jsonl").write_text('{"value": 1.0}\n')
    assert main(["gap", "--redraw", "--out", str(tmp_path)]) == 0


def test_a_claim_has_its_own_number_of_seeds(tmp_path, known, monkeypatch):
    monkeypatch.setitem(CLAIMS, "gap", replace(CLAIMS["gap"], seeds=3))
    assert main(["gap", "--out", str(tmp_path)]) == 0
    assert [row["value"] for row in read(tmp_path / "data.jsonl", dict)] == [fmean(range(4))]
    assert "Written by `python -m evidence gap`" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["speed"], "'speed'"),
        (["gap", "--seeds", "0"], "--seeds: expected at least 1, got '0'"),
        (["gap", "--seeds", "few"], "--seeds: expected at least 1, got 'few'"),
        (["gap", "--redraw"], "--redraw: there are no data in runs/evidence/gap"),
        (["gap", "--out", "file"], "--out: "),
    ],
)
def test_a_wrong_argument_is_named(arguments, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_name_the_claims_are_listed(arguments):
    command = [sys.executable, "-m", "evidence", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (result.returncode, result.stderr) == (0, "")
    assert [name for name in CLAIMS if f"\n  {name} " not in result.stdout] == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_in_a_plot_is_cut_or_covers_the_data(name, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw(CLAIMS[name], read(RESULTS / name / "data.jsonl", dict), tmp_path / "plot.png")
    (figure,) = drawn
    assert cut_or_covering(figure) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_page_shows_its_plot(name):
    assert "](plot.png)" in (RESULTS / name / "table.md").read_text(encoding="utf-8")
    assert (RESULTS / name / "plot.png").exists()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_table_is_that_of_its_rows(name):
    rows = read(RESULTS / name / "data.jsonl", dict)
    table = as_markdown(CLAIMS[name], rows, f"python -m evidence {name}")
    assert table == (RESULTS / name / "table.md").read_text(encoding="utf-8")


def test_staleness_that_is_known_is_not_measured_again(monkeypatch):
    monkeypatch.setattr(staleness, "CASES", (Case(2, 0.05), Case(2, 0.1)))
    rows = list(staleness.CLAIM.rows(1, lambda _: None, []))
    assert len(rows) == 4
    (again,) = staleness.CLAIM.rows(1, lambda _: None, rows[:2] + rows[3:])
    assert again == rows[2]


def test_noise_that_is_known_is_not_measured_again(monkeypatch):
    monkeypatch.setattr(noise, "TRAINING_EPOCHS", 0)
    monkeypatch.setattr(noise, "noise_with_memory", lambda x, kind, value, draws: value)
    rows = list(noise.CLAIM.rows(1, lambda _: None, []))
    half = len(rows) // 2
    assert list(noise.CLAIM.rows(1, lambda _: None, rows[:half])) == rows[half:]
    assert list(noise.CLAIM.rows(1, lambda _: None, rows)) == []


@on_every_claim
def test_every_claim_says_what_it_claims_in_a_sentence(name):
    assert CLAIMS[name].sentence.endswith(".")


def test_the_table_of_double_forward_takes_differences_seed_by_seed(tmp_path):
    rows = [
        {**asdict(case), "double_forward": name, "seed": seed, "accuracy": 90.0 + gain + seed, "loss": 0.5}
        for case in double_forward.CASES
        for name, gain in (("without", 0.0), ("with", 1.5))
        for seed in range(3)
    ]
    ((_, lines),) = double_forward.CLAIM.tables(rows)
    assert [line[3] for line in lines] == (len(double_forward.CASES) + 1) * ["+1.5 ± 0.0"]
    draw(double_forward.CLAIM, rows, tmp_path / "plot.png")


def test_double_forward_changes_nothing_where_no_weight_changes():
    still = double_forward.Case(8, 4, lr=0.0, epochs=1)
    without, with_it = (double_forward.outcome(still, 0, double_forward=on) for on in (False, True))
    assert with_it == without


def test_double_forward_changes_a_training():
    case = double_forward.Case(8, 4, lr=0.05, epochs=1, pretrained=True)
    without, with_it = (double_forward.outcome(case, 0, double_forward=on) for on in (False, True))
    assert with_it["loss"] != without["loss"]


def test_the_oracles_differ_in_the_gradient_alone():
    data = data_of(MLP, "report")
    batch = torch.arange(oracle.LARGE)
    found = {}
    for name in (oracle.THROUGH, oracle.CONSTANT):
        layer = nn.BatchNorm1d(4) if name == oracle.THROUGH else oracle.OthersConstant(nn.BatchNorm1d(4))
        x = data.train_inputs[batch].flatten(1)[:, :4].clone().requires_grad_()
        y = layer.train()(x)
        y[: oracle.OWN].square().sum().backward()
        found[name] = y.detach(), x.grad
    (y, through), (same, constant) = found.values()
    torch.testing.assert_close(y, same)
    torch.testing.assert_close(through[: oracle.OWN], constant[: oracle.OWN])
    assert constant[oracle.OWN :].abs().max() == 0
    assert through[oracle.OWN :].abs().max() > 0


def test_batch_norms_own_gradient_is_orthogonal_to_shift_and_scale():
    layer = nn.BatchNorm1d(3)
    shares = orthogonality.Shares(layer, together=50)
    for _ in range(2):
        layer(normal(50, 3).requires_grad_()).backward(normal(50, 3) ** 3)
    assert len(shares.found) == 2
    assert max(max(found) for found in shares.found) < 1e-6


def test_a_gradient_that_is_a_shift_is_all_along_it():
    layer = nn.Identity()
    shares = orthogonality.Shares(layer, together=50)
    for _ in range(5):
        layer(normal(10, 3).requires_grad_()).backward(torch.ones(10, 3))
    ((shift, scale),) = shares.found
    assert shift == pytest.approx(1.0)
    assert scale < 1e-6


@pytest.mark.parametrize("module", [oracle, orthogonality])
def test_tables_of_the_backward_claims_have_a_line_a_method(module, tmp_path):
    names = getattr(module, "NAMES", None) or module.ENTRANTS
    rows = [
        {"name": name, "seed": seed, "status": "ok", "accuracy": 90.0, "train_loss": 0.5}
        | {"shift": [1.0, 2.0], "scale": [3.0, 4.0]}
        for name in names
        for seed in range(3)
    ]
    ((_, lines),) = module.CLAIM.tables(rows)
    assert [line[0] for line in lines] == list(names)
    draw(module.CLAIM, rows, tmp_path / "plot.png")

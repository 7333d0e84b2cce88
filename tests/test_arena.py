"""The arena: what is trained next, how a rate is chosen, and what the tables say of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evidence import arena, batches_of_128, confirmed, gradient_forms, lists, real_data, rule
from evidence.arena import CHOOSING_SEED, Known, Step, next_steps, tables_of, trained, verdict
from evidence.by_values import ByValues, match_by_values
from evidence.claim import as_markdown, draw, mean_cell
from evidence.lists import CONFIRMED, EDGES, RATES, TUNED, Entrant, Task, data_of
from mbnorm import MatchedBatchNorm1d, MatchedBatchNorm2d
from mbnorm.experiments.data import load
from mbnorm.experiments.estimates import PERCENT
from mbnorm.experiments.grid import Run
from mbnorm.experiments.records import read

TASK = Task("digits", "digits", "mlp", 8, 1, images=64, held_out=32)
BATCH, OURS = Entrant("batch"), Entrant("matched")


def row(step, score, **others):
    return {**step.key, "status": "ok", "accuracy": score, "test_error": 1.0, "seconds": 1.0, **others}


def chosen(entrant, rate, task=TASK):
    """The rows of a choice that a rate has won."""
    rates = RATES if rate in RATES else (*RATES, rate)
    return [row(Step(task, entrant, r, CHOOSING_SEED, "choice"), 90.0 if r == rate else 50.0) for r in rates]


def reported(entrant, scores, rate=0.1, task=TASK):
    return [row(Step(task, entrant, rate, seed, "report"), score) for seed, score in enumerate(scores)]


def test_first_each_rate_is_tried_by_the_seed_that_chooses():
    steps = next_steps([TASK], [BATCH], 5, [])
    assert [(s.rate, s.seed, s.part) for s in steps] == [(r, CHOOSING_SEED, "choice") for r in RATES]


def test_a_rate_in_the_middle_is_reported_by_five_other_seeds():
    steps = next_steps([TASK], [BATCH], 5, chosen(BATCH, 0.1))
    assert [(s.rate, s.seed, s.part) for s in steps] == [(0.1, seed, "report") for seed in range(5)]


@pytest.mark.parametrize(("best", "further"), EDGES.items())
def test_a_rate_at_the_edge_adds_one_more(best, further):
    (step,) = next_steps([TASK], [BATCH], 5, chosen(BATCH, best))
    assert (step.rate, step.part) == (further, "choice")
    lost = [*chosen(BATCH, best), row(step, 10.0)]
    assert {s.rate for s in next_steps([TASK], [BATCH], 5, lost)} == {best}
    won = [*chosen(BATCH, best), row(step, 95.0)]
    assert {s.rate for s in next_steps([TASK], [BATCH], 5, won)} == {further}


def test_what_is_measured_is_not_trained_again():
    rows = chosen(BATCH, 0.1) + reported(BATCH, [80.0, 81.0])
    steps = next_steps([TASK], [BATCH], 3, rows)
    assert [(s.seed, s.part) for s in steps] == [(2, "report")]
    assert next_steps([TASK], [BATCH], 2, rows) == []


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 48},
        {"images": 48},
        {"held_out": 48},
        {"batch_size": 4},
        {"model": "cnn"},
        {"data": "photos"},
        {"loss": "dice"},
        {"sampling": "drifting"},
    ],
)
def test_a_task_that_was_changed_is_trained_anew(change):
    rows = chosen(BATCH, 0.1) + reported(BATCH, [80.0])
    other = replace(TASK, **change)
    assert len(next_steps([other], [BATCH], 1, rows)) == len(RATES)
    rows += [*chosen(BATCH, 0.3, other), row(Step(other, BATCH, 1.0, CHOOSING_SEED, "choice"), 10.0)]
    assert Known(rows).rate(other, BATCH) == 0.3
    assert Known(rows).scores(other, BATCH) == {}


def test_rows_without_a_word_for_what_was_always_alike_count():
    rows = [{k: v for k, v in r.items() if k not in ("held_out", "halvings")} for r in chosen(BATCH, 0.1)]
    assert Known(rows).rate(TASK, BATCH) == 0.1


def test_what_diverged_scores_nothing_and_is_not_chosen():
    rows = chosen(BATCH, 0.1)
    rows[1]["status"] = "diverged"
    assert Known(rows).rate(TASK, BATCH) != 0.1


def test_of_equal_rates_the_smaller_is_chosen():
    rows = [{**r, "accuracy": 70.0} for r in chosen(BATCH, 0.1)]
    assert Known(rows).rate(TASK, BATCH) == RATES[0]


def test_segmentations_are_chosen_by_dice():
    rows = chosen(BATCH, 0.1)
    for r in rows:
        r["dice"] = 80.0 if r["rate"] == RATES[0] else 10.0
    assert Known(rows).rate(TASK, BATCH) == RATES[0]


def test_reports_at_a_rate_that_was_not_chosen_do_not_count():
    rows = chosen(BATCH, 0.1) + reported(BATCH, [10.0], rate=0.3) + reported(BATCH, [80.0])
    assert Known(rows).scores(TASK, BATCH) == {0: 80.0}


def test_held_out_images_are_neither_trained_on_nor_tested_on():
    task = replace(TASK, images=None)
    choice, report = data_of(task, "choice"), data_of(task, "report")
    source = load("digits")
    assert len(choice.train_inputs) + len(choice.test_inputs) == len(source.train_inputs)
    torch.testing.assert_close(choice.train_inputs, report.train_inputs)
    assert len(report.test_inputs) == len(source.test_inputs)
    every = torch.cat([choice.train_inputs, choice.test_inputs]).flatten(1)
    expected = source.train_inputs.flatten(1)
    # the same images, scaled alike and in another order
    found = (every - every.mean()) / every.std()
    expected = (expected - expected.mean()) / expected.std()
    torch.testing.assert_close(
        found.sum(1).sort().values, expected.sum(1).sort().values, rtol=1e-3, atol=1e-2
    )


def test_halved_inputs_keep_their_classes_in_place(monkeypatch):
    inputs = torch.arange(10 * 64.0).view(10, 1, 4, 4, 4)
    targets = (inputs[:, 0] % 3).long()
    from mbnorm.experiments.dataset import Data

    monkeypatch.setattr(lists, "load", lambda name: Data(inputs, targets, inputs, targets, 3))
    task = Task("made up", "made up", "unet3d", 2, 1, held_out=2, halvings=1)
    data = data_of.__wrapped__(task, "report")
    assert data.train_inputs.shape == (8, 1, 2, 2, 2)
    assert torch.equal(data.test_targets, targets[:, ::2, ::2, ::2])


def test_no_task_is_on_both_lists():
    names = [task.name for task in (*TUNED, *CONFIRMED)]
    assert len(set(names)) == len(names)
    assert not {task.data for task in TUNED} & {task.data for task in CONFIRMED}


def test_a_training_gives_the_row_that_was_asked_for():
    step = Step(TASK, OURS, 0.1, 0, "report")
    found = trained(step)
    assert found.items() >= step.key.items()
    assert found["status"] == "ok"
    assert 0 < found["accuracy"] <= 100
    assert next_steps([TASK], [OURS], 1, [*chosen(OURS, 0.1), found]) == []


def test_a_method_at_another_batch_size_is_another_entrant():
    small, large = (Step(TASK, Entrant("batch", m), 0.1, 0, "report").key for m in (None, 32))
    assert (small["batch_size"], large["batch_size"]) == (8, 32)
    assert large["lr"] == pytest.approx(4 * small["lr"])
    assert small["entrant"] != large["entrant"]


def test_a_killed_arena_goes_on(monkeypatch):
    def stop(call, steps):
        yield row(steps[0], 70.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(arena, "in_processes", stop)
    measured = arena.measured_rows([TASK], [BATCH], 1, lambda _: None, [])
    rows = [next(measured)]
    with pytest.raises(KeyboardInterrupt):
        next(measured)
    monkeypatch.setattr(arena, "in_processes", lambda call, steps: (row(s, 70.0) for s in steps))
    found = list(arena.measured_rows([TASK], [BATCH], 1, lambda _: None, rows))
    # the two rates that were left, the further one at the edge, and the report
    assert [(r["rate"], r["part"]) for r in found] == [
        (0.1, "choice"),
        (0.3, "choice"),
        (0.01, "choice"),
        (0.01, "report"),
    ]


def everything(scores):
    """The rows of an arena that has ended, by entrant."""
    return [r for entrant, of in scores.items() for r in chosen(entrant, 0.1) + reported(entrant, of)]


def test_the_verdict_compares_ours_with_the_best_of_the_others():
    group = Entrant("group")
    rows = everything({BATCH: [60.0, 61.0, 62.0], group: [70.0, 71.5, 72.0], OURS: [65.0, 66.0, 67.0]})
    said = verdict([TASK], [BATCH, group, OURS], OURS, rows)
    assert said == "`matched` is behind the best of the others in digits (66.0 against 71.2 of group)."


def test_the_verdict_calls_no_difference_one():
    rows = everything({BATCH: [60.0, 64.0, 68.0], OURS: [65.0, 66.0, 67.0]})
    assert "no different from" in verdict([TASK], [BATCH, OURS], OURS, rows)


def test_batch_norm_at_another_size_is_no_rival():
    rows = everything({BATCH: [60.0, 61.0, 62.0], OURS: [65.0, 66.0, 67.0], Entrant("batch", 32): [90.0] * 3})
    assert "before the best" in verdict([TASK], [BATCH, Entrant("batch", 32), OURS], OURS, rows)


def test_tables_show_rate_score_and_difference():
    rows = everything({BATCH: [60.0, 61.0, 62.0], OURS: [65.0, 66.0, 67.0]})
    (header, lines), (_, ranks) = tables_of([TASK], [BATCH, OURS], rows)
    assert header[1:3] == ["rate", "accuracy, %"]
    assert lines[0] == ["matched", "0.1", "66.0 ± 2.5", "1.0", "+5.0 ± 0.0", "3", "0"]
    assert ranks == [["matched", "1.00", "1"], ["batch", "2.00", "2"]]


def test_a_task_that_not_all_have_been_measured_in_has_no_ranks():
    rows = everything({BATCH: [60.0, 61.0, 62.0]})
    *_, (_, ranks) = tables_of([TASK], [BATCH, OURS], rows)
    assert ranks == []
    partly = rows + everything({OURS: [65.0]})
    *_, (_, ranks) = tables_of([TASK], [BATCH, OURS], partly)
    assert ranks == []


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([51.0, 52.0, 53.0], "Double-Forward gains with batches of 128: +1.0 ± 0.0 points, seed by seed."),
        ([49.0, 50.0, 51.0], "Double-Forward loses with batches of 128: -1.0 ± 0.0 points, seed by seed."),
        ([49.0, 51.0, 53.0], "Double-Forward makes no difference with batches of 128: (+0.0 ± 2.5) points,"),
        ([51.0], ""),
    ],
)
def test_the_claim_about_batches_of_128_says_what_a_second_forward_adds(scores, said):
    (task,) = batches_of_128.TASKS
    rows = [
        found
        for entrant, of in ((batches_of_128.WITHOUT, [50.0, 51.0, 52.0]), (batches_of_128.WITH, scores))
        for found in chosen(entrant, 0.1, task) + reported(entrant, of, task=task)
    ]
    assert batches_of_128.CLAIM.verdict(rows).startswith(said)


def test_the_verdict_says_nothing_of_too_few_seeds():
    rows = everything({BATCH: [60.0], OURS: [90.0]})
    assert verdict([TASK], [BATCH, OURS], OURS, rows) == ""


def shows(page, claim, *measured):
    """Whether a page has the scores of entrants in tasks, as the rows of a claim have them."""
    root = Path(__file__).parent.parent
    known = Known(read(root / "docs" / "results" / claim / "data.jsonl", dict))
    text = (root / page).read_text(encoding="utf-8").replace(" %", "")
    return all(
        mean_cell(list(known.scores(task, entrant).values()), 1, PERCENT) in text
        for task, entrants in measured
        for entrant in entrants
    )


def test_the_results_have_the_numbers_of_the_real_data():
    measured = (lists.CIFAR10, [Entrant("mabn"), OURS]), (lists.NUCLEI, [Entrant("group+ws"), OURS, BATCH])
    assert shows("docs/results/README.md", "real-data", *measured)


def test_the_results_have_the_numbers_of_the_rule():
    measured = (lists.CIFAR10, [rule.CHOSEN]), (lists.NUCLEI, [rule.CHOSEN])
    assert shows("docs/results/README.md", "rule", *measured)


def test_the_readme_has_the_numbers_of_the_rule():
    cifar10 = lists.CIFAR10, [rule.CHOSEN, Entrant("mabn"), BATCH]
    nuclei = lists.NUCLEI, [rule.CHOSEN, Entrant("group+ws"), BATCH]
    assert shows("README.md", "rule", cifar10, nuclei)


@pytest.mark.parametrize("page", ["README.md", "docs/results/README.md"])
def test_pages_have_the_numbers_of_the_confirming_list(page):
    root = Path(__file__).parent.parent
    tasks, rows = confirmed.newest(read(root / "docs" / "results" / "confirmed" / "data.jsonl", dict))
    text = (root / page).read_text(encoding="utf-8").replace(" %", "")
    for task in tasks:
        for entrant in (confirmed.OURS, *([BATCH] if page == "README.md" else [])):
            assert mean_cell(list(Known(rows).scores(task, entrant).values()), 1, PERCENT) in text


def test_what_is_not_measured_yet_is_not_shown():
    other = Entrant("group")
    rows = chosen(BATCH, 0.1) + chosen(other, 0.1)
    assert len(tables_of([TASK], [BATCH, other], rows)) == 1
    (_, lines), _ = tables_of([TASK], [BATCH, other], rows + reported(other, [50.0, 50.0, 50.0]))
    assert [line[0] for line in lines] == ["group"]


def test_labels_name_what_is_switched_on():
    options = ("gradient", "exact"), ("center_filters", True), ("per_image", False), ("matched_batch_size", 8)
    assert Entrant("matched", 4, options).label == "matched exact center_filters matched_batch_size=8 at 4"


def test_the_changes_of_a_rule_are_shown():
    new, old = rule.CHANGES["each image too"]
    rows = [
        row
        for entrant, score in ((new, 60.0), (old, 50.0))
        for row in chosen(entrant, 0.1, rule.TUNED[0]) + reported(entrant, [score] * 3, task=rule.TUNED[0])
    ]
    (headings, lines), *_ = rule.CLAIM.tables(rows)
    assert headings[1] == rule.TUNED[0].name
    expected = ["each image too", "+10.0 ± 0.0", *["-"] * (len(rule.TUNED) - 1)]
    assert lines[list(rule.CHANGES).index("each image too")] == expected


def test_the_real_data_are_shown_and_drawn(tmp_path):
    rows = [
        r
        for task in real_data.TASKS
        for number, entrant in enumerate(real_data.ENTRANTS)
        for r in chosen(entrant, 0.1, task) + reported(entrant, [50.0 + number] * 3, task=task)
    ]
    text = as_markdown(real_data.CLAIM, rows, "python -m evidence real-data")
    assert text.split("\n\n")[1].startswith("`matched` is before the best of the others in CIFAR-10")
    draw(real_data.CLAIM, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def confirming(number, scores):
    """The rows of one confirming run, with the number of its rule."""
    return [
        {**r, "rule": number}
        for task in CONFIRMED
        for entrant, of in scores.items()
        for r in chosen(entrant, 0.1, task) + reported(entrant, of, task=task)
    ]


def test_a_rule_has_one_number_until_the_library_changes(monkeypatch, tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "blend.py").write_text("a = 1")
    monkeypatch.setattr(confirmed, "LIBRARY", tmp_path)
    first = confirmed.rule()
    (tmp_path / "experiments" / "report.py").write_text("b = 1")
    assert confirmed.rule() == first
    (tmp_path / "blend.py").write_text('"""Of a."""\n# one\na = 1')
    assert confirmed.rule() == first
    (tmp_path / "blend.py").write_text("a = 2")
    assert confirmed.rule() != first


def test_a_confirming_run_notes_its_rule_and_takes_over_none_of_another(monkeypatch):
    monkeypatch.setattr(confirmed, "rule", lambda: "new")
    monkeypatch.setattr(arena, "in_processes", lambda call, steps: (row(s, 70.0) for s in steps))
    monkeypatch.setattr(confirmed, "ENTRANTS", (BATCH, OURS))
    old = confirming("old", {BATCH: [60.0], OURS: [65.0]})
    found = list(confirmed.CLAIM.rows(1, lambda _: None, old))
    assert {r["entrant"] for r in found} == {"matched"}
    assert {r["rule"] for r in found} == {"new"}


def test_what_an_earlier_rule_was_tried_on_counts_as_tuned():
    rows = confirming("old", {BATCH: [60.0] * 3, OURS: [65.0] * 3})
    tasks, shown = confirmed.newest(rows)
    assert [task.note for task in tasks] == [task.note for task in CONFIRMED]
    rows += confirming("new", {OURS: [75.0] * 3})
    tasks, shown = confirmed.newest(rows)
    assert all(task.note.startswith("counts as tuned") for task in tasks)
    assert Known(shown).scores(CONFIRMED[0], OURS) == {0: 75.0, 1: 75.0, 2: 75.0}


def test_the_shipped_way_to_remember_is_the_layers_own():
    own, swapped = (MatchedBatchNorm2d(4, gradient="remembered", matched_batch_size=512) for _ in range(2))
    draws = torch.Generator().manual_seed(0)
    for _ in range(4):
        x, dy = torch.randn(2, 2, 4, 3, 3, generator=draws)
        again = x.clone().requires_grad_()
        own(x.requires_grad_()).backward(dy)
        with gradient_forms.remembering(gradient_forms.FORMS[gradient_forms.SHIPPED]):
            swapped(again).backward(dy)
        torch.testing.assert_close(again.grad, x.grad)
        torch.testing.assert_close(swapped.gradient_scale, own.gradient_scale)


@pytest.mark.parametrize("name", gradient_forms.FORMS)
def test_every_way_to_remember_trains(name):
    layer = MatchedBatchNorm2d(4, gradient="remembered", matched_batch_size=512)
    draws = torch.Generator().manual_seed(0)
    with gradient_forms.remembering(gradient_forms.FORMS[name]):
        for _ in range(3):
            x, dy = torch.randn(2, 2, 4, 3, 3, generator=draws)
            layer(x.requires_grad_()).backward(dy)
            assert x.grad.isfinite().all()
    assert layer.gradient_mean.abs().max() > 0


def test_ways_to_remember_are_shown_and_drawn(tmp_path):
    of = [
        (name, task, seed)
        for name in gradient_forms.FORMS
        for task in gradient_forms.TASKS
        for seed in (0, 1, 2)
    ]
    rows = [
        {"form": name, "task": task.name, "seed": seed, "status": "ok", "accuracy": 50.0 + len(name) + seed}
        for name, task, seed in of
    ]
    text = as_markdown(gradient_forms.CLAIM, rows, "python -m evidence gradient-forms")
    assert text.split("\n\n")[1].startswith("Mean score over the tasks: averaged, four times as long")
    draw(gradient_forms.CLAIM, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("ratio", "wanted", "worth"), [(1e9, 256, 1), (2.0, 128, 4), (0.0, 64, 8)])
def test_an_earlier_rule_matches_values(ratio, wanted, worth):
    layer = MatchedBatchNorm2d(4)
    match_by_values(layer, 64)
    layer.memory_measured.copy_(torch.tensor([ratio, 0.0, 8.0, 9.0]))
    weight = float(layer.memory.weight_of_history(layer.state, 8, 2))
    assert weight == pytest.approx((wanted - worth) / (wanted + worth))


def test_an_entrant_may_have_the_earlier_rule():
    task = lists.MLP
    run = Run("matched", task.setting(0.1, 2), 0)
    model = rule.by_values(centered=False).net(run, lists.data_of(task, "report"))
    memories = [m.memory for m in model.modules() if isinstance(m, MatchedBatchNorm1d)]
    assert memories
    assert all(isinstance(memory, ByValues) for memory in memories)

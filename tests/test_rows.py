import io
import re
from dataclasses import replace

import pytest
from helpers import cut_or_covering
from matplotlib.figure import Figure as Drawing
from report_pages import NASTY, hard_page, report_of
from rich.console import Console
from scipy import stats

from mbnorm.experiments.estimates import INTERVAL, NO_DIFFERENCE, PERCENT, estimate, paired_difference
from mbnorm.experiments.grid import Run, Setting, grid_settings, reference_of, runs_of
from mbnorm.experiments.page import Figure, Page, Section, render
from mbnorm.experiments.plot import as_svg, batch_size_series, draw, panel_svg
from mbnorm.experiments.report import as_markdown, show
from mbnorm.experiments.report_page import as_html
from mbnorm.experiments.rows import (
    RANKS,
    Row,
    caption,
    columns,
    conclusion,
    mean_ranks,
    notes,
    row_of,
    rows_of,
)
from mbnorm.experiments.training import Outcome

SETTING = Setting("mlp", 4, "shuffled", 0.025, 2)
ONE_CLASS = replace(SETTING, sampling="one-class")
DONE = Outcome("ok", 1.0, None, 90.0, 0.5, 0.25, 0.125)
FAILED = Outcome("failed", 0.1, "one value per channel")
DIVERGED = replace(DONE, status="diverged", accuracy=10.0, train_mode_loss=None)


@pytest.fixture(scope="module")
def report():
    """The text of a report with a series of batch sizes and failures."""
    settings = grid_settings(["mlp"], [2, 4], ["shuffled"], None, None)
    return report_of(settings, ["none", "batch", "instance"], 2)


def row(method, *outcomes):
    return Row(method, dict(enumerate(outcomes)))


def rows_for(accuracies, setting=SETTING):
    """Return the rows of methods with these accuracies; None is a failed run."""
    outcomes = {
        Run(method, setting, seed): FAILED if accuracy is None else replace(DONE, accuracy=accuracy)
        for method, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    }
    return rows_of(setting, list(outcomes), outcomes)


@pytest.mark.parametrize("values", [[95.0, 97.0, 97.5], [1.0, 2.0, 4.0, 5.0], [90.1, 97.2, 96.3, 95.4, 91.5]])
def test_the_interval_is_students(values):
    mean, error = sum(values) / len(values), stats.sem(values)
    low, high = stats.t.interval(0.95, len(values) - 1, mean, error)
    found = estimate(values)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draws = stats.norm.rvs(loc=3, scale=2, size=(4000, 5), random_state=0)
    covered = [abs(e.mean - 3) < e.half_width for e in map(estimate, draws.tolist())]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("values", [[97.0], [96.0, 98.0]])
def test_fewer_than_three_values_have_no_interval(values):
    found = estimate(values)
    assert (found.half_width, found.low, found.high, str(found)) == (None, 97.0, 97.0, "97.0")


def test_no_values_have_no_estimate():
    assert estimate([]) is None


def test_an_interval_that_would_pass_a_bound_is_cut_there_and_shown_by_its_ends():
    # 2.48 to both sides
    high, low = (estimate(values, PERCENT) for values in ([98.0, 99.0, 100.0], [2.0, 1.0, 0.0]))
    assert (high.high, low.low) == (100.0, 0.0)
    assert [str(high), str(low)] == ["99.0 (96.5 to 100)", "1.0 (0 to 3.5)"]


def test_an_interval_that_stays_within_its_bounds_is_shown_by_its_half_width():
    assert str(estimate([96.0, 97.0, 98.0], PERCENT)) == "97.0 ± 2.5"


@pytest.mark.parametrize("values", [[98.02, 98.06, 100.08], [97.95, 97.91, 99.99]])
def test_what_is_shown_reads_as_within_the_bounds(values):
    found = estimate(values, PERCENT)
    mean, _, half_width = str(found).partition(" ± ")
    assert "to 100)" in str(found) or float(mean) + float(half_width) <= 100


def test_a_bound_that_rounding_hides_is_not_shown():
    tiny = [1e-9, 2e-9, 9e-9]
    assert estimate(tiny).low < 0
    assert estimate(tiny, (0.0, 1.0)).text(2) == "0.00 ± 0.00"


@pytest.mark.parametrize("digits", [0, 2, 4])
def test_an_estimate_is_shown_with_the_digits_that_are_wanted(digits):
    half_width = stats.t.ppf(0.975, 2) / 3**0.5
    assert estimate([1.0, 2.0, 3.0]).text(digits) == f"{2:.{digits}f} ± {half_width:.{digits}f}"


@pytest.mark.parametrize(
    ("differences", "decided", "text"),
    [
        ([1.0, 2.0, 3.0], False, "(+2.0 ± 2.5)"),
        ([-1.0, -2.0, -3.0], False, "(-2.0 ± 2.5)"),
        ([2.0, 3.0, 4.0], True, "+3.0 ± 2.5"),
        ([-2.0, -3.0, -4.0], True, "-3.0 ± 2.5"),
        ([0.0, 0.0, 0.0], False, "(+0.0 ± 0.0)"),
        ([-0.01, -0.02, 0.0], False, "(+0.0 ± 0.0)"),
        ([7.0, 7.0], False, "(+7.0)"),
    ],
)
def test_a_difference_whose_interval_includes_0_is_none_and_stands_in_parentheses(differences, decided, text):
    found = estimate(differences)
    assert (found.decided, found.signed()) == (decided, text)


def test_differences_are_paired_by_seed():
    found = paired_difference({0: 92.0, 1: 83.0, 2: 74.0}, {2: 73.0, 0: 91.0, 1: 82.0, 7: 5.0})
    assert (found.mean, found.half_width, found.count) == (1.0, 0.0, 3)


def test_a_paired_interval_ignores_what_seeds_have_in_common():
    ours, theirs = {0: 50.0, 1: 71.0, 2: 90.0}, {0: 48.0, 1: 70.0, 2: 87.0}
    assert paired_difference(ours, theirs).half_width < estimate(list(ours.values())).half_width / 10


def test_seeds_without_a_partner_make_no_difference():
    assert paired_difference({0: 1.0}, {1: 2.0}) is None


def test_rows_are_sorted_by_accuracy_and_failures_come_last():
    rows = rows_for({"batch": [None], "none": [20.0], "matched": [97.0], "group": [96.0]})
    assert [r.method for r in rows] == ["matched", "group", "none", "batch"]


def test_a_row_shows_estimate_difference_seeds_failures_and_both_losses():
    rows = rows_for({"matched": [95.0, 96.0, 97.0], "batch": [85.0, 86.0, 87.0]})
    assert rows[0].cells(rows[1]) == (
        "matched",
        "96.0 ± 2.5",
        "-",
        "+10.0 ± 0.0",
        "3",
        "0",
        "0.250",
        "0.125",
    )


def test_the_baseline_does_not_differ_from_itself():
    (only,) = rows_for({"batch": [85.0, 87.0]})
    assert only.cells(only)[3] == "-"


def test_a_row_shows_what_other_test_samples_could_change():
    found = row("matched", DONE, replace(DONE, test_error=1.0), replace(DONE, test_error=1.5), FAILED, None)
    assert found.cells(None)[2] == "1.2"


def test_a_difference_that_is_none_stands_in_parentheses_in_every_report(tmp_path):
    tables = [(SETTING, rows_for({"matched": [96.0, 97.0, 98.0], "batch": [95.0, 97.0, 95.0]}))]
    console = Console(width=80, record=True, file=io.StringIO())
    show(tables, "batch", console)
    page = as_html(tables, [], "batch", "mbnorm compare")
    for text in (as_markdown(tables, "batch"), console.export_text(), page):
        assert "(+1.3 ± 3.8)" in text


def test_the_caption_says_what_the_signs_mean():
    assert INTERVAL in caption([], "batch")
    assert NO_DIFFERENCE in caption([], "batch")
    assert '"test set ±"' in caption([], "batch")


def test_ranks_are_said_to_go_by_means_alone():
    tables = [(s, rows_for({"batch": [95.0], "matched": [97.0]}, s)) for s in (SETTING, ONE_CLASS)]
    console = Console(width=80, record=True, file=io.StringIO())
    show(tables, "batch", console)
    page = as_html(tables, [], "batch", "mbnorm compare")
    for text in (as_markdown(tables, "batch"), " ".join(console.export_text().split()), page):
        assert RANKS in text


def test_a_row_counts_failed_diverged_and_missing_runs():
    cells = row("none", DIVERGED, FAILED, DONE, None).cells(None)
    assert cells[4:] == ("4", "1 failed, 1 diverged, 1 missing", "not finite", "0.125")


def test_a_diverged_run_counts_with_what_it_measured():
    assert row("none", DIVERGED, DONE).score.mean == 50


def test_a_method_without_any_result_has_a_row():
    runs = runs_of([SETTING], ["matched", "batch"], 2)
    rows = rows_of(SETTING, runs, {runs[0]: DONE, runs[1]: DONE})
    assert row_of("batch", rows).cells(None) == ("batch", "-", "-", "-", "2", "2 missing", "-", "-")


def test_the_reference_is_in_the_table_and_marked():
    outcomes = {Run("batch", reference_of(SETTING), 0): DONE, Run("matched", SETTING, 0): DONE}
    rows = rows_of(SETTING, list(outcomes), outcomes)
    text = as_markdown([(SETTING, rows)], "batch")
    assert re.search(r"\| \*batch at m = 64\* \| +\*90\.0\* \|", text)
    assert "In italics: batch norm on shuffled batches of 64 at lr 0.1. Written by" in text


def test_the_reference_does_not_stand_beside_itself():
    (only,) = rows_for({"batch": [97.0]}, reference_of(SETTING))
    assert only.reference is None


def test_the_baseline_is_not_the_reference():
    outcomes = {Run("batch", reference_of(SETTING), 0): DONE, Run("matched", SETTING, 0): DONE}
    assert row_of("batch", rows_of(SETTING, list(outcomes), outcomes)) is None


CLEAR = {"none": [98.0, 98.5, 98.2], "matched": [97.0, 97.4, 97.3], "batch": [40.0, 20.0, 60.0]}
UNCLEAR = {"none": [98.0, 98.0, 98.0], "matched": [97.0, 98.5, 97.5], "batch": [40.0, 20.0, 60.0]}


def test_the_table_says_who_is_best_and_where_our_layers_lose():
    said = ["none does best here.", "All of mbnorm's layers are behind none."]
    assert notes(SETTING, rows_for(CLEAR)) == said


def test_the_table_says_where_our_layers_win():
    rows = rows_for({"none": [96.0, 96.5, 96.2], "matched": [97.0, 97.4, 97.3]})
    assert notes(SETTING, rows) == ["matched does best here."]


def test_the_table_names_both_where_the_first_does_not_differ_from_the_second():
    said = ["none and matched come first, with no difference between them."]
    assert notes(SETTING, rows_for(UNCLEAR)) == said


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_do_not_say_that_there_is_no_difference(seeds):
    said = ["none has the best mean. Whether that is a difference takes 3 seeds to tell."]
    assert notes(SETTING, rows_for({method: found[:seeds] for method, found in CLEAR.items()})) == said


def test_our_layers_lose_where_each_of_them_differs_from_the_first():
    rows = rows_for({**UNCLEAR, "matched": UNCLEAR["none"], "memorized": [90.0, 91.0, 90.0]})
    assert len(notes(SETTING, rows)) == 1
    rows = rows_for({**UNCLEAR, "group": UNCLEAR["none"], "matched": [90.0, 91.0, 90.0]})
    assert notes(SETTING, rows)[1:] == ["All of mbnorm's layers are behind none."]


def test_the_table_says_why_runs_failed():
    assert notes(SETTING, [row("batch", FAILED)]) == ["batch failed: one value per channel."]


def test_the_table_says_how_memories_start_on_batches_of_one():
    (note,) = notes(replace(SETTING, batch_size=1), rows_for({"matched": [97.0]}))
    assert "one forward of 2 images" in note


def test_ranks_are_averaged_over_settings_and_ties_share_theirs():
    tables = [
        (SETTING, rows_for({"batch": [90.0], "group": [95.0], "matched": [97.0]})),
        (ONE_CLASS, rows_for({"batch": [95.0], "group": [95.0], "matched": [90.0]}, ONE_CLASS)),
    ]
    assert mean_ranks(tables) == [
        ("group", 1.75, [2, 1.5]),
        ("matched", 2.0, [1, 3]),
        ("batch", 2.25, [3, 1.5]),
    ]


def test_a_method_with_failed_runs_ranks_behind():
    tables = [(SETTING, rows_for({"batch": [99.0, None], "group": [50.0, 50.0]}))]
    assert [method for method, *_ in mean_ranks(tables)] == ["group", "batch"]


def test_only_methods_that_are_in_every_setting_are_ranked():
    tables = [
        (SETTING, rows_for({"batch": [90.0], "group": [95.0]})),
        (ONE_CLASS, rows_for({"batch": [95.0]}, ONE_CLASS)),
    ]
    assert mean_ranks(tables) == [("batch", 1.0, [1, 1])]


def test_settings_that_differ_in_the_batch_size_alone_are_a_series():
    small, large = replace(SETTING, batch_size=2, lr=0.0125), replace(SETTING, batch_size=8, lr=0.05)
    series = batch_size_series([(small, []), (large, []), (ONE_CLASS, []), (replace(SETTING, lr=9.0), [])])
    assert [list(found) for found in series.values()] == [[2, 8]]


@pytest.mark.parametrize("method", ["matched", "batch+recalibrate"])
def test_the_table_fits_into_80_columns(method):
    console = Console(width=80, record=True, file=io.StringIO())
    rows = [
        row(method, *[replace(DONE, accuracy=a, test_error=2.4) for a in (80.0, 90.0, 99.0, 60.0)], FAILED),
        row("batch", *[replace(DIVERGED, accuracy=a) for a in (94.0, 75.0, 99.0, 80.0)], None),
    ]
    show([(SETTING, rows)], "batch", console)
    text = console.export_text()
    for words in (method, "(55.6 to 100)", "(-4.8 ± 24.8)", "diverged", "missing"):
        assert words in text
    assert "…" not in text


def test_the_figure_is_drawn_with_failures_and_many_settings(tmp_path):
    perfect = row("matched", replace(DONE, accuracy=100.0), DONE)
    path = tmp_path / "compare.png"
    draw([(SETTING, [perfect, row("batch", FAILED)]), *[(ONE_CLASS, [perfect])] * 3], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_in_a_figure_is_cut(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Drawing, "savefig", lambda figure, *_, **__: drawn.append(figure))
    setting = replace(ONE_CLASS, model="timm:resnet18", data="folder:photos")
    rows = rows_for({"momentum-constant": [99.5, 97.0, 98.0], "batch": [0.0, 20.0, 3.0], "group": [None]})
    draw([(setting, rows)], tmp_path / "compare.png")
    assert cut_or_covering(drawn[0]) == []


def test_an_interval_that_goes_on_beyond_the_figure_is_marked(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Drawing, "savefig", lambda figure, *_, **__: drawn.append(figure))
    for values, marks in (([50.0, 51.0, 52.0], 0), ([0.0, 20.0, 3.0], 1), ([99.0, 97.0, 99.9], 1)):
        draw([(SETTING, rows_for({"batch": values}))], tmp_path / "compare.png")
        # beside the seeds and their mean
        assert len(drawn[-1].axes[0].collections) == 2 + marks


def test_a_report_needs_nothing_beside_itself(report):
    assert "http://" not in report.replace("http://www.w3.org/", "")
    assert not any(word in report for word in ("https://", "<script", "<link", "<img", " src=", "@import"))


def test_a_report_counts_what_is_missing_and_names_it():
    runs = runs_of([SETTING], ["matched"], 2)
    page = as_html([(SETTING, rows_of(SETTING, runs, {runs[0]: DONE}))], [runs[1]], "batch", "mbnorm compare")
    assert "2 runs in 1 setting, of which 0 diverged, 0 failed, 1 missing." in page
    assert str(runs[1]) in page


def test_a_report_begins_with_what_was_found_and_has_its_command_once(report):
    _, _, body = report.partition("</h1>")
    assert body.strip().startswith('<p class="lead">No method can be called better or worse than batch')
    assert report.count("<figure>") == 4
    assert report.count("mbnorm compare --methods") == 1


def test_a_report_names_processors_and_days():
    outcomes = [replace(DONE, processor="A 1", date="2026-11-30"), replace(DONE, date="2026-12-02")]
    page = as_html([(SETTING, [row("matched", *outcomes)])], [], "batch", "mbnorm compare")
    assert "Trained on A 1, an unknown processor, 2026-11-30 to 2026-12-02, with mbnorm" in page


def test_a_conclusion_calls_a_method_better_only_where_the_interval_leaves_out_0():
    better = {"batch": [50.0, 51.0, 52.0], "matched": [90.0, 91.0, 92.0]}
    tables = [(SETTING, rows_for(better | {"none": [40.0, 60.0, 52.0], "group": [None] * 3}))]
    assert conclusion(tables, "batch") == "Compared with batch, better: matched; no difference: none."
    assert conclusion(tables, "matched") == "Compared with matched, worse: batch, none."


def test_a_conclusion_over_settings_counts_them():
    first = rows_for({"batch": [50.0, 51.0, 52.0], "matched": [90.0, 91.0, 92.0], "none": [60.0, 61.0, 62.0]})
    values = {"batch": [50.0, 51.0, 52.0], "matched": [90.0, 91.0, 92.0], "none": [40.0, 41.0, 42.0]}
    tables = [(SETTING, first), (ONE_CLASS, rows_for(values, ONE_CLASS))]
    said = "better in all 2 settings: matched; in some: none (1 better and 1 worse of 2)"
    assert conclusion(tables, "batch") == f"Compared with batch, {said}."


def test_two_seeds_decide_nothing():
    tables = [(SETTING, rows_for({"batch": [50.0, 51.0], "matched": [90.0, 91.0]}))]
    assert conclusion(tables, "batch").startswith("No method can be called better or worse than batch")


def test_all_text_is_escaped():
    text = hard_page()
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert NASTY not in text


def test_figures_of_a_page_share_no_names():
    figure = Figure(panel_svg([row("matched", DONE)]), "a")
    text = render(Page("two", sections=[Section("s", figures=[figure, figure])]))
    names = [part.partition('"')[0] for part in text.split(' id="')[1:]]
    assert len(names) == len(set(names)) > 10


def test_every_name_that_a_figure_refers_to_is_in_it():
    figure = Figure(panel_svg([row("matched", DONE)]), "a")
    text = render(Page("one", sections=[Section("s", figures=[figure])]))
    names = {part.partition('"')[0] for part in text.split(' id="')[1:]}
    wanted = {part.partition('"')[0] for part in text.split('href="#')[1:]}
    wanted |= {part.partition(")")[0] for part in text.split("url(#")[1:]}
    assert wanted
    assert wanted <= names


def test_a_figure_is_the_same_each_time():
    def drawn():
        figure = Drawing()
        figure.subplots().plot([1, 2])
        return as_svg(figure)

    assert drawn() == drawn()
    assert drawn().startswith("<svg ")


def test_segmentations_are_compared_by_dice():
    found = row("batch", *(replace(DONE, dice=dice) for dice in (60.0, 61.0, 62.0)))
    assert found.score.mean == 61.0
    assert columns("batch", [found])[1] == "Dice, %"
    assert columns("batch", [row("batch", DONE)])[1] == "accuracy, %"
    assert "Dice" in caption([(SETTING, [found])], "batch")
    assert "Dice" not in caption([(SETTING, [row("batch", DONE)])], "batch")

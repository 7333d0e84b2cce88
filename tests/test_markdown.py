import pytest

from mbnorm.experiments.markdown import table

HEADER = ["name", "note", "%"]
ROWS = [["a long name", "x", "1.0"], ["b", "", "± 10.0"]]


def test_columns_are_padded_to_their_widest_cell():
    assert table(HEADER, ROWS, "llr").splitlines() == [
        "| name        | note |      % |",
        "| ----------- | ---- | -----: |",
        "| a long name | x    |    1.0 |",
        "| b           |      | ± 10.0 |",
    ]


def test_all_but_the_first_column_are_aligned_to_the_right():
    assert table(HEADER, ROWS) == table(HEADER, ROWS, "lrr")


def test_a_column_has_room_for_its_rule():
    assert table(["m", "k"], [["1", "2"]]).splitlines()[1] == "| --- | --: |"


def test_a_table_without_rows_has_its_header():
    assert table(["a"], []) == "| a   |\n| --- |"


def test_a_bar_in_a_cell_is_no_border():
    assert table(["a|b"], [["|"]]).splitlines() == [r"| a\|b |", "| ---- |", r"| \|   |"]


@pytest.mark.parametrize("rows", [[["1"]], [["1", "2", "3"]]])
def test_a_row_of_another_length_is_refused(rows):
    with pytest.raises(ValueError, match="expected 2 columns, got"):
        table(["a", "b"], rows)


@pytest.mark.parametrize("align", ["l", "lrr", "lc"])
def test_an_alignment_of_other_columns_or_letters_is_refused(align):
    with pytest.raises(ValueError, match=f"got .*'{align}'"):
        table(["a", "b"], [["1", "2"]], align)

import ast
import re

from contract import NOT_APPLICABLE, PAGE, TESTS, page, promises, proofs

PROMISED = promises((TESTS / "promises.txt").read_text(encoding="utf-8"))
PROVEN = proofs(TESTS)


def test_every_promise_is_proven_or_says_why_it_is_not():
    assert [n for n, text in PROMISED.items() if (n in PROVEN) == text.startswith(NOT_APPLICABLE)] == []


def test_every_id_that_a_test_proves_is_promised():
    assert sorted(PROVEN.keys() - PROMISED.keys()) == []


def test_every_promise_is_a_sentence():
    assert [n for n, text in PROMISED.items() if not re.fullmatch(r"\S[^|]+\.", text)] == []


def test_no_id_is_promised_twice():
    lines = (TESTS / "promises.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(PROMISED)


def test_the_page_is_what_make_contract_writes():
    assert PAGE.read_text(encoding="utf-8") == page(PROMISED, PROVEN)


def test_every_marker_is_on_a_function():
    # elsewhere, as in pytest.param, the page would not know of it
    nodes = [n for path in TESTS.glob("test_*.py") for n in ast.walk(ast.parse(path.read_text("utf-8")))]
    calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "pytest.mark.contract"]
    assert sum(len(call.args) for call in calls) == sum(map(len, PROVEN.values()))


def test_markers_are_read_from_the_source(tmp_path):
    code = (
        "import pytest\n\n@pytest.mark.contract('X-2', 'X-1')\n@pytest.mark.slow\ndef test_it():\n    pass\n"
    )
    (tmp_path / "test_sample.py").write_text(code)
    assert proofs(tmp_path) == {"X-2": ["test_sample::test_it"], "X-1": ["test_sample::test_it"]}


def test_promises_are_sorted_by_kind_and_number():
    assert list(promises("B1-10: c.\nA2: d.\nB1-2: a.\nA1: b.")) == ["B1-2", "B1-10", "A1", "A2"]

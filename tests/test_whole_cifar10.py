import json
from pathlib import Path

import pytest

from evidence import rule, whole_cifar10
from evidence.arena import Known
from evidence.claim import as_markdown, draw
from evidence.lists import CIFAR10, Entrant
from evidence.whole_cifar10 import CLAIM, RATES

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def published(claim):
    lines = (RESULTS / claim / "data.jsonl").read_text(encoding="utf-8").splitlines()
    return Known([json.loads(line) for line in lines])


@pytest.mark.parametrize("method", RATES)
def test_rates_are_those_that_held_out_images_chose(method):
    if method == "matched":
        found = published("rule").rate(CIFAR10, rule.CHOSEN)
    else:
        found = published("real-data").rate(CIFAR10, Entrant(method))
    assert RATES[method] == found


@pytest.fixture
def small(monkeypatch, tmp_path):
    for name, value in {"DATA": "digits", "MODEL": "mlp", "BATCH_SIZE": 50, "EPOCHS": 2}.items():
        monkeypatch.setattr(whole_cifar10, name, value)
    monkeypatch.setattr(whole_cifar10, "RATES", {"batch": 0.1, "matched": 0.03})
    monkeypatch.setattr(whole_cifar10, "FOLDER", tmp_path / "checkpoints")


def test_each_epoch_is_a_row(small, tmp_path):
    told = []
    rows = list(CLAIM.rows(1, told.append, []))
    assert sorted((row["method"], row["epoch"]) for row in rows) == [
        *(("batch", 1), ("batch", 2)),
        *(("matched", 1), ("matched", 2)),
    ]
    assert len(told) == 4
    assert list(CLAIM.rows(1, told.append, rows)) == []
    text = as_markdown(CLAIM, rows, "command")
    assert "| batch " in text
    draw(CLAIM, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_stopped_goes_on(small):
    rows = CLAIM.rows(1, lambda line: None, [])
    first = [next(rows)]
    rows.close()
    first += CLAIM.rows(1, lambda line: None, first)
    assert len(first) == 4


def test_a_training_that_fails_is_named(small, monkeypatch):
    monkeypatch.setattr(whole_cifar10, "DATA", "npz:none.npz")
    with pytest.raises(RuntimeError, match=r"mbnorm train --model mlp --data npz:none.npz .*: exit status 2"):
        list(CLAIM.rows(1, lambda line: None, []))

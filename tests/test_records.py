import json
import math
import os

import pytest

from mbnorm.experiments import records


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.jsonl"


def test_no_file_has_no_records(path):
    assert records.read(path, dict) == []
    assert not path.exists()


def test_records_come_back_in_their_order(path):
    for number in (3, 1, 2):
        records.append(path, {"number": number, "text": "ü|\n"})
    assert records.read(path, dict) == [{"number": number, "text": "ü|\n"} for number in (3, 1, 2)]


def test_a_record_is_on_disk_as_one_line(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    records.append(path, {"a": 1})
    assert path.read_text() == '{"a": 1}\n'
    assert synced == [path.stat().st_size]


def test_the_newest_of_a_key_counts(path):
    for key, value in (("a", 1), ("b", 2), ("a", 3)):
        records.append(path, {"key": key, "value": value})
    assert dict(records.read(path, lambda r: (r["key"], r["value"]))) == {"a": 3, "b": 2}


@pytest.mark.parametrize("length", range(1, 9))
def test_what_a_killed_process_left_is_removed_and_the_next_record_starts_a_line(path, length):
    records.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2}'[:length])
    assert records.read(path, dict) == [{"a": 1}]
    records.append(path, {"a": 3})
    assert records.read(path, dict) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b"", b"\xff", b'{"b": 1}', b'{"a": null}'])
def test_a_line_that_is_no_record_is_named_and_nothing_is_removed(path, line):
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n{"a"')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2 is not a result: "):
        records.read(path, lambda record: float(record["a"]))
    assert path.read_bytes() == before


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_json_does_not_have_is_refused_and_not_written(path, number):
    records.append(path, {"a": 1})
    for add in (lambda r: records.append(path, r), lambda r: records.write(path, [r])):
        with pytest.raises(ValueError, match="JSON"):
            add({"a": number})
    assert records.read(path, dict) == [{"a": 1}]


def test_a_file_is_replaced_as_a_whole(path, monkeypatch):
    records.append(path, {"a": 1})
    records.write(path, [{"a": 2}, {"a": 3}])
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [2, 3]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        records.write(path, [])
    assert records.read(path, dict) == [{"a": 2}, {"a": 3}]

"""Parts of a run on a GPU that raise, hang, or die; the jobs are Python code, and no GPU is asked for."""

import sys
import time
from textwrap import dedent

import pytest

from mbnorm.experiments.bench import gpu_parts
from mbnorm.experiments.bench.gpu_parts import DEVICE_LOST, Job, Note, supervise, work

HANGS = "time.sleep(100)"
RAISES = "raise ValueError('no such number')"
DIES = "os.kill(os.getpid(), signal.SIGSEGV)"
LOSES_THE_DEVICE = "globals().update(lost=True)"
WORKS = "rows.append(1)"

PROCESS = """
import argparse, json, os, signal, time
from pathlib import Path
from mbnorm.experiments.bench.gpu_parts import Job, Note, work

parser = argparse.ArgumentParser()
for name, kind in (("--first", int), ("--until", float), ("--note", Path)):
    parser.add_argument(name, type=kind)
options = parser.parse_args()
lost = False

def doing(number, code):
    def do():
        rows = []
        exec(code)
        yield {"job": number}
    return do

def synchronize():
    if lost:
        raise RuntimeError("the device is gone")

def write(row):
    with open(OUT, "a") as file:
        file.write(json.dumps(row) + "\\n")

jobs = [Job(f"job {n}", doing(n, code)) for n, code in enumerate(CODES)]
raise SystemExit(work("part", jobs, options.first, options.until, Note(options.note), write, synchronize))
"""


@pytest.fixture
def do(tmp_path):
    """Supervise a process that runs these pieces of code; return all rows by their order, and the seconds."""
    from mbnorm.experiments.bench.rows import read

    def run(*codes, seconds=60.0, patience=30.0):
        out = tmp_path / "rows"
        head = f"CODES, OUT = {codes!r}, {str(out)!r}"
        start = time.monotonic()
        command = [sys.executable, "-c", head + PROCESS]
        told = list(supervise("part", command, tmp_path, start + seconds, patience))
        return (read(out) if out.exists() else []), told, time.monotonic() - start

    return run


def test_jobs_are_done_in_turn(do):
    rows, told, _ = do(WORKS, WORKS, WORKS)
    assert [row["job"] for row in rows] == [0, 1, 2]
    assert told == []


def test_a_job_that_raises_becomes_a_row_with_its_traceback(do):
    rows, told, _ = do(WORKS, RAISES, WORKS)
    assert [row.get("job") for row in rows] == [0, None, 2]
    assert (rows[1]["of"], rows[1]["what"]) == ("part", "job 1")
    assert rows[1]["why"] == "ValueError: no such number"
    assert rows[1]["traceback"].startswith("Traceback")
    assert told == []


def test_after_a_job_that_dies_another_process_goes_on(do):
    rows, told, _ = do(WORKS, DIES, WORKS, DIES)
    assert [row["job"] for row in rows] == [0, 2]
    assert [(row["what"], row["why"]) for row in told] == [
        ("job 1", "RuntimeError: died by SIGSEGV"),
        ("job 3", "RuntimeError: died by SIGSEGV"),
    ]


def test_after_a_job_that_hangs_another_process_goes_on(do):
    rows, told, _ = do(WORKS, HANGS, WORKS, patience=2.0)
    assert [row["job"] for row in rows] == [0, 2]
    assert [(row["what"], row["why"]) for row in told] == [
        ("job 1", "RuntimeError: killed: no progress in 2 s")
    ]


def test_after_a_job_that_loses_the_device_another_process_goes_on(do):
    rows, told, _ = do(WORKS, LOSES_THE_DEVICE, WORKS)
    assert [(row.get("job"), row.get("why")) for row in rows] == [
        (0, None),
        (1, None),
        (None, "RuntimeError: the device is gone"),
        (2, None),
    ]
    assert told == []


def test_a_part_ends_in_time_whatever_hangs(do):
    rows, told, seconds = do(HANGS, WORKS, seconds=1.0)
    assert seconds < 5
    assert rows == []
    assert [row["why"] for row in told] == ["RuntimeError: killed: no time left"]


def test_a_process_that_does_not_begin_is_not_begun_again(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such package')"]
    (row,) = supervise("part", command, tmp_path, time.monotonic() + 60, 30.0)
    assert (row["what"], row["why"]) == ("before its first job", "RuntimeError: exit status 1")
    assert row["traceback"].strip() == "no such package"


def test_what_a_process_has_started_dies_with_it(tmp_path):
    child = tmp_path / "child"
    code = dedent(
        f"""
        import subprocess, time
        child = subprocess.Popen(["sleep", "100"])
        open({str(child)!r}, "w").write(str(child.pid))
        time.sleep(100)
        """
    )
    list(supervise("part", [sys.executable, "-c", code], tmp_path, time.monotonic() + 2, 30.0))
    # a signal is answered when the kernel next runs who was sent it: on a busy machine that takes a while
    until = time.monotonic() + 30
    while _runs(child.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    assert not _runs(child.read_text())


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            # a zombie is dead, and waits for who has adopted it
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_that_does_not_die_is_left(monkeypatch):
    class Stuck:
        pid, waited = -1, 0

        def wait(self, seconds):
            self.waited = seconds
            raise gpu_parts.subprocess.TimeoutExpired("stuck", seconds)

    killed = []
    monkeypatch.setattr(gpu_parts.os, "killpg", lambda *arguments: killed.append(arguments))
    process = Stuck()
    gpu_parts._kill(process)
    assert len(killed) == 1
    assert process.waited == gpu_parts.SECONDS_TO_DIE


def test_jobs_that_the_time_does_not_suffice_for_are_told(tmp_path):
    rows = []
    jobs = [Job("a", lambda: [{"job": "a"}]), Job("b", list), Job("c", list)]
    assert work("part", jobs, 1, time.monotonic() - 1, Note(tmp_path / "note"), rows.append, list) == 0
    assert [row["what"] for row in rows] == ["b and 1 more"]


def test_a_device_that_does_not_come_back_ends_the_process(tmp_path):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    rows = []
    jobs = [Job("a", lambda: [{"job": "a"}]), Job("b", list)]
    note = Note(tmp_path / "note")
    assert work("part", jobs, 0, float("inf"), note, rows.append, lost) == DEVICE_LOST
    assert note.read() == (0, "a")
    assert [row.get("why") for row in rows] == [
        None,
        "RuntimeError: an illegal memory access was encountered",
    ]

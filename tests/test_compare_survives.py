"""Comparisons that are killed lose no finished run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

RUNS = 24
COMMAND = ["--methods", "batch,matched,group", "--seeds", "8", "--batch-sizes", "32", "--epochs", "6"]


class Comparison:
    """`mbnorm compare` on two processes, in a process group of its own."""

    def __init__(self, out):
        self.out = out
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mbnorm", "compare", *COMMAND, "--jobs", "2", "--out", str(self.out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def lines(self):
        path = self.out / "results.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_results(self, count):
        deadline = time.monotonic() + 200
        while len(self.lines()) < count:
            assert time.monotonic() < deadline
            assert self.process.poll() is None
            time.sleep(0.02)

    def wait_for_a_worker(self):
        parent = str(self.process.pid)
        while self.process.poll() is None:
            listing = subprocess.run(
                ["ps", "-axww", "-o", "pid=,ppid=,command="], capture_output=True, text=True, timeout=60
            ).stdout
            for pid, ppid, what in (line.split(None, 2) for line in listing.splitlines()):
                if ppid == parent and "popen_loky" in what:
                    return int(pid)
            time.sleep(0.1)
        raise AssertionError("the comparison ended before it had workers")

    def group_is_gone_within(self, seconds):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.1)
        return False

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=120)

    def finish(self):
        _, err = self.process.communicate(timeout=200)
        return self.process.returncode, err


@pytest.fixture
def comparison(tmp_path):
    running = Comparison(tmp_path)
    yield running
    running.end()


def names(lines):
    return [(record["method"], record["seed"]) for record in map(json.loads, lines)]


def test_a_killed_comparison_leaves_no_process_and_goes_on_where_it_was(comparison):
    comparison.wait_for_results(2)
    os.kill(comparison.process.pid, signal.SIGKILL)
    # whoever is left has its end of the pipe
    comparison.process.communicate(timeout=120)
    assert comparison.group_is_gone_within(60)
    finished = comparison.lines()
    assert 2 <= len(finished) < RUNS
    comparison.start()
    assert comparison.finish() == (0, "")
    assert comparison.lines()[: len(finished)] == finished
    assert len(names(comparison.lines())) == len(set(names(comparison.lines()))) == RUNS


def test_a_killed_worker_ends_the_comparison_in_a_line_and_the_next_one_goes_on(comparison):
    worker = comparison.wait_for_a_worker()
    comparison.wait_for_results(2)
    os.kill(worker, signal.SIGKILL)
    status, err = comparison.finish()
    finished = comparison.lines()
    assert status == 1
    assert err.startswith(
        f"a process died, for want of memory perhaps: {len(finished)} of {RUNS} runs are in "
    )
    assert err.count("\n") == 1
    assert comparison.group_is_gone_within(60)
    comparison.start()
    assert comparison.finish() == (0, "")
    assert comparison.lines()[: len(finished)] == finished
    assert len(names(comparison.lines())) == len(set(names(comparison.lines()))) == RUNS

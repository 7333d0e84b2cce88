"""Tries mutmut's changes of the code on the tests, many a minute: `make mutants`.

mutmut starts pytest anew for each change. Here the tests are collected once, and each change has a fork that
runs the tests that call the changed function until one fails: of each test one case first, the fast ones and
those that have caught much before the others. Ranks are forks of that fork, so tests of two ranks count, too.
Started again, it goes on where it was stopped; what is known is in the folder mutants, where mutmut's own
commands find it.
"""

import argparse
import fnmatch
import gc
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from itertools import accumulate, pairwise
from math import inf, sqrt
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path("mutants").resolve()
CALLS, CAUGHT = FOLDER / "calls.json", FOLDER / "caught.json"
ON_RANKS = "mbnorm.layers.synced."
"""What runs on ranks, whose calls nobody counts: all tests with ranks are tried."""


class Run:
    """A session of pytest that tries changes instead of running tests once.

    Args:
        files: what mutmut knows of each file, by change.
        changes: the names of those to try.
        seconds: for how long of tests each is tried.
    """

    def __init__(self, files: dict[str, Any], changes: list[str], seconds: float) -> None:
        self.files, self.changes, self.seconds = files, changes, seconds
        self.caught = Counter(json.loads(CAUGHT.read_text()) if CAUGHT.exists() else {})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Try all, each in a fork."""
        import mbnorm

        assert FOLDER in Path(mbnorm.__file__).resolve().parents
        session.config.pluginmanager.unregister(name="terminalreporter")
        _let_ranks_be_forks()
        calls = _known_calls(session.items)
        # a collection of garbage would copy all of it into each fork
        gc.freeze()
        for name in self.changes:
            self._try(name, self._selected(name, session.items, calls))
        return True

    def _try(self, name: str, items: list[pytest.Item]) -> None:
        culprit = _forked(lambda: _first_to_fail(name, items))
        if culprit is not None:
            self.caught.update([culprit, culprit + _function(name)])
            CAUGHT.write_text(json.dumps(self.caught))
        file = self.files[name]
        file.exit_code_by_key[name] = 0 if culprit is None else 1
        file.save()
        print(f"{name}: {culprit or f'survives {len(items)} tests'}", flush=True)

    def _selected(self, name: str, items: list[pytest.Item], calls: dict[str, Any]) -> list[pytest.Item]:
        function = _function(name)
        on_ranks = name.startswith(ON_RANKS)
        found = [
            item
            for item in items
            if function in calls[item.nodeid][1] or (on_ranks and "two_ranks" in item.fixturenames)
        ]

        def cost(item: pytest.Item) -> float:
            here, all_ = self.caught[item.nodeid + function], self.caught[item.nodeid]
            return calls[item.nodeid][0] / (1 + all_ + 20 * here)

        cases = Counter[Any]()
        turns = []
        for item in sorted(found, key=cost):
            turns.append((cases[item.function], item))
            cases[item.function] += 1
        found = [item for _, item in sorted(turns, key=lambda turn: turn[0])]
        before = accumulate((calls[item.nodeid][0] for item in found), initial=0.0)
        return [item for item, seconds in zip(found, before, strict=False) if seconds < self.seconds]


def _function(change: str) -> str:
    return change.rpartition("__mutmut_")[0]


def _let_ranks_be_forks() -> None:
    import ranks

    class Forks:
        get_context = staticmethod(lambda _: multiprocessing.get_context("fork"))

    # new interpreters would take seconds for each change
    ranks.multiprocessing = Forks


def _known_calls(items: list[pytest.Item]) -> dict[str, tuple[float, list[str]]]:
    """Return the seconds of each test and the functions it calls; the first time a test is seen it runs."""
    known = json.loads(CALLS.read_text()) if CALLS.exists() else {}
    if new := [item for item in items if item.nodeid not in known]:
        known |= _forked(lambda: _calls(new))
        CALLS.write_text(json.dumps(known))
    return known


def _calls(items: list[pytest.Item]) -> dict[str, tuple[float, list[str]]]:
    from mutmut.mutation.trampoline import set_mutant_under_test
    from mutmut.state import state

    set_mutant_under_test("stats")
    found, start = {}, time.monotonic()
    for item, passes in zip(items, _run(items), strict=True):
        if not passes:
            raise AssertionError(f"fails without a change: {item.nodeid}")
        now = time.monotonic()
        found[item.nodeid] = now - start, sorted(state()._stats)
        state()._stats.clear()
        start = now
    return found


def _first_to_fail(name: str, items: list[pytest.Item]) -> str | None:
    from mutmut.mutation.trampoline import set_mutant_under_test

    set_mutant_under_test(name)
    return next((item.nodeid for item, passes in zip(items, _run(items), strict=True) if not passes), None)


def _run(items: list[pytest.Item]) -> Iterator[bool]:
    """Run tests, and yield for each whether it passes."""
    for item, following in pairwise([*items, None]):
        item.session.testsfailed = 0
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        yield item.session.testsfailed == 0


def _forked(function: Callable[[], Any]) -> Any:
    """Return what a function returns in a fork, of which nothing is left; "a crash" for one that crashes."""
    with tempfile.NamedTemporaryFile() as answer:
        process = os.fork()
        if process == 0:
            os.setsid()
            try:
                Path(answer.name).write_text(json.dumps(function()))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        try:
            _, status = os.waitpid(process, 0)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        if os.WIFSIGNALED(status):
            return "a crash"
        return json.loads(Path(answer.name).read_text())


def make() -> list[Any]:
    """Write the changed code anew where it is older than the code; return what mutmut knows of each file."""
    from mutmut.__main__ import copy_also_copy_files, copy_src_dir, create_mutants, setup_source_paths
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.trampoline import set_mutant_under_test
    from mutmut.utils.file_utils import walk_mutatable_files

    set_mutant_under_test("mutant_generation")
    FOLDER.mkdir(exist_ok=True)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        copy_src_dir()
        copy_also_copy_files()
        create_mutants(1)
    setup_source_paths()
    files = [SourceFileMutationData(path=path) for path in sorted(walk_mutatable_files())]
    for file in files:
        file.load()
        file.meta_path = file.meta_path.resolve()
    return [file for file in files if file.exit_code_by_key]


def table(files: list[Any]) -> str:
    """Return how many changes of each file were tried and caught; where not all, the 95 % interval, too."""
    lines = ["| file | mutants | tried | killed |", "| --- | ---: | ---: | ---: |"]
    tried, of = [], 0
    for file in files:
        codes = list(file.exit_code_by_key.values())
        known = [code == 1 for code in codes if code is not None]
        lines.append(_row(f"`{Path(file.path).relative_to('src/mbnorm')}`", known, len(codes)))
        tried, of = tried + known, of + len(codes)
    return "\n".join([*lines, _row("together", tried, of)])


def _row(name: str, killed: list[bool], of: int) -> str:
    if not killed:
        return f"| {name} | {of} | 0 | |"
    n, share, z = len(killed), sum(killed) / len(killed), 1.96
    share_text = f"{100 * share:.0f} %"
    if n < of:
        # Wilson's
        middle, half = share + z**2 / (2 * n), z * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        low, high = ((middle + side * half) / (1 + z**2 / n) for side in (-1, 1))
        share_text += f", {100 * low:.0f} to {100 * high:.0f}"
    return f"| {name} | {of} | {n} | {sum(killed)} ({share_text}) |"


def main() -> None:
    """Try the changes that the command line names."""
    from mutmut.configuration import config

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of changes, as mutmut shows them")
    parser.add_argument("--seconds", type=float, default=inf, help="of tests for each change, at most")
    parser.add_argument("--survivors", action="store_true", help="try again what has survived")
    options = parser.parse_args()
    files = make()
    wanted = 0 if options.survivors else None
    changes = [
        name
        for file in files
        for name, code in file.exit_code_by_key.items()
        if code == wanted and any(fnmatch.fnmatch(name, pattern) for pattern in options.patterns)
    ]
    # stopped early, what was tried is a random part
    random.Random(0).shuffle(changes)
    arguments = ["--rootdir=.", "--tb=native", "--assert=plain", "--timeout=60"]
    by_change = {name: file for file in files for name in file.exit_code_by_key}
    arguments += [*config().pytest_add_cli_args, *config().pytest_add_cli_args_test_selection]
    os.chdir(FOLDER)
    pytest.main(arguments, plugins=[Run(by_change, changes, options.seconds)])
    print(table(files))


if __name__ == "__main__":
    main()

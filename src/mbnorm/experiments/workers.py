"""Runs trained side by side, a process each."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed

import torch

from mbnorm.experiments.grid import Run, cost
from mbnorm.experiments.training import Outcome, train


def train_all(
    runs: Sequence[Run], jobs: int, accelerator: str
) -> Generator[tuple[Run, Outcome | BaseException]]:
    """Train ``runs`` in ``jobs`` processes, longest first, and yield each as it ends, or what it raised.

    Leaving the iteration early, by an exception too, ends the processes at once.
    """
    pool = ProcessPoolExecutor(
        min(jobs, len(runs)), mp_context=multiprocessing.get_context("spawn"), initializer=_set_up_worker
    )
    try:
        futures: dict[Future[Outcome], Run] = {}
        # ignored signals are inherited: Ctrl-C reaches every process, and only this one is to answer
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for run in sorted(runs, key=cost, reverse=True):
                futures[pool.submit(train, run, accelerator)] = run
        finally:
            signal.signal(signal.SIGINT, handler)
        for future in as_completed(futures):
            yield futures[future], future.exception() or future.result()
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _set_up_worker() -> None:
    torch.set_num_threads(1)
    # its preparation costs more than it saves on nets this small
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

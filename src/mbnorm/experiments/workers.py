"""Runs trained side by side: in processes here, or on a cluster."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from joblib import Parallel, delayed, effective_n_jobs, parallel_config  # type: ignore[import-untyped]
from joblib.externals.loky import (  # type: ignore[import-untyped]
    get_reusable_executor,
    process_executor,
)

from mbnorm.experiments.grid import Run, cost
from mbnorm.experiments.models import SMALL
from mbnorm.experiments.training import Outcome, train

Scheduler: TypeAlias = Literal["local", "dask", "ray"]
SCHEDULERS: tuple[Scheduler, ...] = get_args(Scheduler)
PACKAGES: dict[Scheduler, str] = {"dask": "distributed", "ray": "ray"}

Argument = TypeVar("Argument")
Result = TypeVar("Result")

Crash: TypeAlias = str
"""What a run raised, in a line."""

SECONDS_BETWEEN_LOOKS = 1.0


def train_all(
    runs: Sequence[Run],
    jobs: int | None,
    accelerator: str,
    scheduler: Scheduler = "local",
    address: str | None = None,
) -> Generator[tuple[Run, Outcome | Crash]]:
    """Train ``runs``, longest first, and yield each as it ends; with "ray" as many as jobs at once.

    Leaving the iteration early, by an exception too, ends local processes at once.

    Args:
        runs: what to train.
        jobs: runs at a time; None is one for each core, here or of the cluster.
        accelerator: where to train.
        scheduler: "local" for processes of this machine, or the cluster that gets the runs.
        address: of the cluster; None starts one here, or takes the one that is configured.

    Raises:
        BrokenProcessPool: a local process died without a word.
        ConnectionError: there is no cluster at this address.
    """
    with _cluster(scheduler, address) as backend, parallel_config(backend, n_jobs=jobs or -1):
        parent = os.getpid() if scheduler == "local" else None
        tasks = [delayed(_train)(run, accelerator, parent) for run in sorted(runs, key=cost, reverse=True)]
        if scheduler == "ray":
            yield from _in_waves(tasks, jobs)
            return
        yield from _as_they_end(tasks)


def in_processes(call: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Generator[Result]:
    """Call a function once for each argument, in a process for each core, and yield results as they come.

    What it raises is raised here. Leaving the iteration early ends the processes at once.
    """
    parent = os.getpid()
    with _cluster("local", None) as backend, parallel_config(backend, n_jobs=-1):
        yield from _as_they_end([delayed(_called)(call, argument, parent) for argument in arguments])


def _as_they_end(tasks: Iterable[Any]) -> Iterator[Any]:
    # a batch of several runs would be handed back, and stored, only when all of them have ended
    parallel = Parallel(return_as="generator_unordered", batch_size=1)
    # ignored signals are inherited: Ctrl-C reaches every process, and only this one is to answer
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        finished = parallel(tasks)
    finally:
        signal.signal(signal.SIGINT, handler)
    yield from finished


def _in_waves(tasks: Sequence[Any], jobs: int | None) -> Iterator[tuple[Run, Outcome | Crash]]:
    """Do as many tasks at a time as there are workers: this backend hands nothing back before the end."""
    workers = effective_n_jobs(jobs or -1)
    for start in range(0, len(tasks), workers):
        yield from Parallel(batch_size=1)(tasks[start : start + workers])


def _train(run: Run, accelerator: str, parent: int | None) -> tuple[Run, Outcome | Crash]:
    with _on_one_core(parent), preparing(run.setting.model):
        try:
            return run, train(run, accelerator)
        except Exception as error:
            # some exceptions cannot be sent
            return run, f"{type(error).__name__}: {error}"


def _called(call: Callable[[Argument], Result], argument: Argument, parent: int) -> Result:
    # a worker that has grown is taken to leak and started anew, and would read its data again
    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize
    with _on_one_core(parent):
        return call(argument)


@contextmanager
def _on_one_core(parent: int | None) -> Iterator[None]:
    # joblib does a single job at a time in the parent itself
    if parent not in (None, os.getpid()):
        _leave_with(parent)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def preparing(model: str) -> Iterator[None]:
    """Have oneDNN compute the convolutions of a net, unless it is so small that preparing them costs more."""
    mkldnn = torch.backends.mkldnn
    enabled = mkldnn.enabled
    mkldnn.enabled = enabled and model not in SMALL  # type: ignore[assignment]
    try:
        yield
    finally:
        mkldnn.enabled = enabled


@cache
def _leave_with(parent: int | None) -> None:
    """Leave Ctrl-C to the parent, and end when it has ended."""
    # a process that took the place of another one has not inherited this
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int | None) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


@contextmanager
def _cluster(scheduler: Scheduler, address: str | None) -> Iterator[str]:
    """Connect to a cluster, and give the name of joblib's backend for it."""
    match scheduler:
        case "local":
            try:
                yield "loky"
            finally:
                get_reusable_executor().shutdown(kill_workers=True)
        case "dask":
            from dask.distributed import Client  # type: ignore[import-not-found]

            try:
                client = Client(address)
            except OSError as error:
                raise ConnectionError(f"no dask scheduler at {address}: {error}") from error
            with client:
                yield "dask"
        case "ray":
            import ray  # type: ignore[import-not-found]
            from ray.util.joblib import register_ray  # type: ignore[import-not-found]

            ray.init(address=address, log_to_driver=False)
            register_ray()
            try:
                yield "ray"
            finally:
                ray.shutdown()

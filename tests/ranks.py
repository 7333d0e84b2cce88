"""Two processes that wait for work, each a rank of one gloo group."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

SECONDS = 300
"""How long a check may take, the start of the processes included."""
SECONDS_APART = 150
"""How long one rank may wait for the other, which imports as much on a core that others use, too."""


class TwoRanks:
    """Runs functions of test modules on both ranks at once: ``function(rank, *args)``."""

    def __init__(self) -> None:
        self.processes: list[Any] = []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="mbnorm-ranks-")
        store = Path(self.folder.name) / "store"
        self.connections = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(store), theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self.connections.append(ours)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.processes = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what the function returns on each rank; raises if it does so on one."""
        if not self.processes:
            self.start()
        work = (Path(sys.modules[function.__module__].__file__ or "").stem, function.__name__, args)
        for connection in self.connections:
            connection.send_bytes(pickle.dumps(work))
        answers = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(SECONDS):
                self.stop()
                raise TimeoutError(f"rank {rank} has not answered within {SECONDS} s: {function.__name__}")
            answers.append(pickle.loads(connection.recv_bytes()))
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        if errors:
            # a rank that failed may have left a collective half done
            self.stop()
            raise AssertionError("\n".join(errors))
        return [value for _, value in answers]


def _serve(rank: int, store: str, connection: Any) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=SECONDS_APART)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    while True:
        try:
            module, name, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = None, getattr(importlib.import_module(module), name)(rank, *args)
        except BaseException:
            answer = traceback.format_exc(), None
        connection.send_bytes(pickle.dumps(answer))

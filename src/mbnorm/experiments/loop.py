"""The loop of `mbnorm train`."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mbnorm.experiments.resumable import Batch, Record, Training


def fit(
    training: Training, seconds_between: float, stepped: Callable[[], None], ended: Callable[[Record], None]
) -> None:
    """Train to the end, saving now and then and after each epoch.

    Args:
        training: where it is now.
        seconds_between: two checkpoints within an epoch.
        stepped: is called after each step.
        ended: is called with the record of each epoch.

    Raises:
        KeyboardInterrupt: Ctrl-C or a request to terminate; the last whole step is saved first.
    """
    saved = time.monotonic()
    with _stop_asked(training.fabric.world_size) as asked:
        while training.step < training.total_steps:
            for batches in _saved_if_unreadable(training):
                training.advance(batches)
                stepped()
                due = time.monotonic() - saved >= seconds_between
                # what ends an epoch is saved with its record
                if (due or asked()) and not training.between_epochs:
                    training.save()
                    saved = time.monotonic()
                    if asked():
                        raise KeyboardInterrupt
            ended(training.end_epoch())
            training.save()
            if asked():
                raise KeyboardInterrupt


def _saved_if_unreadable(training: Training) -> Iterator[list[Batch]]:
    """Yield the batches of each step; one that cannot be read ends the training at a whole step."""
    batches = training.batches()
    while True:
        try:
            found = next(batches, None)
        except Exception:
            training.save()
            raise
        if found is None:
            return
        yield found


@contextmanager
def _stop_asked(ranks: int) -> Iterator[Callable[[], bool]]:
    """Give a function that says whether the process was asked to stop; asked twice, it stops at once."""
    asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        # ranks that stopped after different steps would wait for one another
        if asked or ranks > 1:
            raise KeyboardInterrupt
        asked = True

    handlers = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

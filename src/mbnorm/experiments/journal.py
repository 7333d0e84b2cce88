"""What `mbnorm train` leaves to read: lines of JSON, curves, TensorBoard's events, and a progress bar."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mbnorm.experiments import records
from mbnorm.experiments.curves import draw
from mbnorm.experiments.resumable import Record, Training

SECONDS_BETWEEN_UPDATES = 0.5


class Journal:
    """A line of JSON and an event for TensorBoard for each epoch, and curves of all.

    Epochs that are repeated are reported once.

    Args:
        out: the folder of log.jsonl, curves.png and the events.
        step: what is known of later steps is forgotten.
    """

    def __init__(self, out: Path, step: int) -> None:
        # takes seconds
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.figure = out / "log.jsonl", out / "curves.png"
        epochs = records.read(self.path, lambda epoch: (float(epoch["step"]), epoch))
        records.write(self.path, [epoch for end, epoch in epochs if end <= step])
        self.events: Any = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.start = time.monotonic()

    def write(self, record: Record) -> None:
        """Note an epoch."""
        seconds = round(time.monotonic() - self.start, 2)
        # JSON has no word for the loss of a training that has diverged
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        records.append(self.path, {**finite, "seconds": seconds})
        for name in ("lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            self.events.add_scalar(name, record[name], record["step"])
        self.events.flush()

    def close(self) -> None:
        """Finish the files, and draw the epochs that there are."""
        self.events.close()
        if epochs := records.read(self.path, dict):
            draw(epochs, self.figure)


class Bar:
    """Loss, accuracy and time left, on a terminal; elsewhere a line an epoch."""

    def __init__(self, training: Training, console: Console) -> None:
        self.training, self.console = training, console
        self.last = 0.0
        self.progress: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self.progress = Progress(
                *columns,
                TextColumn("left:"),
                TimeRemainingColumn(),
                console=console,
                speed_estimate_period=300,
            )
            self.progress.start()
            self.task = self.progress.add_task("", total=training.total_steps, completed=training.step)

    def stepped(self) -> None:
        """Show where the training is, now and then."""
        now = time.monotonic()
        if self.progress is None or now - self.last < SECONDS_BETWEEN_UPDATES:
            return
        self.last = now
        loss, right, count = self.training.sums.tolist()
        epochs = self.training.plan.run.setting.epochs
        self.progress.update(
            self.task,
            completed=self.training.step,
            description=f"epoch {self.training.epoch + 1}/{epochs}, loss {loss / max(count, 1):.3f}, "
            f"accuracy {100 * right / max(count, 1):.1f} %",
        )

    def ended(self, record: Record) -> None:
        """Print what an epoch came to."""
        trained, tested = (
            f"{part} loss {record[f'{part}_loss']:.3f}, {part} accuracy {record[f'{part}_accuracy']:.1f} %"
            for part in ("train", "test")
        )
        line = f"epoch {record['epoch']:g}: {trained}; {tested}"
        console = self.console if self.progress is None else self.progress.console
        console.print(line, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.progress is not None:
            self.progress.stop()


@contextmanager
def told(training: Training, out: Path) -> Iterator[tuple[Any, Any]]:
    """Give the two functions that `fit` calls: they tell what happens, on rank 0 alone."""
    if not training.fabric.is_global_zero:
        yield lambda: None, lambda record: None
        return
    journal = Journal(out, training.step)
    bar = Bar(training, Console(file=sys.stdout, highlight=False))

    def ended(record: Record) -> None:
        journal.write(record)
        bar.ended(record)

    try:
        yield bar.stepped, ended
    finally:
        bar.close()
        journal.close()

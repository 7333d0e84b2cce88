"""Parts of a run that may raise, hang or die: each is done by processes of its own, and the others go on.

A process does the jobs of a part in turn and notes which it is at. If it hangs or dies, the job it was at
becomes a row that says why, and another process goes on with the next one.
"""

import contextlib
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mbnorm.experiments.bench.rows import Row, failure

DEVICE_LOST = 3
"""Exit status after a job from which the device has not come back."""
MARGIN = 2.0
"""Seconds before the end of a part after which no job begins."""
SECONDS_TO_DIE = 5.0
POLL = 0.1
SAID = 3000
"""Characters of a process's last words that a row keeps."""


class Job(NamedTuple):
    """What one process does in one go: a name, and what yields its rows."""

    name: str
    rows: Callable[[], Iterable[Row]]


def told(of: str, what: str, error: Exception) -> Row:
    """Return the row of what did not run, with its traceback."""
    lines = "".join(traceback.format_exception(error))
    return {**failure(of, what, error), "traceback": lines[-SAID:]}


class Note:
    """A file in which a process notes what it does: the number of its job, and after that its name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, number: int, name: str) -> None:
        """Note the start of a job."""
        self.path.write_text(f"{number} {name}", encoding="utf-8")

    def touch(self) -> None:
        """Note progress."""
        self.path.touch()

    def read(self) -> tuple[int, str] | None:
        """Return number and name of the last job noted, if any."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        number, _, name = text.partition(" ")
        return (int(number), name) if number else None

    def age(self, start: float) -> float:
        """Return the seconds since the last progress after ``start``, by `time.time`; 0 if there was none."""
        changed = self.path.stat().st_mtime if self.path.exists() else 0.0
        return time.time() - changed if changed > start else 0.0


def work(
    part: str,
    jobs: Sequence[Job],
    first: int,
    until: float,
    note: Note,
    write: Callable[[Row], None],
    synchronize: Callable[[], object],
) -> int:
    """Do the jobs from ``first`` on, in this process, and return its exit status."""
    for number, job in enumerate(jobs[first:], first):
        note.write(number, job.name)
        if time.monotonic() > until:
            write(
                failure(part, f"{job.name} and {len(jobs) - number - 1} more", TimeoutError("no time left"))
            )
            return 0
        try:
            for row in job.rows():
                write(row)
                note.touch()
            # an error on the device shows at the next wait, and from most of them a process never recovers
            synchronize()
        except Exception as error:
            write(told(part, job.name, error))
            try:
                synchronize()
            except Exception:
                return DEVICE_LOST
    return 0


def supervise(part: str, command: list[str], scratch: Path, until: float, patience: float) -> Iterator[Row]:
    """Do a part by processes, one after another; yield a row for each that hangs, dies or runs out of time.

    Args:
        part: its name.
        command: what does the part; it is told with which job to begin, until when, and where to note them.
        scratch: folder for the note and what the processes say.
        until: when to end, by `time.monotonic`.
        patience: seconds without progress after which a process is taken to hang, from its first job on.
    """
    note = Note(scratch / "note")
    first = 0
    while True:
        with (scratch / "said").open("w+", encoding="utf-8", errors="replace") as said:
            # the clock is that of all processes
            options = ["--first", str(first), "--note", str(note.path), "--until", f"{until - MARGIN:.1f}"]
            # a session of its own, so that what it has started dies with it
            # before the process, whose first note is not to be missed however late this one goes on
            start = time.time()
            process = subprocess.Popen([*command, *options], stdout=said, stderr=said, start_new_session=True)
            why = _wait(process, note, start, until, patience)
            said.seek(0)
            words = said.read()[-SAID:]
        if why is None:
            return
        number, name = note.read() or (-1, "before its first job")
        # what the device lost is told in a row of the job itself
        if why != f"exit status {DEVICE_LOST}":
            yield {**failure(part, name, RuntimeError(why)), "traceback": words}
        if number < first or time.monotonic() > until:
            return
        first = number + 1


def _wait(
    process: "subprocess.Popen[bytes]", note: Note, start: float, until: float, patience: float
) -> str | None:
    """Wait for the end of a process begun at ``start``, or make it; return why it was too early, or None."""
    while process.poll() is None:
        late, idle = time.monotonic() > until, note.age(start) > patience
        if late or idle:
            _kill(process)
            return "killed: no time left" if late else f"killed: no progress in {patience:.0f} s"
        time.sleep(POLL)
    status = process.returncode
    if status < 0:
        return f"died by {signal.Signals(-status).name}"
    return f"exit status {status}" if status else None


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process with all that it has started; one that the driver holds may not die, and is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_DIE)

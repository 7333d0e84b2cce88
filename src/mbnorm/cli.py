"""The console script `mbnorm`."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

NEEDED = (
    "jinja2",
    "joblib",
    "lightning_fabric",
    "matplotlib",
    "numpy",
    "rich",
    "skimage",
    "sklearn",
    "typer",
)
COMMANDS = ("compare", "train", "diagnose")
"""That need more than torch."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments``, or those of the process, name; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # these two also where torch alone is installed
    if given == ["--version"]:
        from mbnorm.versions import describe

        print(describe())
        return 0
    if given == ["build"]:
        return _build()
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        commands = f"{', '.join(COMMANDS[:-1])} and {COMMANDS[-1]}"
        return _fail(
            f"{commands} need {', '.join(missing)}: pip install '.[experiments]' in a clone of mbnorm", 1
        )
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _build() -> int:
    from mbnorm.backends import cpu

    if reason := cpu.build():
        return _fail(reason, 1)
    print("the CPU kernels are ready")
    return 0


def _run(arguments: Sequence[str] | None) -> int:
    import typer

    from mbnorm.experiments.commands import app

    try:
        status: int | None = app(arguments, prog_name="mbnorm", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # errors in the options are click's, which new typers keep to themselves
        if not hasattr(error, "format_message"):
            raise
        return _fail(error.format_message(), 2)
    return status or 0


def _fail(line: str, status: int) -> int:
    print(f"mbnorm: {line}", file=sys.stderr)
    return status

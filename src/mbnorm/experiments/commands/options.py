"""What options say, as values; a wrong one gives one line."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import typer

from mbnorm.experiments.data import EMBEDDED, OUTSIDE_FORMS, load, parts
from mbnorm.experiments.models import MODELS, TIMM, known
from mbnorm.experiments.sampling import Sampling, largest_batch

Choice = TypeVar("Choice", bound=str)
Number = TypeVar("Number", int, float)

ACCELERATORS = ("cpu", "cuda", "mps")
DATA_NAMES = ", ".join((*EMBEDDED, *(form.partition("[")[0] for form in OUTSIDE_FORMS)))
"""What help says; a word as long as parquet's columns would be cut there."""


def choice(option: str, value: str, allowed: Sequence[Choice]) -> Choice:
    """Return the one of ``allowed`` that was asked for."""
    for known_value in allowed:
        if value == known_value:
            return known_value
    raise typer.BadParameter(f"expected {', '.join(allowed)}; got {value!r}", param_hint=option)


def choices(option: str, text: str, allowed: Sequence[Choice]) -> list[Choice]:
    """Return those of ``allowed`` that a comma-separated list names."""
    return [choice(option, part, allowed) for part in _parts(text)]


def net_name(option: str, name: str) -> str:
    """Return the name of a net that there is."""
    if not known(name):
        raise typer.BadParameter(
            f"expected {', '.join(MODELS)} or {TIMM}NAME; got {name!r}", param_hint=option
        )
    return name


def models(option: str, text: str) -> list[str]:
    """Return the nets that a comma-separated list names."""
    return [net_name(option, part) for part in _parts(text)]


def data_set(option: str, name: str) -> str:
    """Return the name of a data set that can be read."""
    try:
        load(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
    return name


def data_sets(option: str, text: str) -> list[str]:
    """Return the data sets that a comma-separated list names."""
    return [data_set(option, part) for part in _parts(text)]


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Return the numbers above 0 of a comma-separated list."""
    numbers = []
    for part in _parts(text):
        try:
            number = kind(part)
        except ValueError:
            number = kind("0")
        if not (number > 0 and math.isfinite(number)):
            what = "whole numbers of at least 1" if kind is int else "numbers above 0"
            raise typer.BadParameter(f"expected {what}, comma-separated; got {part!r}", param_hint=option)
        numbers.append(number)
    return numbers


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def shares(option: str, text: str) -> list[float]:
    """Return the numbers between 0 and 1 of a comma-separated list."""
    found = numbers(option, text, float)
    if max(found) >= 1:
        raise typer.BadParameter(f"expected numbers below 1, got {max(found)}", param_hint=option)
    return found


def above_0(option: str, value: float) -> float:
    """Return the value, if it is above 0 and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise typer.BadParameter(f"expected a number above 0, got {value}", param_hint=option)
    return value


def at_least_1(option: str, value: int) -> int:
    """Return the value, if it is at least 1."""
    if value < 1:
        raise typer.BadParameter(f"expected at least 1, got {value}", param_hint=option)
    return value


def check_batch_fits(batch_size: int, sampling: Sampling, data: str, option: str) -> None:
    """Refuse batches larger than the data allow."""
    most = largest_batch(sampling, parts(data).train_targets)
    if batch_size > most:
        raise typer.BadParameter(
            f"{sampling} batches have at most {most} images, got {batch_size}", param_hint=option
        )


def check_accelerator(accelerator: str) -> None:
    """Refuse an accelerator that this machine lacks."""
    choice("--accelerator", accelerator, ACCELERATORS)
    if accelerator == "cpu":
        return
    # takes seconds to import
    from lightning_fabric import Fabric

    try:
        Fabric(accelerator=accelerator, devices=1)
    except RuntimeError as error:
        raise typer.BadParameter(str(error), param_hint="--accelerator") from error

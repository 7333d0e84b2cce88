"""What options say, as values; a wrong one gives one line."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import typer

from mbnorm.experiments.data import load
from mbnorm.experiments.models import MODELS, TIMM, known
from mbnorm.experiments.sampling import Sampling, largest_batch

Choice = TypeVar("Choice", bound=str)
Number = TypeVar("Number", int, float)

ACCELERATORS = ("cpu", "cuda", "mps")


def choice(option: str, value: str, allowed: Sequence[Choice]) -> Choice:
    """Return the one of ``allowed`` that was asked for."""
    for known_value in allowed:
        if value == known_value:
            return known_value
    raise typer.BadParameter(f"expected {', '.join(allowed)}; got {value!r}", param_hint=option)


def choices(option: str, text: str, allowed: Sequence[Choice]) -> list[Choice]:
    """Return those of ``allowed`` that a comma-separated list names."""
    return [choice(option, part, allowed) for part in _parts(text)]


def models(option: str, text: str) -> list[str]:
    """Return the nets that a comma-separated list names."""
    for part in _parts(text):
        if not known(part):
            raise typer.BadParameter(
                f"expected {', '.join(MODELS)} or {TIMM}NAME; got {part!r}", param_hint=option
            )
    return _parts(text)


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


def at_least_1(option: str, value: int) -> int:
    """Return the value, if it is at least 1."""
    if value < 1:
        raise typer.BadParameter(f"expected at least 1, got {value}", param_hint=option)
    return value


def check_batch_fits(batch_size: int, sampling: Sampling, data: str, option: str) -> None:
    """Refuse batches larger than the data allow."""
    most = largest_batch(sampling, load(data).train_targets)
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

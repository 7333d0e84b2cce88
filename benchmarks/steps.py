"""Whole training steps of nets with each norm."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mbnorm
from benchmarks.cases import BASE, give_norm
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.rows import Row, failure
from benchmarks.timing import GRAPH, captured, on, race, seconds_of
from mbnorm.experiments.markdown import table
from mbnorm.experiments.nets import resnet18, resnet50, unet3d

OURS = ("matched", "momentum", "memorized")
REFRESHED = "+df"
"""After the name of a norm: with Double-Forward."""
UNCENTERED = "matched-uncentered"
"""Matched BN without the centered filters that `convert` gives nets that are trained from scratch."""
WITH_REFRESHED = (BASE, UNCENTERED, *OURS, *(norm + REFRESHED for norm in OURS))
COMPILED = f"compiled, {on(1)}"


def two_convolutions() -> nn.Module:
    """Return two convolutions with norms."""
    layers: list[nn.Module] = []
    for inputs in (3, 32):
        layers += [nn.Conv2d(inputs, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers)


def small_cnn() -> nn.Module:
    """Return six convolutions with norms, for images of 32 pixels."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class Net(NamedTuple):
    """What builds a net, the shape of its input, and how often its steps are timed."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rounds: int


NETS = {
    "two convolutions": Net(two_convolutions, (2, 3, 32, 32), 60),
    "small CNN": Net(small_cnn, (2, 3, 32, 32), 40),
    "resnet18": Net(resnet18, (2, 3, 32, 32), 9),
    "unet3d": Net(unet3d, (2, 1, 32, 32, 32), 9),
    "resnet50": Net(resnet50, (2, 3, 224, 224), 9),
}


class Trainer:
    """A net with one norm, and its training step: a call."""

    def __init__(self, net: str, norm: str, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.model = NETS[net].build().to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        give_norm(self.model, norm.removesuffix(REFRESHED))
        if norm.endswith(REFRESHED):
            mbnorm.DoubleForward(self.model, self.optimizer)
        self.x = torch.randn(NETS[net].shape).to(device)

    def compile(self) -> None:
        """Have torch compile the net."""
        self.model = torch.compile(self.model, fullgraph=True)  # type: ignore[assignment]

    def loss(self) -> Tensor:
        """Return a loss of the net's output."""
        y: Tensor = self.model(self.x)
        return y.square().mean()

    def __call__(self) -> None:
        """Train a step."""
        self.optimizer.zero_grad()
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def measure(
    net: str,
    norms: Sequence[str],
    how: str,
    *,
    rounds: int | None = None,
    threads: int = 1,
    device: str = "cpu",
    seconds_a_round: float = 0.0,
) -> Iterator[Row]:
    """Yield a row for each norm, timed in turns with the others.

    Args:
        net: one of `NETS`.
        norms: those of `benchmarks.cases.NORMS`, and `BASE`, each also with `REFRESHED`.
        how: `COMPILED`, `GRAPH`, or another name for steps that are neither.
        rounds: how often each is timed.
        threads: of torch.
        device: where the net is.
        seconds_a_round: how long steps are repeated in a round.
    """
    if how == COMPILED:
        torch.compiler.reset()
    calls: dict[str, Callable[[], object]] = {}
    memory: dict[str, Row] = {}
    # torch takes all nets for versions of one, and compiles only so many versions
    with torch._dynamo.config.patch(recompile_limit=8 * len(norms)):
        for norm in norms:
            try:
                trainer = Trainer(net, norm, device)
                if how == COMPILED:
                    trainer.compile()
                for _ in range(3):
                    trainer()
                # what a compiled step saves is for torch to choose
                saved = {} if how == COMPILED else {"saved_bytes": saved_bytes(trainer.model, trainer.loss)}
                memory[norm] = {**saved, "peak_bytes": peak_bytes(trainer, device)}
                calls[norm] = captured(trainer) if how == GRAPH else trainer
            except Exception as error:
                yield failure("step", f"{net}, {norm}, {how}", error)
        measured = race(
            calls, rounds=rounds or NETS[net].rounds, seconds_a_round=seconds_a_round, threads=threads
        )
    for norm, measurement in measured.items():
        yield {
            "kind": "step",
            "net": net,
            "norm": norm,
            "how": how,
            **seconds_of(measurement),
            **memory[norm],
        }


def rows(quick: bool) -> Iterator[Row]:
    """Yield the rows of training steps on the CPU."""
    for threads in (1,) if quick else (1, 2):
        for net in ("small CNN",) if quick else ("resnet18", "unet3d"):
            rounds = 2 if quick else None
            yield from measure(net, WITH_REFRESHED, on(threads), rounds=rounds, threads=threads)


def compiled_rows(quick: bool) -> Iterator[Row]:
    """Yield the rows of compiled training steps on the CPU."""
    for net in ("two convolutions",) if quick else ("two convolutions", "small CNN", "resnet18"):
        yield from measure(net, (BASE, UNCENTERED, *OURS), COMPILED, rounds=3 if quick else None)


def tables(rows: list[Row]) -> list[str]:
    """Return the table of steps, after what it says."""
    steps = [row for row in rows if row["kind"] == "step"]
    if not steps:
        return []
    text = (
        "Whole training steps at batch 2: milliseconds, and time, memory that the forward keeps for the "
        "backward, and peak memory over those of the same net with `nn.BatchNorm`."
    )
    if any(row["norm"] == UNCENTERED for row in steps):
        text += f" matched has centered filters, as `convert` makes it; {UNCENTERED} has not."
    header = ["net, how", "norm", "ms", "time", "saved", "peak"]
    return [text, table(header, list(_lines(steps)), "llrrrr")]


def _lines(steps: list[Row]) -> Iterator[list[str]]:
    for net, how in dict.fromkeys((row["net"], row["how"]) for row in steps):
        here = {row["norm"]: row for row in steps if (row["net"], row["how"]) == (net, how)}
        base = here.get(BASE, {})
        for norm, row in here.items():
            over = [
                f"{row[what] / base[what]:.{digits}f}" if what in row and what in base else "-"
                for what, digits in (("median_s", 2), ("saved_bytes", 3), ("peak_bytes", 3))
            ]
            yield [f"{net}, {how}", norm, f"{1e3 * row['median_s']:.2f}", *over]

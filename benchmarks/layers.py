"""Forward and backward of single layers, checked for correctness first."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.cases import BASE, KERNELS, OTHERS, PROVIDERS, RESNET50, Case, cases, exact_copy
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.operators import bare
from benchmarks.rows import Row, failure, geometric_mean, ratios
from benchmarks.timing import GRAPH, captured, on, race, seconds_of
from mbnorm.experiments.markdown import table

ROUNDS = 7
SECONDS_A_ROUND = 0.03
MOVED = 5
"""Tensors of the input's size that a forward and backward must read or write at least."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 1e-2}
"""Error against float64, in units of the largest value, above which nothing is timed."""
EAGER = tuple(name for name in PROVIDERS if not name.startswith("compiled"))
COMPILED = (BASE, "compiled_batch_norm", "matched", "compiled_matched")
SAMPLE = (*RESNET50[-2:], OTHERS[0])
"""The shapes of a quick run."""


class Contestant:
    """A layer with its input, ready to be timed: a call is a forward and backward.

    Raises:
        ArithmeticError: it computes something else than its float64 copy.
    """

    def __init__(self, case: Case, layer: nn.Module, device: str = "cpu") -> None:
        self.layer = layer.to(device)
        self.x = case.tensor(0, device).requires_grad_()
        self.cotangent = case.tensor(1, device)
        self.wanted = [self.x, *(p for p in layer.parameters() if p.requires_grad)]
        error = self.error()
        # NaN is no more than anything
        if not error <= TOLERANCE[case.dtype]:
            raise ArithmeticError(f"error {error:.1e} against float64, nothing timed")

    def error(self) -> float:
        """Return the error of output and input gradient, over the largest value."""
        exact = exact_copy(getattr(self.layer, "_orig_mod", self.layer))
        x = self.x.detach().double().requires_grad_()
        want = exact(x)
        (want_dx,) = torch.autograd.grad(want, x, self.cotangent.double())
        y = self.layer(self.x)
        (dx,) = torch.autograd.grad(y, self.x, self.cotangent)
        return max(_relative(y, want), _relative(dx, want_dx))

    def forward(self) -> Tensor:
        """Run a forward."""
        y: Tensor = self.layer(self.x)
        return y

    def __call__(self) -> None:
        """Run a forward and backward."""
        torch.autograd.grad(self.forward(), self.wanted, self.cotangent)


def _relative(value: Tensor, want: Tensor) -> float:
    return float((value.detach().double() - want.detach()).abs().max() / want.detach().abs().max())


def measure(
    case: Case,
    names: Sequence[str],
    *,
    rounds: int = ROUNDS,
    seconds_a_round: float = SECONDS_A_ROUND,
    threads: int = 1,
    device: str = "cpu",
) -> Iterator[Row]:
    """Yield a row for each layer, timed in turns with the others; on a GPU in a CUDA graph, too."""
    if any(name.startswith("compiled") for name in names):
        # of one function torch compiles eight kinds of input, and runs others as they are
        torch.compiler.reset()
    calls: dict[str, Callable[[], object]] = {}
    memory: dict[str, Row] = {}
    for name in names:
        try:
            contestant = Contestant(case, PROVIDERS[name](case), device)
            # the second call knows that the memory is filled
            contestant()
            memory[name] = {
                "saved_bytes": saved_bytes(contestant.layer, contestant.forward),
                "peak_bytes": peak_bytes(contestant, device),
            }
            calls[name] = bare(contestant) if name == KERNELS else contestant
        except Exception as error:
            yield failure("layer", f"{name} on {case}", error)
    copied = _copy_rate(case, device, threads)
    for how in (on(threads),) if device == "cpu" else ("eager", GRAPH):
        timed = {}
        for name, call in calls.items():
            try:
                timed[name] = captured(call) if how == GRAPH else call
            except Exception as error:
                yield failure("layer", f"{name} on {case}, {how}", error)
        measured = race(timed, rounds=rounds, seconds_a_round=seconds_a_round, threads=threads)
        for name, measurement in measured.items():
            yield {
                "kind": "layer",
                "provider": name,
                "shape": case.shape,
                "dtype": case.dtype,
                "layout": case.layout,
                "how": how,
                **seconds_of(measurement),
                "gb_per_s": MOVED * case.bytes / measurement.median / 1e9,
                "copy_gb_per_s": copied,
                **memory[name],
            }


def _copy_rate(case: Case, device: str, threads: int) -> float:
    """Return the GB a second, read and written, of copying a tensor of the case's size."""
    source = case.tensor(0, device)
    target = torch.empty_like(source)
    copying = race({"copy": lambda: target.copy_(source)}, rounds=3, seconds_a_round=0.01, threads=threads)
    return 2 * case.bytes / copying["copy"].median / 1e9


def rows(quick: bool) -> Iterator[Row]:
    """Yield the rows of all layers on the CPU."""
    for threads in (1,) if quick else (1, 2):
        dtypes = ("float32",) if quick else ("float32", "bfloat16")
        for case in cases(SAMPLE if quick else RESNET50 + OTHERS, dtypes):
            yield from measure(case, EAGER, rounds=3 if quick else ROUNDS, threads=threads)


def compiled_rows(quick: bool) -> Iterator[Row]:
    """Yield the rows of layers under torch.compile on the CPU."""
    for case in cases(SAMPLE[:1] if quick else RESNET50 + OTHERS, ("float32",)):
        yield from measure(case, COMPILED, rounds=3 if quick else ROUNDS)


def tables(rows: list[Row]) -> list[str]:
    """Return the tables of layers, each after what it says."""
    layers = [row for row in rows if row["kind"] == "layer"]
    return [*_over_all_shapes(layers), *_each_shape(layers)] if layers else []


def _names(layers: list[Row]) -> list[str]:
    present = {row["provider"] for row in layers}
    return [name for name in PROVIDERS if name in present and name != BASE]


def _over_all_shapes(layers: list[Row]) -> list[str]:
    names = _names(layers)
    of_resnet = [row for row in layers if _of_resnet(row["shape"])]
    lines = []
    for batch, dtype, layout, how in dict.fromkeys(
        (row["shape"][0], row["dtype"], row["layout"], row["how"]) for row in of_resnet
    ):
        cells = []
        for name in names:
            found = ratios(of_resnet, name, BASE, dtype=dtype, layout=layout, how=how)
            values = [ratio for (shape, _), ratio in found.items() if shape[0] == batch]
            cells.append(f"{geometric_mean(values):.2f} ({max(values):.2f})" if values else "-")
        lines.append([f"{dtype}, {layout}, batch {batch}, {how}", *cells])
    text = (
        "Time of forward and backward over that of `nn.BatchNorm` in the same run: geometric mean over the "
        "shapes of ResNet-50 (worst shape). `kernels` are the operators of `momentum`, without layer and "
        "autograd. `doubling` is y = 2x: one node of autograd, and four of the five tensors that a "
        "normalization must move."
    )
    return [text, table(["", *names], lines, "l" + "r" * len(names))]


def _of_resnet(shape: Sequence[int]) -> bool:
    return (RESNET50[0][0], *shape[1:]) in RESNET50


def _each_shape(layers: list[Row]) -> list[str]:
    names = _names(layers)
    hows = [row["how"] for row in layers]
    how = GRAPH if GRAPH in hows else hows[0]
    chosen = [
        row for row in layers if (row["dtype"], row["layout"], row["how"]) == ("float32", "contiguous", how)
    ]
    lines = []
    for shape in dict.fromkeys(tuple(row["shape"]) for row in chosen):
        here = {row["provider"]: row for row in chosen if tuple(row["shape"]) == shape}
        if BASE not in here:
            continue
        base = here[BASE]
        cells = [f"{here[n]['median_s'] / base['median_s']:.2f}" if n in here else "-" for n in names]
        rates = 4 * ["-"]
        if ours := here.get("momentum"):
            rates = [f"{ours['gb_per_s']:.1f}", f"{base['copy_gb_per_s']:.1f}"]
            rates += [f"{ours[what] / base[what]:.2f}" for what in ("saved_bytes", "peak_bytes")]
        lines.append(["x".join(map(str, shape)), *cells, *rates])
    text = (
        f"Each shape, float32, contiguous, {how}: time over `nn.BatchNorm`, and GB/s of the layer `momentum` "
        f"({MOVED} tensors moved at least) beside that of a copy; the bytes it saves for the backward, and "
        "the most that its tensors take, over those of `nn.BatchNorm`."
    )
    header = ["shape", *names, "GB/s", "copy GB/s", "saved", "peak"]
    return [text, table(header, lines, "l" + "r" * (len(header) - 1))]

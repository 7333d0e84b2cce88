"""One run on a GPU: `python -m mbnorm.experiments.bench.gpu OUT` checks, then measures, in 8 minutes at most.

Numbers of every backend first; then steps of a ResNet-50; then forward and backward of layers in its shapes,
launched one by one and replayed from a CUDA graph, with their peak memory. It writes OUT/gpu.jsonl, row by
row, and OUT/gpu.md. What does not run, or what the time did not suffice for, becomes a row that says why.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mbnorm import functional
from mbnorm.experiments.bench import gpu_steps
from mbnorm.experiments.bench.cases import DTYPES, PROVIDERS, RESNET50, Case, Layout, Provider
from mbnorm.experiments.bench.gpu_report import table
from mbnorm.experiments.bench.rows import Row, machine, write
from mbnorm.experiments.bench.timing import TOLERANCE, Timing

SECONDS = 450.0
BATCHES = (2, 8, 32)
BACKENDS: tuple[functional.Backend, ...] = ("traceable", "aten", "triton")
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
EAGER = ("batch_norm", "momentum", "memorized", "momentum-aten")
COMPILED = ("batch_norm", "compiled_batch_norm", "compiled_momentum")
COMPILED_SHAPES = ((64, 112, 112), (256, 56, 56), (512, 28, 28), (2048, 7, 7))
ROUNDS = 5
SECONDS_A_ROUND = 0.01
CHECKED = ((9, 70), (4, 5, 33), (2, 64, 56, 56), (2, 3, 224, 224), (2, 2048, 7, 7), (1, 8, 8, 16, 16))


def gpu_machine() -> Row:
    """Return what a row says of where it was measured."""
    row = machine()
    if torch.cuda.is_available():
        import triton

        row |= {
            "device": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "triton": triton.__version__,
        }
    return row


def gpu_cases(dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> list[Case]:
    """Return the shapes of ResNet-50 at every batch size, dtype and layout."""
    return [
        Case((batch, *shape[1:]), dtype, layout)
        for batch in BATCHES
        for dtype in dtypes
        for layout in LAYOUTS
        for shape in RESNET50
    ]


def compiled_cases() -> list[Case]:
    """Return the cases that compiled layers run too: compiling all of them takes too long."""
    return [
        Case((batch, *shape), dtype, "contiguous")
        for batch in (2, 32)
        for dtype in ("float32", "bfloat16")
        for shape in COMPILED_SHAPES
    ]


def errors_of(backend: functional.Backend, case: Case, device: str) -> dict[str, float]:
    """Return the errors of output and gradients against float64, in units of the largest value."""
    channels = case.shape[1]
    generator = torch.Generator().manual_seed(2)
    x, dy = (case.tensor(seed).to(device) for seed in (0, 1))
    weight, bias, mean = (torch.randn(channels, generator=generator).to(device) for _ in range(3))
    var = 0.5 + torch.rand(channels, generator=generator).to(device)

    def run(dtype: torch.dtype | None, backend: functional.Backend) -> list[Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight, bias)]
        y = functional.blended_batch_norm(
            leaves[0], leaves[1], leaves[2], mean, var, 0.3, variance="averaged", eps=1e-5, backend=backend
        ).y
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    wanted = run(torch.float64, "traceable")
    found = run(None, backend)
    return {
        name: float((got.double() - want).abs().max() / want.abs().max())
        for name, got, want in zip(("y", "dx", "dw", "db"), found, wanted, strict=True)
    }


def check(device: str) -> Iterator[Row]:
    """Yield the errors of every backend that runs on ``device``.

    Raises:
        ArithmeticError: a backend is wrong.
    """
    for shape in CHECKED:
        for dtype in DTYPES:
            for layout in LAYOUTS if len(shape) > 3 else LAYOUTS[:1]:
                for backend in BACKENDS if device == "cuda" else BACKENDS[:2]:
                    case = Case(shape, dtype, layout)
                    errors = errors_of(backend, case, device)
                    # not the largest of them: NaN has no place in an order
                    if not all(error <= TOLERANCE[dtype] for error in errors.values()):
                        raise ArithmeticError(f"{backend} on {case}: errors {errors} against float64")
                    yield {"kind": "error", "backend": backend, **described(case), **errors}


def described(case: Case) -> Row:
    """Return what a row says of a case."""
    return {"shape": case.shape, "dtype": case.dtype, "layout": case.layout}


class Runner:
    """A layer on the GPU with its input, to be timed on the device's clock."""

    def __init__(self, case: Case, build: Provider) -> None:
        self.layer = build(case).to("cuda")
        self.x = case.tensor(0).to("cuda").requires_grad_()
        self.dy = case.tensor(1).to("cuda")
        self.wanted = [self.x, *(p for p in self.layer.parameters() if p.requires_grad)]

    def __call__(self) -> None:
        """Run a forward and backward."""
        torch.autograd.grad(self.layer(self.x), self.wanted, self.dy)

    def peak_bytes(self) -> int:
        """Return the most bytes that a forward and backward take beside what is there before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def graph(self) -> Callable[[], None]:
        """Return a forward and backward as the replay of a CUDA graph."""
        return gpu_steps.captured(self)


def seconds_of(call: Callable[[], object], calls: int) -> float:
    """Return the seconds of a call among ``calls`` in a row, by the device's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def race(calls: dict[str, Callable[[], object]]) -> dict[str, Timing]:
    """Time every call in each round, so that a slow moment of the machine hits all of them."""
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        repeats[name] = max(1, min(100, int(SECONDS_A_ROUND / seconds_of(call, 2))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, repeats[name]))
    return {name: Timing.of(found) for name, found in seconds.items()}


def copy_rate(case: Case) -> float:
    """Return the bytes a second, read and written, of copying a tensor of the case's size."""
    source = torch.zeros(case.shape, dtype=DTYPES[case.dtype], device="cuda")
    target = torch.empty_like(source)
    return 2 * case.bytes / race({"copy": lambda: target.copy_(source)})["copy"].median


def layer_rows(case: Case, providers: dict[str, Provider]) -> Iterator[Row]:
    """Yield the times and peak memory of layers, each launched and replayed from a graph."""
    runners = {name: Runner(case, build) for name, build in providers.items()}
    copied = copy_rate(case)
    for launched in ("eager", "graph"):
        calls: dict[str, Callable[[], object]] = {}
        for name, runner in runners.items():
            try:
                calls[name] = runner if launched == "eager" else runner.graph()
            except RuntimeError as error:
                yield {**described(case), **failure("layer", f"{name}, {launched}", error)}
        for name, timing in race(calls).items():
            yield {
                "kind": "layer",
                "provider": name,
                **described(case),
                "threads": launched,
                "mode": "both",
                "median_s": timing.median,
                "low_s": timing.low,
                "high_s": timing.high,
                "bytes": case.bytes,
                "copy_bytes_per_s": copied,
                "peak_bytes": runners[name].peak_bytes(),
            }


def failure(kind: str, what: str, error: Exception) -> Row:
    """Return the row of what did not run."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return {"kind": "failure", "of": kind, "what": what, "why": reason}


def _compiled(build: Provider) -> Provider:
    def compiled(case: Case) -> nn.Module:
        # one case's graphs are of no use to the next
        torch.compiler.reset()
        return torch.compile(build(case))  # type: ignore[return-value]

    return compiled


def measured(until: float) -> Iterator[Row]:
    """Yield every row, as far as the time goes."""
    yield from check("cuda")
    yield from gpu_steps.step_rows(until)
    eager = {name: PROVIDERS[name] for name in EAGER}
    compiled = {name: PROVIDERS[name] for name in COMPILED[:2]}
    compiled["compiled_momentum"] = _compiled(PROVIDERS["momentum-traceable"])
    work = [(case, eager) for case in gpu_cases()] + [(case, compiled) for case in compiled_cases()]
    for number, (case, providers) in enumerate(work):
        if time.monotonic() > until:
            yield {
                "kind": "failure",
                "of": "layer",
                "what": f"{len(work) - number} cases",
                "why": "no time left",
            }
            return
        yield from layer_rows(case, providers)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m mbnorm.experiments.bench.gpu", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="start nothing after so many")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this measures a GPU, and torch sees none", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    where = gpu_machine()
    for row in measured(time.monotonic() + options.seconds):
        rows.append({**row, **where})
        write(options.out / "gpu.jsonl", rows)
    text = table(rows)
    (options.out / "gpu.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

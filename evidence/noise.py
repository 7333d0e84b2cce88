"""The noise of batch statistics at fixed weights, and what a memory does to it."""

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, mean_cell
from evidence.trained import where
from mbnorm import MemorizedBatchNorm1d, MomentumBatchNorm1d, recalibrate
from mbnorm.experiments.data import digits
from mbnorm.experiments.estimates import NOT_NEGATIVE
from mbnorm.experiments.grid import Run, Setting, linear_rate
from mbnorm.experiments.sampling import one_epoch
from mbnorm.experiments.training import initial_model

MODELS: tuple[str, ...] = ("mlp", "cnn")
BATCH_SIZES = (2, 8, 32)
BATCHES = 500
TRAINING_BATCH = 32
TRAINING_EPOCHS = 3
MEMORIES = (("lambda", 0.5), ("lambda", 0.75), ("lambda", 0.9375), ("k", 4), ("k", 16), ("k", 64))
BATCHES_BEFORE = 200
STAGES = ("untrained", "trained")
MEASURED = ("mean_noise", "var_noise", "left")


def noise_of_batches(
    x: Tensor, batch_size: int, draws: torch.Generator, batches: int = BATCHES
) -> tuple[float, float]:
    """Return the variances of the batch mean and of the batch variance, for channels of variance 1.

    Means over channels, of batches drawn with replacement from ``x``, shape (N, C, ...).
    """
    values = x.double().flatten(2) if x.dim() > 2 else x.double().unsqueeze(2)
    mean = values.mean((0, 2), keepdim=True)
    var = (values - mean).square().mean((0, 2))
    live = var > 1e-5
    values = ((values - mean) / var.clamp_min(1e-12).sqrt()[:, None])[:, live]
    # a batch's moments are means of its images' moments
    firsts, seconds = values.mean(2), values.square().mean(2)
    drawn = torch.randint(len(x), (batches, batch_size), generator=draws)
    means = firsts[drawn].mean(1)
    variances = seconds[drawn].mean(1) - means.square()
    return float(means.square().mean()), float(variances.var(0).mean())


def noise_with_memory(
    x: Tensor, kind: str, value: float, draws: torch.Generator, batches: int = BATCHES
) -> float:
    """Return the variance of the mean that normalizes batches of 2, in units of that of their own mean."""
    layer: Any
    if kind == "lambda":
        layer = MomentumBatchNorm1d(x.shape[1], history_weight=value)
    else:
        layer = MemorizedBatchNorm1d(x.shape[1], memory_size=int(value))
    truth = x.mean(0)
    own = blended = 0.0
    with torch.no_grad():
        for number in range(BATCHES_BEFORE + batches):
            batch = x[torch.randint(len(x), (2,), generator=draws)]
            layer(batch)
            if number >= BATCHES_BEFORE:
                normalizing = layer.memory_mean if kind == "lambda" else layer.running_mean
                own += (batch.mean(0) - truth).square().mean().item()
                blended += (normalizing - truth).square().mean().item()
    return blended / own


def theory_of_memory(kind: str, value: float) -> float:
    """Return what averaging leaves of the variance of independent batches."""
    return (1 - value) / (1 + value) if kind == "lambda" else 1 / value


def layer_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return what each batch norm is given of all training digits, normalized by their own statistics."""
    images = digits().train_inputs
    recalibrate(model, [images])
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: inputs.__setitem__(name, args[0])

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers]
    model.eval()
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return inputs


def _train(model: nn.Module, seed: int) -> None:
    draws, data = torch.Generator().manual_seed(seed), digits()
    rate = linear_rate(TRAINING_BATCH)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=rate, momentum=0.9)
    for _ in range(TRAINING_EPOCHS):
        for indices in one_epoch("shuffled", data.train_targets, TRAINING_BATCH, draws):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train_inputs[indices]), data.train_targets[indices])
            torch.autograd.backward(loss)
            optimizer.step()


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    for seed in range(seeds):
        done = where(known, seed=seed)
        if _complete(done):
            continue
        yield from (row for row in _of_seed(seed) if not where(done, **_what(row)))
        tell(f"seed {seed}")


def _of_seed(seed: int) -> Iterator[Row]:
    for name in MODELS:
        model = initial_model(Run("batch", Setting(name, TRAINING_BATCH, "shuffled", 0.1, 1), seed))
        for stage in STAGES:
            if stage == "trained":
                _train(model, seed)
            inputs = layer_inputs(model)
            yield from _noise_rows(inputs, {"model": name, "stage": stage, "seed": seed})
            if name == "mlp" and stage == "trained":
                yield from _memory_rows(inputs, seed)


def _complete(rows: Sequence[Row]) -> bool:
    """Return whether these are all rows of a seed: those of the last net, trained, too."""
    before, after = (len(where(rows, kind="batch", model=MODELS[-1], stage=stage)) for stage in STAGES)
    return 0 < before == after


def _what(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in MEASURED}


def _noise_rows(inputs: dict[str, Tensor], common: Row) -> Iterator[Row]:
    draws = torch.Generator().manual_seed(common["seed"])
    for number, x in enumerate(inputs.values()):
        for m in BATCH_SIZES:
            mean, var = noise_of_batches(x, m, draws)
            pixels = x[0, 0].numel()
            at = {"layer": number, "pixels": pixels, "batch_size": m, "mean_noise": mean, "var_noise": var}
            yield {"kind": "batch", **common, **at}


def _memory_rows(inputs: dict[str, Tensor], seed: int) -> Iterator[Row]:
    draws = torch.Generator().manual_seed(seed)
    for number, x in enumerate(inputs.values()):
        for kind, value in MEMORIES:
            left = noise_with_memory(x, kind, value, draws)
            yield {"kind": kind, "value": value, "seed": seed, "layer": number, "left": left}


def _tables(rows: Sequence[Row]) -> list[Table]:
    headings = ["what", "layer", "pixels"]
    headings += [f"m = {m}: mean, n times (theory 1)" for m in BATCH_SIZES]
    headings += [f"m = {m}: var / theory" for m in BATCH_SIZES]
    lines = []
    for model, stage, layer, pixels in _layers(rows):
        line = [f"{model}, {stage}", str(layer), str(pixels)]
        found = {m: _of(rows, model, stage, layer, m) for m in BATCH_SIZES}
        line += [mean_cell([_mean_ratio(r) for r in found[m]], 2, NOT_NEGATIVE) for m in BATCH_SIZES]
        line += [mean_cell([_var_ratio(r) for r in found[m]], 2, NOT_NEGATIVE) for m in BATCH_SIZES]
        lines.append(line)
    return [(headings, lines), _memory_table(rows)]


def _memory_table(rows: Sequence[Row]) -> Table:
    lines = []
    for kind, value in MEMORIES:
        line = [f"{kind} = {value:g}"]
        for layer in (0, 1):
            found = where(rows, kind=kind, value=value, layer=layer)
            line.append(mean_cell([row["left"] for row in found], 4, NOT_NEGATIVE))
        lines.append([*line, f"{theory_of_memory(kind, value):.4f}"])
    return ["noise of the mean left by", "layer 0", "layer 1", "theory"], lines


def _layers(rows: Sequence[Row]) -> list[tuple[str, str, int, int]]:
    found = [(r["model"], r["stage"], r["layer"], r["pixels"]) for r in rows if r["kind"] == "batch"]
    return list(dict.fromkeys(found))


def _of(rows: Sequence[Row], model: str, stage: str, layer: int, m: int) -> list[Row]:
    return where(rows, kind="batch", model=model, stage=stage, layer=layer, batch_size=m)


def _mean_ratio(row: Row) -> float:
    """Return n times the noise of the mean: n over the effective sample size."""
    n: int = row["batch_size"] * row["pixels"]
    return n * float(row["mean_noise"])


def _var_ratio(row: Row) -> float:
    n: int = row["batch_size"] * row["pixels"]
    return float(row["var_noise"]) / (2 * (n - 1) / n**2)


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    layers, memories = panels
    m = BATCH_SIZES[1]
    for model in MODELS:
        for stage, marker in zip(STAGES, ("o", "x"), strict=True):
            at = [(layer, pixels) for mo, st, layer, pixels in _layers(rows) if (mo, st) == (model, stage)]
            means = [fmean(_mean_ratio(r) for r in _of(rows, model, stage, layer, m)) for layer, _ in at]
            layers.plot([layer for layer, _ in at], means, marker + "-", label=f"{model}, {stage}")
    layers.axhline(1, color="#9e9e9e", linestyle="--", label="theory: independent values")
    layers.set_yscale("log")
    layers.set_xlabel(f"layer (batches of {m})")
    layers.set_ylabel("variance of the batch mean, times n")
    for kind in ("lambda", "k"):
        points = [(theory_of_memory(kind, r["value"]), r["left"]) for r in rows if r["kind"] == kind]
        memories.scatter([t for t, _ in points], [left for _, left in points], s=18, label=kind)
    memories.plot([0.01, 0.4], [0.01, 0.4], "--", color="#9e9e9e", label="theory")
    memories.set_xscale("log")
    memories.set_yscale("log")
    memories.set_xlabel("noise left, theory: (1 - lambda) / (1 + lambda), 1 / k")
    memories.set_ylabel("noise left, measured")


CLAIM = Claim(
    title="Noise of batch statistics",
    sentence=(
        "The noise of batch statistics depends on the batch size alone: the mean's variance is 1/n, the "
        "variance's "
        "2(n-1)/n², and a memory averages it away."
    ),
    measured=(
        f"{BATCHES} batches of digits drawn with replacement, weights fixed, every layer normalized with the "
        f"statistics of all images; untrained, and trained for {TRAINING_EPOCHS} epochs; means over "
        "channels. n is images times pixels: 1 means that pixels are as good as independent values, more "
        "that they are correlated. Second table: variance of the mean that normalizes batches of 2 in the "
        "trained MLP, in units of that of the batch's own."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=2,
)

"""`mbnorm diagnose`: a net and data in, a table, a plot and JSON out."""

from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any, TypeAlias, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm import Diagnosis, diagnose
from mbnorm.diagnose import ENOUGH_VALUES
from mbnorm.diagnosis import used_values
from mbnorm.experiments.data import Parts, parts
from mbnorm.experiments.grid import Run, Setting, linear_rate
from mbnorm.experiments.methods import Method
from mbnorm.experiments.plot import BATCH, LETTERS, OTHERS, OWN, WIDTH
from mbnorm.experiments.progress import counted
from mbnorm.experiments.sampling import Sampling, one_epoch
from mbnorm.experiments.synthetic import GaussianField
from mbnorm.experiments.training import net_for
from mbnorm.noise_cost import BATCHES

SYNTHETIC_NAME = "synthetic"
SYNTHETIC = GaussianField(channels=1, sides=(8, 8), correlation=0.8)


def source(data: str) -> Parts:
    """Return what a data set is like; synthetic fields have the shape of digits.

    Raises:
        ValueError: the data cannot be read.
    """
    return parts("digits" if data == SYNTHETIC_NAME else data)


def net(
    model: str, method: Method, batch_size: int, checkpoint: Path | None, data: str = "digits"
) -> nn.Module:
    """Return a net for these data, in train mode, untrained or with the weights in a file.

    Raises:
        ValueError: the file is missing, is no checkpoint, or one of another net; it is named in one line.
    """
    setting = Setting(model, batch_size, "shuffled", linear_rate(batch_size), 1, data)
    built = net_for(Run(method, setting, 0), source(data))
    if checkpoint is not None:
        try:
            state = _state_dict(checkpoint)
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}") from error
        try:
            built.load_state_dict(state)
        except RuntimeError as error:
            reason = _misfit(built, state) or str(error).splitlines()[-1].strip()
            raise ValueError(f"{checkpoint} does not fit {model} with {method} layers: {reason}") from error
    return built.train()


def _misfit(model: nn.Module, state: dict[str, Any]) -> str | None:
    """Return in what the keys differ, in a few words; None if they do not."""
    known = model.state_dict().keys()
    unknown = [key for key in state if key not in known]
    if any(key.rpartition(".")[2].startswith("memory_") for key in unknown):
        return "these layers have no such memories; give the --method that it was trained with"
    missing = [key for key in known if key not in state]
    if not missing and not unknown:
        return None
    first = f"{missing[0]!r} is missing" if missing else f"{unknown[0]!r} is not known"
    return f"{len(missing)} keys are missing and {len(unknown)} are not known, {first}"


def _state_dict(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError((error.strerror or str(error)).lower()) from error
    # damaged files raise nearly anything
    except Exception as error:
        raise ValueError(
            f"expected a file of torch.save that holds tensors alone ({type(error).__name__})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError("expected a state_dict of tensors, or one under 'state_dict' or 'model'")
    return loaded


Batch: TypeAlias = tuple[Tensor, Tensor | None]
"""Inputs, shape (batch_size, C, ...), and their targets, if there are any."""


def batches_of(data: str, sampling: Sampling, batch_size: int, count: int) -> Iterator[Batch]:
    """Draw so many batches; ``sampling`` is not for synthetic ones, which have no targets."""
    if data == SYNTHETIC_NAME:
        yield from ((inputs, None) for inputs in SYNTHETIC.batches(batch_size, count, seed=0))
        return
    read = source(data)
    draws = torch.Generator().manual_seed(0)
    drawn = 0
    while drawn < count:
        for indices in one_epoch(sampling, read.train_targets, batch_size, draws)[: count - drawn].tolist():
            yield torch.stack([read.train[index][0] for index in indices]), read.train_targets[indices]
            drawn += 1


def write(
    model: nn.Module, batches: Iterator[Batch], count: int, title: str, out: Path, *, with_loss: bool = False
) -> tuple[Diagnosis, list[Path]]:
    """Diagnose a model and write table.txt, diagnose.json and diagnose.png into ``out``.

    Args:
        model: with batch norms.
        batches: what it is trained with.
        count: how many.
        title: of table and figure.
        out: the folder.
        with_loss: also say what the noise of each layer adds to the cross-entropy.

    Raises:
        ValueError: an input cannot be decoded, or the model has no batch norms.
    """
    layers = sum(isinstance(module, _BatchNorm) for module in model.modules())
    forwards = count + ((2 * layers + 3) * min(count, BATCHES) if with_loss else 0)
    with counted(forwards, "batches") as step:

        def forward(model: nn.Module, batch: Batch) -> Any:
            step()
            return model(batch[0])

        found = diagnose(model, batches, loss=_cross_entropy if with_loss else None, forward=forward)
    table, record, figure = (out / name for name in ("table.txt", "diagnose.json", "diagnose.png"))
    table.write_text(f"{title}\n\n{found}\n", encoding="utf-8")
    record.write_text(found.to_json() + "\n", encoding="utf-8")
    draw(found, title, figure)
    return found, [table, record, figure]


def _cross_entropy(output: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(output, cast(Tensor, batch[1]))


def draw(found: Diagnosis, title: str, path: Path) -> None:
    """Write the figure of a diagnosis: effective sample sizes and findings, layer by layer."""
    layers = found.layers
    rows = range(len(layers))
    figure = Figure(figsize=(WIDTH, 2.6 + 0.44 * len(layers)), layout="constrained")
    figure.suptitle(fill(title, LETTERS), fontsize=9, fontweight="bold")
    sizes, errors = figure.subplots(2)
    sizes.set_xscale("log")
    sizes.xaxis.set_major_formatter("{x:g}")
    sizes.axvline(ENOUGH_VALUES, color="#9e9e9e", linestyle="--", linewidth=1)
    remembers = False
    for row, layer in zip(rows, layers, strict=True):
        noise, color = layer.noise, OWN if layer.verdict == "fine" else BATCH
        sizes.scatter([noise.values], [row], s=36, facecolor="none", edgecolor=OTHERS)
        if noise.effective_values is not None:
            sizes.plot([noise.values, noise.effective_values], [row, row], color=color, linewidth=1)
            sizes.scatter([noise.effective_values], [row], s=36, color=color)
        used = used_values(noise)
        if used is not None and noise.pooled_batches > 1:
            sizes.scatter([used], [row], s=36, marker="D", facecolor="none", edgecolor=color)
            remembers = True
    label = "values of a channel in a batch (ring), independent ones that would be as noisy (dot)"
    label += ", with the memory (diamond)" if remembers else ""
    sizes.set_xlabel(
        fill(f"{label}; dashed: {ENOUGH_VALUES}, which are enough", LETTERS), fontsize=9, loc="right"
    )
    series = {
        "batch mean": ("o", [layer.noise.mean_error for layer in layers]),
        "train against eval mode": ("s", [layer.noise.mismatch for layer in layers]),
        "running mean": ("x", [layer.noise.running_mean_error for layer in layers]),
    }
    for name, (marker, found_errors) in series.items():
        known = [(error, row) for row, error in zip(rows, found_errors, strict=True) if error is not None]
        if known:
            xs, ys = zip(*known, strict=True)
            errors.scatter(xs, ys, marker=marker, s=30, label=name)
    errors.set_xlim(left=0)
    errors.set_xlabel("error, in standard deviations of the channel", fontsize=9, loc="right")
    for panel in (sizes, errors):
        panel.set_yticks(rows, [f"{layer.name}: {layer.verdict}" for layer in layers], fontsize=9)
        panel.set_ylim(len(layers) - 0.5, -0.5)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#eeeeee")
        panel.set_axisbelow(True)
    figure.legend(*errors.get_legend_handles_labels(), loc="outside lower center", fontsize=9, frameon=False)
    figure.savefig(path, dpi=200)

"""What `diagnose` says of a trained MobileNetV2 with a loss, and whether it names the layers that matter."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, mean_cell
from evidence.lists import TUNED_FINE
from evidence.pretrained import check, data_of, pretrained, with_new_head
from evidence.trained import where
from mbnorm import diagnose
from mbnorm.experiments.dataset import Data
from mbnorm.experiments.estimates import NOT_NEGATIVE, UNBOUNDED
from mbnorm.experiments.sampling import one_epoch
from mbnorm.memories.measured_average import MeasuredAverage
from mbnorm.noise import NoiseMeter
from mbnorm.noise_cost import Normalizer, matched_part
from mbnorm.observe import Observer, observe

TASK = TUNED_FINE[0]
BATCHES = 100
OTHER_BATCHES = 50
"""Of a choice of layers; the statistics are those of all."""
VALUES = MeasuredAverage().matched_batch_size
COUNTS = (5, 13, 26)
BY_LOSS, BY_SIZE = "most added loss", "smallest effective sample size"
SHOWN = 8
PENALTY = 1e-3
"""Of the squares of the new layer's weights, which a thousand images would otherwise make large."""


def with_trained_head(seed: int, data: Data) -> nn.Module:
    """Return ImageNet's net whose new last layer has learned these images, in train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = with_new_head(pretrained("ImageNet"), data.classes).eval()
    head = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
    features: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    with torch.no_grad():
        for part in torch.split(data.train_inputs, BATCHES):
            model(part)
    handle.remove()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=30)

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(head(torch.cat(features)), data.train_targets)
        found = found + PENALTY * head.weight.square().sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found.detach()

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return model.train()


def added_with(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], choices: Sequence[Sequence[str]]
) -> list[float]:
    """Return what the noise of all layers adds to the loss if chosen ones have that of Matched BN."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    meters = {name: NoiseMeter(layer, frozen=False) for name, layer in layers.items()}
    observe(model, batches, {layers[name]: meter for name, meter in meters.items()}, None, None)
    parts = {name: matched_part(meter.result(), VALUES) for name, meter in meters.items()}

    def loss(part_of: dict[str, float]) -> float:
        found: list[float] = []
        observers: dict[_BatchNorm, Observer] = {
            layer: Normalizer(meters[name], part_of[name]) for name, layer in layers.items()
        }

        def note(output: Tensor, batch: tuple[Tensor, Tensor]) -> None:
            found.append(float(F.cross_entropy(output, batch[1])))

        observe(model, batches[:OTHER_BATCHES], observers, None, None, note)
        return fmean(found)

    quiet = loss(dict.fromkeys(layers, 0.0))
    return [
        loss({name: parts[name] if name in chosen else 1.0 for name in layers}) - quiet for chosen in choices
    ]


def measured(seed: int) -> Row:
    """Diagnose the net with some batches, choose layers, and look at what they change with other batches."""
    data = data_of(TASK)
    model = with_trained_head(seed, data)
    draws = torch.Generator().manual_seed(seed)
    epochs = [one_epoch("shuffled", data.train_targets, TASK.batch_size, draws)[:BATCHES] for _ in range(2)]
    first, second = (
        [(data.train_inputs[index], data.train_targets[index]) for index in indices] for indices in epochs
    )
    seconds = []
    for loss in (None, lambda output, batch: F.cross_entropy(output, batch[1])):
        start = time.perf_counter()
        found = diagnose(model, first, loss=loss)
        seconds.append(round(time.perf_counter() - start, 1))
    assert found.cost is not None
    costs = {layer.name: layer.cost._asdict() for layer in found.layers if layer.cost is not None}
    sizes = {layer.name: layer.noise.effective_values or 0.0 for layer in found.layers}
    by_loss = sorted(costs, key=lambda name: -costs[name]["added"])
    by_size = sorted(sizes, key=lambda name: sizes[name])
    choices = [[], list(costs)] + [order[:count] for count in COUNTS for order in (by_loss, by_size)]
    none, everything, *chosen = added_with(model, second, choices)
    return {
        "seed": seed,
        "loss": found.loss,
        "cost": found.cost._asdict(),
        "costs": costs,
        "sizes": sizes,
        "none": none,
        "all": everything,
        BY_LOSS: chosen[::2],
        BY_SIZE: chosen[1::2],
        "seconds": seconds,
    }


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    for seed in range(seeds):
        if not where(known, seed=seed):
            row = measured(seed)
            tell(f"seed {seed}: {row['seconds'][1]} s")
            yield row


def _largest(rows: Sequence[Row]) -> list[str]:
    """Return the layers that add most, in the mean over seeds."""
    means = {name: fmean(row["costs"][name]["added"] for row in rows) for name in rows[0]["costs"]}
    return sorted(means, key=lambda name: -means[name])[:SHOWN]


def _tables(rows: Sequence[Row]) -> list[Table]:
    if not rows:
        return []
    cell = partial(mean_cell, digits=2, bounds=UNBOUNDED)
    lines = []
    for name in _largest(rows):
        of = [row["costs"][name] for row in rows]
        sizes = mean_cell([row["sizes"][name] for row in rows], 1, NOT_NEGATIVE)
        lines.append(
            [name, sizes, *(cell([one[key] for one in of]) for key in ("added", "error", "matched"))]
        )
    of_all = [row["cost"] for row in rows]
    lines.append(
        ["all together", "-", *(cell([one[key] for one in of_all]) for key in ("added", "error", "matched"))]
    )
    chosen = [
        [str(count), *(cell([row[way][number] for row in rows]) for way in (BY_LOSS, BY_SIZE))]
        for number, count in enumerate(COUNTS)
    ]
    chosen.insert(0, ["0", *[cell([row["none"] for row in rows])] * 2])
    chosen.append(["all", *[cell([row["all"] for row in rows])] * 2])
    seconds = [
        ["without a loss", mean_cell([row["seconds"][0] for row in rows], 0, NOT_NEGATIVE)],
        ["with one", mean_cell([row["seconds"][1] for row in rows], 0, NOT_NEGATIVE)],
    ]
    return [
        (["layer", "n_eff", "loss added", "standard error", "with matched"], lines),
        (["layers with the noise of Matched BN", BY_LOSS, BY_SIZE], chosen),
        (["diagnose", "seconds"], seconds),
    ]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    (panel,) = panels
    for number, row in enumerate(rows):
        names = list(row["costs"])
        added = [max(row["costs"][name]["added"], 0.0) for name in names]
        label = "layers" if number == 0 else None
        panel.plot([row["sizes"][name] for name in names], added, ".", color="C0", label=label)
    panel.set_xscale("log")
    panel.set_yscale("symlog", linthresh=0.1)
    panel.set_xlabel("effective sample size of a batch of 2")
    panel.set_ylabel("loss that the layer's noise adds by itself")


CLAIM = Claim(
    title="What noise adds in MobileNetV2",
    sentence=(
        "In a trained MobileNetV2 at batch 2 the layers whose noise costs most are not those of the smallest "
        "effective sample size, and to calm the former helps more."
    ),
    measured=(
        "MobileNetV2 of ImageNet whose new last layer has learned 1,000 images of CIFAR-10, 96 pixels wide: "
        f"`diagnose` with cross-entropy and {BATCHES} batches of 2. The first table has the layers that add "
        f"most. The second is of {OTHER_BATCHES} other batches: what the noise of all layers adds to the "
        "loss if so many of them, the first of each ranking, have the noise of Matched BN. Seconds are on "
        "one core of a busy machine."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=1,
    seeds=3,
    check=lambda: check(TASK),
)

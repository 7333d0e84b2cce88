"""What the noise of batch statistics adds to the loss: measured, injected, and to second order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple, TypeAlias

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, mean_cell
from evidence.lists import CNN, MLP, Entrant, Task, data_of
from evidence.noise_layers import Size, draw_noise, replace_norms, size_of
from evidence.trained import where
from mbnorm import recalibrate
from mbnorm.experiments.estimates import UNBOUNDED
from mbnorm.experiments.grid import Run
from mbnorm.experiments.training import fit

TASKS = (MLP, CNN)
RATE = 0.1
TRAINING_BATCH = 32
SIZES = (2, 4, 8, 16, 32, 64)
IMAGES = 768
"""Of the training images; a multiple of all sizes."""
REPEATS = 4
"""How often the images are cut into batches, and noise is drawn."""
STEP = 0.05
"""The part of the noise that second differences of losses are taken over."""
SHOWN = 16
"""The batch size of the tables by layer."""
REAL, OTHERS, INJECTED = "real batches", "statistics of another batch", "injected, channels independent"
OWN = "second order, real batches"
FORMULA, SMOOTH = "second order, channels independent", "the same, its smooth part"
WAYS = (REAL, OWN, OTHERS, INJECTED, FORMULA, SMOOTH)
ALL = "all"


class Noise(NamedTuple):
    """The shift p and the scale 1 + q that noise amounts to, shape (N, C), for each image."""

    p: Tensor
    q: Tensor


Source: TypeAlias = Callable[[Tensor], Noise]
"""Is given the normalized inputs of a layer, and returns the noise of each image."""


class PopulationNorm(nn.Module):
    r"""A batch norm in eval mode, with noise or without.

    .. math:: y = w\,((1 + q)\,\hat x + p) + b
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm = norm
        self.source: Source | None = None
        self.given = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize images with the running statistics."""
        norm = self.norm
        z = F.batch_norm(x, norm.running_mean, norm.running_var, None, None, False, 0.0, norm.eps)
        self.given = z.detach()
        ones = [1] * (x.dim() - 2)
        if self.source is not None:
            p, q = (t.view(*t.shape, *ones) for t in self.source(z))
            z = (1 + q) * z + p
        return z * norm.weight.view(1, -1, *ones) + norm.bias.view(1, -1, *ones)

    @property
    def eps(self) -> Tensor:
        """Eps in units of the variance, shape (C,)."""
        assert self.norm.running_var is not None
        return self.norm.eps / (self.norm.running_var + self.norm.eps)


class Deviations(NamedTuple):
    """A batch's mean and its variance minus 1, of inputs normalized by all, shape (N, C), for each image."""

    mean: Tensor
    var: Tensor

    def exact(self, eps: Tensor) -> Noise:
        """Return the noise that these deviations amount to."""
        rstd = (1 + self.var + eps).clamp_min(1e-30).rsqrt()
        return Noise(-self.mean * rstd, rstd - 1)

    def expanded(self, part: float) -> Noise:
        """Return it to second order, for deviations that are ``part`` as large."""
        mean, var = part * self.mean, part * self.var
        return Noise(-mean + mean * var / 2, -var / 2 + 3 / 8 * var.square())


def of_batches(z: Tensor, images: int, *, others: bool = False) -> Deviations:
    """Return the deviations of each image's batch of so many images, or of the batch before it."""
    values = z.flatten(2) if z.dim() > 2 else z.unsqueeze(2)
    var, mean = torch.var_mean(values.reshape(-1, images, *values.shape[1:]), (1, 3), correction=0)
    if others:
        var, mean = var.roll(1, 0), mean.roll(1, 0)
    return Deviations(mean.repeat_interleave(images, 0), var.repeat_interleave(images, 0) - 1)


def drawn(size: Size, like: Tensor, draws: torch.Generator) -> Deviations:
    """Draw the noise model for each image and channel by itself."""
    shape = like.shape[:2]
    u, square = (t.view(shape).to(like.dtype) for t in draw_noise(size, shape.numel(), draws))
    return Deviations(u, square - 1)


def of_signs(size: Size, like: Tensor, draws: torch.Generator) -> Deviations:
    """Draw signs that have the means and variances of the noise model: probes of a trace."""
    signs = torch.randint(0, 2, (2, *like.shape[:2]), generator=draws).to(like.dtype) * 2 - 1
    scatter = 2 * (1 - 1 / size.values) ** 2 / size.freedom if size.freedom > 0 else 0.0
    return Deviations(signs[0] / size.values**0.5, signs[1] * scatter**0.5 - 1 / size.values)


class Net:
    """A trained net in float64 whose layers normalize with the statistics of its images.

    Args:
        model: has batch norms.
        inputs: of the images.
        targets: their classes.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self.model, self.inputs, self.targets = model.double().eval(), inputs.double(), targets
        recalibrate(model, [self.inputs])
        replace_norms(model, lambda norm, _: PopulationNorm(norm))
        self.layers = [m for m in model.modules() if isinstance(m, PopulationNorm)]

    def losses(self, sources: Mapping[int, Source], order: Tensor) -> Tensor:
        """Return the loss of each image in an order, with noise in some layers."""
        for number, layer in enumerate(self.layers):
            layer.source = sources.get(number)
        return F.cross_entropy(self.model(self.inputs[order]), self.targets[order], reduction="none")

    @torch.no_grad()
    def added(self, sources: Mapping[int, Source], order: Tensor) -> float:
        """Return what noise adds to the mean loss."""
        return float((self.losses(sources, order) - self.losses({}, order)).mean())

    def by_differences(self, layer: int, deviations: Deviations, order: Tensor) -> float:
        r"""Return the first two orders of what noise adds, f'(0) + f''(0)/2 of the part h of the noise.

        Differences of losses over many images see that gradients jump at the kinks of ReLU.
        """
        up = self.added({layer: lambda _: deviations.expanded(STEP)}, order)
        down = self.added({layer: lambda _: deviations.expanded(-STEP)}, order)
        return (up - down) / (2 * STEP) + (up + down) / (2 * STEP**2)

    def by_products(self, layer: int, deviations: Deviations, order: Tensor) -> float:
        """Return the same by a Hessian-vector product, which does not see the kinks of ReLU."""
        p, q = (torch.zeros_like(t, requires_grad=True) for t in deviations)
        loss = self.losses({layer: lambda _: Noise(p, q)}, order).mean()
        gradient = torch.autograd.grad(loss, (p, q), create_graph=True)
        first = deviations.expanded(1.0)
        linear = -deviations.mean, -deviations.var / 2
        added = sum((g.detach() * t).sum() for g, t in zip(gradient, first, strict=True))
        along = sum((g * t).sum() for g, t in zip(gradient, linear, strict=True))
        assert isinstance(along, Tensor)
        product = torch.autograd.grad(along, (p, q))
        return float(added + sum((h * t).sum() for h, t in zip(product, linear, strict=True)) / 2)


def measured(net: Net, images: int, draws: torch.Generator) -> Iterator[tuple[str, str, float]]:
    """Yield what the noise of batches of so many images adds to the loss, by layer and way."""
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(REPEATS):
        for layer, way, value in _measured(net, images, draws):
            found.setdefault((layer, way), []).append(value)
    for (layer, way), values in found.items():
        yield layer, way, fmean(values)
    for way in (OWN, FORMULA, SMOOTH):
        yield ALL, way, sum(fmean(found[str(i), way]) for i in range(len(net.layers)))


def _measured(net: Net, images: int, draws: torch.Generator) -> Iterator[tuple[str, str, float]]:
    """Yield the same for one order of the images; for all layers, what takes forwards alone."""
    numbers = range(len(net.layers))
    order = torch.randperm(len(net.inputs), generator=draws)
    with torch.no_grad():
        net.losses({}, order)
    given = [layer.given for layer in net.layers]
    sizes = [size_of(z, images) for z in given]

    def real(i: int) -> Source:
        return lambda z: of_batches(z, images).exact(net.layers[i].eps)

    def others(i: int) -> Source:
        # what noise before the layer changes would add up, since nothing takes it out
        return lambda _: of_batches(given[i], images, others=True).exact(net.layers[i].eps)

    def injected(i: int) -> Source:
        return lambda z: drawn(sizes[i], z, draws).exact(net.layers[i].eps)

    for way, source in ((REAL, real), (OTHERS, others), (INJECTED, injected)):
        for i in numbers:
            yield str(i), way, net.added({i: source(i)}, order)
        yield ALL, way, net.added({i: source(i) for i in numbers}, order)
    for i in numbers:
        signs = of_signs(sizes[i], given[i], draws)
        yield str(i), OWN, net.by_differences(i, of_batches(given[i], images), order)
        yield str(i), FORMULA, net.by_differences(i, signs, order)
        yield str(i), SMOOTH, net.by_products(i, signs, order)


def trained_net(task: Task, seed: int) -> Net:
    """Return a net trained with batch norm, and the images that it is looked at with."""
    data = data_of(task, "report")
    run = Run("batch", task.setting(RATE, TRAINING_BATCH), seed)
    model = Entrant("batch").net(run, data)
    fit(model, run, data)
    return Net(model, data.train_inputs[:IMAGES], data.train_targets[:IMAGES])


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    for task in TASKS:
        for seed in range(seeds):
            left = [m for m in SIZES if not where(known, task=task.name, seed=seed, images=m)]
            if not left:
                continue
            net = trained_net(task, seed)
            with torch.no_grad():
                loss = float(net.losses({}, torch.arange(len(net.inputs))).mean())
            for m in left:
                draws = torch.Generator().manual_seed(1000 * seed + m)
                added: dict[str, dict[str, float]] = {}
                for layer, way, value in measured(net, m, draws):
                    added.setdefault(layer, {})[way] = value
                tell(f"{task.name}, seed {seed}, batches of {m}")
                yield {"task": task.name, "seed": seed, "images": m, "loss": loss, "added": added}


def _of(rows: Sequence[Row], task: Task, images: int, layer: str, way: str) -> list[float]:
    """Return m times what noise adds, from each seed."""
    return [images * row["added"][layer][way] for row in where(rows, task=task.name, images=images)]


def _cell(values: Sequence[float]) -> str:
    return mean_cell(values, 2 if not values or abs(fmean(values)) < 10 else 0, UNBOUNDED)


def _tables(rows: Sequence[Row]) -> list[Table]:
    tables: list[Table] = []
    for task in TASKS:
        found = where(rows, task=task.name)
        if not found:
            continue
        lines = [[way, *(_cell(_of(rows, task, m, ALL, way)) for m in SIZES)] for way in WAYS]
        tables.append(([f"{task.name}, all layers: m R", *(f"m = {m}" for m in SIZES)], lines))
        layers = [layer for layer in found[0]["added"] if layer != ALL]
        lines = [[layer, *(_cell(_of(rows, task, SHOWN, layer, way)) for way in WAYS)] for layer in layers]
        tables.append(([f"{task.name}, layer: m R at m = {SHOWN}", *WAYS], lines))
    return tables


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    for task, panel in zip(TASKS, panels, strict=True):
        for number, way in enumerate(WAYS):
            found = {m: _of(rows, task, m, ALL, way) for m in SIZES}
            points = [(m, fmean(values)) for m, values in found.items() if values]
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=f"C{number}", markersize=4, label=way)
        panel.set_xscale("log")
        panel.set_yscale("symlog", linthresh=1)
        panel.set_ylim(-1, 100)
        panel.set_xlabel("images m in a batch")
        panel.set_ylabel("m R, up to 100")
        panel.set_title(task.name)


CLAIM = Claim(
    title="What noise adds to the loss",
    sentence=(
        "What the noise of batches of m images adds to the loss, R, is for large m half the trace of the "
        "loss's Hessian against the noise's covariance, and noise that is drawn for each channel by itself "
        "adds as much."
    ),
    measured=(
        f"Nets trained on digits with batches of {TRAINING_BATCH} at rate {RATE} for a batch of 64. R is "
        f"the mean over {IMAGES} training images of the loss with noise minus the loss with the statistics "
        "of all of them, without dropout, in float64. Where R is proportional to 1/m, a line of the first "
        "tables is constant. Real batches: normalized by themselves, in one layer or in all. Statistics of "
        "another batch: those of another m images. Injected: drawn for each image and channel, with "
        "measured effective sample size and degrees of freedom. Second order: slopes and curvatures along "
        "the deviations of real "
        "batches, or along signs with the variances of the noise model; for all layers, the sum over layers. "
        "The smooth part is by Hessian-vector products, which do not see the kinks of ReLU; the others by "
        f"differences of losses over {STEP:g} of the noise."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=len(TASKS),
    seeds=3,
)

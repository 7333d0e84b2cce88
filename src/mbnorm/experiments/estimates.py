"""Means over seeds with their confidence intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of ``count`` values; its confidence interval reaches ``half_width`` to both sides."""

    mean: float
    half_width: float | None
    count: int

    def __str__(self) -> str:
        return self._shown("")

    def signed(self) -> str:
        """Return the text of a difference."""
        return self._shown("+")

    def _shown(self, sign: str) -> str:
        mean = f"{self.mean:{sign}.1f}"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.1f}"


def estimate(values: Sequence[float]) -> Estimate | None:
    r"""Return the mean of ``values`` with Student's interval, if there are any.

    .. math:: \bar x \pm t_{n-1,\,0.975}\; s / \sqrt n

    A single value has no interval.

    >>> print(estimate([95.0, 97.0, 99.0]))
    97.0 ± 5.0
    """
    if not values:
        return None
    n = len(values)
    if n == 1:
        return Estimate(values[0], None, 1)
    # the package takes a second to import
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    quantile = float(stdtrit(n - 1, (1 + LEVEL) / 2))
    return Estimate(fmean(values), quantile * stdev(values) / math.sqrt(n), n)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Return the mean difference over the seeds that both have, with its interval.

    >>> print(paired_difference({0: 97.0, 1: 98.0, 2: 99.0}, {0: 90.0, 1: 91.0}).signed())
    +7.0 ± 0.0
    """
    return estimate([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])

"""Means over seeds with their confidence intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeAlias

Bounds: TypeAlias = tuple[float, float]
"""The least and the largest value that can be."""

LEVEL = 0.95
FEWEST = 3
"""Values that an interval needs."""
UNBOUNDED: Bounds = (-math.inf, math.inf)
NOT_NEGATIVE: Bounds = (0.0, math.inf)
PERCENT: Bounds = (0.0, 100.0)
INTERVAL = (
    "± is the 95 % interval of the mean over the seeds (Student's t). Where it would go below 0 or above "
    f"100 %, it is cut there and both ends are shown. Fewer than {FEWEST} seeds have no interval, and show "
    "no difference."
)
NO_DIFFERENCE = "In parentheses: the interval includes 0, which is no difference."


@dataclass(frozen=True)
class Estimate:
    """A mean of ``count`` values; its confidence interval reaches ``half_width`` to both sides.

    It is cut at ``bounds``, and it is None where there are too few values.
    """

    mean: float
    half_width: float | None
    count: int
    bounds: Bounds = UNBOUNDED

    @property
    def low(self) -> float:
        """The lower end of the interval; the mean where there is none."""
        return max(self.mean - (self.half_width or 0.0), self.bounds[0])

    @property
    def high(self) -> float:
        """The upper end of the interval; the mean where there is none."""
        return min(self.mean + (self.half_width or 0.0), self.bounds[1])

    @property
    def decided(self) -> bool:
        """Whether there is an interval and it leaves out 0: whether a difference is one."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 1) -> str:
        """Return the mean with its interval.

        >>> print(estimate([95.0, 97.0, 99.0]).text(2))
        97.00 ± 4.97
        >>> print(estimate([95.0, 97.0, 99.0], PERCENT))
        97.0 (92.0 to 100)
        """
        return self._shown("", digits)

    def signed(self, digits: int = 1) -> str:
        """Return the text of a difference, in parentheses where it is none.

        >>> print(estimate([0.5, 1.0, 1.5]).signed())
        (+1.0 ± 1.2)
        """
        text = self._shown("+", digits)
        return text if self.decided else f"({text})"

    def _shown(self, sign: str, digits: int) -> str:
        # 0.0 makes a 0 of -0
        middle = round(self.mean, digits) + 0.0
        mean = f"{middle:{sign}.{digits}f}"
        if self.half_width is None:
            return mean
        half_width = round(self.half_width, digits)
        ends = round(middle - half_width, digits), round(middle + half_width, digits)
        # what is shown must not pass a bound; one that rounding hides is none
        if self.bounds[0] <= ends[0] and ends[1] <= self.bounds[1]:
            return f"{mean} ± {half_width:.{digits}f}"
        return f"{mean} ({self._end(self.low, digits)} to {self._end(self.high, digits)})"

    def _end(self, value: float, digits: int) -> str:
        return f"{value:g}" if value in self.bounds else f"{value:.{digits}f}"


def estimate(values: Sequence[float], bounds: Bounds = UNBOUNDED) -> Estimate | None:
    r"""Return the mean of ``values`` with Student's interval, if there are any.

    .. math:: \bar x \pm t_{n-1,\,0.975}\; s / \sqrt n

    Fewer than three values have no interval: that of two would be 13 times as wide as they are apart.

    Args:
        values: one for each seed.
        bounds: the least and the largest value that can be; the interval ends there.

    >>> print(estimate([95.0, 97.0, 99.0]))
    97.0 ± 5.0
    """
    if not values:
        return None
    n = len(values)
    if n < FEWEST:
        return Estimate(fmean(values), None, n, bounds)
    # the package takes a second to import
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    quantile = float(stdtrit(n - 1, (1 + LEVEL) / 2))
    return Estimate(fmean(values), quantile * stdev(values) / math.sqrt(n), n, bounds)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Return the mean difference over the seeds that both have, with its interval.

    >>> print(paired_difference({0: 97.0, 1: 98.5, 2: 99.0}, {0: 90.0, 1: 91.0, 2: 92.0}).signed())
    +7.2 ± 0.7
    """
    return estimate([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])

"""Means with their error bars."""

import math
from collections.abc import Callable, Sequence

import numpy as np

_Z = 1.959963984540054  # of a 95% interval


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error (with n - 1; 0 for a single value)."""
    n, mean = len(values), float(np.mean(values))
    return mean, float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else 0.0


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share of successes by Wilson's score, which stays inside [0, 1].

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    share, z2 = right / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95% interval of a statistic of `count` rows, by drawing them anew with replacement.

    Args:
      statistic: of the rows with these places.
    """
    random = np.random.default_rng(seed)
    found = [statistic(random.integers(count, size=count)) for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum."""
    if not values:
        return {}
    return {
        "p50": float(np.quantile(values, 0.5)),
        "p99": float(np.quantile(values, 0.99)),
        "max": float(max(values)),
    }

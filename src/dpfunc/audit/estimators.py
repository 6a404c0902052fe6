"""Lower bounds on epsilon from independent trials: numpy and scipy alone, confidence stated.

Each takes what an attack scored and returns a number that is above the true epsilon with probability
at most 1 - confidence, under the assumption that its docstring names.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv
from scipy.stats import nct

from dpfunc import _checks
from dpfunc.accounting import gaussian_epsilon
from dpfunc.audit.families import Family, strongest_refuted

Array = NDArray[np.float64]

_MOST_THRESHOLDS = 512


def clopper_pearson(
    scores_in: ArrayLike,
    scores_out: ArrayLike,
    *,
    delta: float,
    confidence: float = 0.95,
    threshold: float | None = None,
) -> float:
    """Bound epsilon from below by the error rates of a threshold on independent scores.

    ASSUMES THAT SCORES ARE INDEPENDENT: one canary of each run, not many of one run.

    Args:
        scores_in: (n,) scores of trials with the canary in, n >= 2; higher should mean in.
        scores_out: (k,) scores of trials without it, k >= 2.
        delta: in (0, 1).
        confidence: in (0, 1).
        threshold: a score above it is a guess of in. None: every second score chooses it, and is
            then spent.

    Returns:
        A number in [0, inf). At most about log(min(n, k) / 4), however much leaks.

    Guarantees:
        Above the true epsilon with probability at most 1 - confidence: the two rates are exact
        Clopper-Pearson bounds, at (1 - confidence) / 2 each.
        A threshold of None is chosen on scores that the bound does not use.

    Raises:
        ValueError: fewer than two scores, a NaN, or a number out of range.

    Source: Clopper and Pearson 1934; Nasr et al. 2021, arXiv:2101.04535, section 4, with delta.

    >>> round(clopper_pearson([1.0] * 1000, [0.0] * 1000, delta=1e-5, threshold=0.5), 3)
    5.601
    """
    inside, outside = scores(scores_in=scores_in), scores(scores_out=scores_out)
    delta = _checks.open_unit(delta=delta)
    alpha = 1.0 - _checks.open_unit(confidence=confidence)
    if threshold is None:
        every = np.concatenate([inside[::2], outside[::2]])
        levels = np.linspace(0, 1, min(_MOST_THRESHOLDS, len(every)))
        candidates = np.unique(np.quantile(every, levels, method="lower"))
        found = _from_rates(inside[::2], outside[::2], candidates, delta, alpha)
        threshold = float(candidates[np.argmax(found)])
        inside, outside = inside[1::2], outside[1::2]
    threshold = _checks.real(threshold=threshold)
    return float(_from_rates(inside, outside, np.array([threshold]), delta, alpha)[0])


def _from_rates(
    inside: Array, outside: Array, thresholds: Array, delta: float, alpha: float
) -> Array:
    """The bound at each threshold: whichever of a guess of in and a guess of out says more."""
    caught = len(inside) - np.searchsorted(np.sort(inside), thresholds, side="right")
    false = len(outside) - np.searchsorted(np.sort(outside), thresholds, side="right")
    true_low = _rate_below(caught, len(inside), alpha / 2)
    false_high = 1.0 - _rate_below(len(outside) - false, len(outside), alpha / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        says_in = np.log((true_low - delta) / false_high)
        says_out = np.log((1.0 - false_high - delta) / (1.0 - true_low))
    return np.maximum(np.nan_to_num(np.fmax(says_in, says_out), nan=0.0, neginf=0.0), 0.0)


def _rate_below(count: NDArray[np.int_], num: int, alpha: float) -> Array:
    """The exact lower confidence bound on a rate, from `count` of `num`."""
    hit = np.maximum(count, 1)
    return np.where(count > 0, betaincinv(hit, num - hit + 1, alpha), 0.0)


def gaussian_fit(
    scores_in: ArrayLike, scores_out: ArrayLike, *, delta: float, confidence: float = 0.95
) -> float:
    """Bound epsilon from below as if the scores were two normals of one variance.

    ASSUMES INDEPENDENT NORMAL SCORES OF ONE VARIANCE, AND A GAUSSIAN TRADE-OFF CURVE. Of a sampled
    run neither holds exactly. It reaches far beyond what the number of trials could show without.

    Args:
        scores_in, scores_out: as for `clopper_pearson`; three or more together.
        delta, confidence: in (0, 1).

    Returns:
        A number in [0, inf].

    Guarantees:
        Under the assumption, above the true epsilon with probability exactly 1 - confidence (where it
        is not 0): the two-sample t statistic has a noncentral t law whose centre is mu.

    Raises:
        ValueError: too few scores, a NaN or an infinity, or a number out of range.

    Source: Johnson and Welch 1940 on the noncentral t; Dong, Roth, Su 2022, arXiv:1905.02383, on mu.

    >>> trials = np.random.default_rng(0).standard_normal((2, 2000))
    >>> round(gaussian_fit(trials[0] + 1.0, trials[1], delta=1e-5), 2)  # mu = 1 is 4.38
    3.98
    """
    inside, outside = scores(scores_in=scores_in), scores(scores_out=scores_out)
    delta = _checks.open_unit(delta=delta)
    confidence = _checks.open_unit(confidence=confidence)
    if not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        raise ValueError("Expected finite scores for a fit of normals, got an infinity.")
    freedom = len(inside) + len(outside) - 2
    squares = sum(float(((s - s.mean()) ** 2).sum()) for s in (inside, outside))
    gap = float(inside.mean() - outside.mean())
    if squares == 0.0:
        return math.inf if gap > 0 else 0.0
    scale = math.sqrt(1 / len(inside) + 1 / len(outside))
    centre = _centre_below(gap / (math.sqrt(squares / freedom) * scale), freedom, confidence)
    return float(gaussian_epsilon(centre * scale, delta))


def accuracy_bound(accuracies: ArrayLike, *, confidence: float = 0.95) -> float:
    """Bound from below the mean of independent numbers in [0, 1], whatever their laws.

    Args:
        accuracies: (R,) in [0, 1], of independent runs; each has a mean of at most some p.
        confidence: in (0, 1).

    Returns:
        A number in [0, 1): the greatest p that is refuted.

    Guarantees:
        Above p with probability at most 1 - confidence, for every R: it is a bet against p whose
        wealth, a nonnegative supermartingale, reached 1 / (1 - confidence) (Ville's inequality).

    Raises:
        ValueError: no accuracies, one outside [0, 1], or a confidence out of range.

    Source: Waudby-Smith and Ramdas 2024, arXiv:2010.09686, section 4, with their predictable bets.

    >>> round(accuracy_bound([0.6] * 200), 3)
    0.59
    """
    seen = np.asarray(accuracies, dtype=np.float64)
    alpha = 1.0 - _checks.open_unit(confidence=confidence)
    if seen.ndim != 1 or seen.size == 0 or not ((seen >= 0) & (seen <= 1)).all():
        raise ValueError(
            f"Expected accuracies to be a vector of numbers in [0, 1], got shape {seen.shape}."
        )
    places = np.arange(1, len(seen) + 1)
    means = (0.5 + np.cumsum(seen)) / (places + 1)
    variances = (0.25 + np.cumsum((seen - means) ** 2)) / (places + 1)
    before = np.concatenate([[0.25], variances[:-1]])  # a bet knows the runs before it alone
    bets = np.sqrt(2 * math.log(1 / alpha) / (len(seen) * before))

    def refuted(p: float) -> bool:
        # At most 0.9 of the wealth is at stake, and every factor falls as p rises.
        wealth = np.cumsum(np.log1p(np.minimum(bets, 0.9 / p) * (seen - p)))
        return bool(wealth.max() >= math.log(1 / alpha))

    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def independent_runs(
    accuracies: ArrayLike, family: Family, *, delta: float, confidence: float = 0.95
) -> float:
    """Bound epsilon from below by how often guesses are right, over independent runs.

    If a run meets a curve of the family, a guess about one canary in by a fair coin is right with
    probability at most (1 + advantage) / 2. The mean over a run's canaries keeps to that however they
    depend on each other; over runs, `accuracy_bound`.

    Args:
        accuracies: (R,) share of right guesses in each run.
        family: the assumption; see `noise_family` and `gaussian_family`.
        delta, confidence: in (0, 1).

    Returns:
        Epsilon of the strongest curve in the family that is refuted; 0 where none is.

    Guarantees:
        If the mechanism meets a curve of the family, above that curve's epsilon with probability at
        most 1 - confidence.
        That a curve is refuted needs no family: each is refuted by itself.

    Raises:
        ValueError: as `accuracy_bound`, or delta out of range.

    Source: the advantage is the total variation distance: Dong, Roth, Su 2022, Proposition 2.12.

    >>> from dpfunc.audit import gaussian_family
    >>> round(independent_runs([0.69] * 500, gaussian_family(), delta=1e-5), 2)  # mu = 1 is 4.38
    4.2
    """
    delta = _checks.open_unit(delta=delta)
    advantage = 2.0 * accuracy_bound(accuracies, confidence=confidence) - 1.0
    strength = strongest_refuted(lambda s: family.advantage(s) < advantage, family.strongest)
    return family.epsilon(strength, delta) if strength > 0 else 0.0


def scores(**named: Any) -> Array:
    """A vector of at least two numbers, none of them NaN."""
    ((name, value),) = named.items()
    found = np.asarray(value, dtype=np.float64)
    if found.ndim != 1 or found.size < 2:
        raise ValueError(f"Expected {name} to be a vector of two or more, got shape {found.shape}.")
    if np.isnan(found).any():
        raise ValueError(f"Expected {name} without NaN, got {int(np.isnan(found).sum())}.")
    return found


def _centre_below(t: float, freedom: int, confidence: float) -> float:
    """The noncentrality at which a t as large as this has probability 1 - confidence; at least 0."""

    def excess(centre: float) -> float:
        return float(nct.sf(t, freedom, centre)) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    high = t + 10.0  # there a larger t is all but certain, unless the confidence asks for more
    while excess(high) <= 0:
        high = 2 * high
    return brentq(excess, 0.0, high, xtol=1e-9)  # pyright: ignore[reportReturnType]

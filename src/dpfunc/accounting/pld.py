"""The default accountant: bounds on both sides of the exact privacy profile of a log.

The privacy loss of a log is a sum of independent losses, one for each step. Its profile comes from
the cheapest of three methods that serves: a closed form (full batches; one subsampled step), the
contour sum of contour.py (most logs, a millisecond), or the lattice of lattice/ (few or rarely hit
steps, Laplace noise, batches of a fixed size). Each gives an upper and a lower bound with its errors
inside, so the truth is between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dpfunc import _checks
from dpfunc.accounting import contour
from dpfunc.accounting.closed import (
    full_batch_delta,
    full_batch_epsilon,
    one_step_delta,
    one_step_epsilon,
)
from dpfunc.accounting.contour import Found, Steps
from dpfunc.accounting.directions import (
    NOISES,
    Contents,
    Counted,
    Direction,
    contents_of,
    directions,
)
from dpfunc.accounting.lattice import lattice_delta, lattice_epsilon
from dpfunc.accounting.pairs import GaussianPair
from dpfunc.accounting.quadrature import stacks
from dpfunc.events import AnyLog, Log

WIDTH = 1e-6
"""Epsilon interval, relative to max(1, epsilon), beyond which another method is tried."""
_NOTHING = Found(-math.inf, -math.inf)
_MOST_EVENTS = 4096
"""In a log whose distinct events are looked at one by one, where grids that stand for them fall short."""
_MOST_PAIRS, _MOST_STEPS, _LEAST_NOISE, _MOST_NOISE = 64, 1e8, 0.05, 1e4
"""For the lattice: its rounding grows with steps and noise, its points with losses."""


def epsilon_bounds(
    log: AnyLog, *, delta: ArrayLike, group_size: int = 1, direction: str | None = None
) -> Any:
    """Bounds on both sides of the epsilon that the log's releases together satisfy at `delta`.

    Args:
        log: what ran; `()` is nothing.
        delta: in (0, 1); a number or an array of them.
        group_size: protects this many examples together, each of them drawn on its own; at most 500.
        direction: "remove", "add" or "replace" alone; None is the larger of those that the log has.

    Returns:
        (lower, upper), floats in [0, inf]; arrays of delta's shape where delta is an array.

    Guarantees:
        lower <= epsilon <= upper, for the exact epsilon of the pairs of distributions in
        docs/accountant.md, which also lists what is estimated and not proved.
        upper - lower is at most 1e-6 max(1, epsilon), but for fixed-size sampling under replace-one,
        whose exact epsilon is not known; for Laplace noise beside Gaussian, 2e-6; and where float64
        has no more digits: beyond 1e12 steps, delta above 1/2, delta far below the probability
        that any of some rare steps with little noise hits.
        An empty log, probability 0 and infinite noise give exactly (0, 0); zero noise gives an upper
        of inf, unless it is too rarely drawn to matter at delta.
        The order of events does not matter, nor how they are run together.

    Raises:
        ValueError, TypeError: a number out of range, an event without a bound, two relations in one
            log, or a direction that the log does not have.

    Source: docs/accountant.md; Alghamdi et al. 2023, arXiv:2208.09595, for the contour.

    >>> from dpfunc.events import StepEvent
    >>> log = (StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=10_000),)
    >>> lower, upper = epsilon_bounds(log, delta=1e-5)
    >>> round(lower, 8), round(upper, 8)
    (6.18771239, 6.18771239)
    """
    chosen = _Choice(log, group_size, direction)

    def at(delta: float) -> tuple[float, float]:
        delta = _checks.open_unit("It is a probability of failure, say 1e-5.", delta=delta)
        lower, upper = _largest_epsilon(chosen.directions, delta)
        if chosen.has_grids and not _is_narrow(lower, upper):
            lower, upper = _largest_epsilon(chosen.exact, delta)
        return lower, upper

    return _each(at, delta)


def delta_bounds(
    log: AnyLog, *, epsilon: ArrayLike, group_size: int = 1, direction: str | None = None
) -> Any:
    """Bounds on both sides of the delta that the log's releases together satisfy at `epsilon`.

    Args:
        log: what ran; `()` is nothing.
        epsilon: finite, >= 0; a number or an array of them.
        group_size, direction: as for `epsilon_bounds`.

    Returns:
        (lower, upper), floats in [0, 1]; arrays of epsilon's shape where epsilon is an array.

    Guarantees:
        As for `epsilon_bounds`. Zero noise on all the data gives (1, 1).

    Raises:
        ValueError, TypeError: as for `epsilon_bounds`.

    Source: docs/accountant.md.

    >>> from dpfunc.events import StepEvent
    >>> log = (StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=10_000),)
    >>> lower, upper = delta_bounds(log, epsilon=6.0)
    >>> f"{lower:.8e} {upper:.8e}"
    '1.75977608e-05 1.75977608e-05'
    """
    chosen = _Choice(log, group_size, direction)

    def at(epsilon: float) -> tuple[float, float]:
        epsilon = _checks.finite_non_negative(epsilon=epsilon)
        lower, upper = _largest_delta(chosen.directions, epsilon)
        if chosen.has_grids and not upper - lower <= 1e-6 * upper:
            lower, upper = _largest_delta(chosen.exact, epsilon)
        return lower, upper

    return _each(at, epsilon)


class _Choice:
    """The directions of a log to look at: with grids for its steps, and without."""

    def __init__(self, log: AnyLog, group_size: int, direction: str | None) -> None:
        self.log = Log(log)
        self.group_size = _checks.integer(at_least=1, group_size=group_size)
        if group_size > 500:
            raise ValueError(f"Expected group_size <= 500, got {group_size}.")
        self.name = direction
        self.directions = self._chosen(contents_of(self.log))
        self.has_grids = len(self.log) <= _MOST_EVENTS and any(o.grids for o in self.directions)

    @cached_property
    def exact(self) -> list[Direction]:
        return self._chosen(contents_of(self.log, most_steps=_MOST_EVENTS))

    def _chosen(self, contents: Contents) -> list[Direction]:
        found = directions(contents, self.group_size)
        if self.name is not None:
            _checks.choice(("remove", "add", "replace"), direction=self.name)
            names = [one.name for one in found]
            if found and self.name not in names:
                known = " or ".join(map(repr, names))
                raise ValueError(
                    f"Expected direction to be one that the log has, {known}, got {self.name!r}."
                )
            return [one for one in found if one.name == self.name]
        # Full-batch Gaussians are their own reverse.
        if len(found) < 2 or all(one.is_gaussian for one in found):
            return list(found[:1])
        return [found[0]._replace(two_way=True), *found[1:]]


def _largest_epsilon(chosen: list[Direction], delta: float) -> tuple[float, float]:
    best = Found(0.0, 0.0)
    for one in chosen:
        found = _epsilon(one, delta, best)
        lower, upper = max(best.lower, found.lower), max(best.upper, found.upper)
        best = Found(float(lower), float(upper), found.contour)
    return best.lower, best.upper


def _largest_delta(chosen: list[Direction], epsilon: float) -> tuple[float, float]:
    best = Found(0.0, 0.0)
    for one in chosen:
        found = _delta(one, epsilon, best)
        lower, upper = max(best.lower, found.lower), max(best.upper, found.upper)
        best = Found(float(lower), float(upper), found.contour)
    return best.lower, best.upper


def _each(bounds: Callable[[float], tuple[float, float]], values: ArrayLike) -> Any:
    if np.ndim(values) == 0:
        return bounds(values)  # pyright: ignore[reportArgumentType]
    array = np.asarray(values)
    both = np.array([bounds(value) for value in array.ravel().tolist()]).reshape(*array.shape, 2)
    return both[..., 0], both[..., 1]


def _epsilon(one: Direction, delta: float, than: Found = _NOTHING) -> Found:
    """Of one direction: an interval of epsilon, or one below than.lower."""
    if one.overflow_prob:
        return _epsilon_beside(one, delta)
    if one.hit_prob <= delta:
        return Found(0.0, 0.0)
    if one.mu == math.inf:
        return Found(math.inf if one.bare_prob > delta else 0.0, math.inf)
    low, high, by = _product_epsilon(one, one.dominating, delta, than)
    if one.realised != one.dominating:
        alone = one._replace(two_way=False)
        low = _product_epsilon(alone, one.realised, delta, _NOTHING).lower
    return Found(max(0.0, min(low, high)), max(0.0, high), by)


def _delta(one: Direction, epsilon: float, than: Found = _NOTHING) -> Found:
    """Of one direction: an interval of delta, or one below than.lower."""
    if one.mu == math.inf:
        return Found(one.bare_prob, min(1.0, one.hit_prob))
    if one.overflow_prob:
        one, than = one._replace(two_way=False), _NOTHING
    low, high, by = _product_delta(one, one.dominating, epsilon, than)
    if one.realised != one.dominating:
        alone = one._replace(two_way=False)
        low = _product_delta(alone, one.realised, epsilon, _NOTHING).lower
    low, high = min(low, high), min(high, one.hit_prob)
    # Either law may differ from the product's by overflow_prob, and Q counts e^epsilon times.
    beside = _beside(one, epsilon)
    return Found(min(max(0.0, low - beside), 1.0), min(high + beside, 1.0), by)


def _beside(one: Direction, epsilon: float) -> float:
    """(1 + e^epsilon) overflow_prob, at most 1."""
    if not one.overflow_prob:
        return 0.0
    log_beside = math.log(one.overflow_prob) + epsilon + math.log1p(math.exp(-epsilon))
    return math.exp(log_beside + 1e-12) if log_beside < 0 else 1.0


def _epsilon_beside(one: Direction, delta: float) -> Found:
    """Of laws that may differ from the product's: its epsilon where delta leaves room for that.

    What they differ by rises with epsilon. So an epsilon found with the room that is left at a larger
    one is an upper bound, and one found with the delta that a larger one may hide is a lower.
    """
    exact = one._replace(overflow_prob=0.0, two_way=False)
    low, high, _ = _epsilon(exact, delta)
    hidden = delta + _beside(one, low) if low < math.inf else 1.0
    least = _epsilon(exact, hidden).lower if hidden < 1 else 0.0
    for tried in range(60):
        further = high + 1e-9 * 2.0**tried * max(1.0, high)
        room = delta - _beside(one, further) if further < math.inf else 0.0
        if room <= 0:
            break
        high = _epsilon(exact, room).upper
        if high <= further:
            return Found(least, high)
    return Found(least, math.inf)


def _product_epsilon(one: Direction, pairs: Counted, delta: float, than: Found) -> Found:
    if not pairs and not one.grids:
        return Found(*full_batch_epsilon(one.mu, delta))
    single = _single(one, pairs)
    if single is not None:
        if than.lower > 0 and one_step_delta(*single, than.lower)[1] <= delta:
            return Found(0.0, than.lower)
        return Found(*one_step_epsilon(*single, delta))
    found = Found(0.0, math.inf)
    steps = _steps(one, pairs)
    if steps is not None:
        found = contour.epsilon_bounds(steps, math.log(delta), than) or found
    # Near delta = 1 the profile is flat, and what the sum rounds is wide: for the lattice too.
    enough = found.upper <= than.lower or _is_narrow(found.lower, found.upper)
    enough = enough or (delta > 0.5 and found.upper < math.inf)
    if not enough and _fits_a_lattice(one, pairs):
        low, high = lattice_epsilon(_all(one.mu, pairs), delta)
        found = found._replace(lower=max(found.lower, low), upper=min(found.upper, high))
    return found


def _is_narrow(low: float, high: float) -> bool:
    return high < math.inf and high - max(low, 0.0) <= WIDTH * max(1.0, high)


def _product_delta(one: Direction, pairs: Counted, epsilon: float, than: Found) -> Found:
    if not pairs and not one.grids:
        return Found(*full_batch_delta(one.mu, epsilon))
    single = _single(one, pairs)
    if single is not None:
        return Found(*one_step_delta(*single, epsilon))
    found, below = Found(0.0, 1.0), False
    steps = _steps(one, pairs)
    if steps is not None:
        logs = contour.delta_bounds(steps, epsilon, than if than.lower > 0 else None)
        below = than.lower > 0 and logs.upper <= math.log(than.lower)
        low, high = math.exp(min(logs.lower, 0.0)), math.exp(min(logs.upper, 0.0))
        found = Found(low, high, logs.contour)
    enough = below or found.upper - found.lower <= 1e-5 * found.upper
    if not enough and _fits_a_lattice(one, pairs):
        low, high = lattice_delta(_all(one.mu, pairs), np.array([epsilon]))
        lower, upper = max(found.lower, float(low[0])), min(found.upper, float(high[0]))
        found = found._replace(lower=lower, upper=upper)
    return found


def _steps(one: Direction, pairs: Counted) -> Steps | None:
    """What the contour can sum, or None."""
    gaussian = [(pair, count) for pair, count in pairs if isinstance(pair, GaussianPair)]
    if len(gaussian) < len(pairs) or not _is_in_range(pairs):
        return None
    return Steps([*stacks(gaussian), *one.grids], one.mu, one.two_way)


def _all(mu: float, pairs: Counted) -> Counted:
    return (*pairs, (GaussianPair(1 / mu, (0.0, 1.0), (1.0,)), 1.0)) if mu else pairs


def _fits_a_lattice(one: Direction, pairs: Counted) -> bool:
    few = len(pairs) <= _MOST_PAIRS and sum(count for _, count in pairs) <= _MOST_STEPS
    near = all(_LEAST_NOISE <= pair.noise <= _MOST_NOISE for pair, _ in pairs)
    return few and near and not one.grids


def _is_in_range(pairs: Counted) -> bool:
    return all(pair.noise >= NOISES[0] / 2 for pair, _ in pairs)


def _single(one: Direction, pairs: Counted) -> tuple[GaussianPair, str] | None:
    """The pair and its direction, where all that ran is one Poisson step."""
    if one.mu or one.grids or len(pairs) != 1 or pairs[0][1] != 1:
        return None
    pair = pairs[0][0]
    if not isinstance(pair, GaussianPair):
        return None
    shape = len(pair.above), len(pair.below)
    return (pair, "remove") if shape == (2, 1) else (pair, "add") if shape == (1, 2) else None

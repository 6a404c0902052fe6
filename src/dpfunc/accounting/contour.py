"""delta(epsilon) of a log as a sum of a few dozen numbers, with an upper and a lower bound.

For any theta > 0, with K(z) = log E_P[e^(z L)] summed over the log's steps,

    delta(epsilon) = 1 / (2 pi i) integral over Re z = theta of e^(K(z) - z epsilon) / (z (z + 1)) dz.

The trapezoid sum over z_j = theta + 2 pi i j / T is more than an approximation. It is, by Poisson's
summation formula,

    S(epsilon) = sum over all integers k of delta(epsilon + k T) e^(theta k T),

every term of which is at least 0: S bounds delta from above as it stands, and S less a Chernoff bound
on the other terms bounds it from below. What else separates the numbers below from S is each
bounded and added outward; docs/accountant.md has the proofs:

    tail      the nodes beyond the last, by `characteristic.decay`
    moment    quadrature and rounding of K at each node
    sum       rounding of the sum
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dpfunc.accounting.pairs import Array
from dpfunc.accounting.quadrature import UNIT, TooManyNodes
from dpfunc.accounting.rows import Row, Steps, row
from dpfunc.accounting.saddle import SMALL, choose, guess, reach, saddle
from dpfunc.accounting.terms import Contour, Tilted, log_delta_bounds, log_tail, tilted, total

_MOST_TERMS = 3e5  # of the sum, times 2 pi
_WORK = 2.5e8  # most products of pairs, nodes on the contour, nodes of the quadrature


class Found(NamedTuple):
    """An interval, and the contour that gave it."""

    lower: float
    upper: float
    contour: Contour | None = None


def contour(
    steps: Steps,
    *,
    log_delta: float | None = None,
    epsilon: float | None = None,
) -> Contour | None:
    """The contour for one point of the privacy profile, given by its delta or its epsilon.

    Returns None where the sum would take too many nodes: few steps, or rarely hit ones.
    """
    try:
        found = saddle(steps.sketch or steps, log_delta, epsilon)
        return None if found is None else _planned(steps, *found)
    except TooManyNodes:
        return None


def _closer(
    steps: Steps, at: Contour, epsilon: float, log_delta: float, both: bool | None = None
) -> Contour | None:
    """The same, planned anew: the aliases were planned for a guess, and now more is known."""
    try:
        return None if at.plan is None else _planned(steps, at.plan, epsilon, log_delta, both)
    except TooManyNodes:
        return None


def _planned(
    steps: Steps, plan: Row, epsilon: float, log_delta: float, both: bool | None = None
) -> Contour | None:
    """The contour for a point of the profile that is near the saddle points of the row."""
    chosen = choose(plan, epsilon, log_delta)
    if chosen is None:
        return None
    if both is None:
        both = steps.two_way and not _surely_below(plan, 0.98 * epsilon, log_delta)
    index, period = chosen.tilt, chosen.period
    theta = float(plan.theta[index])
    needed = float(plan.value[index]) - theta * epsilon - log_delta - SMALL
    # Far out the loss moves as much as without a tilt, which may show a few rare hits.
    t_guess = reach(needed, min(float(plan.variance[index]), float(plan.variance[0])))
    found = plan
    if steps.sketch is not None:
        # And some between the chosen ones, where more is certain if few pairs say too little of many.
        few = [chosen.below, index, *range(index + 1, chosen.above)[-2:], chosen.above]
        found, index = row(steps, plan.theta[few], 1.3 * t_guess, ready=both), 1
    reached = _reach(steps, found, index, t_guess, needed, _MOST_TERMS / period, both)
    if reached is None:
        return None
    t_last, tail, laws = reached
    spacing, size = 2 * math.pi / period, math.ceil(t_last * period / (2 * math.pi)) + 1
    if sum(one.at.x.size for one in laws) * size > _WORK:
        return None
    at = total(steps, theta, laws, spacing, size, tail)
    log_alias = found.ceiling - _log_expm1(np.abs(found.theta - theta) * period)
    parts = slice(index + 1, None), slice(index)
    aliases = tuple((found.theta[part], log_alias[part]) for part in parts)
    return at._replace(planned=epsilon, row=found, plan=plan, aliases=aliases)


def _surely_below(found: Row, epsilon: float, log_delta: float) -> bool:
    """Whether Chernoff's bound says that the other direction is below delta at epsilon."""
    if found.reverse is None:
        return False
    return bool((found.reverse - found.theta * epsilon).min() <= log_delta)


def _log_expm1(x: Array) -> Array:
    """log(e^x - 1), -inf at 0."""
    return x + np.log(np.maximum(-np.expm1(-x), 1e-300))


def _reach(
    steps: Steps, found: Row, index: int, t_last: float, needed: float, longest: float, both: bool
) -> tuple[float, Array, list[Tilted]] | None:
    """How far to sum until the rest is e^-needed of e^(K(theta) - theta epsilon), and log of the rest."""
    theta, laid = float(found.theta[index]), found.laid
    served, power = laid.t if laid.t >= t_last else 1.3 * t_last, 2.0
    laws = tilted(steps, theta, served, both, laid, index)
    tail = log_tail(steps, laws, t_last)
    while (own := float(tail[0])) >= -needed:
        # It falls like -t^power, with 2 for normal losses, and that is found on the way for others.
        further = min(max(1.02 * (needed / max(-own, needed / 4)) ** (1 / power), 1.1), 2.0)
        t_last *= further
        if t_last > longest:
            return None
        tail = log_tail(steps, laws, t_last)
        fall = float(tail[0]) / min(own, -1e-3)
        power = min(max(math.log(max(fall, 1.0)) / math.log(further), 0.5), 2.0)
    if t_last > served:
        laws = tilted(steps, theta, t_last, both, laid, index)
    return t_last, tail, laws


def _is_below(log_delta: float, than: Found) -> bool:
    """Whether epsilon is surely at most than.lower, by what the other direction's contour has of this one.

    The sum is an upper bound whatever its tilt and period are, and so is Chernoff's.
    """
    at = than.contour
    if at is None or than.lower == -math.inf:
        return False
    if at.row is not None and _surely_below(at.row, than.lower, log_delta):
        return True
    return at.reverse is not None and log_delta_bounds(at.reverse, than.lower)[1] <= log_delta


def epsilon_bounds(steps: Steps, log_delta: float, than: Found | None = None) -> Found | None:
    """Epsilons between which the profile meets a delta; they may be negative, or both below than.lower.

    Where the sum takes too many nodes the lower is -inf and the upper Chernoff's; None where even its
    integrals take too many. `than` is of the other direction.
    """
    if than is not None and _is_below(log_delta, than):
        return Found(-math.inf, than.lower)
    at = contour(steps, log_delta=log_delta)
    if at is None:
        upper = _chernoff_epsilon(steps, log_delta)
        return None if upper is None else Found(-math.inf, upper)
    center = _solve(at, log_delta)
    bounds = _outward(at, center, log_delta)
    for _ in range(3):
        width = bounds[1] - bounds[0]
        if width <= 1e-7 * max(1.0, abs(center)):
            break
        again = _closer(steps, at, center, log_delta)
        if again is None:
            break
        center = _solve(again, log_delta)
        closer = _outward(again, center, log_delta)
        bounds = max(bounds[0], closer[0]), min(bounds[1], closer[1])
        at = again
        if not bounds[1] - bounds[0] <= 0.5 * width:
            break
    found = Found(*bounds, at)
    if steps.two_way and at.reverse is None and not _is_below(log_delta, found):
        # The plan was off, and Chernoff's bound does not tell the directions apart after all.
        again = _closer(steps, at, center, log_delta, both=True)
        found = found if again is None else found._replace(contour=again)
    return found


def delta_bounds(steps: Steps, epsilon: float, than: Found | None = None) -> Found:
    """Bounds on log delta at an epsilon, of which only Chernoff's where the sum takes too many nodes.

    They may be both below the log of than.lower, the delta of the other direction.
    """
    if than is not None:
        log_delta = math.log(than.lower)
        if _is_below(log_delta, than._replace(lower=epsilon)):
            return Found(-math.inf, log_delta)
    at = contour(steps, epsilon=epsilon)
    if at is None:
        return Found(-math.inf, chernoff(steps, epsilon))
    low, high, _ = log_delta_bounds(at, epsilon)
    if not high - low <= 1e-7:
        again = _closer(steps, at, epsilon, min(high, 0.0))
        if again is not None:
            closer, closest, _ = log_delta_bounds(again, epsilon)
            low, high, at = max(low, closer), min(high, closest), again
    return Found(low, high, at)


def _solve(at: Contour, log_delta: float) -> float:
    """Where the sum itself meets delta: Newton's method on its logarithm, between moving ends."""
    theta = float(at.z[0].real)
    low, high, epsilon = -math.inf, math.inf, at.planned
    noise = at.error + 64 * UNIT * at.sizes[0]
    for _ in range(80):
        turned = at.terms * np.exp((at.z - theta) * (at.mean - epsilon))
        total = float(turned.sum().real)
        longest = 10 / theta + 0.1 * abs(epsilon)
        if total > noise:
            excess = math.log(total) + at.log_scale - theta * epsilon - log_delta
            step = excess * total / float((turned @ at.z).real)
            if not -longest < step < longest:
                step = math.copysign(longest, excess)
        else:  # so far out that nothing but rounding is left
            excess, step = -1.0, -longest
        low, high = (epsilon, high) if excess > 0 else (low, epsilon)
        after = epsilon + step
        if not low <= after <= high:
            after = (low + high) / 2
        if abs(after - epsilon) <= 4 * UNIT * (1 + abs(epsilon)):
            return after
        epsilon = after
    return epsilon


def _outward(at: Contour, center: float, log_delta: float) -> tuple[float, float]:
    """The nearest epsilons beside center whose bounds on delta lie on the safe sides of it."""
    *bounds, slope = log_delta_bounds(at, center)
    ends = [-math.inf, math.inf]
    for side, outward in ((0, -1), (1, 1)):
        short = abs(bounds[side] - log_delta)
        for _ in range(40):
            if not math.isfinite(short):
                break
            epsilon = center + outward * (1.02 * short / -slope + 8 * UNIT * (1 + abs(center)))
            off = log_delta_bounds(at, epsilon)[side] - log_delta * (1 - outward * 2 * UNIT)
            if off * outward <= 0:
                ends[side] = epsilon
                break
            short += 2 * abs(off)
    return ends[0], ends[1]


def chernoff(steps: Steps, epsilon: float) -> float:
    """An upper bound on log delta, from a few evaluations of the moment function."""
    near, cliff, _ = guess(steps, None, epsilon)
    best = 0.0
    for middle in {near, min(near, cliff)}:
        try:
            found = row(steps, middle * 2.0 ** np.arange(-3.0, 3.5, 0.5))
        except TooManyNodes:
            continue
        best = min(best, float(np.min(found.ceiling - found.theta * epsilon)))
    return best


def _chernoff_epsilon(steps: Steps, log_delta: float) -> float | None:
    thetas = guess(steps, log_delta, None)[0] * 1.25 ** np.arange(-60.0, 10.0)
    while thetas[-1] > 1e-6:
        try:
            found = row(steps, thetas)
        except TooManyNodes:
            thetas = thetas / 10
            continue
        return float(((found.ceiling - log_delta) / found.theta).min())
    return None

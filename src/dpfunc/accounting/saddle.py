"""Where to sum: a tilt near the saddle point, the epsilon there, and a period.

They decide how narrow the bounds are, never whether they hold.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dpfunc.accounting.rows import Row, Steps, is_small, row

SMALL = -25.0  # log of what tail and aliases may be beside delta
_DIGITS = 6.0  # nats that a contour beside the saddle may cancel
_CLIFF = 40.0
"""Nats of delta between neighbouring tilts that are worth a closer look."""
_RATIO = 1.35
"""Of neighbouring tilts."""


def saddle(
    steps: Steps, log_delta: float | None, epsilon: float | None
) -> tuple[Row, float, float] | None:
    """Tilts around the saddle point, its epsilon and its log delta, of which one or both are given."""
    near, cliff, variance = guess(steps, log_delta, epsilon)
    normal = near < cliff
    thetas = min(near, cliff) * _RATIO ** np.arange(-4.0 if normal else -6.0, 4.0)
    both = steps.two_way and is_small(steps)
    # Where losses are nearly normal the sum's own nodes are few, and they serve the search as well.
    t = 1.3 * reach(-SMALL + 8, variance) if normal and is_small(steps) else 0.0
    for _ in range(20):
        if not 1e-7 < thetas[0] < 1e7:
            break
        found = row(steps, np.concatenate([[0.0], thetas]), t, both=both)
        mean, curve = found.mean[1:], found.variance[1:] + thetas**-2 + (1 + thetas) ** -2
        epsilons = mean - 1 / thetas - 1 / (1 + thetas)
        scale = np.log(thetas * (1 + thetas) * np.sqrt(2 * math.pi * curve))
        logs = found.value[1:] - thetas * epsilons - scale
        past = log_delta - logs if log_delta is not None else epsilons - (epsilon or 0.0)
        place = int(np.searchsorted(past, 0.0))
        if not 2 <= place <= len(thetas) - 2:  # centre what was found, or go on beyond the end
            beyond = 4 * (place == len(thetas)) - 4 * (place == 0)
            thetas = thetas[0] * _RATIO ** (np.arange(10.0) + place - 5 + beyond)
            t = 0.0
        elif logs[place - 1] - logs[place] > _CLIFF:
            # From some tilt on K is that of a single rare hit: look where that begins.
            between = np.linspace(thetas[place - 1], thetas[place], 7)
            below, above = thetas[: place - 1], thetas[place + 1 :][:3]
            thetas = np.concatenate([below, between, above])
        else:
            part = past[place - 1] / (past[place - 1] - past[place])
            at = [float(v[place - 1] + part * (v[place] - v[place - 1])) for v in (epsilons, logs)]
            if epsilon is None and log_delta is not None:  # Chernoff's is closer on a cliff
                chernoff = ((found.ceiling - log_delta)[1:] / thetas).min()
                return found, min(at[0], float(chernoff)), log_delta
            return found, epsilon or 0.0, at[1] if log_delta is None else log_delta
    return None


def guess(
    steps: Steps, log_delta: float | None, epsilon: float | None
) -> tuple[float, float, float]:
    """The tilt for the Gaussian law that the central limit theorem suggests, the tilt near which a
    single rare hit begins to outweigh what that says, and the variance of the law.
    """
    variance, cliff = steps.mu**2, 1e3
    for stack in steps.stacks:
        hit = np.maximum(stack.above[:, 1:].sum(1), stack.below[:, 1:].sum(1))
        noise = stack.noise[:, 0]
        rise = np.expm1(np.minimum(noise**-2, 7))
        variance += float(np.abs(stack.counts) @ (hit * hit * rise))
        # q^(1 + theta) e^(theta (1 + theta) / (2 s^2)), the part of a hit, is least at s^2 log(1 / q) - 1/2.
        cliff = min(cliff, float((noise * noise * (1 - 1.4 * np.log(hit))).min()))
    if log_delta is not None:
        near = math.sqrt(-2 * log_delta / variance)
    else:
        near = max((epsilon or 0.0) / variance - 0.5, 1 / math.sqrt(variance))
    return min(max(near, 1e-3), 1e3), cliff, variance


def reach(needed: float, variance: float) -> float:
    """How far the sum goes, on a normal law, until what is left is e^-needed of its scale."""
    return math.sqrt(2.3 * max(needed, 1.0) / variance)


class Choice(NamedTuple):
    """Indices of tilts, and a period."""

    tilt: int
    """Of where to sum."""
    below: int
    """Of the tilts whose Chernoff bounds say how small the aliases are."""
    above: int
    period: float


def choose(found: Row, epsilon: float, log_delta: float) -> Choice | None:
    """The tilt whose aliases are small with the shortest period, of those that cancel few digits."""
    thetas = found.theta
    exponents = found.value - thetas * epsilon
    excess = found.ceiling - thetas * epsilon - log_delta - SMALL
    distance = thetas[None, :] - thetas[:, None]
    np.fill_diagonal(distance, math.nan)
    needed = np.maximum(excess, 1.0) / distance
    above, below = np.where(needed > 0, needed, math.inf), np.where(needed < 0, -needed, math.inf)
    periods = np.maximum(above.min(1), below.min(1))
    periods[(exponents > exponents.min() + _DIGITS) | (thetas == 0)] = math.inf
    best = int(periods.argmin())
    if not math.isfinite(periods[best]):
        return None
    # Of the tilts above the nearest that serves nearly as well: those far out may be on a cliff.
    enough = max(float(periods[best]), 1.2 * float(above[best].min()))
    nearest = int((above[best] <= enough).argmax())
    period = max(float(periods[best]), float(above[best, nearest]))
    return Choice(best, int(below[best].argmin()), nearest, period)

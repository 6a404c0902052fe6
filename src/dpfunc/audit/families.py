"""Families of trade-off curves, from more private to less: what a bound on an attack is read against.

An attack shows a point: so many true positives at so many false ones. At a small delta a few thousand
trials cannot show epsilon itself; a curve through the point can. A family is that assumption,
in the open: curves by strength, each given by points (epsilon, delta) on or above its profile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpfunc import _checks
from dpfunc.accounting import (
    delta_bounds,
    epsilon,
    epsilon_bounds,
    gaussian_delta,
    gaussian_epsilon,
)
from dpfunc.events import AnyLog, Log

Array = NDArray[np.float64]


class Points(NamedTuple):
    """(epsilon, delta) pairs that a mechanism satisfies, the first at epsilon 0."""

    epsilons: Array
    deltas: Array


class Family(NamedTuple):
    """Curves by strength: the greater, the less private."""

    points: Callable[[float], Points]
    advantage: Callable[[float], float]
    """delta at epsilon 0: the most by which true positive rate exceeds false positive rate."""
    epsilon: Callable[[float, float], float]
    """`epsilon(strength, delta)`, from below where it cannot be exact."""
    strongest: float
    """The greatest strength that is tried, a power of two: what refutes it leaves no doubt."""


def gaussian_family() -> Family:
    """The mu-GDP curves, by mu."""

    def points(mu: float) -> Points:
        # Where the tangents of the curve go in equal steps of its normal quantile.
        epsilons = np.concatenate([[0.0], mu * np.arange(0.0, 9.0, 0.05) + 1e-12])
        return Points(epsilons, gaussian_delta(mu, epsilons))

    return Family(
        points,
        lambda mu: math.erf(mu / math.sqrt(8)),
        lambda mu, delta: float(gaussian_epsilon(mu, delta)),
        64.0,
    )


def approximate_family(delta: float) -> Family:
    """The curves of (epsilon, delta) alone, by epsilon: no assumption beyond the definition."""
    delta = _checks.open_unit(delta=delta)

    def points(strength: float) -> Points:
        at_zero = (math.expm1(strength) + 2 * delta) / (math.exp(strength) + 1)
        return Points(np.array([0.0, strength]), np.array([at_zero, delta]))

    return Family(points, lambda e: float(points(e).deltas[0]), lambda e, _: e, 64.0)


def noise_family(log: AnyLog) -> Family:
    """What ran with its noise divided by a strength: 1 is the log as it is."""
    log = Log(log)

    def louder(strength: float) -> Log:
        return Log(
            replace(event, noise_multiplier=event.noise_multiplier / strength) for event in log
        )

    def points(strength: float) -> Points:
        # Tangents at deltas in equal steps of their logarithm: any choice holds, this one is cheap.
        deltas = advantage(strength) * np.geomspace(1.0, 1e-8, 21)[1:]
        touch = [epsilon_bounds(louder(strength), delta=float(d))[1] for d in deltas if d > 0]
        return Points(np.array([0.0, *touch]), np.array([advantage(strength), *deltas[deltas > 0]]))

    def advantage(strength: float) -> float:
        return float(delta_bounds(louder(strength), epsilon=0.0)[1])

    return Family(
        points,
        advantage,
        lambda strength, delta: epsilon(louder(strength), delta=delta),
        2.0,  # with little of its noise left an accountant takes long
    )


def strongest_refuted(refuted: Callable[[float], bool], most: float) -> float:
    """The greatest strength that is refuted, to 2 in 1000 from below; 0 where none is.

    Refuted strengths lie below those that are not. Looked for in [2**-10, most], from 1 outwards.
    """
    place = 0.0  # in powers of two
    if refuted(1.0):
        while 2.0**place < most and refuted(2.0 ** (place + 1.0)):
            place += 1.0
        if 2.0**place >= most:
            return 2.0**place
    else:
        while place > -10.0 and not refuted(2.0 ** (place - 1.0)):
            place -= 1.0
        if place == -10.0:
            return 0.0
        place -= 1.0
    low, high = place, place + 1.0
    while high - low > 2e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(2.0**middle) else (low, middle)
    return 2.0**low

"""Where the losses of a log lie, in outline: it decides how narrow the bounds are, not whether they hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import NamedTuple

import numpy as np

from dpfunc.accounting.lattice.laws import atoms_of, tails
from dpfunc.accounting.pairs import Array, Pair

Steps = Sequence[tuple[Pair, int | float]]

_SPENT = 0.01  # share of the width for what lies above the grid, below it, or outside the window
_MOST = 1e11  # counts, beyond which rounding leaves nothing to tell
_LEAST = 1e-280  # Q above the last loss resolved: of rarer ones float64 does not have all digits


class Tilt(NamedTuple):
    """Where the composition looks: chosen by estimates, so that the bounds come out narrow."""

    theta: float  # the exponential tilt
    epsilon: float  # the epsilon whose delta it shows best
    log_delta: float  # about the log of that delta
    log_rare: float  # the log of a delta that makes no difference
    window: tuple[float, float]  # losses of the log that matter
    further: tuple[float, float]  # tilts that bound what lies below and above the window
    spans: list[tuple[float, float]]  # for each pair the losses to resolve

    @property
    def spare(self) -> float:
        return math.exp(max(self.log_rare, -690.0))


class Outline(NamedTuple):
    """P at the mean losses of cells: 40 in each decade from 1e-12 to 1e12 around an anchor."""

    anchor: float  # a loss that the grid should hold
    cell_ends: Array  # the upper ones
    losses: Array
    log_mass: Array

    @classmethod
    def of(cls, pair: Pair) -> Outline:
        away, anchor = np.geomspace(1e-12, 1e12, 961), _anchor(pair)
        ends = np.concatenate([[-np.inf], anchor - away[::-1], [anchor], anchor + away])
        p, q = pair.masses(ends)
        some = (p > 1e-300) & (q > 1e-300) & (tails(q) > _LEAST)
        log_mass = np.log(p[some])
        ends = np.minimum(ends[1:], pair.support[1])[some]
        return cls(anchor, ends, log_mass - np.log(q[some]), log_mass)

    def moments(self, theta: float) -> Array:
        """log E[e^(theta L)] and its first two derivatives."""
        power = theta * self.losses + self.log_mass
        top = power.max()
        weight = np.exp(power - top)
        mass = weight.sum()
        mean = weight @ self.losses / mass
        return np.array([top + math.log(mass), mean, weight @ (self.losses - mean) ** 2 / mass])

    def cut(self, log_mass: float) -> Outline:
        """Without the losses above which P has at most this mass."""
        above = np.append(tails(np.exp(self.log_mass))[1:], 0.0)
        last = int(np.argmax(above <= math.exp(log_mass)))
        return Outline(self.anchor, *(array[: last + 1] for array in self[1:]))

    def span(
        self, theta: float, log_rare: float, log_alias: float, least: float
    ) -> tuple[float, float]:
        """The losses to resolve: P is rare above them, and under the tilt below them."""
        top = float(self.cut(log_rare).cell_ends[-1])
        below = np.log(np.cumsum(np.exp(self.log_mass))) + theta * self.cell_ends
        rare = self.cell_ends[below <= log_alias + log_sum(theta * self.losses + self.log_mass)]
        first = least if least > -math.inf else float(self.cell_ends[0])
        bottom = float(rare[-1]) if len(rare) else first
        return max(min(bottom, top), least, top - 1200.0), top


class Log:
    """The pairs of a log, in outline."""

    def __init__(self, pairs: Steps) -> None:
        pairs = [(pair, count) for pair, count in pairs if count]
        self.pairs = [pair for pair, _ in pairs]
        self.counts = np.array([count for _, count in pairs], dtype=np.float64)
        if not all(0 < n < math.inf and n % 1 == 0 for n in self.counts.tolist()):
            raise ValueError(f"Expected whole counts, got {self.counts.tolist()}.")
        self.outlines = [Outline.of(pair) for pair in self.pairs]

    @property
    def support(self) -> tuple[float, float]:
        """Infimum and supremum of the log's loss, rounded outward."""
        ends = np.array([pair.support for pair in self.pairs]).reshape(-1, 2)
        outward = 1e-14 * np.array([-1.0, 1.0])
        low, high = self.counts @ (ends + outward * np.abs(ends))
        return float(low), float(high)

    @property
    def is_resolved(self) -> bool:
        """Whether float64 has the losses of all pairs, and of their sum."""
        return self.counts.sum() < _MOST and all(len(o.losses) for o in self.outlines)

    def cumulant(self, thetas: Array) -> Array:
        """K(theta) = log E[e^(theta L)] of the log."""
        total = np.zeros(len(thetas))
        for n, o in self.items():
            total += n * log_sum(np.multiply.outer(thetas, o.losses) + o.log_mass)
        return total

    def saddle(self, theta: float) -> tuple[float, float]:
        """The epsilon whose saddle point is theta, and about the log of its delta."""
        value, slope, curvature = self.moments(theta)
        epsilon = slope - 1 / theta - 1 / (1 + theta)
        spread = curvature + theta**-2 + (1 + theta) ** -2
        log_delta = value - theta * epsilon - math.log(theta) - math.log1p(theta)
        return epsilon, log_delta - 0.5 * math.log(2 * math.pi * spread)

    def moments(self, theta: float) -> tuple[float, float, float]:
        value, slope, curvature = sum((n * o.moments(theta) for n, o in self.items()), np.zeros(3))
        return float(value), float(slope), float(curvature)

    def guess(self, log_delta: float, width: float) -> Tilt:
        """Where delta should be this, if the saddle point can be trusted: not for rare large losses."""
        log = self.cut(log_delta - 20.0)
        theta = _root(log, lambda theta: log_delta - log.saddle(theta)[1])
        return self.tilt(max(0.0, log.saddle(theta)[0]), log_delta, width)

    def tilt(self, epsilon: float, log_delta: float | None, width: float) -> Tilt:
        """For this epsilon, whose delta is about that."""
        if log_delta is None:
            theta = _root(self, lambda theta: self.saddle(theta)[0] - epsilon)
            log_delta = min(0.0, self.saddle(theta)[1])
        # delta falls at a relative rate of at least about this, and may change by as much.
        rate = max(1.0, -log_delta / max(abs(epsilon), 1e-6))
        log_rare = log_delta + math.log(min(1e-6, _SPENT * width * rate))
        log = self.cut(log_rare)
        theta = _root(log, lambda theta: log.saddle(theta)[0] - epsilon)
        value, _, curvature = log.moments(theta)
        log_alias = min(log_rare - (value - theta * epsilon) + math.log1p(theta), -7.0)
        spans = [
            o.span(theta, log_rare - math.log(n), log_alias - math.log(n), pair.support[0])
            for (n, o), pair in zip(log.items(), self.pairs, strict=True)
        ]
        # A larger step would see the outline's cells instead of the losses.
        far = [
            abs(end - o.anchor)
            for span, (_, o) in zip(spans, log.items(), strict=True)
            for end in span
        ]
        steps = np.geomspace(1e-2, 30.0, 40) / math.sqrt(curvature + theta**-2)
        steps *= min(1.0, 8.0 / max(*far, 1e-9) / steps[-1])
        rise = (log.cumulant(theta + steps) - value - log_alias) / steps
        fall = (log.cumulant(theta - steps) - value - log_alias) / steps
        up, down = int(np.argmin(rise)), int(np.argmin(fall))
        further = float(theta - steps[down]), float(theta + steps[up])
        least, most = self.counts @ np.array(spans)
        window = max(-float(fall[down]), float(least)), min(float(rise[up]), float(most))
        window = min(window[0], epsilon), max(window[1], epsilon)
        return Tilt(theta, epsilon, log_delta, log_rare, window, further, spans)

    def items(self) -> list[tuple[float, Outline]]:
        return list(zip(self.counts.tolist(), self.outlines, strict=True))

    def cut(self, log_rare: float) -> Log:
        """Without the losses that are rarer than that."""
        log = copy(self)
        log.outlines = [o.cut(log_rare - math.log(n)) for n, o in self.items()]
        return log


def log_sum(powers: Array) -> Array:
    """log of the sum of e^powers along the last axis."""
    top = powers.max(-1, keepdims=True)
    return np.log(np.exp(powers - top).sum(-1)) + top[..., 0]


def _root(log: Log, rises: Callable[[float], float]) -> float:
    """The tilt where this passes 0, as far as float64 can bear it."""
    from scipy.optimize import brentq

    most = 1e4 / max(1e-5, *(abs(o.losses[-1]) for o in log.outlines))
    low, high = math.log(1e-7), math.log(most)
    if rises(math.exp(low)) > 0:
        return math.exp(low)
    if rises(math.exp(high)) <= 0:
        return math.exp(high)
    return math.exp(float(brentq(lambda t: rises(math.exp(t)), low, high, xtol=1e-3)))  # pyright: ignore


def _anchor(pair: Pair) -> float:
    """The heaviest atom, else an end of the support, else 0."""
    if atoms := atoms_of(pair):
        return max(atoms, key=lambda atom: atom[1])[0]
    return next((end for end in pair.support if math.isfinite(end)), 0.0)

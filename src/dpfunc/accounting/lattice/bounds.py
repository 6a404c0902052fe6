"""Bounds on delta and on epsilon, from lattices made finer until they are narrow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from dpfunc.accounting.lattice.composition import Curve, compose, nothing
from dpfunc.accounting.lattice.laws import atoms_of, merge, split
from dpfunc.accounting.lattice.outline import Log, Steps, Tilt
from dpfunc.accounting.pairs import Array

_MOST_POINTS = 1 << 20
Look = Callable[[Curve, Curve], tuple[float, float, float]]
"""Of a lower and an upper profile: the epsilon and log delta of interest, and how far they are
apart there, in epsilon."""


def lattice_delta(pairs: Steps, epsilons: Array, *, width: float = 1e-6) -> tuple[Array, Array]:
    """Bounds on delta at each epsilon, any real numbers, for a log of (pair, count).

    Args:
        pairs: what ran, seen in one direction, with the number of times it ran.
        epsilons: (n,), any real numbers.
        width: of the bounds, as a difference in epsilon, relative where epsilon is above 1. It is
            met unless that takes more than 2^20 points; the bounds hold in any case.

    Returns:
        (lower, upper), each (n,).

    Raises:
        ValueError: a count that is not whole.
    """
    log, epsilons = Log(pairs), np.asarray(epsilons, dtype=np.float64)
    lower, upper = _near_support(log, epsilons)
    left = np.flatnonzero((upper > lower) & log.is_resolved)
    left = left[np.argsort(epsilons[left])]
    while len(left):
        middle = left[len(left) // 2]
        here = float(epsilons[middle])
        low, high = _near(log, here, width)
        lower[left] = np.maximum(lower[left], low.delta(epsilons[left]))
        upper[left] = np.minimum(upper[left], high.delta(epsilons[left]))
        # One tilt serves a stretch of epsilons: until the bounds part for its sake.
        miss = np.array([high.first_below(delta) for delta in lower[left]]) - epsilons[left]
        enough = width * np.maximum(1.0, np.abs(epsilons[left]))
        best = float(miss[left == middle][0])
        enough = np.maximum(enough, 2 * best if best < math.inf else 0.0)
        left = left[(miss > enough) & (left != middle)]
    return lower, upper


def lattice_epsilon(pairs: Steps, delta: float, *, width: float = 1e-6) -> tuple[float, float]:
    """Bounds on epsilon at delta, in [0, inf]: `lattice_delta`, inverted.

    Guarantees:
        The upper delta at the upper epsilon is at most delta. The lower delta at the lower epsilon
        is at least delta, or the lower epsilon is 0.
    """
    log, log_delta = Log(pairs), math.log(delta)
    ceiling = max(0.0, log.support[1] + math.log1p(-delta))
    best = 0.0, ceiling
    if not log.is_resolved or ceiling == 0.0:
        return best
    tilt = log.guess(log_delta, width)

    def look(low: Curve, high: Curve) -> tuple[float, float, float]:
        nonlocal best
        best = max(best[0], low.last_above(delta)), min(best[1], max(0.0, high.first_below(delta)))
        # Of bounds that tell nothing, neither is where to look.
        known = [e for e, nothing in zip(best, (0.0, ceiling), strict=True) if e != nothing]
        here = sum(known) / len(known) if known else tilt.epsilon
        return here, log_delta, best[1] - best[0]

    for _ in _refine(log, tilt, width, look):
        pass
    return best


def _near_support(log: Log, epsilons: Array) -> tuple[Array, Array]:
    """Bounds on any profile of this support, narrow near its ends.

    delta(epsilon) is at least 1 - e^epsilon, at most that + e^(epsilon - lowest loss) - 1, and at
    most 1 - e^(epsilon - highest loss).
    """
    low, high = log.support
    lower, upper = (-np.expm1(np.minimum(epsilons - end, 0.0)) + 0.0 for end in (0.0, high))
    away = np.clip(epsilons - low, 0.0, 1.0)
    first = np.expm1(away) - np.expm1(np.minimum(epsilons, 1.0))
    return lower, np.where(away < 1.0, np.minimum(first, upper), upper)


def _near(log: Log, epsilon: float, width: float) -> tuple[Curve, Curve]:
    """The lower and the upper profile, narrow at epsilon."""

    def look(low: Curve, high: Curve) -> tuple[float, float, float]:
        here = np.array([epsilon])
        least, most = (float(np.clip(curve.delta(here)[0], 1e-300, 1.0)) for curve in (low, high))
        late = high.first_below(least) if most > 1e-290 else epsilon
        return epsilon, (math.log(least) + math.log(most)) / 2, late - epsilon

    *_, curves = _refine(log, log.tilt(epsilon, None, width), width, look)
    return curves


def _refine(log: Log, tilt: Tilt, width: float, look: Look) -> Iterator[tuple[Curve, Curve]]:
    """The lower and the upper profile, on finer and finer lattices."""
    cells, last, idle = 1024.0, math.inf, 0
    for _ in range(10):
        reach = tilt.window[1] - tilt.window[0]
        least = max(1e-9, reach, *(top - bottom for bottom, top in tilt.spans)) / _MOST_POINTS
        step = _aligned(log, max(min(reach / cells, 1.0), least))
        curves = _curves(log, tilt, step) if step <= 1.0 else (nothing(-1), nothing(1))
        yield curves
        epsilon, log_delta, gap = look(*curves)
        target = width * max(1.0, abs(epsilon))
        far = gap * tilt.theta > 1.0
        idle = idle + 1 if gap > 0.9 * last else 0
        if gap <= target or step <= least or idle > (3 if far else 0):
            break
        if abs(epsilon - tilt.epsilon) * tilt.theta > 0.3 or abs(log_delta - tilt.log_delta) > 8.0:
            tilt = log.tilt(epsilon, log_delta, width)
        cells *= 4.0 if far else min(64.0, max(1.5, math.sqrt(1.3 * gap / target)))
        last = gap


def _curves(log: Log, tilt: Tilt, step: float) -> tuple[Curve, Curve]:
    spare = tilt.spare / float(log.counts.sum())
    anchors = [outline.anchor for outline in log.outlines]
    low, high = (
        [
            law(pair, anchor, span, step, spare)
            for pair, anchor, span in zip(log.pairs, anchors, tilt.spans, strict=True)
        ]
        for law in (merge, split)
    )
    return compose(log.counts, low, step, tilt, -1), compose(log.counts, high, step, tilt, 1)


def _aligned(log: Log, step: float) -> float:
    """A step near this one, not above it, that puts two atoms of a pair on the lattice."""
    apart = [atoms[-1][0] - atoms[0][0] for atoms in map(atoms_of, log.pairs) if len(atoms) > 1]
    apart = [a for a in apart if a > step]
    if not apart:
        return step
    parts = math.ceil(apart[0] / step) + np.arange(1 if len(set(apart)) == 1 else 4096)
    steps = apart[0] / parts
    miss = sum(np.abs(a / steps - np.round(a / steps)) for a in apart)
    return float(steps[np.argmin(miss)])

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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpfunc.accounting import moments
from dpfunc.accounting.characteristic import decay, log_characteristic
from dpfunc.accounting.moments import UNIT, Stack
from dpfunc.accounting.pairs import Array

_SMALL = -25.0  # log of what tail and aliases may be beside delta
_DIGITS = 6.0  # nats that a contour beside the saddle may cancel
_CLIFF = 40.0
"""Nats of delta between neighbouring tilts that are worth a closer look."""
_FEW_PAIRS, _FEW_TERMS = 8, 400.0
_MOST_TERMS = 3e5  # of the sum, times 2 pi
_MOST_ROW = 1e7  # products of tilts, pairs and nodes
_WORK = 1.5e8  # most products of pairs, nodes on the contour, nodes of the quadrature


class Steps(NamedTuple):
    """A log in one direction: Gaussian mixtures, and all full-batch Gaussians as one of this mu."""

    stacks: list[Stack]
    mu: float = 0.0
    two_way: bool = False
    """Whether the other direction, in which P and Q are exchanged, will be asked for too."""


class Contour(NamedTuple):
    """All that the sum needs at any epsilon."""

    planned: float
    """The epsilon that it was planned for."""
    z: NDArray[np.complex128]
    terms: NDArray[np.complex128]
    """e^(K(z) - K(theta) - i t mean) / (z (z + 1)), times 2 / T (1 / T at t = 0)."""
    mean: float
    mean_error: float
    log_scale: float
    """K(theta)."""
    scale_error: float
    error: float
    """Of the sum of terms, all but its rounding."""
    sizes: tuple[float, float]
    """Sums of the moduli of the terms, and of t times those."""
    spacing: float
    row: Row | None = None
    """Around the tilt: for the aliases."""
    aliases: tuple[tuple[Array, Array], ...] = ()
    """For those above epsilon and those below: tilts, and log of the bound less tilt times epsilon."""
    reverse: Contour | None = None
    """Of the other direction, at the same tilt and period, where it comes at little cost."""


class Row(NamedTuple):
    """The real log moment function at some tilts, and its first two derivatives."""

    theta: Array
    value: Array
    mean: Array
    variance: Array
    ceiling: Array
    """The value, rounded up, with Chernoff's constant: less theta epsilon it bounds log delta."""


class Found(NamedTuple):
    """An interval of epsilon, and the contour that gave it."""

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
        found = _saddle(steps, log_delta, epsilon)
        return None if found is None else _planned(steps, *found)
    except moments.TooManyNodes:
        return None


def _closer(steps: Steps, at: Contour, epsilon: float, log_delta: float) -> Contour | None:
    """The same, planned anew: the aliases were planned for a guess, and now more is known."""
    try:
        return None if at.row is None else _planned(steps, at.row, epsilon, log_delta)
    except moments.TooManyNodes:
        return None


def _planned(steps: Steps, row: Row, epsilon: float, log_delta: float) -> Contour | None:
    """The contour for a point of the profile that is near the saddle points of the row."""
    chernoff = row.ceiling - row.theta * epsilon
    chosen = _choose(row.theta, row.value - row.theta * epsilon, chernoff - log_delta - _SMALL)
    if chosen is None:
        return None
    index, period = chosen
    theta = float(row.theta[index])
    needed = row.value[index] - theta * epsilon - log_delta - _SMALL
    # Far out the loss moves as much as without a tilt, which may show a few rare hits.
    tilted, plain = float(row.variance[index]), float(row.variance[0])
    t_guess = math.sqrt(2.3 * max(needed, 1.0) / min(tilted, plain))
    normal = tilted < 1.4 * plain and t_guess * period <= _FEW_TERMS
    both = steps.two_way and normal and _is_small(steps)
    reached = _reach(steps, theta, t_guess, needed, _MOST_TERMS / period, both)
    if reached is None:
        return None
    t_last, log_tail, laws = reached
    spacing, size = 2 * math.pi / period, math.ceil(t_last * period / (2 * math.pi)) + 1
    if sum(one.at.x.size for one in laws) * size > _WORK:
        return None
    at = _sum(steps, theta, laws, spacing, size, log_tail)
    log_alias = row.ceiling - _log_expm1(np.abs(row.theta - theta) * period)
    parts = slice(index + 1, None), slice(index)
    aliases = tuple((row.theta[part], log_alias[part]) for part in parts)
    return at._replace(planned=epsilon, row=row, aliases=aliases)


def _is_small(steps: Steps) -> bool:
    """Whether numpy spends more on its calls than on numbers: twice as many cost little more."""
    (stack, *others) = steps.stacks
    return not others and stack.shape is None and stack.counts.size <= _FEW_PAIRS


def _log_expm1(x: Array) -> Array:
    """log(e^x - 1), -inf at 0."""
    return x + np.log(np.maximum(-np.expm1(-x), 1e-300))


def _reach(
    steps: Steps, theta: float, t_last: float, needed: float, longest: float, both: bool
) -> tuple[float, Any, list[Tilted]] | None:
    """How far to sum until the rest is e^-needed of e^(K(theta) - theta epsilon), and log of the rest."""
    served, power = 1.3 * t_last, 2.0
    tilted = _tilted(steps, theta, served, both)
    log_tail = _log_tail(steps, tilted, t_last)
    while (own := float(np.ravel(log_tail)[0])) >= -needed:
        # It falls like -t^power, with 2 for normal losses, and that is found on the way for others.
        further = min(max(1.02 * (needed / max(-own, needed / 4)) ** (1 / power), 1.1), 2.0)
        t_last *= further
        if t_last > longest:
            return None
        log_tail = _log_tail(steps, tilted, t_last)
        fall = float(np.ravel(log_tail)[0]) / min(own, -1e-3)
        power = min(max(math.log(max(fall, 1.0)) / math.log(further), 0.5), 2.0)
    return t_last, log_tail, tilted if t_last <= served else _tilted(steps, theta, t_last, both)


def log_delta_bounds(at: Contour, epsilon: float) -> tuple[float, float, float]:
    """log of a lower and an upper bound on delta, and d log delta / d epsilon; -inf for a bound of 0."""
    theta = float(at.z[0].real)
    turned = at.terms * np.exp((at.z - theta) * (at.mean - epsilon))
    total, slope = float(turned.sum().real), -float((turned @ at.z).real)
    phase_error = at.mean_error + 4 * UNIT * (abs(at.mean) + abs(epsilon))
    size, moment = at.sizes
    error = at.error + UNIT * (len(turned) + 16) * size + phase_error * moment
    log_scale = at.log_scale - theta * epsilon
    scale_error = at.scale_error + 4 * UNIT * (abs(at.log_scale) + abs(theta * epsilon))
    alias = sum(
        math.exp(min(float((logs - lambdas * epsilon).min()) - log_scale, 700.0))
        for lambdas, logs in at.aliases
    )
    upper = _log(total + error) + log_scale + scale_error
    lower = _log(total - error - alias) + log_scale - scale_error if at.aliases else -math.inf
    return lower, upper, slope / total if total > 0 else -theta


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _best_constant(lambdas: Array) -> Array:
    """log of the least c with (1 - e^-x)_+ <= c e^(lambda x): delta <= c E[e^(lambda (L - epsilon))]."""
    logs = np.log(np.maximum(lambdas, np.finfo(float).tiny))  # 0 log 0 is 0
    return lambdas * logs - (1 + lambdas) * np.log1p(lambdas)


def _row(steps: Steps, thetas: Array) -> Row:
    value = steps.mu**2 * (thetas**2 + thetas) / 2
    mean = steps.mu**2 * (thetas + 0.5)
    variance = np.full_like(thetas, steps.mu**2)
    error = 64 * UNIT
    for stack in steps.stacks:
        at = moments.nodes(stack, float(thetas.max()))
        if at.x.size * len(thetas) > _MOST_ROW:
            raise moments.TooManyNodes
        every, counts = moments.tilted(stack, at, thetas), np.abs(stack.counts)
        value = value + every.log_moment @ stack.counts
        error = error + (every.rounding + at.error) @ counts
        error = error + UNIT * (8 + len(counts)) * (np.abs(every.log_moment) @ counts)
        error = error + stack.interpolation_error(every.log_moment.T)
        mean = mean + every.mean @ stack.counts
        variance = variance + every.variance @ stack.counts
    ceiling = value + 64 * UNIT * np.abs(value) + error + _best_constant(thetas)
    return Row(thetas, value, mean, np.maximum(variance, 1e-300), ceiling)


def _saddle(
    steps: Steps, log_delta: float | None, epsilon: float | None
) -> tuple[Row, float, float] | None:
    """Tilts around the saddle point, its epsilon and its log delta, of which one or both are given."""
    thetas = _guess(steps, log_delta, epsilon) * 1.35 ** np.arange(-5.0, 5.0)
    for _ in range(20):
        if not 1e-7 < thetas[0] < 1e7:
            break
        row = _row(steps, np.concatenate([[0.0], thetas]))
        mean, variance = row.mean[1:], row.variance[1:]
        epsilons = mean - 1 / thetas - 1 / (1 + thetas)
        curve = variance + thetas**-2 + (1 + thetas) ** -2
        scale = np.log(thetas * (1 + thetas) * np.sqrt(2 * math.pi * curve))
        logs = row.value[1:] - thetas * epsilons - scale
        past = log_delta - logs if log_delta is not None else epsilons - (epsilon or 0.0)
        place = int(np.searchsorted(past, 0.0))
        if not 3 <= place <= len(thetas) - 2:  # centre what was found, or go on beyond the end
            beyond = 4 * (place == len(thetas)) - 4 * (place == 0)
            thetas = thetas[0] * 1.35 ** (np.arange(10.0) + place - 5 + beyond)
        elif logs[place - 1] - logs[place] > _CLIFF:
            # From some tilt on K is that of a single rare hit: look where that begins.
            between = np.linspace(thetas[place - 1], thetas[place], 7)
            thetas = np.concatenate(
                [thetas[max(0, place - 5) : place - 1], between, thetas[place + 1 :][:3]]
            )
        else:
            part = past[place - 1] / (past[place - 1] - past[place])
            at = [float(v[place - 1] + part * (v[place] - v[place - 1])) for v in (epsilons, logs)]
            if epsilon is None and log_delta is not None:  # Chernoff's is closer on a cliff
                epsilon = min(
                    at[0],
                    float(((row.ceiling - log_delta)[1:] / thetas).min()),
                )
            return (
                row,
                0.0 if epsilon is None else epsilon,
                at[1] if log_delta is None else log_delta,
            )
    return None


def _guess(steps: Steps, log_delta: float | None, epsilon: float | None) -> float:
    """The tilt for the Gaussian law that the central limit theorem suggests."""
    variance = steps.mu**2
    for stack in steps.stacks:
        hit = np.maximum(stack.above[:, 1:].sum(1), stack.below[:, 1:].sum(1))
        variance += float(
            np.abs(stack.counts) @ (hit**2 * np.expm1(np.minimum(stack.noise[:, 0] ** -2, 4)))
        )
    if log_delta is not None:
        return min(max(math.sqrt(-2 * log_delta / variance), 1e-3), 1e3)
    return min(max((epsilon or 0.0) / variance - 0.5, 1 / math.sqrt(variance), 1e-3), 1e3)


def _choose(lambdas: Array, exponents: Array, excess: Array) -> tuple[int, float] | None:
    """The tilt whose aliases are small with the shortest period, of those that cancel few digits."""
    distance = lambdas[None, :] - lambdas[:, None]
    np.fill_diagonal(distance, math.nan)
    needed = np.maximum(excess, 1.0) / np.abs(distance)
    periods = np.maximum(
        needed.min(1, where=distance > 0, initial=math.inf),
        needed.min(1, where=distance < 0, initial=math.inf),
    )
    periods[(exponents > exponents.min() + _DIGITS) | (lambdas == 0)] = math.inf
    best = int(periods.argmin())
    return (best, float(periods[best])) if math.isfinite(periods[best]) else None


class Tilted(NamedTuple):
    """A stack at its nodes, tilted."""

    stack: Stack
    at: moments.Nodes
    tilt: moments.Tilt


def _tilted(steps: Steps, theta: float, t: float, both: bool = False) -> list[Tilted]:
    """At theta; both: and at -1 - theta, which is theta in the other direction."""
    found = []
    for stack in steps.stacks:
        # The curve of `decay` bends over a noise's width: so fine a step follows it.
        finest = 0.3 * min(1.0, float(stack.noise.min()))
        at = moments.nodes(stack, theta, t, finest, both=both)
        thetas = [theta, -1 - theta] if both else [theta]
        tilt = moments.tilted(stack, at, np.array(thetas))
        found.append(Tilted(stack, at, tilt if both else moments.Tilt(*(a[0] for a in tilt))))
    return found


def _log_tail(steps: Steps, tilted: list[Tilted], t_last: float) -> Any:
    """log of a bound on what the terms beyond t_last add up to, over e^(K(theta) - theta epsilon)."""
    bound = -((steps.mu * t_last) ** 2) / 2
    for stack, at, tilt in tilted:
        bound = bound + decay(stack, at, tilt, t_last)
    # They are (2 / T) sum of e^bound / t_j^2, and the sum of 1 / t_j^2 is at most T / (2 pi t_last).
    return bound - math.log(math.pi * t_last)


def _sum(
    steps: Steps, theta: float, tilted: list[Tilted], spacing: float, size: int, log_tail: Any
) -> Contour:
    """All but what the aliases need, in both directions if tilted has both."""
    t = spacing * np.arange(size)
    z = (theta + 1j * t).astype(np.complex128)
    mean = mean_error = 0.0
    log_scale = steps.mu**2 * (theta**2 + theta) / 2
    scale_error = 8 * UNIT * log_scale
    ceiling = -((steps.mu * t) ** 2) / 2
    exponent, error = ceiling + 0j, -8 * UNIT * ceiling
    for stack, at, tilt in tilted:
        counts = np.abs(stack.counts)
        summing = UNIT * (8 + len(counts))
        mean = mean + tilt.mean @ stack.counts
        mean_error = mean_error + summing * (np.abs(tilt.mean) @ counts)
        log_scale = log_scale + tilt.log_moment @ stack.counts
        off = tilt.rounding + at.error + summing * np.abs(tilt.log_moment)
        scale_error = scale_error + off @ counts
        if stack.shape is not None:
            scale_error += stack.interpolation_error(tilt.log_moment)
        there = log_characteristic(stack, at, tilt, spacing, size)
        exponent, error = exponent + there.value, error + there.error
        ceiling = ceiling + there.ceiling
    # In the other direction the loss is -L.
    exponent, mean = np.atleast_2d(exponent), np.atleast_1d(mean)
    exponent[1:], mean[1:] = exponent[1:].conj(), -mean[1:]
    weight = spacing / math.pi / (z * (z + 1))
    weight[0] /= 2
    terms = weight * np.exp(exponent)
    sizes = np.abs(terms)
    off = np.minimum(
        sizes * np.expm1(np.minimum(error, 700)), sizes + np.abs(weight) * np.exp(ceiling)
    )
    error = off.sum(-1) + np.exp(np.minimum(log_tail, 700.0))
    of_mu = steps.mu**2 * (theta + 0.5)
    numbers = (mean + of_mu, mean_error + 8 * UNIT * of_mu, log_scale, scale_error, error)
    rows = np.stack([np.broadcast_to(each, len(mean)) for each in numbers], -1).tolist()
    moduli = zip(sizes.sum(-1).tolist(), (sizes @ t).tolist(), strict=True)
    own, *other = (
        Contour(math.nan, z, of_one, mean, mean_error, log_scale, scale_error, error, both, spacing)
        for of_one, (mean, mean_error, log_scale, scale_error, error), both in zip(
            terms, rows, moduli, strict=True
        )
    )
    return own._replace(reverse=other[0]) if other else own


def _is_below(steps: Steps, log_delta: float, than: Found, own: Contour | None) -> bool:
    """Whether epsilon is surely at most than.lower, by its contour: that of the other direction, mostly.

    The sum is an upper bound whatever its tilt and period are, and so is Chernoff's.
    """
    if own is not None:
        return log_delta_bounds(own, than.lower)[1] <= log_delta
    if than.contour is None:
        return False
    at = than.contour
    t, theta = at.z.imag, float(at.z[0].real)
    try:
        row = _row(steps, theta * 1.5 ** np.arange(4.0))
        if (row.ceiling - row.theta * than.lower).min() <= log_delta:
            return True
        tilted = _tilted(steps, theta, float(t[-1]))
    except moments.TooManyNodes:
        return False
    if sum(one.at.x.size for one in tilted) * len(t) > _WORK:
        return False
    log_tail = _log_tail(steps, tilted, float(t[-1]))
    there = _sum(steps, theta, tilted, at.spacing, len(t), log_tail)
    return log_delta_bounds(there, than.lower)[1] <= log_delta


def epsilon_bounds(
    steps: Steps, log_delta: float, than: Found | None = None, own: Contour | None = None
) -> Found | None:
    """Epsilons between which the profile meets a delta; they may be negative, or both below than.lower.

    Where the sum takes too many nodes the lower is -inf and the upper Chernoff's; None where even its
    integrals take too many. `own` is a contour of these steps, if there is one, planned for others.
    """
    if than is not None and _is_below(steps, log_delta, than, own):
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
    return Found(*bounds, at)


def delta_bounds(steps: Steps, epsilon: float) -> tuple[float, float]:
    """Bounds on log delta at an epsilon, of which only Chernoff's where the sum takes too many nodes."""
    at = contour(steps, epsilon=epsilon)
    if at is None:
        return -math.inf, chernoff(steps, epsilon)
    low, high, _ = log_delta_bounds(at, epsilon)
    if not high - low <= 1e-7:
        again = _closer(steps, at, epsilon, min(high, 0.0))
        if again is not None:
            closer, closest, _ = log_delta_bounds(again, epsilon)
            low, high = max(low, closer), min(high, closest)
    return low, high


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
    try:
        row = _row(steps, _guess(steps, None, epsilon) * 2.0 ** np.arange(-2.0, 3.5, 0.5))
    except moments.TooManyNodes:
        return 0.0
    return float(np.min(row.ceiling - row.theta * epsilon))


def _chernoff_epsilon(steps: Steps, log_delta: float) -> float | None:
    thetas = _guess(steps, log_delta, None) * 1.25 ** np.arange(-60.0, 10.0)
    while thetas[-1] > 1e-6:
        try:
            row = _row(steps, thetas)
        except moments.TooManyNodes:
            thetas = thetas / 10
            continue
        return float(((row.ceiling - log_delta) / row.theta).min())
    return None

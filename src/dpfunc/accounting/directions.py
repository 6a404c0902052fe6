"""From a log to its dominating pairs, one list for each direction in which neighbours can differ.

Which pair an event has, with its proof, is in docs/accountant.md; any other event is refused. With
N(j) = N(j, noise^2) and q = sampling_prob, to take one example away from a Gaussian step is

    sampling none                   N(1)  against  N(0)
    poisson                         (1 - q) N(0) + q N(1)  against  N(0)
    poisson, a group of k           sum over j of Binomial(k, q)(j) N(j)  against  N(0)
    fixed_without_replacement       as poisson, at half the noise

and to add one is the reverse. To replace one has a single direction, its own reverse:

    sampling none                   N(2)  against  N(0)
    poisson                         (1 - q) N(0) + q N(1)  against  (1 - q) N(0) + q N(-1)
    fixed_without_replacement       `SplicedPair`, which dominates but need not be realised

To zero one out is to take it away, but where the batch has a fixed size: there it is no worse than
to replace it. A Poisson draw cut to a public size is within overflow_prob of one that is not.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from dpfunc.accounting.interpolation import Cells, Grid, fold, grids, some_of
from dpfunc.accounting.laplace import LaplacePair, SplicedPair
from dpfunc.accounting.pairs import Array, GaussianPair, Pair
from dpfunc.accounting.quadrature import Stack
from dpfunc.events import MECHANISMS, Columns, Kind, Log

Counted = tuple[tuple[Pair, float], ...]
NOISES = 0.01, 1e8
LEAST_PROB = 1e-30
"""Beyond these the numbers of a sampled Gaussian step leave the range of float64."""


class Direction(NamedTuple):
    """A log in one direction: the product of its pairs, and one full-batch Gaussian of mean mu."""

    name: str
    mu: float
    dominating: Counted
    realised: Counted
    """Pairs that some neighbours have: for lower bounds. Mostly the dominating ones themselves."""
    overflow_prob: float
    """Summed over the steps: how far either law can be, in total variation, from the product."""
    grids: tuple[Stack, ...] = ()
    """Further Gaussian pairs: few that stand for many."""
    hit_prob: float = math.inf
    """At least as likely as that any step draws what differs: bounds the total variation distance."""
    bare_prob: float = 0.0
    """How likely a step without noise draws it, at least."""
    two_way: bool = False
    """Whether the next direction is this one's reverse, and will be asked for after it."""

    @property
    def is_gaussian(self) -> bool:
        """Whether mu says all."""
        return not self.dominating and not self.grids


class Step(NamedTuple):
    """Equal events, wherever in the log they are."""

    kind: Kind
    noise_multiplier: float
    sampling_prob: float
    count: float  # pyright: ignore[reportIncompatibleMethodOverride]


class Contents(NamedTuple):
    """What a log holds, however long it is."""

    steps: list[Step]
    """The distinct events that released something, in an order of their own."""
    grids: tuple[Grid, ...] = ()
    """What stands for the rest."""
    kinds: tuple[Kind, ...] = ()
    """What the grids' kinds are."""


def contents_of(log: Log, most_steps: int = 256) -> Contents:
    """The distinct events; where they are more than most_steps, Poisson batches under Gaussian noise as grids."""
    if len(log) <= most_steps:
        return Contents(_distinct(log.columns(), log.kinds))
    kinds = log.kinds
    closed = log.folded("dpfunc.accounting", lambda value, new: _folded(value, new, kinds))
    cells, others = _folded(closed, log.columns(log.closed), kinds)
    found = grids(cells)
    if sum(grid.weight.size for grid in found) > len(log) / 2:
        return Contents(_distinct(log.columns(), log.kinds))
    return Contents(sorted(others.values()), tuple(found), kinds)


Folded = tuple[Cells, dict[tuple[int, float, float], Step]]


def _folded(value: Folded | None, columns: Columns, kinds: tuple[Kind, ...]) -> Folded:
    cells, others = value or ({}, {})
    gaussian = np.array(
        [kind.mechanism == "gaussian" and "poisson" in kind.sampling for kind in kinds]
    )
    prob, noise = columns.sampling_prob, columns.noise_multiplier
    smooth = gaussian[columns.kind] & (prob >= LEAST_PROB) & (prob < 1)
    smooth &= (noise >= NOISES[0]) & (noise <= NOISES[1])
    cells = fold(cells, columns if smooth.all() else some_of(columns, smooth))
    if smooth.all():
        return cells, others
    others = dict(others)
    for step in _distinct(some_of(columns, ~smooth), kinds):
        key = (kinds.index(step.kind), step.noise_multiplier, step.sampling_prob)
        before = others[key].count if key in others else 0.0
        others[key] = step._replace(count=before + step.count)
    return cells, others


def _distinct(columns: Columns, kinds: tuple[Kind, ...]) -> list[Step]:
    counts: dict[tuple[int, float, float], float] = {}
    for noise, prob, count, kind in zip(*(column.tolist() for column in columns), strict=True):
        if prob > 0 and noise < math.inf and count > 0:
            counts[kind, noise, prob] = counts.get((kind, noise, prob), 0.0) + count
    return sorted(
        Step(kinds[kind], noise, prob, count) for (kind, noise, prob), count in counts.items()
    )


def directions(contents: Contents, group_size: int = 1) -> tuple[Direction, ...]:
    """The directions of a log; no noise gives mu = inf."""
    steps = contents.steps
    present = {step.kind for step in steps} | {contents.kinds[grid.kind] for grid in contents.grids}
    if not present:
        return ()
    relations = sorted({kind.relation for kind in present})
    if len(relations) > 1:
        raise ValueError(
            f"Expected one relation in a log, got {' and '.join(map(repr, relations))}. "
            "Account the log under one of them: say which data sets are neighbours."
        )
    one_way = relations == ["replace_one"] and all(
        kind.sampling != "fixed_without_replacement" for kind in present
    )
    names = ("replace",) if one_way else ("remove", "add")
    return tuple(_direction(name, contents, group_size) for name in names)


def _direction(name: str, contents: Contents, group_size: int) -> Direction:
    steps = contents.steps
    inverse, overflow, hits = [], 0.0, math.inf if contents.grids else 0.0
    log_missed = 0.0
    dominating: list[tuple[Pair, float]] = []
    realised: list[tuple[Pair, float]] = []
    for step in steps:
        _refuse_unknown(step.kind, step.sampling_prob, group_size)
        overflow += step.count * step.kind.overflow_prob
        hits += step.count * group_size * step.sampling_prob * (1 + 1e-9)
        shift = _full_batch_shift(step, group_size)
        if step.noise_multiplier == 0.0:
            inverse.append(math.inf)
            missed = math.log1p(-step.sampling_prob) if step.sampling_prob < 1 else -math.inf
            log_missed += step.count * missed
        elif shift:
            inverse.append(shift / step.noise_multiplier * math.sqrt(step.count))
        else:
            hardest, easiest = _within_range(step)
            pair, real = _pairs(name, hardest, group_size)
            dominating.append((pair, step.count))
            if easiest is not None:
                if easiest is not hardest:
                    _, real = _pairs(name, easiest, group_size)
                realised.append((real, step.count))
    standing = []
    for grid in contents.grids:
        kind = contents.kinds[grid.kind]
        _refuse_unknown(kind, float(grid.sampling_prob[0]), group_size)
        overflow += grid.total * kind.overflow_prob
        standing.append(_stack(name, grid, kind, group_size))
    return Direction(
        name,
        math.hypot(*inverse),
        tuple(dominating),
        tuple(realised),
        overflow,
        tuple(standing),
        hits,
        1.0 if log_missed == -math.inf else -math.expm1(log_missed) * (1 - 1e-9),
    )


def _within_range(step: Step) -> tuple[Step, Step | None]:
    """A step that gives away no less and one that gives away no more, or nothing, to compute with."""
    noise, prob = step.noise_multiplier, step.sampling_prob
    if NOISES[0] <= noise <= NOISES[1] and prob >= LEAST_PROB:
        return step, step
    hardest = step._replace(
        noise_multiplier=min(noise, NOISES[1]), sampling_prob=max(prob, LEAST_PROB)
    )
    if noise > NOISES[1] or prob < LEAST_PROB:
        return hardest, None
    return hardest, step._replace(noise_multiplier=max(noise, NOISES[0]))


def _stack(name: str, grid: Grid, kind: Kind, group_size: int) -> Stack:
    """The pairs of `_pairs`, all at once."""

    def of(places: Array, counts: Array) -> Stack:
        noise, prob = places.reshape(2, -1)
        laws = [(1 - q, q) if group_size == 1 else _binomial(group_size, q) for q in prob.tolist()]
        drawn, one = np.array(laws), np.ones((len(laws), 1))
        below = drawn if kind.relation == "replace_one" else one
        above, below = _turned(name, drawn, below)
        return Stack(noise[:, None], above, below, counts)

    return replace(
        of(np.stack([grid.noise_multiplier, grid.sampling_prob]), grid.weight),
        shape=grid.shape,
        total=grid.total,
        centres=of(grid.centres, grid.counts),
        corners=of(grid.corners, grid.counts),
    )


def _refuse_unknown(kind: Kind, sampling_prob: float, group_size: int) -> None:
    fixed, laplace = kind.sampling == "fixed_without_replacement", kind.mechanism == "laplace"
    advice = ""
    if kind.mechanism not in MECHANISMS:
        advice = "Say what noise of your own costs: account_as(log, mechanism, events)."
    elif kind.sampling == "truncated_poisson" and not kind.overflow_prob:
        advice = "Say overflow_prob in the event: how likely is a draw beyond the cap, at most?"
    elif group_size > 1 and (fixed or laplace):
        advice = "Groups are known for Gaussian noise on Poisson batches, or on all the data."
    elif laplace and (fixed or (kind.relation == "replace_one" and sampling_prob < 1.0)):
        advice = "Laplace noise is known for Poisson batches under add or remove one."
    if advice:
        raise ValueError(
            f"Expected an event that the 'pld' accountant has a bound for, got {kind}. "
            f"It does not guess. {advice}"
        )


def _full_batch_shift(step: Step, group_size: int) -> float:
    """How far a full-batch Gaussian moves, in clip norms, and 0 for any other step."""
    kind = step.kind
    if kind.mechanism != "gaussian" or step.sampling_prob < 1.0:
        return 0.0
    # A batch of a fixed size has as many examples on either side: one less, another more.
    fixed = kind.sampling == "fixed_without_replacement" and kind.relation != "zero_out"
    return group_size * (2.0 if fixed or kind.relation == "replace_one" else 1.0)


def _pairs(name: str, step: Step, group_size: int) -> tuple[Pair, Pair]:
    """The pair that dominates a step and one that neighbours can realise."""
    kind, noise, q = step.kind, step.noise_multiplier, step.sampling_prob
    replaces = kind.relation == "replace_one"
    fixed = kind.sampling == "fixed_without_replacement"
    if kind.mechanism == "laplace":
        pair = LaplacePair(noise / 2 if replaces else noise, *_turned(name, (1 - q, q), (1.0,)))
        return pair, pair
    if fixed:
        half = GaussianPair(noise / 2, *_turned(name, (1 - q, q), (1.0,)))
        if kind.relation == "add_or_remove_one":
            return half, half
        if kind.relation == "zero_out":
            return SplicedPair(noise, q), GaussianPair(noise, *_turned(name, (1 - q, q), (1.0,)))
        return SplicedPair(noise, q), half
    drawn = (1 - q, q) if group_size == 1 else _binomial(group_size, q)
    pair = GaussianPair(noise, *_turned(name, drawn, drawn if replaces else (1.0,)))
    return pair, pair


def _binomial(size: int, prob: float) -> tuple[float, ...]:
    """Each the float next to it."""
    hit = Fraction(prob)
    return tuple(
        float(math.comb(size, j) * hit**j * (1 - hit) ** (size - j)) for j in range(size + 1)
    )


def _turned(name: str, above: Any, below: Any) -> Any:
    return (below, above) if name == "add" else (above, below)

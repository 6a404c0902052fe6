"""A pair on the lattice: a law whose profile is above the pair's, and one whose profile is below.

Upper law. The P mass p of a cell (a, a + h] of losses, whose Q mass is q, is put on its two ends so
that p and q are kept: a mean-preserving spread of v (Doroshenko et al. 2022, arXiv:2207.04380).

Lower law. Cell k sends a share b_k of its P mass to its upper end and the rest to its lower end.
What meets at a grid point is merged there (Jensen), which is allowed if its mean of v is at most
that of the point, since raising v lowers delta. In units of v_k the condition at point k is

    b_(k-1) up_(k-1) <= (1 - b_k) down_k,    up_(k-1) = E[v / v_k - 1; cell k - 1],
                                             down_k = E[1 - v / v_k; cell k].

Both are second-order in h.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy

from dpfunc.accounting.laplace import Atoms
from dpfunc.accounting.pairs import Array, Pair

ULP = 2.0**-52


class Law(NamedTuple):
    """A measure with `mass[k]` at base + k step, and `infinite` at infinity."""

    base: float
    mass: Array
    infinite: float
    drift: float  # of each loss, that makes up for rounding


def tails(mass: Array) -> Array:
    """mass[k] and all that is above it."""
    sums: Array = np.cumsum(mass[::-1])
    return sums[::-1]


def atoms_of(pair: Pair) -> Atoms:
    return getattr(pair, "atoms", ())


def split(pair: Pair, anchor: float, span: tuple[float, float], step: float, spare: float) -> Law:
    """The upper law: each cell's mass on its two ends, P and Q kept."""
    grid = _grid(anchor, *span, step)
    p, q = pair.masses(np.concatenate([[-np.inf], grid, [np.inf]]))
    cell, start, apart = slice(1, -1), grid[:-1], -math.expm1(-step)
    # To clip a mass at 0 raises the measure, so that it is safe.
    up = np.maximum(p[cell] - _times_exp(q[cell], start), 0.0) / apart
    mass = np.zeros(len(grid))
    mass[1:] = up
    mass[:-1] += np.maximum(p[cell] - up, 0.0)
    mass[0] += p[0]
    slope = up * (1 - apart) + _times_exp(np.append(tails(q[cell])[1:], 0.0), start)
    drift, infinite = _rounding(p[1:], q[1:], start, slope, spare)
    if pair.support[1] <= grid[-1] + drift:  # what lies above the last point is there by rounding
        mass[-1] += p[-1]
        return Law(float(grid[0]), mass, infinite, drift)
    return Law(float(grid[0]), mass, infinite + float(p[-1]) * (1 + 1e-9), drift)


def merge(pair: Pair, anchor: float, span: tuple[float, float], step: float, spare: float) -> Law:
    """The lower law: cells shared out between grid points and merged there."""
    grid, ends = _merging_grid(pair, anchor, span, step)
    p, q = pair.masses(ends)
    all_p, all_q = p[1:].copy(), q[1:].copy()
    mass = np.zeros(len(grid))
    for k, atom in _atoms_on(pair, grid, step):
        cell = int(np.searchsorted(ends, atom[0])) - 1
        p[cell], q[cell] = max(p[cell] - atom[1], 0.0), max(q[cell] - atom[2], 0.0)
        mass[k] = atom[1]
    if ends[1] > grid[0]:
        mass[0] = p[0]
    p, q = p[1:], q[1:]
    down = p - _times_exp(q, grid)
    if ends[-2] < grid[-1]:
        down[-1] = 0.0
    p = np.where(down < 0, 0.0, p)  # finer than rounding: dropped
    up = np.maximum(_times_exp(q[:-1], grid[1:]) - p[:-1], 1e-300)
    share, left = _shares(up, np.maximum(down, 0.0))
    _lift(mass, left, grid, min(max(round((anchor - grid[0]) / step), 0), len(grid) - 1))
    mass += (1 - share) * p
    mass[1:] += (share * p)[:-1]
    middle = (grid[0] + grid[-1]) / 2
    v_tails = tails(mass * np.exp(middle - grid))
    slope = np.append(v_tails[1:], 0.0) * np.exp(grid - middle)
    drift, _ = _rounding(all_p, all_q, grid, slope, spare)  # where nothing is above, 0 is a bound
    return Law(float(grid[0]), mass, 0.0, drift)


def _shares(up: Array, down: Array) -> tuple[Array, Array]:
    """Shares b that meet the condition, and what they leave of it at each point.

    With r_k = down_k / up_(k-1), b_(k-1) = r_k / (1 + max(r_k, r_(k+1))) meets it: b_k is at most
    r_(k+1) / (1 + r_(k+1)), which leaves 1 - b_k >= 1 / (1 + r_(k+1)).
    """
    ratio = np.minimum(down[1:] / up, 1e18)
    share = ratio / (1 + np.maximum(ratio, np.append(ratio[1:], 0.0)))
    share = np.append(share, 0.0)  # what is above the last point goes down to it
    left = (1 - share) * down
    left[1:] = np.maximum(left[1:] - share[:-1] * up, 0.0)
    # Every second cell, then the others, raises its share until one of its ends has nothing left.
    for cell, above in ((slice(0, -1, 2), slice(1, None, 2)), (slice(1, -1, 2), slice(2, None, 2))):
        more = np.minimum(left[above] / up[cell.start :: 2], 1 - share[cell])
        more = np.minimum(more, left[cell] / np.maximum(down[cell], 1e-300))
        share[cell] += more
        left[cell] = np.maximum(left[cell] - more * down[cell], 0.0)
        left[above] = np.maximum(left[above] - more * up[cell.start :: 2], 0.0)
    return share, left


def _lift(mass: Array, left: Array, grid: Array, heavy: int) -> None:
    """What is left above a heavy point, an outcome of its own, is used up by mass of it."""
    near = slice(heavy + 1, int(np.searchsorted(grid, grid[heavy] + 700.0)))
    lift = left[near] / np.expm1(grid[near] - grid[heavy])
    lift *= min(1.0, mass[heavy] / 2 / max(float(lift.sum()), 1e-300))
    mass[heavy] -= lift.sum()
    mass[near] += lift


def _grid(anchor: float, bottom: float, top: float, step: float) -> Array:
    first = math.floor((bottom - anchor) / step + 1e-6)
    last = max(first + 1, math.ceil((top - anchor) / step - 1e-6))
    return anchor + step * np.arange(first, last + 1, dtype=np.float64)


def _merging_grid(
    pair: Pair, anchor: float, span: tuple[float, float], step: float
) -> tuple[Array, Array]:
    """The grid, and the ends of the cells.

    A support that ends without an atom is anchored at the mean of its last cell, merged whole.
    """
    (low, high), (bottom, top) = pair.support, span
    if not atoms_of(pair) and anchor == low > bottom - step:
        mean = _mean_loss(pair, low, low + step)
        grid = _grid(mean, mean, max(top, mean), step)
        return grid, np.concatenate([[-np.inf, low + step], grid[1:], [np.inf]])
    if not atoms_of(pair) and anchor == high < top + step:
        mean = _mean_loss(pair, high - step, high)
        grid = _grid(mean, min(bottom, mean - step), mean, step)
        return grid, np.concatenate([[-np.inf], grid[:-1], [high - step, np.inf]])
    grid = _grid(anchor, bottom, top, step)
    return grid, np.concatenate([[-np.inf], grid, [np.inf]])


def _mean_loss(pair: Pair, start: float, end: float) -> float:
    """The loss at the mean of v over a cell."""
    p, q = pair.masses(np.array([start, end]))
    mean = math.log(p[0] / q[0]) if p[0] > 0 and q[0] > 0 else start
    return min(max(mean, start), end)


def _atoms_on(pair: Pair, grid: Array, step: float) -> list[tuple[int, tuple[float, float, float]]]:
    """The atoms that a grid point holds, with its index."""
    near = [(round((atom[0] - grid[0]) / step), atom) for atom in atoms_of(pair)]
    return [
        (k, atom)
        for k, atom in near
        if 0 <= k < len(grid) and abs(grid[k] - atom[0]) <= ULP * (16 + 4 * abs(atom[0]))
    ]


def _rounding(p: Array, q: Array, losses: Array, slope: Array, spare: float) -> tuple[float, float]:
    """What makes up for the rounding of cells' masses: a shift of all losses, and mass at infinity.

    The pair promises sums of neighbouring masses to a few units in the last place of the tail, and
    of its log. So a profile made of them, tail(p) - e^l tail(q), is off by `error` at most. A shift
    s of the losses changes it by at least s times its slope in l. Where there is no slope mass at
    infinity does it, and where the error is below `spare`, the composition adds that.
    """
    p_tail, q_tail = tails(p)[: len(losses)], tails(q)[: len(losses)]
    error = (
        32 * p_tail
        + 4 * scipy.special.entr(p_tail)
        + _times_exp(32 * q_tail + 4 * scipy.special.entr(q_tail), losses)
    )
    error = np.where(ULP * error > spare, ULP * error, 0.0)
    flat = slope < 1e-250
    shift = (error[~flat] / slope[~flat]).max(initial=0.0)
    fixed = ULP * (96 + 8 * max(abs(losses[0]), abs(losses[-1])))
    return float(shift) + fixed, float(error[flat].max(initial=0.0))


def _times_exp(q: Array, losses: Array) -> Array:
    half = np.exp(losses / 2)  # e^loss alone may be beyond float64
    return q * half * half

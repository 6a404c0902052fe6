"""A log of many different steps as a few: the sum over steps of f(noise, prob), for any smooth f.

A cell holds the steps of an eighth of an octave of noise multipliers and of a factor of 2^(1/2) of
probabilities. In x and y, the logarithms scaled to [-1, 1], the sum over its steps of
count * T_j(x) T_k(y) is all that is kept: it says what the sum of every polynomial f is. A panel is
a rectangle of neighbouring cells, up to an octave by a factor of 4, whose polynomials are those of its
cells. Its sums stand for a quadrature whose nodes are the Chebyshev points and whose weights, some
negative, add up to the number of steps:

    sum over steps of count f(x, y)  =  sum over nodes of weight f(node) + count * (f - its interpolant).

The last term is estimated by `residual`, the size of the last coefficients that are kept; what they
leave out is smaller where they fall off, and is seen where they do not.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpfunc.accounting.pairs import Array
from dpfunc.events import Columns

SIZES = 24, 20
"""Nodes for the noise multiplier and for the probability in a panel where the other is constant."""
_BOTH = 19, 14
"""And where neither is: rows are their product."""
_CELL = np.array([math.log(2.0) / 8, math.log(2.0) / 2])
_SPANS = 8, 4
"""Most cells in a panel."""
_CHUNK = 1 << 16


class Cell(NamedTuple):
    """Sums over the steps of one cell, and the range that they span."""

    moments: Array
    """(sizes) sum of count T_j T_k."""
    low: Array
    """(2,) least noise multiplier and probability."""
    high: Array


class Grid(NamedTuple):
    """A quadrature: steps with weights for counts."""

    kind: int
    noise_multiplier: Array
    sampling_prob: Array
    weight: Array
    shape: tuple[int, int]
    total: float
    counts: Array
    """(cells,) of steps in each cell of the panel."""
    centres: Array
    """(2, cells) the noise multiplier and probability that its steps have in the mean of logarithms."""
    corners: Array
    """(2, cells, corners) and those at the ends of its range."""


Cells = dict[tuple[int, int, int], Cell]
"""By kind of event and place."""


def some_of(columns: Columns, rows: NDArray[Any] | slice) -> Columns:
    """The chosen rows of a log."""
    return Columns(
        columns.noise_multiplier[rows],
        columns.sampling_prob[rows],
        columns.count[rows],
        columns.kind[rows],
    )


def fold(cells: Cells | None, columns: Columns) -> Cells:
    """Cells with further steps, all of them with a probability in (0, 1) and noise in (0, inf)."""
    cells = dict(cells or {})
    for start in range(0, len(columns.count), _CHUNK):
        part = some_of(columns, slice(start, start + _CHUNK))
        logs = np.log(np.stack([part.noise_multiplier, part.sampling_prob]))
        at = np.floor(logs / _CELL[:, None]).astype(np.int64)
        code = ((part.kind << 16) + at[0] << 16) + at[1]  # logs of floats: each well within 2^15
        for one in np.unique(code):
            rows = np.flatnonzero(code == one)
            key = (int(part.kind[rows[0]]), int(at[0, rows[0]]), int(at[1, rows[0]]))
            cells[key] = _added(cells.get(key), key[1:], logs[:, rows], some_of(part, rows))
    return cells


def _added(cell: Cell | None, place: tuple[int, int], logs: Array, columns: Columns) -> Cell:
    values = np.stack([columns.noise_multiplier, columns.sampling_prob])
    low, high = values.min(1), values.max(1)
    of_noise, of_prob = (
        _chebyshev(2 * (logs[i, : 1 if low[i] == high[i] else None] / _CELL[i] - place[i]) - 1, n)
        for i, n in enumerate(SIZES)
    )
    moments = _moments(of_noise, columns.count, of_prob)
    if cell is not None:
        moments += cell.moments
        low, high = np.minimum(low, cell.low), np.maximum(high, cell.high)
    return Cell(moments, low, high)


def _moments(of_noise: Array, count: Array, of_prob: Array) -> Array:
    """Sums of count T_j T_k; one column of polynomials stands for equal ones."""
    if of_noise.shape[1] == 1:
        return np.outer(
            of_noise[:, 0], of_prob @ count if of_prob.shape[1] > 1 else of_prob[:, 0] * count.sum()
        )
    if of_prob.shape[1] == 1:
        return np.outer(of_noise @ count, of_prob[:, 0])
    return (of_noise * count) @ of_prob.T


def grids(cells: Cells) -> list[Grid]:
    """The quadratures that stand for the cells."""
    found = []
    for kind in sorted({key[0] for key in cells}):
        here = {key[1:]: cell for key, cell in cells.items() if key[0] == kind}
        for rows in _spans({i for i, _ in here}, _SPANS[0]):
            for columns in _spans({j for i, j in here if i in rows}, _SPANS[1]):
                panel = {(i, j): c for (i, j), c in here.items() if i in rows and j in columns}
                found.append(_grid(kind, panel, (rows, columns)))
    return found


def _spans(places: set[int], most: int) -> list[range]:
    """Ranges of so many places at most that together hold all of them."""
    found: list[range] = []
    for place in sorted(places):
        if found and place < found[-1].start + most:
            found[-1] = range(found[-1].start, place + 1)
        else:
            found.append(range(place, place + 1))
    return found


def _grid(kind: int, cells: dict[tuple[int, int], Cell], spans: tuple[range, range]) -> Grid:
    """The quadrature of a panel; one node in a direction in which all steps agree."""
    low = np.min([cell.low for cell in cells.values()], axis=0)
    high = np.max([cell.high for cell in cells.values()], axis=0)
    varies = low < high
    sizes = [
        n if vary else 1 for n, vary in zip(_BOTH if varies.all() else SIZES, varies, strict=True)
    ]
    moments = np.zeros(sizes)
    for place, cell in cells.items():
        of_noise, of_prob = (
            _carried(size, place[i] - spans[i].start, len(spans[i])) for i, size in enumerate(sizes)
        )
        moments += of_noise @ cell.moments[: sizes[0], : sizes[1]] @ of_prob.T
    values = []
    for i, size in enumerate(sizes):
        moments = np.moveaxis(np.tensordot(_coefficients(size), moments, (0, i)), 0, i)
        log = _CELL[i] * (spans[i].start + len(spans[i]) * (_points(size) + 1) / 2)
        values.append(np.exp(log) if size > 1 else low[i : i + 1])
    noise, prob = np.meshgrid(*values, indexing="ij")
    counts = np.array([cell.moments[0, 0] for cell in cells.values()])
    return Grid(
        kind,
        noise.ravel(),
        prob.ravel(),
        moments.ravel(),
        (sizes[0], sizes[1]),
        float(counts.sum()),
        counts,
        np.stack([_centre(place, cell) for place, cell in cells.items()], 1),
        np.stack([_corners(cell, varies) for cell in cells.values()], 1),
    )


def _centre(place: tuple[int, int], cell: Cell) -> Array:
    mean = np.array([cell.moments[1, 0], cell.moments[0, 1]]) / cell.moments[0, 0]
    return np.clip(np.exp(_CELL * (place + (mean + 1) / 2)), cell.low, cell.high)


def _corners(cell: Cell, varies: NDArray[np.bool_]) -> Array:
    """(2, corners) all ends in each direction in which the panel varies."""
    ends = [
        [low, high] if vary else [low] for low, high, vary in zip(*cell[1:], varies, strict=True)
    ]
    return np.reshape(np.meshgrid(*ends, indexing="ij"), (2, -1))


@cache
def _carried(size: int, place: int, span: int) -> Array:
    """T_k of a panel in the T_j of one of its cells, where the panel is so many cells long."""
    return _chebyshev((2 * place + 1 + _points(size)) / span - 1, size) @ _coefficients(size).T


@cache
def _coefficients(size: int) -> Array:
    """What values at the Chebyshev points are multiplied by."""
    scale = np.where(np.arange(size) == 0, 1.0, 2.0) / size
    return _chebyshev(_points(size), size) * scale[:, None]


def residual(values: NDArray[Any], shape: tuple[int, int]) -> Array:
    """How far (nodes, ...) values are from what their interpolant is between the nodes: an estimate."""
    table = values.reshape(*shape, *values.shape[1:])
    error = np.zeros(values.shape[1:])
    for axis, size in enumerate(shape):
        if size > 1:
            table = np.moveaxis(table, axis, 0)
            table = np.tensordot(_coefficients(size), table, axes=1)
            table = np.moveaxis(table, 0, axis)
    for axis, size in enumerate(shape):
        if size > 1:
            last = np.abs(np.moveaxis(table, axis, 0)[-2:])
            error += 2 * last.sum((0, 1))
    return error


def _chebyshev(x: Array, size: int) -> Array:
    """(size, len(x)) Chebyshev polynomials."""
    rows = np.ones((size, len(x)))
    if size > 1:
        rows[1] = x
    for j in range(2, size):
        np.multiply(rows[j - 1], 2 * x, out=rows[j])
        rows[j] -= rows[j - 2]
    return rows


@cache
def _points(size: int) -> Array:
    return np.cos((np.arange(size) + 0.5) * math.pi / size)

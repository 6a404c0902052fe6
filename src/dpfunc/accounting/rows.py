"""The real log moment function K at some tilts, with Chernoff's bound from each, in both directions.

delta(epsilon) <= c(theta) e^(K(theta) - theta epsilon) for every theta >= 0, c(l) = l^l / (1 + l)^(1 + l).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dpfunc.accounting.moments import Moments, log_moments
from dpfunc.accounting.pairs import Array
from dpfunc.accounting.quadrature import UNIT, Nodes, Stack, TooManyNodes, nodes

_FEW_PAIRS = 8
_MOST_ROW = 1e7  # products of tilts, pairs and nodes


class Steps(NamedTuple):
    """A log in one direction: Gaussian mixtures, and all full-batch Gaussians as one of this mu."""

    stacks: list[Stack]
    mu: float = 0.0
    two_way: bool = False
    """Whether the other direction, in which P and Q are exchanged, will be asked for too."""

    @property
    def sketch(self) -> Steps | None:
        """Few pairs whose K is near that of all, where these are many: to plan with."""
        if all(stack.centres is None for stack in self.stacks):
            return None
        return self._replace(stacks=[stack.centres or stack for stack in self.stacks])


class Laid(NamedTuple):
    """The nodes of every stack, what they serve, and the moments that were summed on them."""

    nodes: list[Nodes]
    theta: float
    t: float
    both: bool
    moments: list[Moments]
    tilts: int
    """Of them in this direction, before those of the other."""


class Row(NamedTuple):
    """K at some tilts, and its first two derivatives."""

    theta: Array
    value: Array
    error: Array
    mean: Array
    variance: Array
    ceiling: Array
    """The value, rounded up, with Chernoff's constant: less theta epsilon it bounds log delta."""
    reverse: Array | None
    """The ceiling of the other direction."""
    laid: Laid


def is_small(steps: Steps) -> bool:
    """Whether numpy spends more on its calls than on numbers: twice as many cost little more."""
    return sum(stack.counts.size for stack in steps.stacks) <= _FEW_PAIRS


def row(
    steps: Steps, thetas: Array, t: float = 0.0, *, both: bool = False, ready: bool = False
) -> Row:
    """K at rising tilts, by nodes that serve |Im z| <= t too; both: and of the other direction.

    ready: the nodes serve that as well.
    """
    # In the other direction K is that of this one at -1 - theta, and the loss is -L.
    every = np.concatenate([thetas, -1 - thetas]) if both else thetas
    theta = float(thetas[-1])
    value = steps.mu**2 / 2 * (every * every + every)
    mean = steps.mu**2 * (every + 0.5)
    variance = np.full_like(thetas, steps.mu**2)
    error = np.full_like(every, 64 * UNIT)
    laid, found = [], []
    for stack in steps.stacks:
        at = lay(stack, theta, t, both or ready)
        if at.x.size * len(every) > _MOST_ROW:
            raise TooManyNodes
        own, counts = log_moments(stack, at, every), np.abs(stack.counts)
        value += own.log_moment @ stack.counts
        summing = UNIT * (8 + len(counts))
        error += (own.rounding + at.error + summing * np.abs(own.log_moment)) @ counts
        if stack.shape is not None:
            error += stack.interpolation_error(own.log_moment)
        mean += own.mean @ stack.counts
        variance += own.variance[: len(thetas)] @ stack.counts
        laid.append(at)
        found.append(own)
    ceiling = value + 64 * UNIT * np.abs(value) + error
    ceiling += np.tile(_best_constant(thetas), 2 if both else 1)
    size = len(thetas)
    return Row(
        thetas,
        value[:size],
        error,
        mean[:size],
        np.maximum(variance, 1e-300),
        ceiling[:size],
        ceiling[size:] if both else None,
        Laid(laid, theta, t, both or ready, found, size),
    )


def lay(stack: Stack, theta: float, t: float, both: bool) -> Nodes:
    """Nodes for tilts up to theta and, where t > 0, for the sum."""
    # The curve of `decay` bends over a noise's width: so fine a step follows it.
    finest = 0.3 * min(1.0, float(stack.noise.min())) if t else math.inf
    return nodes(stack, theta, t, finest, both=both)


def _best_constant(lambdas: Array) -> Array:
    """log of the least c with (1 - e^-x)_+ <= c e^(lambda x): delta <= c E[e^(lambda (L - epsilon))]."""
    logs = np.log(np.maximum(lambdas, np.finfo(float).tiny))  # 0 log 0 is 0
    return lambdas * logs - (1 + lambdas) * np.log1p(lambdas)

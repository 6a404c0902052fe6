"""Optimizers as (init, update) pairs of pure functions over pytrees.

What they read is already released, so nothing here can cost privacy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpfunc import _checks, trees
from dpfunc.typing import Params, Tree


class Optimizer(NamedTuple):
    """`init(params) -> state`; `update(grads, state, params) -> (updates, state)`."""

    init: Callable[[Params], Any]
    update: Callable[[Tree, Any, Params], tuple[Tree, Any]]


def apply_updates(params: Params, updates: Tree) -> Params:
    """Add updates to params, each leaf in the dtype of its parameter.

    >>> apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([1.0, -1.0])})
    {'w': tensor([2., 0.])}
    """
    return trees.map(lambda p, u: (p + u).to(p.dtype), params, updates)


def sgd(learning_rate: float, *, momentum: float = 0.0, nesterov: bool = False) -> Optimizer:
    """Gradient descent, with momentum as `torch.optim.SGD` defines it.

    Args:
        learning_rate: step size, > 0.
        momentum: decay of the velocity, in [0, 1].
        nesterov: look ahead along the velocity.

    Guarantees:
        Equal to torch.optim.SGD on the same gradients, up to rounding.

    Raises:
        ValueError: a number out of range.

    Source: Sutskever et al. 2013, in the form of torch.optim.SGD.

    >>> optimizer = sgd(0.5)
    >>> optimizer.update(torch.ones(2), optimizer.init(torch.zeros(2)), torch.zeros(2))[0]
    tensor([-0.5000, -0.5000])
    """
    _checks.positive(learning_rate=learning_rate)
    _checks.probability(momentum=momentum)

    def init(params: Params) -> Tree:
        return trees.map(lambda p: torch.zeros_like(p, dtype=_at_least_float32(p)), params)

    def update(grads: Tree, state: Tree, params: Params) -> tuple[Tree, Tree]:
        del params
        velocity = trees.map(lambda v, g: momentum * v + g, state, grads)
        ahead = trees.map(lambda v, g: g + momentum * v, velocity, grads) if nesterov else velocity
        return trees.map(lambda v: -learning_rate * v, ahead), velocity

    return Optimizer(init, update)


class AdamState(NamedTuple):
    """The moments of the gradient and the number of updates so far, a 0-d tensor."""

    step: Tensor
    first: Tree
    second: Tree


def adam(
    learning_rate: float, *, b1: float = 0.9, b2: float = 0.999, stabilizer: float = 1e-8
) -> Optimizer:
    """Adam, as `torch.optim.Adam` defines it.

    Args:
        learning_rate: step size, > 0.
        b1, b2: decay of the first and second moment, in [0, 1).
        stabilizer: added to the root of the second moment, > 0 (torch calls it eps).

    Guarantees:
        Equal to torch.optim.Adam on the same gradients, up to rounding.

    Raises:
        ValueError: a number out of range.

    Source: Kingma and Ba 2015, arXiv:1412.6980, Algorithm 1.

    >>> optimizer = adam(0.5)
    >>> optimizer.update(torch.ones(2), optimizer.init(torch.zeros(2)), torch.zeros(2))[0]
    tensor([-0.5000, -0.5000])
    """
    _checks.positive(learning_rate=learning_rate)
    _checks.positive(stabilizer=stabilizer)
    for name, decay in {"b1": b1, "b2": b2}.items():
        if _checks.probability(**{name: decay}) == 1.0:
            raise ValueError(f"Expected 0 <= {name} < 1, got {decay!r}.")

    def init(params: Params) -> AdamState:
        trees.check_floating(params, "params", "")
        zeros = trees.map(lambda p: torch.zeros_like(p, dtype=_at_least_float32(p)), params)
        device = trees.leaves(params)[0].device
        return AdamState(torch.zeros((), dtype=torch.int64, device=device), zeros, zeros)

    def update(grads: Tree, state: AdamState, params: Params) -> tuple[Tree, AdamState]:
        del params
        step = state.step + 1
        first = trees.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, grads)
        second = trees.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.second, grads)
        power = step.to(torch.float64)
        unbias1, unbias2 = 1 - b1**power, 1 - b2**power
        updates = trees.map(
            lambda m, v: (
                -learning_rate
                * (m / unbias1.to(m.dtype))
                / ((v / unbias2.to(v.dtype)).sqrt() + stabilizer)
            ),
            first,
            second,
        )
        return updates, AdamState(step, first, second)

    return Optimizer(init, update)


def _at_least_float32(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)

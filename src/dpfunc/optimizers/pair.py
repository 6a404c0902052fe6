"""The pair itself, how its updates are applied, and how pairs follow one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpfunc import trees
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


def chain(*optimizers: Optimizer) -> Optimizer:
    """Let each pair read what the one before it wrote; the first reads the gradient.

    Args:
        optimizers: at least one pair. All but the last map gradients to gradients, as `ema` does.

    Returns:
        A pair whose state is the tuple of theirs.

    Guarantees:
        `chain(a, chain(b, c))` and `chain(a, b, c)` give the same updates.
        `chain(a)` gives those of a.

    Raises:
        TypeError: none is given, or one is not an (init, update) pair.

    >>> from dpfunc.optimizers import ema, sgd
    >>> optimizer = chain(ema(decay=0.9), sgd(0.5))
    >>> optimizer.update(torch.ones(2), optimizer.init(torch.zeros(2)), torch.zeros(2))[0]
    tensor([-0.5000, -0.5000])
    """
    if not optimizers:
        raise TypeError("Expected at least one (init, update) pair, got none.")
    for optimizer in optimizers:
        check_pair(optimizer)

    def init(params: Params) -> tuple[Any, ...]:
        return tuple(optimizer.init(params) for optimizer in optimizers)

    def update(grads: Tree, state: tuple[Any, ...], params: Params) -> tuple[Tree, tuple[Any, ...]]:
        states = []
        for optimizer, inner in zip(optimizers, state, strict=True):
            grads, inner = optimizer.update(grads, inner, params)
            states.append(inner)
        return grads, tuple(states)

    return Optimizer(init, update)


def check_pair(optimizer: Optimizer) -> None:
    """A pair that was made, and not the function that makes one."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"Expected an (init, update) pair, got {optimizer!r}. "
            "Make one: sgd(0.1), Optimizer(init, update), from_torchopt of a TorchOpt transform."
        )


def begin(params: Params) -> tuple[Tensor, Tree]:
    """No update so far, as a 0-d tensor, and zeros in the shapes of params, float32 at least."""
    trees.check_floating(params, "params", "Integers have no gradient.")
    device = trees.leaves(params)[0].device
    zeros = trees.map(lambda p: torch.zeros_like(p, dtype=wide(p)), params)
    return torch.zeros((), dtype=torch.int64, device=device), zeros


def raised(grads: Tree) -> Tree:
    """Gradients in float32 at least, so that what is made of them is too."""
    return trees.map(lambda g: g.to(wide(g)), grads)


def wide(leaf: Tensor) -> torch.dtype:
    return torch.promote_types(leaf.dtype, torch.float32)

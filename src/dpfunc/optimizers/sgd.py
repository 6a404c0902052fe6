"""Gradient descent with momentum."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dpfunc import _checks, trees
from dpfunc.optimizers.pair import Optimizer, begin, raised
from dpfunc.optimizers.rates import LearningRate, as_rate
from dpfunc.typing import Params, Tree


class SGDState(NamedTuple):
    """The number of updates so far, a 0-d tensor, and the velocity: () where there is no momentum."""

    step: Tensor
    velocity: Tree


def sgd(
    learning_rate: float | Tensor | LearningRate,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Gradient descent, with momentum as `torch.optim.SGD` defines it.

    Args:
        learning_rate: step size, > 0; a number, a 0-d tensor, or a function of the step.
        momentum: decay of the velocity, in [0, 1].
        nesterov: look ahead along the velocity; needs momentum.
        weight_decay: this multiple of the parameters joins the gradient, >= 0.

    Guarantees:
        Equal to torch.optim.SGD on the same gradients, up to rounding.
        The state is float32 at least. A rate that changes makes no new graph.

    Raises:
        ValueError: a number out of range, or nesterov without momentum.
        TypeError: learning_rate is none of the three, or params are not floating point.

    Source: Sutskever et al. 2013, in the form of torch.optim.SGD.

    >>> import torch
    >>> optimizer = sgd(0.5)
    >>> optimizer.update(torch.ones(2), optimizer.init(torch.zeros(2)), torch.zeros(2))[0]
    tensor([-0.5000, -0.5000])
    """
    schedule = as_rate(learning_rate)
    momentum = _checks.probability(momentum=momentum)
    weight_decay = _checks.finite_non_negative(weight_decay=weight_decay)
    if nesterov and momentum == 0.0:
        raise ValueError("Expected nesterov=True together with momentum > 0, got momentum=0.0.")

    def init(params: Params) -> SGDState:
        step, zeros = begin(params)
        return SGDState(step, zeros if momentum else ())

    def update(grads: Tree, state: SGDState, params: Params) -> tuple[Tree, SGDState]:
        ahead, velocity = raised(grads), state.velocity
        if weight_decay:
            ahead = trees.map(lambda g, p: g + weight_decay * p, ahead, params)
        if momentum:
            velocity = trees.map(lambda v, g: momentum * v + g, velocity, ahead)
            ahead = (
                trees.map(lambda v, g: g + momentum * v, velocity, ahead) if nesterov else velocity
            )
        rate = schedule(state.step)
        updates = trees.map(lambda u: -rate.to(u.dtype) * u, ahead)
        return updates, SGDState(state.step + 1, velocity)

    return Optimizer(init, update)

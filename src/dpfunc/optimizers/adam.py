"""Adam, with decoupled weight decay, and with the noise taken out of its second moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from dpfunc import _checks, trees
from dpfunc.mechanism import DPSGD, check_mechanism
from dpfunc.noise import released_variance
from dpfunc.optimizers.pair import Optimizer, begin, raised
from dpfunc.optimizers.rates import LearningRate, as_rate
from dpfunc.typing import Params, Tree


class AdamState(NamedTuple):
    """The moments of the gradient and the number of updates so far, a 0-d tensor."""

    step: Tensor
    first: Tree
    second: Tree


def adam(
    learning_rate: float | Tensor | LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    stabilizer: float = 1e-8,
) -> Optimizer:
    """Adam, as `torch.optim.Adam` defines it.

    Args:
        learning_rate: step size, > 0; a number, a 0-d tensor, or a function of the step.
        b1, b2: decay of the first and second moment, in [0, 1).
        stabilizer: added to the root of the second moment, > 0 (torch calls it eps).

    Guarantees:
        Equal to torch.optim.Adam on the same gradients, up to rounding.
        The state is float32 at least. A rate that changes makes no new graph.

    Raises:
        ValueError: a number out of range.
        TypeError: learning_rate is none of the three, or params are not floating point.

    Source: Kingma and Ba 2015, arXiv:1412.6980, Algorithm 1.

    >>> import torch
    >>> optimizer = adam(0.5)
    >>> optimizer.update(torch.ones(2), optimizer.init(torch.zeros(2)), torch.zeros(2))[0]
    tensor([-0.5000, -0.5000])
    """
    return adamw(learning_rate, b1=b1, b2=b2, stabilizer=stabilizer, weight_decay=0.0)


def adamw(
    learning_rate: float | Tensor | LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    stabilizer: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """Adam with decoupled weight decay, as `torch.optim.AdamW` defines it.

    Args:
        learning_rate, b1, b2, stabilizer: as for `adam`.
        weight_decay: each update takes learning_rate times this share off the parameters, >= 0.

    Guarantees:
        Equal to torch.optim.AdamW on the same gradients, up to rounding.
        The state is float32 at least. A rate that changes makes no new graph.

    Raises:
        ValueError: a number out of range.
        TypeError: learning_rate is none of the three, or params are not floating point.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, Algorithm 2.

    >>> import torch
    >>> optimizer, params = adamw(0.5, weight_decay=0.1), torch.ones(2)
    >>> optimizer.update(torch.ones(2), optimizer.init(params), params)[0]
    tensor([-0.5500, -0.5500])
    """
    stabilizer = _checks.positive(stabilizer=stabilizer)
    weight_decay = _checks.finite_non_negative(weight_decay=weight_decay)
    return _adam(learning_rate, b1, b2, lambda v: v.sqrt() + stabilizer, weight_decay)


def adam_bc(
    learning_rate: float | Tensor | LearningRate,
    mechanism: DPSGD,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    floor: float = 5e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Adam for private gradients: the variance of the noise is taken out of the second moment.

    Noise adds its variance to every coordinate of the second moment, and where it outweighs the
    gradients Adam divides all of them by about the same number. That variance is public.

    Args:
        learning_rate, b1, b2: as for `adam`.
        mechanism: the one that releases the gradients, from which the variance is read. A step
            that gets a noise_multiplier of its own releases noise of another variance.
        floor: the least corrected second moment, in squared gradient units, > 0. It takes the place
            of the stabilizer, and bounds an update by learning_rate * |first moment| / sqrt(floor).
        weight_decay: as for `adamw`.

    Guarantees:
        Without noise equal to `adam` where the second moment is above floor, up to its stabilizer.
        On gradients of noise alone the corrected second moment has mean 0 before the floor.
        The state is float32 at least. A rate that changes makes no new graph.

    Raises:
        ValueError: a number out of range.
        TypeError: mechanism is not a DPSGD; others as `adam`.

    Source: Tang, Shpilevskiy and Lecuyer 2024, arXiv:2312.14334, DP-AdamBC: the update
    m / sqrt(max(v - (noise_multiplier * sensitivity / expected_batch_size)**2, floor)).

    >>> import torch
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=3.0, sampling_prob=0.1, expected_batch_size=1)
    >>> optimizer = adam_bc(0.5, mechanism)
    >>> optimizer.update(torch.tensor([5.0]), optimizer.init(torch.zeros(1)), torch.zeros(1))[0]
    tensor([-0.6250])
    """
    check_mechanism(mechanism)
    floor = _checks.positive(floor=floor)
    weight_decay = _checks.finite_non_negative(weight_decay=weight_decay)
    noise = released_variance(mechanism)
    return _adam(learning_rate, b1, b2, lambda v: (v - noise).clamp(min=floor).sqrt(), weight_decay)


def _adam(
    learning_rate: float | Tensor | LearningRate,
    b1: float,
    b2: float,
    divisor: Callable[[Tensor], Tensor],
    weight_decay: float,
) -> Optimizer:
    """The moments without their bias, the first over a function of the second."""
    schedule = as_rate(learning_rate)
    for name, decay in {"b1": b1, "b2": b2}.items():
        if _checks.probability(**{name: decay}) == 1.0:
            raise ValueError(f"Expected 0 <= {name} < 1, got {decay!r}.")

    def init(params: Params) -> AdamState:
        # Two trees: one tensor in two places is a graph of its own to the compiler.
        (step, first), (_, second) = begin(params), begin(params)
        return AdamState(step, first, second)

    def update(grads: Tree, state: AdamState, params: Params) -> tuple[Tree, AdamState]:
        grads, rate, step = raised(grads), schedule(state.step), state.step + 1
        first = trees.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, grads)
        second = trees.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.second, grads)
        power = step.double()
        unbias1, unbias2 = 1 - b1**power, 1 - b2**power

        moves = trees.map(
            lambda m, v: (m / unbias1.to(m.dtype)) / divisor(v / unbias2.to(v.dtype)), first, second
        )
        if weight_decay:
            moves = trees.map(lambda u, p: u + weight_decay * p, moves, params)
        updates = trees.map(lambda u: -rate.to(u.dtype) * u, moves)
        return updates, AdamState(step, first, second)

    return Optimizer(init, update)

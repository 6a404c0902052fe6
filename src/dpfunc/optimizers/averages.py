"""Moving averages of what is released: of gradients against their noise, and of parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from dpfunc import _checks, trees
from dpfunc.optimizers.pair import (
    Optimizer,
    apply_updates,
    begin,
    check_pair,
    raised,
    wide,
)
from dpfunc.typing import Params, Tree


class EMAState(NamedTuple):
    """The number of trees so far, a 0-d tensor, and their weighted sum."""

    step: Tensor
    total: Tree


def ema(*, decay: float, unbiased: bool = True) -> Optimizer:
    """Exponential moving average of the trees that `update` is given: in a chain, of gradients.

    Args:
        decay: weight of the average against a new tree, in [0, 1).
        unbiased: divide by the sum of the weights so far, so that the average of equal trees is that
            tree from the first on. False: the sum starts at zero and the first ones are small.

    Returns:
        A pair: `update(tree, state, params) -> (average, state)`; it does not read params.

    Guarantees:
        The average of the trees x_1, ..., x_n with weights (1 - decay) decay**(n - i), over the sum
        of the weights where unbiased. Independent noise of variance s**2 in each is left with
        s**2 (1 - decay) / (1 + decay) after many.
        Post-processing: a function of what it is given alone. The state is float32 at least.

    Raises:
        ValueError: decay is out of range.

    Source: Polyak and Juditsky 1992, for averages; the weights are those of Kingma and Ba 2015,
    arXiv:1412.6980, section 3.

    >>> import torch
    >>> average = ema(decay=0.5)
    >>> x, state = average.update(torch.tensor([3.0]), average.init(torch.zeros(1)), None)
    >>> x, average.update(torch.tensor([0.0]), state, None)[0]
    (tensor([3.]), tensor([1.]))
    """
    if _checks.probability(decay=decay) == 1.0:
        raise ValueError(f"Expected 0 <= decay < 1, got {decay!r}.")

    def init(params: Params) -> EMAState:
        return EMAState(*begin(params))

    def update(tree: Tree, state: EMAState, params: Params) -> tuple[Tree, EMAState]:
        del params
        step = state.step + 1
        total = trees.map(lambda a, x: decay * a + (1 - decay) * x, state.total, raised(tree))
        if not unbiased:
            return total, EMAState(step, total)
        weight = 1 - decay ** step.double()
        return trees.map(lambda a: a / weight.to(a.dtype), total), EMAState(step, total)

    return Optimizer(init, update)


class AveragedState(NamedTuple):
    """The average of the parameters after each update, and the states behind it."""

    average: Params
    ema: EMAState
    inner: Any


def averaged(optimizer: Optimizer, *, decay: float) -> Optimizer:
    """Keep an average of the parameters beside an optimizer; its updates stay as they are.

    Args:
        optimizer: an (init, update) pair.
        decay: as for `ema`.

    Returns:
        A pair whose state holds, as `average`, the parameters to evaluate: the unbiased `ema` of
        the parameters after each update, those of `init` before the first.

    Guarantees:
        The updates are those of optimizer. The average is float32 at least.
        Post-processing: the average may be released along with the parameters.

    Raises:
        ValueError: decay is out of range.
        TypeError: optimizer is not an (init, update) pair.

    Source: De et al. 2022, arXiv:2204.13650, section 3.2, "parameter averaging".

    >>> import torch
    >>> from dpfunc.optimizers import sgd
    >>> optimizer = averaged(sgd(1.0), decay=0.5)
    >>> params = torch.zeros(1)
    >>> updates, state = optimizer.update(torch.ones(1), optimizer.init(params), params)
    >>> state.average
    tensor([-1.])
    """
    check_pair(optimizer)
    average = ema(decay=decay)

    def init(params: Params) -> AveragedState:
        first = trees.map(lambda p: p.to(wide(p), copy=True), params)
        return AveragedState(first, average.init(params), optimizer.init(params))

    def update(grads: Tree, state: AveragedState, params: Params) -> tuple[Tree, AveragedState]:
        updates, inner = optimizer.update(grads, state.inner, params)
        mean, outer = average.update(apply_updates(params, updates), state.ema, params)
        return updates, AveragedState(mean, outer, inner)

    return Optimizer(init, update)


class DiSKState(NamedTuple):
    """How far the parameters are ahead of the iterate, the filter's state and the optimizer's."""

    ahead: Tree
    ema: EMAState
    inner: Any


def disk(optimizer: Optimizer, *, gain: float) -> Optimizer:
    """Give an optimizer gradients denoised by a simplified Kalman filter that looks ahead.

    The filter predicts the gradient at the iterate x[t] from the one before it, and corrects the
    prediction with a noisy gradient taken at y[t] = x[t] + (1 - gain) / gain * (x[t] - x[t-1]):

        filtered[t] = (1 - gain) * filtered[t-1] + gain * noisy(y[t])

    Here **the parameters of the run are the points y**, so that an ordinary private step takes its
    gradient there and everything else is post-processing. `disk_params` gives the iterate x.

    Args:
        optimizer: an (init, update) pair; it sees filtered gradients and the iterate.
        gain: of the filter, in (0, 1]; 1 is optimizer itself.

    Returns:
        A pair whose parameters are the points y.

    Guarantees:
        The recursion above, for any optimizer. The state is float32 at least.
        Post-processing: it reads released gradients alone. This is the algorithm of the source at
        gamma = (1 - gain) / gain, where its two gradients of each example become one. At other gamma
        they are combined before clipping, which is no post-processing and is not offered.

    Raises:
        ValueError: gain is out of range.
        TypeError: optimizer is not an (init, update) pair.

    Source: Zhang et al. 2024, arXiv:2410.03883, DiSK.

    >>> import torch
    >>> from dpfunc.optimizers import sgd
    >>> optimizer, y = disk(sgd(1.0), gain=0.5), torch.zeros(1)
    >>> updates, state = optimizer.update(torch.ones(1), optimizer.init(y), y)
    >>> y = apply_updates(y, updates)
    >>> y, disk_params(y, state)
    (tensor([-1.]), tensor([-0.5000]))
    """
    check_pair(optimizer)
    if _checks.probability(gain=gain) == 0.0:
        raise ValueError(f"Expected 0 < gain <= 1, got {gain!r}.")
    reach = (1 - gain) / gain
    denoise = ema(decay=1 - gain, unbiased=False)

    def init(params: Params) -> DiSKState:
        _, zeros = begin(params)
        return DiSKState(zeros, denoise.init(params), optimizer.init(params))

    def update(grads: Tree, state: DiSKState, params: Params) -> tuple[Tree, DiSKState]:
        filtered, outer = denoise.update(grads, state.ema, params)
        moves, inner = optimizer.update(filtered, state.inner, disk_params(params, state))
        ahead = trees.map(lambda move: reach * move, moves)
        updates = trees.map(lambda move, new, old: move + new - old, moves, ahead, state.ahead)
        return updates, DiSKState(ahead, outer, inner)

    return Optimizer(init, update)


def disk_params(params: Params, state: DiSKState) -> Params:
    """The iterate of `disk`: what to evaluate and to release, in the dtypes of params."""
    return trees.map(lambda p, ahead: (p - ahead).to(p.dtype), params, state.ahead)

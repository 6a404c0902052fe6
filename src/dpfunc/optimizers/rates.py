"""Learning rates as pure functions of the step: 0-d tensor in, 0-d tensor out.

A step is a tensor, so a rate that changes makes no new graph. Any function of that form will do,
`lambda step: 0.1 / (1 + step.double())` too; those here have the forms of `torch.optim.lr_scheduler`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from dpfunc import _checks

LearningRate: TypeAlias = Callable[[Tensor], Tensor]
"""`schedule(step) -> rate`; step a 0-d int64 tensor, 0 at the first update; rate a 0-d tensor."""


def constant(rate: float) -> LearningRate:
    """The same rate at every step: what a plain number means.

    >>> constant(0.1)(torch.tensor(7))
    tensor(0.1000, dtype=torch.float64)
    """
    number = _checks.positive(rate=rate)
    return lambda step: torch.full_like(step, number, dtype=torch.float64)


def exponential_decay(initial: float, *, decay: float) -> LearningRate:
    """`initial * decay**step`.

    Args:
        initial: rate of the first update, > 0.
        decay: factor from one step to the next, in (0, 1].

    Guarantees:
        Equal to torch.optim.lr_scheduler.ExponentialLR, up to rounding.

    Raises:
        ValueError: a number out of range.

    >>> exponential_decay(1.0, decay=0.5)(torch.tensor(3))
    tensor(0.1250, dtype=torch.float64)
    """
    return step_decay(initial, decay=decay, every=1)


def step_decay(initial: float, *, decay: float, every: int) -> LearningRate:
    """`initial * decay**(step // every)`.

    Args:
        initial: rate of the first update, > 0.
        decay: factor from one stretch to the next, in (0, 1].
        every: length of a stretch in steps, >= 1.

    Guarantees:
        Equal to torch.optim.lr_scheduler.StepLR, up to rounding.

    Raises:
        ValueError: a number out of range.

    >>> step_decay(1.0, decay=0.1, every=10)(torch.tensor(19))
    tensor(0.1000, dtype=torch.float64)
    """
    first = _checks.positive(initial=initial)
    if _checks.probability(decay=decay) == 0.0:
        raise ValueError(f"Expected 0 < decay <= 1, got {decay!r}.")
    stretch = _checks.integer(at_least=1, every=every)
    return lambda step: first * decay ** (step // stretch).to(torch.float64)


def cosine_decay(
    peak: float, *, num_steps: int, num_warmup_steps: int = 0, final: float = 0.0
) -> LearningRate:
    """Rise in a line to `peak`, then fall along half a cosine to `final`, and stay there.

    Args:
        peak: the largest rate, > 0.
        num_steps: length of the whole run, more than num_warmup_steps.
        num_warmup_steps: updates on the line, at peak / n, 2 peak / n, ..., peak; >= 0. The line
            does not begin at 0: a private gradient that moves nothing is privacy spent on nothing.
        final: rate at num_steps and after, in [0, peak].

    Guarantees:
        Without warm-up equal to torch.optim.lr_scheduler.CosineAnnealingLR until num_steps, up to
        rounding.

    Raises:
        ValueError: a number out of range.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5.

    >>> schedule = cosine_decay(1.0, num_steps=12, num_warmup_steps=2)
    >>> [round(float(schedule(torch.tensor(t))), 3) for t in (0, 1, 2, 7, 12, 99)]
    [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    top = _checks.positive(peak=peak)
    warmup = _checks.integer(at_least=0, num_warmup_steps=num_warmup_steps)
    end = _checks.integer(at_least=warmup + 1, num_steps=num_steps)
    low = _checks.finite_non_negative(final=final)
    if low > top:
        raise ValueError(f"Expected final <= peak={top}, got {low}.")

    def schedule(step: Tensor) -> Tensor:
        now = step.to(torch.float64)
        done = ((now - warmup) / (end - warmup)).clamp(0.0, 1.0)
        falling = low + (top - low) * (1 + torch.cos(math.pi * done)) / 2
        return torch.where(step < warmup, top * (now + 1) / max(warmup, 1), falling)

    return schedule


def as_rate(learning_rate: float | Tensor | LearningRate) -> LearningRate:
    """A number, a 0-d tensor (to map over with vmap) or a schedule, as a schedule."""
    if isinstance(learning_rate, Tensor):
        rate = _checked(learning_rate, "learning_rate")
        return lambda step: rate
    if not callable(learning_rate):
        return constant(_checks.positive(learning_rate=learning_rate))
    return lambda step: _checked(learning_rate(step), "learning_rate(step)")


def _checked(rate: Tensor, name: str) -> Tensor:
    if not isinstance(rate, Tensor) or not rate.is_floating_point():
        raise TypeError(
            f"Expected {name} to be a floating-point tensor, got {rate!r}. "
            "A schedule maps the step, a 0-d tensor, to a 0-d tensor."
        )
    if rate.ndim != 0:
        raise ValueError(f"Expected {name} to be a 0-d tensor, got shape {tuple(rate.shape)}.")
    return rate

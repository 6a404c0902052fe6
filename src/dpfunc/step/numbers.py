"""The numbers of a step, where a schedule or adaptive clipping moves them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from dpfunc.mechanism import DPSGD
from dpfunc.schedules import Schedule
from dpfunc.step.asked import States

Numbers: TypeAlias = tuple[Tensor | None, Tensor | None]
"""The noise multiplier and the clipping factor of a step, where they are not the record's own."""


def numbers_of(mechanism: DPSGD) -> Callable[[int | Tensor, States], Numbers]:
    """`f(step, states)`: looked up, so that one compiled step serves every step."""
    noise, adaptive = mechanism.noise_multiplier, mechanism.adaptive
    multiplier = _lookup(noise, math.inf) if isinstance(noise, Schedule) else None
    factor = None if mechanism.factor is None else _lookup(mechanism.factor, math.nan)

    def f(step: int | Tensor, states: States) -> Numbers:
        step = torch.as_tensor(step)
        moving = None if factor is None else factor(step)
        if adaptive is not None:
            moving = states[adaptive.name]
        return None if multiplier is None else multiplier(step), moving

    return f


def _lookup(schedule: Schedule, outside: float) -> Callable[[Tensor], Tensor]:
    """The number of a step as a 0-d tensor.

    A step that the schedule does not have gets noise without end, or a factor that lets nobody
    count: inside a graph nothing can raise.
    """
    table = torch.tensor(schedule.values)

    def at(step: Tensor) -> Tensor:
        inside = (step >= 0) & (step < len(table))
        # index_select and not [step], which a compiler would specialise on.
        row = step.clamp(0, len(table) - 1).reshape(1)
        return torch.where(inside, table.to(step.device).index_select(0, row)[0], outside)

    return at

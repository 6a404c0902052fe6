"""Schedules: one public number for each step of a run, fixed before it starts.

A schedule is data and not code: the sampler, the step and the accountant read the very same numbers, a
record that holds one can be compared and printed, and a number that is out of range is an error before
anything was released.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from dpfunc import _checks


class Schedule:
    """One number for each step.

    Where `DPSGD` takes a schedule, its number at a step is what that step uses and what its event says.

    Args:
        values: the numbers, in the order of the steps; none of them NaN.

    Guarantees:
        `schedule(step)` is a pure function of the step. Equal numbers make equal schedules.
        A step before the first or past the last has no number: asking for it is an error.

    Raises:
        ValueError, TypeError: no values, or one that is no number.

    >>> warm = Schedule([2.0, 1.5, 1.0])
    >>> warm(1), len(warm), min(warm), warm == Schedule((2, 1.5, 1))
    (1.5, 3, 1.0, True)
    """

    __slots__ = ("_values",)

    def __init__(self, values: Iterable[float]) -> None:
        numbers = [_checks.real(**{f"values[{i}]": value}) for i, value in enumerate(values)]
        if not numbers:
            raise ValueError("Expected values to hold a number for each step, got none.")
        self._values = np.array(numbers) + 0.0  # zero has no sign
        self._values.flags.writeable = False

    @property
    def values(self) -> np.ndarray:
        """(num_steps,), float64, read-only."""
        return self._values

    def __call__(self, step: int) -> float:
        step = _checks.integer(at_least=0, step=step)
        if step >= len(self):
            raise ValueError(
                f"Expected step < {len(self)}, the length of the schedule, got {step}. "
                "Make it with a num_steps that covers the run."
            )
        return float(self._values[step])

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Any:
        return iter(self._values.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return np.array_equal(self._values, other._values)

    def __hash__(self) -> int:
        return hash(self._values.tobytes())

    def __repr__(self) -> str:
        first, last = self._values[0], self._values[-1]
        return f"Schedule({first:g} to {last:g} in {len(self)} steps)"


def exponential(initial: float, *, decay: float, num_steps: int) -> Schedule:
    """A number that is multiplied by `decay` at each step: initial * decay ** step.

    Args:
        initial: at step 0.
        decay: finite, > 0.
        num_steps: length of the run, >= 1.

    Raises:
        ValueError, TypeError: a number out of range.

    Source: Opacus' ExponentialNoise and ExponentialGradClip have this form.

    >>> exponential(2.0, decay=0.5, num_steps=3).values
    array([2. , 1. , 0.5])
    """
    initial, decay = _checks.real(initial=initial), _checks.positive(decay=decay)
    return from_function(lambda step: initial * decay**step, num_steps=num_steps)


def staircase(initial: float, *, decay: float, every: int, num_steps: int) -> Schedule:
    """A number that is multiplied by `decay` after each `every` steps.

    Args:
        initial: at step 0.
        decay: finite, > 0.
        every: steps on one stair, >= 1.
        num_steps: length of the run, >= 1.

    Raises:
        ValueError, TypeError: a number out of range.

    Source: Opacus' StepNoise and StepGradClip have this form.

    >>> staircase(8.0, decay=0.5, every=2, num_steps=5).values
    array([8., 8., 4., 4., 2.])
    """
    initial, decay = _checks.real(initial=initial), _checks.positive(decay=decay)
    every = _checks.integer(at_least=1, every=every)
    return from_function(lambda step: initial * decay ** (step // every), num_steps=num_steps)


def from_function(f: Callable[[int], float], *, num_steps: int) -> Schedule:
    """The schedule of any function of the step, called once for each step of the run.

    Args:
        f: step -> number. It sees the step alone: a function that looks at data or at noisy results
            makes numbers that may not be published.
        num_steps: length of the run, >= 1.

    Raises:
        ValueError, TypeError: f returns NaN or no number, or num_steps is no whole number >= 1.

    >>> from_function(lambda step: 1.0 if step < 2 else 0.5, num_steps=4).values
    array([1. , 1. , 0.5, 0.5])
    """
    num_steps = _checks.integer(at_least=1, num_steps=num_steps)

    def at(step: int) -> float:
        value = f(step)
        if isinstance(value, (int, float)) and math.isnan(value):
            raise ValueError(
                f"Expected the schedule to be a number at every step, got NaN at {step}."
            )
        return value

    return Schedule(at(step) for step in range(num_steps))

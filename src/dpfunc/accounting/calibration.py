"""The noise, the number of steps or the sampling probability that a target epsilon allows.

Every search is a bisection that returns its private end: the result's epsilon, by the accountant
named, is at most the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dpfunc import _checks
from dpfunc.accounting.epsilon import epsilon
from dpfunc.events import StepEvent

_TOLERANCE = 1e-6
_NO_ROOM = "Raise target_epsilon or delta, or release less."


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    sampling_prob: float,
    num_steps: int,
    accountant: str = "pld",
) -> float:
    """The least noise that keeps a run within `target_epsilon`.

    Args:
        target_epsilon: > 0.
        delta: in (0, 1).
        sampling_prob: in (0, 1].
        num_steps: of the run, >= 1.
        accountant: as for `epsilon`.

    Returns:
        A noise multiplier whose epsilon is at most target_epsilon, within 1e-6 of the least such.

    Guarantees:
        The epsilon of the result never exceeds the target.

    Raises:
        ValueError: a number out of range, or no noise multiplier below 1e6 is enough.

    Source: bisection; epsilon falls with noise.

    >>> noise = calibrate_noise_multiplier(
    ...     target_epsilon=3.0, delta=1e-5, sampling_prob=0.01, num_steps=1000, accountant="rdp")
    >>> round(noise, 2)
    0.86
    """
    _checks.positive(target_epsilon=target_epsilon)
    sampling_prob = _positive_probability(sampling_prob)
    num_steps = _checks.integer(at_least=1, num_steps=num_steps)

    def fits(noise: float) -> bool:
        event = StepEvent(noise_multiplier=noise, sampling_prob=sampling_prob, count=num_steps)
        return epsilon((event,), delta=delta, accountant=accountant) <= target_epsilon

    return _least(fits, 1e-3, 1e6, "noise_multiplier")


def calibrate_num_steps(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    sampling_prob: float,
    accountant: str = "pld",
) -> int:
    """The most steps that stay within `target_epsilon`; 0 where none does.

    Args:
        target_epsilon: > 0.
        delta: in (0, 1).
        noise_multiplier: finite, >= 0.
        sampling_prob: in (0, 1].
        accountant: as for `epsilon`.

    Returns:
        The largest number of steps, at most 2**50 - 1, whose epsilon is at most target_epsilon.

    Guarantees:
        The epsilon of the result never exceeds the target; below 2**50 - 1, one step more would.

    Raises:
        ValueError: a number out of range.

    Source: bisection; epsilon rises with steps.

    >>> calibrate_num_steps(
    ...     target_epsilon=3.0, delta=1e-5, noise_multiplier=1.0, sampling_prob=0.01, accountant="rdp")
    2195
    """
    _checks.positive(target_epsilon=target_epsilon)
    noise_multiplier = _checks.finite_non_negative(noise_multiplier=noise_multiplier)
    sampling_prob = _positive_probability(sampling_prob)

    def fits(count: int) -> bool:
        event = StepEvent(
            noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, count=count
        )
        return epsilon((event,), delta=delta, accountant=accountant) <= target_epsilon

    low, high = 0, 1
    while high < 2**50 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def calibrate_sampling_prob(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    num_steps: int,
    accountant: str = "pld",
) -> float:
    """The largest sampling probability that keeps a run within `target_epsilon`.

    Args:
        target_epsilon: > 0.
        delta: in (0, 1).
        noise_multiplier: finite, > 0.
        num_steps: of the run, >= 1.
        accountant: as for `epsilon`.

    Returns:
        A probability whose epsilon is at most target_epsilon, within 1e-6 of the largest such; 1
        where even the full batch fits.

    Guarantees:
        The epsilon of the result never exceeds the target.

    Raises:
        ValueError: a number out of range, or no probability above 1e-12 fits.

    Source: bisection; epsilon rises with sampling.

    >>> prob = calibrate_sampling_prob(
    ...     target_epsilon=3.0, delta=1e-5, noise_multiplier=1.0, num_steps=1000, accountant="rdp")
    >>> round(prob, 4)
    0.0142
    """
    _checks.positive(target_epsilon=target_epsilon)
    noise_multiplier = _checks.positive(noise_multiplier=noise_multiplier)
    num_steps = _checks.integer(at_least=1, num_steps=num_steps)

    def fits(inverse: float) -> bool:
        event = StepEvent(
            noise_multiplier=noise_multiplier, sampling_prob=1 / inverse, count=num_steps
        )
        return epsilon((event,), delta=delta, accountant=accountant) <= target_epsilon

    return 1 / _least(fits, 1.0, 1e12, "1 / sampling_prob")


def _positive_probability(value: float) -> float:
    number = _checks.probability(sampling_prob=value)
    if number == 0.0:
        raise ValueError("Expected 0 < sampling_prob <= 1, got 0. Nothing would be released.")
    return number


def _least(fits: Callable[[float], bool], low: float, high: float, name: str) -> float:
    """The least number in [low, high] that fits, where all above one that fits do too."""
    if fits(low):
        return low
    if not fits(high):
        raise ValueError(
            f"Expected some {name} <= {high:g} to fit the target, found none. {_NO_ROOM}"
        )
    while high / low > 1 + _TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high

"""The noise, the number of steps or the sampling probability that a target epsilon allows.

Each is a search for the last whole number that fits: of steps, or of small equal steps in the
logarithm. It returns a number that was tried and whose epsilon, an upper bound, is at most the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypedDict, Unpack

from dpfunc import _checks
from dpfunc.accounting.epsilon import epsilon
from dpfunc.accounting.gdp import mu_of
from dpfunc.accounting.profile import gaussian_mu
from dpfunc.events import AnyLog, Log, StepEvent, append

_NOISES = (1e-3, 1e6)
_LEAST_PROB = 1e-12
_FINE = 2**33
"""Equal parts of the logarithm, 2.4e-9 of noise and 3.2e-9 of a probability each."""
_TRIES = 30
"""After so many, where epsilon jumps or is cut off, only halving is sure to end."""
_MOST_STEPS = 2**50 - 1
_NO_ROOM = "Raise target_epsilon or delta, or release less."


class Fields(TypedDict, total=False):
    """What else an event says, as for StepEvent: of a Gaussian on a Poisson batch, if nothing."""

    mechanism: str
    sampling: str
    relation: str
    overflow_prob: float


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    sampling_prob: float,
    num_steps: int,
    accountant: str = "pld",
    **fields: Unpack[Fields],
) -> float:
    """The least noise that keeps a run within `target_epsilon`.

    Args:
        target_epsilon: > 0.
        delta: in (0, 1).
        sampling_prob: in (0, 1].
        num_steps: of the run, >= 1.
        accountant: as for `epsilon`.
        fields: mechanism, sampling, relation and overflow_prob, as for StepEvent.

    Returns:
        A noise multiplier >= 1e-3 whose epsilon is at most target_epsilon, within 1e-8 relative of
        the least such.

    Guarantees:
        The epsilon of the result never exceeds the target; at 1e-8 less noise it would.

    Raises:
        ValueError, TypeError: a number out of range, an event that the accountant refuses, or no
            noise multiplier below 1e6 is enough.

    Source: interpolation (Illinois) on log epsilon, which falls with log noise and is nearly straight.

    >>> noise = calibrate_noise_multiplier(
    ...     target_epsilon=1.0, delta=1e-5, sampling_prob=0.01, num_steps=10_000)
    >>> round(noise, 7)
    3.8128168
    """
    excess = _excess_over(target_epsilon, delta, accountant)
    sampling_prob = _positive_probability(sampling_prob)
    num_steps = _checks.integer(at_least=1, num_steps=num_steps)
    width = math.log(_NOISES[1] / _NOISES[0]) / _FINE

    run = StepEvent(
        noise_multiplier=_NOISES[1], sampling_prob=sampling_prob, count=num_steps, **fields
    )

    def noise_of(place: int) -> float:
        return max(_NOISES[1] * math.exp(-width * place), _NOISES[0])

    def at(place: int) -> float:
        return excess((replace(run, noise_multiplier=noise_of(place)),))

    # mu^2 = num_steps sampling_prob^2 (e^(1 / noise^2) - 1), solved for noise
    mu = _mu_within(target_epsilon, delta)
    inverse = math.log1p(mu / sampling_prob * (mu / sampling_prob / num_steps))
    guess = math.log(_NOISES[1]) + 0.5 * math.log(min(max(inverse, 1e-12), 1e6))
    place = _last(at, -1, _FINE, _place(guess / width), width)
    if place < 0:
        raise ValueError(
            f"Expected some noise_multiplier <= {_NOISES[1]:g} to fit the target, found none. {_NO_ROOM}"
        )
    return noise_of(place)


def calibrate_num_steps(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    sampling_prob: float,
    accountant: str = "pld",
    **fields: Unpack[Fields],
) -> int:
    """The most steps that stay within `target_epsilon`; 0 where none does.

    Args:
        target_epsilon: > 0.
        delta: in (0, 1).
        noise_multiplier: finite, >= 0.
        sampling_prob: in (0, 1].
        accountant: as for `epsilon`.
        fields: mechanism, sampling, relation and overflow_prob, as for StepEvent.

    Returns:
        The largest number of steps, at most 2**50 - 1, whose epsilon is at most target_epsilon.

    Guarantees:
        The epsilon of the result never exceeds the target; below 2**50 - 1, one step more would.

    Raises:
        ValueError, TypeError: a number out of range, or an event that the accountant refuses.

    Source: that of `remaining`.

    >>> calibrate_num_steps(target_epsilon=1.0, delta=1e-5, noise_multiplier=2.0, sampling_prob=0.01)
    2433
    """
    event = StepEvent(
        noise_multiplier=_checks.finite_non_negative(noise_multiplier=noise_multiplier),
        sampling_prob=_positive_probability(sampling_prob),
        **fields,
    )
    return remaining((), event, target_epsilon=target_epsilon, delta=delta, accountant=accountant)


def calibrate_sampling_prob(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    num_steps: int,
    accountant: str = "pld",
    **fields: Unpack[Fields],
) -> float:
    """The largest sampling probability that keeps a run within `target_epsilon`.

    Args:
        target_epsilon: > 0.
        delta: in (0, 1).
        noise_multiplier: finite, > 0.
        num_steps: of the run, >= 1.
        accountant: as for `epsilon`.
        fields: mechanism, sampling, relation and overflow_prob, as for StepEvent.

    Returns:
        A probability whose epsilon is at most target_epsilon, within 1e-8 relative of the largest
        such; 1 where even the full batch fits.

    Guarantees:
        The epsilon of the result never exceeds the target; at a probability 1e-8 larger it would.

    Raises:
        ValueError, TypeError: a number out of range, an event that the accountant refuses, or no
            probability above 1e-12 fits.

    Source: interpolation (Illinois) on log epsilon, which rises with log sampling_prob.

    >>> prob = calibrate_sampling_prob(
    ...     target_epsilon=1.0, delta=1e-5, noise_multiplier=1.0, num_steps=10_000)
    >>> round(prob, 9)
    0.001973031
    """
    excess = _excess_over(target_epsilon, delta, accountant)
    noise_multiplier = _checks.positive(noise_multiplier=noise_multiplier)
    num_steps = _checks.integer(at_least=1, num_steps=num_steps)
    width = -math.log(_LEAST_PROB) / _FINE

    run = StepEvent(
        noise_multiplier=noise_multiplier, sampling_prob=_LEAST_PROB, count=num_steps, **fields
    )

    def prob_of(place: int) -> float:
        return math.exp(-width * (_FINE - place))

    def at(place: int) -> float:
        return excess((replace(run, sampling_prob=prob_of(place)),))

    gaussian = StepEvent(
        noise_multiplier=noise_multiplier, sampling_prob=_LEAST_PROB, count=num_steps
    )
    guess = math.log(_mu_within(target_epsilon, delta)) - math.log(mu_of((gaussian,)).mu)
    place = _last(at, -1, _FINE, _place(guess / width), width)
    if place < 0:
        raise ValueError(
            f"Expected some sampling_prob >= {_LEAST_PROB:g} to fit the target, found none. {_NO_ROOM}"
        )
    return prob_of(place)


def remaining(
    log: AnyLog,
    event: StepEvent,
    *,
    target_epsilon: float,
    delta: float,
    accountant: str = "pld",
) -> int:
    """How many further steps of one kind fit in the budget.

    Args:
        log: what ran; `()` is nothing.
        event: one of the steps to come; its count does not matter.
        target_epsilon: of the log and those steps together, > 0.
        delta: in (0, 1).
        accountant: as for `epsilon`.

    Returns:
        The largest number of steps, at most 2**50 - 1, with which epsilon is at most target_epsilon;
        0 where not one fits, also where the log alone is beyond the target.

    Guarantees:
        With that many the epsilon does not exceed the target, unless the log alone does; below
        2**50 - 1, with one step more it would.
        `remaining((), event)` is what `calibrate_num_steps` gives.

    Raises:
        ValueError, TypeError: a number out of range, or an event that the accountant refuses.

    Source: interpolation (Illinois) between whole numbers; epsilon rises with steps.

    >>> event = StepEvent(noise_multiplier=2.0, sampling_prob=0.01)
    >>> remaining((replace(event, count=1000),), event, target_epsilon=1.0, delta=1e-5)
    1433
    """
    excess = _excess_over(target_epsilon, delta, accountant)
    log = Log(log)
    if not isinstance(event, StepEvent):
        raise TypeError(f"Expected event to be a StepEvent, got {event!r}.")
    event = replace(event, count=1)
    try:
        room = _mu_within(target_epsilon, delta) ** 2 - mu_of(log).mu ** 2
        guess = _place(max(room, 0.0) / mu_of((event,)).mu ** 2)
    except (ValueError, ArithmeticError):
        guess = 1  # no formula, or nothing released
    slope = 0.7 / max(guess, 1)

    def at(count: int) -> float:
        return excess(append(log, replace(event, count=count)))

    return _last(at, 0, _MOST_STEPS, guess, slope)


def _excess_over(target_epsilon: float, delta: float, accountant: str) -> Callable[[AnyLog], float]:
    """log of epsilon over the target, cut at 2 on either side: at most 0 where a log fits."""
    target = _checks.positive(target_epsilon=target_epsilon)
    delta = _checks.open_unit("It is a probability of failure, say 1e-5.", delta=delta)

    def excess(log: AnyLog) -> float:
        value = epsilon(log, delta=delta, accountant=accountant)
        over = math.log(value) - math.log(target) if value > 0 else -2.0
        return max(min(over, 0.0), -2.0) if value <= target else min(max(over, 1e-300), 2.0)

    return excess


def _mu_within(target_epsilon: float, delta: float) -> float:
    return float(gaussian_mu(target_epsilon, delta))


def _place(value: float) -> int:
    return int(min(max(value, 0.0), float(_MOST_STEPS)))


def _positive_probability(value: float) -> float:
    number = _checks.probability(sampling_prob=value)
    if number == 0.0:
        raise ValueError("Expected 0 < sampling_prob <= 1, got 0. Nothing would be released.")
    return number


def _last(excess: Callable[[int], float], bottom: int, top: int, guess: int, slope: float) -> int:
    """The largest whole number up to top whose excess is at most 0; bottom is taken to be one.

    From the guess outward by what the slope says and half more until both ends are known, then by
    regula falsi, in which an end that stays counts for half as much each time (Illinois).
    """
    low, high, at_low, at_high = bottom, top + 1, 0.0, 0.0
    place, before, stride, tries = guess, 0.0, 0, 0
    while high - low > 1:
        place = min(max(place, low + 1), high - 1)
        value = excess(place)
        tries += 1
        stays = 0.5 if value * before > 0 else 1.0
        if value <= 0:
            low, at_low, at_high = place, value, at_high * stays
        else:
            high, at_high, at_low = place, value, at_low * stays
        before = value
        if low == bottom or high > top:
            stride = max(4 * stride, math.ceil(1.5 * abs(value) / slope))
            place += stride if value <= 0 else -stride
        elif tries < _TRIES:
            place = low + int((high - low) * (at_low / (at_low - at_high)))
        else:
            place = (low + high) // 2
    return low

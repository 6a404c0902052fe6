"""Noise of a user's own: what it costs is for the user to say, as events that accountants know."""

from __future__ import annotations

from collections.abc import Callable

from dpfunc.events import CUSTOM, AnyLog, Log, StepEvent


def account_as(log: AnyLog, mechanism: str, events: Callable[[StepEvent], AnyLog]) -> Log:
    """The log with each event of a noise of your own replaced by events that cost no less.

    Args:
        log: what ran.
        mechanism: the noise, "custom:NAME".
        events: event -> the log whose privacy profile lies above that of the event at every epsilon:
            your claim, and the proof of it is yours.

    Returns:
        A new log; all other events are as they were, in their order.

    Guarantees:
        Nothing else about the event is assumed: without this, every accountant refuses it.

    Raises:
        ValueError: mechanism is not named "custom:NAME", or events returned one of that very noise.
        TypeError: events did not return a log.

    Source: a mechanism whose profile lies above at every epsilon may stand for the other under
        composition: Dong, Roth and Su 2022, arXiv:1905.02383, Theorem 4.

    >>> log = (StepEvent(noise_multiplier=2.0, sampling_prob=0.1, mechanism="custom:rounded"),)
    >>> as_gaussian = lambda e: (StepEvent(noise_multiplier=0.99 * e.noise_multiplier,
    ...                                    sampling_prob=e.sampling_prob, count=e.count),)
    >>> account_as(log, "custom:rounded", as_gaussian)[0].noise_multiplier
    1.98
    """
    if not isinstance(mechanism, str) or not mechanism.startswith(CUSTOM):
        raise ValueError(f"Expected mechanism to be named 'custom:NAME', got {mechanism!r}.")
    told = Log()
    for event in Log(log):
        stands = Log(events(event)) if event.mechanism == mechanism else Log((event,))
        if any(other.mechanism == mechanism for other in stands) and event.mechanism == mechanism:
            raise ValueError(
                f"Expected events of a noise that accountants know, got {mechanism!r} again."
            )
        told = told + stands
    return told

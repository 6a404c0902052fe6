"""Noise of a user's own: what it costs is for the user to say, as events that accountants know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dpfunc.events import CUSTOM, AnyLog, Log, StepEvent, append


def account_as(log: AnyLog, mechanism: str, events: Callable[[StepEvent], AnyLog]) -> Log:
    """The log with each event of a noise of your own replaced by events that cost no less.

    Args:
        log: what ran.
        mechanism: the noise, "custom:NAME".
        events: event -> the log whose privacy profile lies above that of one such release at every
            epsilon: your claim, and the proof of it is yours. It is asked about a count of 1.

    Returns:
        A new log; all other events are as they were, in their order.

    Guarantees:
        Nothing else about the event is assumed: without this, every accountant refuses it. Counts are
        multiplied, and the relation stays what it is.

    Raises:
        ValueError: mechanism is not named "custom:NAME", or events returned nothing, one of that very
            noise, or one of another relation.
        TypeError: events did not return a log.

    Source: a mechanism whose profile lies above at every epsilon may stand for the other under
        composition: Dong, Roth and Su 2022, arXiv:1905.02383, Theorem 4.

    >>> log = (StepEvent(noise_multiplier=2.0, sampling_prob=0.1, mechanism="custom:rounded"),)
    >>> as_gaussian = lambda e: (StepEvent(noise_multiplier=0.99 * e.noise_multiplier,
    ...                                    sampling_prob=e.sampling_prob),)
    >>> account_as(log, "custom:rounded", as_gaussian)[0].noise_multiplier
    1.98
    """
    if not isinstance(mechanism, str) or not mechanism.startswith(CUSTOM):
        raise ValueError(f"Expected mechanism to be named 'custom:NAME', got {mechanism!r}.")
    told = Log()
    for event in Log(log):
        if event.mechanism != mechanism:
            told = append(told, event)
            continue
        stands = Log(events(replace(event, count=1)))
        if not stands or any(
            other.mechanism == mechanism or other.relation != event.relation for other in stands
        ):
            raise ValueError(
                f"Expected events of {event.relation!r} and of a noise that accountants know, got "
                f"{list(stands)} for {mechanism!r}."
            )
        told = told + [replace(other, count=other.count * event.count) for other in stands]
    return told

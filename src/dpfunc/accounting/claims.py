"""What the same noise would be worth, had the batches been drawn otherwise than the log says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from dpfunc.accounting.epsilon import epsilon
from dpfunc.events import AnyLog, Log, StepEvent

_MOST_EVENTS = 64
"""Beyond so many, batches of a fixed size have no narrow answer."""
_DRAWN = ("poisson", "truncated_poisson")


class Claim(NamedTuple):
    """An epsilon, how batches must have been drawn for it, and between which neighbours it holds."""

    assumes: str
    relation: str
    epsilon: float


def otherwise(
    log: AnyLog, *, delta: float, accountant: str = "pld", num_attempts: int = 1
) -> tuple[Claim, ...]:
    """The claims for other ways of drawing batches that the accountant has a bound for.

    Args:
        log: what ran.
        delta: in (0, 1).
        accountant: as for `epsilon`.
        num_attempts: of the run; a shuffled epoch may have been cut short in each.

    Returns:
        At most two Claims, whose texts have a "{unit}" in them: uniform subsets of a fixed size,
        with the same neighbours; and slices of a shuffled order, with an example replaced by a blank one.

    Guarantees:
        Each is the epsilon of a log of its own, as `epsilon` gives it. What the accountant refuses
        is left out.

    Raises:
        ValueError, TypeError: as for `epsilon`.

    Source: for a shuffled order, an epoch shows each example to one of its steps, and the others
        are the same without it: one release of all the data, with the least noise of any step.

    >>> log = (StepEvent(noise_multiplier=2.0, sampling_prob=0.01, count=1000),)
    >>> [round(claim.epsilon, 2) for claim in otherwise(log, delta=1e-5)]
    [1.83, 7.51]
    """
    log = Log(log)
    found = [_fixed(log), _shuffled(log, num_attempts)]
    claims: list[Claim] = []
    for assumes, events in filter(None, found):
        try:
            value = epsilon(events, delta=delta, accountant=accountant)
        except ValueError:
            epsilon(log, delta=delta, accountant=accountant)  # was the log itself at fault?
            continue
        claims.append(Claim(assumes, events[0].relation, value))
    return tuple(claims)


def _fixed(log: Log) -> tuple[str, Log] | None:
    if len(log) > _MOST_EVENTS or not any(event.sampling in _DRAWN for event in log):
        return None
    text = "each batch is a uniform subset, of a fixed size that is the same share of the data"
    return text, Log(
        replace(event, sampling="fixed_without_replacement", overflow_prob=0.0)
        if event.sampling in _DRAWN
        else event
        for event in log
    )


def _shuffled(log: Log, num_attempts: int) -> tuple[str, Log] | None:
    probs = {event.sampling_prob for event in log}
    mechanisms = {event.mechanism for event in log}
    if len(probs) != 1 or len(mechanisms) != 1 or not 0.0 < min(probs) < 1.0:
        return None
    epoch = math.floor(1 / max(probs.pop(), 1e-300))
    # Each attempt may have begun an epoch of its own: the sum of ceil(n_a / m) over a attempts is
    # at most ceil(sum of n_a / m) + a - 1.
    epochs = -(-sum(event.count for event in log) // epoch) + num_attempts - 1
    text = (
        f"batches are slices of a shuffled order, each {{unit}} in one of an epoch's {epoch} steps "
        f"or more, in {epochs} epochs"
    )
    event = StepEvent(
        noise_multiplier=min(event.noise_multiplier for event in log),
        sampling_prob=1.0,
        count=epochs,
        mechanism=mechanisms.pop(),
        sampling="none",
        relation="zero_out",
    )
    return text, Log((event,))

"""What ran, as data: one `StepEvent` a noisy release, in an immutable log that runs together.

A field is never removed and never changes its meaning; a new one is optional. An accountant refuses
an event that it does not know, it does not guess. Everything in an event is public.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from dpfunc import _checks

MECHANISMS = ("gaussian", "laplace")
SAMPLINGS = ("poisson", "truncated_poisson", "fixed_without_replacement", "none")
MAX_COUNT = 10**300  # a float can still hold it
RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """`count` releases of a sum over a random batch, plus noise.

    For vectors v_i of norm at most C and a batch S drawn by `sampling`: the release is
    sum of v_i over S, plus noise of scale noise_multiplier * C in each coordinate.

    Args:
        noise_multiplier: noise scale over sensitivity, dimensionless, in [0, inf]. The scale is the
            standard deviation for "gaussian" (L2 norm), b for "laplace" (L1 norm).
        sampling_prob: probability that an example is in the batch, in [0, 1].
        count: how many such releases, a whole number in [0, 1e300].
        mechanism: "gaussian" or "laplace".
        sampling: "poisson" (each example in or out independently), "truncated_poisson" (Poisson,
            then a uniform subset where the batch would exceed a public cap),
            "fixed_without_replacement", or "none" (every example, probability 1).
        relation: which data sets are neighbours: "add_or_remove_one", "replace_one", "zero_out".

    Guarantees:
        Numbers are plain floats and ints, so that equal events compare equal and write as JSON.

    Raises:
        ValueError, TypeError: a number that is NaN or out of range, an unknown name, or sampling
            "none" with a probability other than 1.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> StepEvent(noise_multiplier=1.1, sampling_prob=0.01, count=1000).count
    1000
    """

    noise_multiplier: float
    sampling_prob: float
    count: int = 1
    mechanism: str = "gaussian"
    sampling: str = "poisson"
    relation: str = "add_or_remove_one"

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("noise_multiplier", _checks.non_negative(noise_multiplier=self.noise_multiplier))
        put("sampling_prob", _checks.probability(sampling_prob=self.sampling_prob))
        put("count", _checks.integer(at_least=0, count=self.count))
        if self.count > MAX_COUNT:
            raise ValueError(
                f"Expected count <= 1e300, got a number of {len(hex(self.count)) - 2} hex digits."
            )
        _checks.choice(MECHANISMS, mechanism=self.mechanism)
        _checks.choice(SAMPLINGS, sampling=self.sampling)
        _checks.choice(RELATIONS, relation=self.relation)
        if self.sampling == "none" and self.sampling_prob != 1.0:
            raise ValueError(
                f"Expected sampling_prob=1 with sampling='none', got {self.sampling_prob}. "
                "Say sampling='poisson' if batches are drawn."
            )


class Log(tuple[StepEvent, ...]):
    """An immutable log of events in which equal neighbours are one event with their counts added.

    Iterate it, add logs or tuples of events with `+`, compare it, hash it; `()` equals the empty log.
    """

    __slots__ = ()

    def __new__(cls, events: Iterable[StepEvent] = ()) -> Log:
        if isinstance(events, StepEvent):
            raise TypeError("Expected a log, got one StepEvent. Write (event,) for a log of one.")
        runs: list[StepEvent] = []
        for event in events:
            if not isinstance(event, StepEvent):
                raise TypeError(f"Expected a log to hold StepEvents, got {event!r}. {_ADVICE}")
            if event.count == 0:
                continue
            if runs and replace(event, count=runs[-1].count) == runs[-1]:
                event = replace(event, count=event.count + runs.pop().count)
            runs.append(event)
        return super().__new__(cls, runs)

    def __add__(self, other: Any) -> Log:
        return Log((*self, *other))

    def __radd__(self, other: Any) -> Log:
        return Log((*other, *self))

    def __repr__(self) -> str:
        return f"Log({list(self)!r})"


_ADVICE = "complete() a PartialEvent with the number first."

AnyLog: TypeAlias = "Log | tuple[StepEvent, ...]"


def append(log: AnyLog, event: StepEvent) -> Log:
    """The log with one more event at its end.

    Args:
        log: a Log, or a tuple of StepEvents; `()` is the empty log.
        event: what ran.

    Returns:
        A new Log; `log` is unchanged.

    Guarantees:
        An event like the last but for its count is merged into it; a count of 0 adds nothing.
        `append(a + b, e) == a + append(b, e)`.

    Raises:
        TypeError: event, or an entry of log, is not a StepEvent.

    >>> event = StepEvent(noise_multiplier=1.0, sampling_prob=0.1)
    >>> append(append((), event), event)[0].count
    2
    """
    return Log((*log, event))

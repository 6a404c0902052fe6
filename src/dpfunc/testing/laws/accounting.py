"""Laws of accountants. Each takes the function under test as `epsilon`, called as `dpfunc.epsilon`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from dpfunc import accounting
from dpfunc.accounting import delta_bounds, epsilon_bounds
from dpfunc.accounting.rdp import ORDERS, rdp
from dpfunc.events import AnyLog, Log, StepEvent

Epsilon: TypeAlias = Callable[..., float]
"""`epsilon(log, delta=delta) -> float`."""

Fold: TypeAlias = Callable[[AnyLog], Any]
"""From a log to numbers that add up where logs do."""


def epsilon_is_a_number(
    log: AnyLog, delta: float, *, epsilon: Epsilon = accounting.epsilon
) -> None:
    """Epsilon is in [0, inf], never NaN; nothing released costs nothing.

    Args:
        log: what ran.
        delta: in (0, 1).
        epsilon: the function under test.

    Raises:
        AssertionError: a number below 0, NaN, or a cost of an empty log.

    >>> epsilon_is_a_number((StepEvent(noise_multiplier=1.0, sampling_prob=0.1),), 1e-5)
    """
    found = epsilon(log, delta=delta)
    if not found >= 0.0:
        raise AssertionError(f"epsilon of {log!r} at delta={delta!r} is {found!r}")
    nothing = Log(replace(event, count=0) for event in Log(log))
    for empty in ((), nothing):
        cost = epsilon(empty, delta=delta)
        if cost != 0.0:
            raise AssertionError(f"nothing released, {empty!r}, costs {cost!r}")


def logs_compose(
    a: AnyLog, b: AnyLog, delta: float, *, epsilon: Epsilon = accounting.epsilon, rtol: float = 1e-5
) -> None:
    """The order of two logs does not matter, and both cost at least what each does.

    Args:
        a, b: logs of one relation.
        delta: in (0, 1).
        epsilon: the function under test.
        rtol: what it may be off by, relative to max(1, epsilon).

    Raises:
        AssertionError: the order matters, or a log costs less with another after it.

    >>> log = (StepEvent(noise_multiplier=1.0, sampling_prob=0.1, count=10),)
    >>> logs_compose(log, (replace(log[0], noise_multiplier=3.0),), 1e-5)
    """
    both, turned = (epsilon(Log(x) + Log(y), delta=delta) for x, y in ((a, b), (b, a)))
    _expect_close(both, turned, rtol, f"{a!r} then {b!r}, and in the other order")
    for part in (a, b):
        alone = epsilon(part, delta=delta)
        if not both >= alone - rtol * max(1.0, alone):
            raise AssertionError(f"{part!r} costs {alone!r} alone and {both!r} with another log")


def costs_add_up(a: AnyLog, b: AnyLog, *, fold: Fold | None = None, rtol: float = 1e-9) -> None:
    """What is additive in an accountant adds up: fold(a + b) = fold(a) + fold(b), and 0 for no log.

    Args:
        a, b: logs.
        fold: the function under test, from a log to numbers; None is our Renyi divergences.
        rtol: relative to the sum.

    Raises:
        AssertionError: it does not add up.

    >>> log = (StepEvent(noise_multiplier=1.0, sampling_prob=0.1, count=10),)
    >>> costs_add_up(log, log)
    """
    fold = fold or _rdp_of
    whole, parts = np.asarray(fold(Log(a) + Log(b))), np.asarray(fold(a)) + np.asarray(fold(b))
    if not np.allclose(whole, parts, rtol=rtol, atol=0.0):
        raise AssertionError(f"{a!r} and {b!r} cost {whole!r} together and {parts!r} apart")
    if np.any(np.asarray(fold(()))):
        raise AssertionError(f"no log costs {fold(())!r}")


def counts_fold(
    log: AnyLog,
    copies: int,
    delta: float,
    *,
    epsilon: Epsilon = accounting.epsilon,
    rtol: float = 1e-5,
) -> None:
    """A count of n is n copies of the log, one after the other.

    Args:
        log: what ran.
        copies: n, at least 1.
        delta: in (0, 1).
        epsilon: the function under test.
        rtol: as for `logs_compose`.

    Raises:
        AssertionError: copies cost something else than a count.

    >>> counts_fold((StepEvent(noise_multiplier=1.0, sampling_prob=0.1),), 3, 1e-5)
    """
    events = tuple(Log(log))
    counted = Log(replace(event, count=event.count * copies) for event in events)
    found = epsilon(counted, delta=delta)
    apart = epsilon(events * copies, delta=delta)
    _expect_close(found, apart, rtol, f"{copies} times {log!r}, and copies of it")


def epsilon_is_monotone(
    event: StepEvent,
    delta: float,
    factor: float,
    *,
    epsilon: Epsilon = accounting.epsilon,
    rtol: float = 1e-5,
) -> None:
    """Epsilon falls with noise and delta, and rises with sampling and with steps.

    Args:
        event: its noise is changed by the factor, and its probability where batches are drawn.
        delta: in (0, 1).
        factor: at least 1.
        epsilon: the function under test.
        rtol: as for `logs_compose`.

    Raises:
        AssertionError: it moves the wrong way.

    >>> epsilon_is_monotone(StepEvent(noise_multiplier=1.0, sampling_prob=0.1), 1e-5, 2.0)
    """
    base = epsilon((event,), delta=delta)
    slack = rtol * max(1.0, base) if math.isfinite(base) else 0.0
    lower = {
        "with more noise": epsilon((_with(event, "noise_multiplier", factor),), delta=delta),
        "at a larger delta": epsilon((event,), delta=1 - (1 - delta) / factor),
    }
    if event.sampling != "none":
        rarer = _with(event, "sampling_prob", 1 / factor)
        lower["with rarer sampling"] = epsilon((rarer,), delta=delta)
    for how, found in lower.items():
        if not found <= base + slack:
            raise AssertionError(f"epsilon of {event!r} rises from {base!r} to {found!r} {how}")
    for count in (event.count + 1, 2 * event.count + 1):
        found = epsilon((replace(event, count=count),), delta=delta)
        if not found >= base - slack:
            raise AssertionError(
                f"epsilon of {event!r} falls from {base!r} to {found!r} at a count of {count}"
            )


def epsilon_covers(log: AnyLog, delta: float, *, epsilon: Epsilon = accounting.epsilon) -> None:
    """A claimed epsilon is not below the truth: the certified lower bound of `epsilon_bounds`.

    Args:
        log: what ran.
        delta: in (0, 1).
        epsilon: the function under test, an accountant of your own, say.

    Raises:
        AssertionError: it under-reports.

    >>> from functools import partial
    >>> epsilon_covers((StepEvent(noise_multiplier=1.0, sampling_prob=0.1),), 1e-5,
    ...     epsilon=partial(accounting.epsilon, accountant="rdp"))
    """
    found, (lower, _) = epsilon(log, delta=delta), epsilon_bounds(log, delta=delta)
    if not found >= lower:
        raise AssertionError(
            f"{log!r} is claimed to cost {found!r} at delta={delta!r}; it costs at least {lower!r}"
        )


def bounds_bracket(
    log: AnyLog,
    delta: float,
    *,
    epsilon_bounds: Callable[..., Any] = epsilon_bounds,
    delta_bounds: Callable[..., Any] = delta_bounds,
    rtol: float = 1e-5,
) -> None:
    """Bounds are in order, tight, and nested: at a larger delta, with fewer steps, and back to delta.

    Args:
        log: what ran; its epsilon is known from both sides (see `epsilon_bounds` for where it is not:
            fixed-size sampling under replace-one, say, and rare steps with little noise).
        delta: in (0, 1/2).
        epsilon_bounds, delta_bounds: the functions under test.
        rtol: how far apart they may be, relative to max(1, epsilon).

    Raises:
        AssertionError: a lower bound above an upper one, or bounds that are NaN or far apart.

    >>> bounds_bracket((StepEvent(noise_multiplier=1.0, sampling_prob=0.1, count=10),), 1e-5)
    """
    lower, upper = epsilon_bounds(log, delta=delta)
    if not 0.0 <= lower <= upper:
        raise AssertionError(f"the bounds of {log!r} at delta={delta!r} are {lower!r}, {upper!r}")
    if math.isfinite(upper) and not upper - lower <= rtol * max(1.0, upper):
        raise AssertionError(
            f"the bounds of {log!r} are {upper - lower!r} apart: {lower!r}, {upper!r}"
        )
    fewer = Log(replace(event, count=(event.count + 1) // 2) for event in Log(log))
    smaller = {
        "a larger delta": epsilon_bounds(log, delta=2 * delta)[0],
        "fewer steps": epsilon_bounds(fewer, delta=delta)[0],
    }
    for how, found in smaller.items():
        if not found <= upper:
            raise AssertionError(
                f"at least {found!r} at {how}, of {log!r} that is at most {upper!r}"
            )
    if math.isfinite(upper):
        for side, at in (("lower", lower), ("upper", upper)):
            least, most = delta_bounds(log, epsilon=at)
            held = least <= delta * (1 + 1e-9) if side == "upper" else most >= delta * (1 - 1e-9)
            if not (0.0 <= least <= most <= 1.0 and (held or at == 0.0)):
                raise AssertionError(
                    f"at the {side} bound {at!r} of epsilon, delta is in [{least!r}, {most!r}], "
                    f"which {delta!r} contradicts"
                )


def relations_are_ordered(
    event: StepEvent,
    delta: float,
    *,
    relations: Sequence[str] = ("add_or_remove_one", "replace_one"),
    epsilon: Epsilon = accounting.epsilon,
    rtol: float = 1e-5,
) -> None:
    """Neighbours that differ by more cost more: one replaced is one removed and another added.

    A Gaussian full batch under replace-one costs just what it costs with half of the noise.

    Args:
        event: Gaussian, Poisson-sampled or a full batch; its relation is replaced.
        delta: in (0, 1).
        relations: from the cheapest on.
        epsilon: the function under test.
        rtol: as for `logs_compose`.

    Raises:
        AssertionError: a wider relation costs less, or the full batch costs something else.

    >>> relations_are_ordered(StepEvent(noise_multiplier=1.0, sampling_prob=0.1, count=10), 1e-5)
    """
    costs = [(name, epsilon((replace(event, relation=name),), delta=delta)) for name in relations]
    for (name, cheap), (other, dear) in itertools.pairwise(costs):
        if not dear >= cheap - rtol * max(1.0, cheap):
            raise AssertionError(
                f"{event!r} costs {dear!r} under {other!r} and {cheap!r} under {name!r}"
            )
    full = replace(event, sampling="none", sampling_prob=1.0, relation="replace_one")
    doubled = replace(
        full, relation="add_or_remove_one", noise_multiplier=full.noise_multiplier / 2
    )
    found, wanted = epsilon((full,), delta=delta), epsilon((doubled,), delta=delta)
    _expect_close(found, wanted, rtol, f"{full!r}, and {doubled!r}")


def _rdp_of(log: AnyLog) -> Any:
    orders = ORDERS[::8]
    return sum((rdp(event, orders) for event in Log(log)), np.zeros(len(orders)))


def _with(event: StepEvent, name: str, factor: float) -> StepEvent:
    return replace(event, **{name: getattr(event, name) * factor})


def _expect_close(a: float, b: float, rtol: float, who: str) -> None:
    if not (a == b or abs(a - b) <= rtol * max(1.0, min(a, b))):
        raise AssertionError(f"{who} cost {a!r} and {b!r}")

"""`epsilon` and `delta`: one log, any accountant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpfunc import _checks
from dpfunc.accounting.gdp import gdp_delta, gdp_epsilon
from dpfunc.accounting.pld import delta_bounds, epsilon_bounds
from dpfunc.accounting.rdp import rdp_delta, rdp_epsilon
from dpfunc.events import AnyLog, Log

Many = Sequence[float] | NDArray[Any]

ACCOUNTANTS = ("pld", "rdp", "gdp")
CLAIMS = {
    "pld": "an upper bound",
    "rdp": "an upper bound",
    "gdp": "an approximation, can under-report",
}
"""What the number of an accountant is."""


@overload
def epsilon(log: AnyLog, *, delta: float, accountant: str = "pld") -> float: ...
@overload
def epsilon(log: AnyLog, *, delta: Many, accountant: str = "pld") -> NDArray[np.float64]: ...
def epsilon(log: AnyLog, *, delta: ArrayLike, accountant: str = "pld") -> Any:
    """The epsilon that the log's releases together satisfy at `delta`.

    Args:
        log: what ran; `()` is nothing.
        delta: in (0, 1); a number or an array of them.
        accountant: "pld", the exact privacy profile, rounded up; "rdp", Renyi divergences, some 10 %
            above it; "gdp", exact for full batches and otherwise an APPROXIMATION that can
            under-report, by 70 % and more.

    Returns:
        A number in [0, inf], or an array of them: an upper bound, but for "gdp".

    Guarantees:
        Never negative and never NaN. An empty log, probability 0 and infinite noise give exactly 0;
        zero noise gives inf, unless "pld" sees that it is too rarely drawn to matter at delta.
        `count=n` equals n copies; `log_a + log_b` composes; order does not matter.
        An event that the accountant has no bound for is refused.

    Raises:
        ValueError, TypeError: delta out of range, an unknown accountant or event.

    Source: that of the accountant; see `epsilon_bounds`, `rdp_epsilon` and `gdp_epsilon`.

    >>> from dpfunc.events import StepEvent
    >>> log = (StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=1000),)
    >>> [round(epsilon(log, delta=1e-5, accountant=name), 3) for name in ("pld", "rdp", "gdp")]
    [1.828, 2.101, 1.618]
    """
    _checks.choice(ACCOUNTANTS, accountant=accountant)
    log = Log(log)

    def at(delta: float) -> float:
        delta = _checks.open_unit("It is a probability of failure, say 1e-5.", delta=delta)
        return rdp_epsilon(log, delta).epsilon if accountant == "rdp" else gdp_epsilon(log, delta)

    return epsilon_bounds(log, delta=delta)[1] if accountant == "pld" else _each(at, delta)


@overload
def delta(log: AnyLog, *, epsilon: float, accountant: str = "pld") -> float: ...
@overload
def delta(log: AnyLog, *, epsilon: Many, accountant: str = "pld") -> NDArray[np.float64]: ...
def delta(log: AnyLog, *, epsilon: ArrayLike, accountant: str = "pld") -> Any:
    """The delta that the log's releases together satisfy at `epsilon`.

    Args:
        log: what ran; `()` is nothing.
        epsilon: finite, >= 0; a number or an array of them.
        accountant: as for `epsilon`.

    Returns:
        A number in [0, 1], or an array of them: an upper bound, but for "gdp".

    Guarantees:
        Falls with epsilon and with noise; rises with sampling and with steps.

    Raises:
        ValueError, TypeError: epsilon out of range, an unknown accountant or event.

    Source: that of the accountant.

    >>> delta((), epsilon=1.0)
    0.0
    """
    _checks.choice(ACCOUNTANTS, accountant=accountant)
    log = Log(log)

    def at(epsilon: float) -> float:
        epsilon = _checks.finite_non_negative(epsilon=epsilon)
        return min(1.0, rdp_delta(log, epsilon)) if accountant == "rdp" else gdp_delta(log, epsilon)

    return delta_bounds(log, epsilon=epsilon)[1] if accountant == "pld" else _each(at, epsilon)


def _each(of: Callable[[Any], float], values: ArrayLike) -> Any:
    if np.ndim(values) == 0:
        return of(values)
    array = np.asarray(values)
    return np.array([of(value) for value in array.ravel().tolist()]).reshape(array.shape)

"""Renyi differential privacy of the Poisson-subsampled Gaussian, at any real order above 1.

For noise multiplier s and probability q the two neighbouring outputs are N(0, s^2) and the mixture
(1 - q) N(0, s^2) + q N(1, s^2), and with x ~ N(0, 1), y = x / s - 1 / (2 s^2), w = q (e^y - 1):

    rdp(a) = log A(a) / (a - 1),     A(a) = E[(1 + w)^a]          (Mironov, Talwar, Zhang 2019, eq. 3)

(the other direction is never larger: their Theorem 5). A is computed by the trapezoid rule, which
on an analytic integrand over the real line converges geometrically: w + 1 has no zero for
|Im x| < pi s, so the step h leaves an error near exp(-2 pi (pi s) / h). Since E[w] = 0, it is
A - 1 = E[(1 + w)^a - 1 - a w] that is summed: no digit is lost where A is close to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpfunc.events import AnyLog, Log, StepEvent

ORDERS: tuple[float, ...] = tuple(1.0 + np.geomspace(1e-2, 1e4, 49))
_MOST_NODES = 200_000
_ROUNDING = 2.0**-50


class RenyiEpsilon(NamedTuple):
    """An epsilon, and the order of the Renyi divergence that gives it."""

    epsilon: float
    best_order: float


def rdp(event: StepEvent, orders: Sequence[float] = ORDERS) -> NDArray[np.float64]:
    """Renyi divergence of one event, its count included, at each order.

    Args:
        event: Gaussian, sampled "poisson" or "none", under add-or-remove-one.
        orders: real numbers above 1.

    Returns:
        (len(orders),) float64, in nats, each in [0, inf]. inf also stands for an order that is not
        computed because its integral would need more than 200 000 nodes.

    Guarantees:
        Linear in the event's count. Non-decreasing in the order wherever it is finite.

    Raises:
        ValueError: an event of another kind, or an order that is not above 1.

    Source: Mironov, Talwar, Zhang 2019, arXiv:1908.10530, section 3.

    >>> rdp(StepEvent(noise_multiplier=2.0, sampling_prob=1.0, sampling="none"), [2.0, 4.0])
    array([0.25, 0.5 ])
    """
    _refuse_unknown(event)
    if not orders:
        raise ValueError("Expected at least one order, got none.")
    for order in orders:
        if not 1.0 < order < math.inf:
            raise ValueError(f"Expected orders above 1, got {order!r}.")
    if event.count == 0:
        return np.zeros(len(orders))
    one = _one_release(event.noise_multiplier, event.sampling_prob, tuple(orders))
    with np.errstate(over="ignore"):  # infinity is then the bound
        return np.nextafter(one * float(event.count), math.inf) if one.any() else one


def rdp_epsilon(log: AnyLog, delta: float, orders: Sequence[float] | None = None) -> RenyiEpsilon:
    """Epsilon at delta, and the order that gives it (nan where nothing was released).

    Args:
        log: what ran.
        delta: in (0, 1).
        orders: to choose from; None searches all real orders in [1.01, 10001].

    Returns:
        RenyiEpsilon(epsilon, best_order).

    Guarantees:
        An upper bound: every order gives one, so the search can cost tightness alone.

    Raises:
        ValueError: an event that is not Gaussian, sampled "poisson" or "none", under
            add-or-remove-one; no orders, or one that is not above 1.

    Source: Canonne, Kamath, Steinke 2020, arXiv:2004.00010, Proposition 12, solved for epsilon.

    >>> log = (StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=1000),)
    >>> spent = rdp_epsilon(log, 1e-5)
    >>> round(spent.epsilon, 3), round(spent.best_order, 1)
    (2.101, 7.8)
    """
    return RenyiEpsilon(*_best(log, orders, lambda total, order: (
        total + np.log1p(-1 / order) - (math.log(delta) + np.log(order)) / (order - 1)
    )))  # fmt: skip


def rdp_delta(log: AnyLog, epsilon: float, orders: Sequence[float] | None = None) -> float:
    """Delta at epsilon; the inverse of `rdp_epsilon`.

    Source: Canonne, Kamath, Steinke 2020, arXiv:2004.00010, Proposition 12.

    >>> rdp_delta((), 1.0)
    0.0
    """
    log = Log(log)
    log_delta, order = _best(log, orders, lambda total, order: (
        (order - 1) * (total - epsilon + np.log1p(-1 / order)) - np.log(order)
    ), floor=-math.inf)  # fmt: skip
    return 0.0 if math.isnan(order) else math.exp(min(0.0, log_delta))


def _best(
    log: AnyLog,
    orders: Sequence[float] | None,
    bound: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
    floor: float = 0.0,
) -> tuple[float, float]:
    """The least bound over the orders, and the order that has it."""
    log = Log(log)
    if orders is not None and not len(orders):
        raise ValueError("Expected at least one order, got none.")
    order = np.asarray(ORDERS if orders is None else orders, dtype=np.float64)
    total = _total(log, order)
    if not total.any():
        return 0.0, math.nan
    bounds = bound(total, order)
    best = int(np.argmin(bounds))
    value, at = float(bounds[best]), float(order[best])
    if orders is None and math.isfinite(value):
        from scipy.optimize import minimize_scalar

        low, high = np.log(order[[max(0, best - 1), min(len(order) - 1, best + 1)]] - 1)

        def refined(t: float) -> float:
            near = np.array([1 + math.exp(t)])
            return float(bound(_total(log, near), near)[0])

        found: Any = minimize_scalar(
            refined, bounds=(low, high), method="bounded", options={"xatol": 1e-5}
        )
        if found.fun < value:
            value, at = float(found.fun), 1 + math.exp(found.x)
    return max(floor, value), at


def _total(log: Log, orders: NDArray[np.float64]) -> NDArray[np.float64]:
    return sum((rdp(event, orders.tolist()) for event in log), np.zeros(len(orders)))


def _refuse_unknown(event: StepEvent) -> None:
    known = {
        "mechanism": ("gaussian",),
        "sampling": ("poisson", "none"),
        "relation": ("add_or_remove_one",),
    }
    for field, values in known.items():
        if getattr(event, field) not in values:
            raise ValueError(
                f"Expected {field} to be one of {', '.join(map(repr, values))} for the 'rdp' accountant, got "
                f"{getattr(event, field)!r}. It refuses what it has no bound for; it does not guess."
            )


@lru_cache(maxsize=1024)
def _one_release(noise: float, prob: float, orders: tuple[float, ...]) -> NDArray[np.float64]:
    order = np.asarray(orders, dtype=np.float64)
    if prob == 0.0 or math.isinf(noise):
        return np.zeros_like(order)
    if noise == 0.0:
        return np.full_like(order, math.inf)
    if prob == 1.0:
        with np.errstate(over="ignore"):
            return np.nextafter(order / 2 / noise / noise, math.inf)
    return np.array([_subsampled(noise, prob, a) for a in orders])


def _subsampled(noise: float, prob: float, order: float) -> float:
    step = min(0.5, 0.5 * noise)
    low, high = -12.0, order / noise + 12.0  # both modes of the integrand, 0 and order / noise
    if (high - low) / step > _MOST_NODES:
        return math.inf
    x = np.arange(low, high + step, step)
    y = x / noise - 0.5 / noise / noise
    log_weight = math.log(step / math.sqrt(2 * math.pi)) - x**2 / 2
    w = prob * np.expm1(np.minimum(y, 30.0))
    exact = y < 30.0  # beyond, 1 is lost beside e^y and e^y may be beyond float64
    beyond = np.logaddexp(math.log1p(-prob), math.log(prob) + y)
    power = order * np.where(exact, np.log1p(w), beyond)  # order * log(1 + w)
    # Rounding is outward: a few units in the last place of the largest term that was summed.
    term = power + log_weight
    top = term.max()
    log_moment = float(top + np.log(np.exp(term - top).sum()) + _ROUNDING * (1 + power.max()))
    if log_moment < 0.5:
        # Close to 1 the digits are in A - 1. Where the power is large (and its weight is tiny) the
        # product is formed before the difference is taken: exp(power) alone would overflow.
        weight = np.exp(log_weight)
        linear = order * np.where(
            exact, w * weight, prob * np.exp(log_weight + np.maximum(y, 30.0))
        )
        small = np.expm1(np.minimum(power, 1.0)) * weight
        whole = np.where(power < 1.0, small, np.exp(np.where(power < 1.0, 0.0, term)) - weight)
        rounding = _ROUNDING * (np.abs(whole) + np.abs(linear))
        tiny = np.abs(order * w) < 1e-3
        excess = np.where(
            tiny, _binomial_tail(order, np.where(tiny, w, 0.0)) * weight, whole - linear + rounding
        )
        log_moment = math.log1p(math.fsum(excess)) * (1 + _ROUNDING)
    if math.isnan(log_moment):
        raise FloatingPointError(
            f"Renyi divergence at {noise=}, {prob=}, {order=} is not a number."
        )
    return math.nextafter(max(0.0, log_moment) / (order - 1), math.inf)


def _binomial_tail(order: float, w: NDArray[np.float64]) -> NDArray[np.float64]:
    """(1 + w)^order - 1 - order w where |order w| < 1e-3, by its series: no digit cancels."""
    inner = np.ones_like(w)
    for k in (6, 5, 4, 3):  # what is left out is below (1e-3)^5 / 7! of what is kept
        inner = 1 + (order - k + 1) / k * w * inner
    return order * (order - 1) / 2 * w**2 * inner

"""Gaussian differential privacy: exact for full batches, an approximation for sampled ones.

A release is mu-GDP when it is no easier to test than N(0, 1) against N(mu, 1). With a = epsilon / mu
- mu / 2 and b = a + mu, the least delta at epsilon is

    delta = Phi(-a) - e^epsilon Phi(-b)                     (Balle & Wang 2018, Theorem 8)
          = phi(a) (R(a) - R(b)),     R(x) = Phi(-x) / phi(x),

since phi(a) = e^epsilon phi(b). Where R(a) and R(b) are close, their difference is the integral of
-R'(x) = 1 - x R(x) from a to b, and where x is large 1 - x R(x) is its asymptotic series: no digit
is lost to cancellation. A negative epsilon is mirrored: delta(-e) = (1 - 1 / e^e) + delta(e) / e^e.

Full-batch Gaussian releases compose exactly: mu^2 is the sum of mu_i^2 (Dong, Roth, Su 2022,
Corollary 3.3). For Poisson-sampled ones there is a central limit theorem, whose mu is a limit and
not a bound.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from dpfunc.events import AnyLog, Kind, Log

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_SERIES_FROM = 12.0  # the series' 20 terms end below 1e-18 of their sum there
_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


class GDP(NamedTuple):
    """The mu of a log, and whether it is the truth or a limit."""

    mu: float
    exact: bool


def log_gaussian_delta(mu: ArrayLike, epsilon: ArrayLike) -> Any:
    """The natural logarithm of `gaussian_delta`, where delta itself may underflow.

    Args:
        mu: real array, >= 0; inf is allowed.
        epsilon: real array of any sign, broadcast against mu; inf is allowed.

    Returns:
        float64 array of the broadcast shape (a number for numbers), each in [-inf, 0].

    Guarantees:
        Absolute error below 1e-12, or relative error below 1e-12 where it is larger.

    Raises:
        ValueError: a NaN, or a negative mu.

    Source: Balle & Wang 2018, arXiv:1805.06530, Theorem 8.

    >>> float(log_gaussian_delta(1.0, 100.0).round(6))
    -4960.254554
    """
    mu, epsilon = np.broadcast_arrays(_real(mu=mu), _real(epsilon=epsilon))
    if (mu < 0).any():
        raise ValueError(f"Expected mu >= 0, got {mu.min()}.")
    with np.errstate(all="ignore"):  # 0, inf and underflow mean what they say
        mirrored = -np.abs(epsilon)
        log_delta = _log_delta(mu, -mirrored)
        log_delta = np.where(
            epsilon < 0, np.log(np.exp(mirrored + log_delta) - np.expm1(mirrored)), log_delta
        )
    log_delta = np.where(mu == 0, np.where(epsilon < 0, log_delta, -np.inf), log_delta)
    return np.minimum(np.where(np.isinf(mu), 0.0, log_delta), 0.0)[()]


def gaussian_delta(mu: ArrayLike, epsilon: ArrayLike) -> Any:
    """The least delta at which a mu-GDP release is (epsilon, delta)-DP: its exact profile.

    Args:
        mu: real array, >= 0; inf is allowed.
        epsilon: real array of any sign, broadcast against mu; inf is allowed.

    Returns:
        float64 array of the broadcast shape (a number for numbers), each in [0, 1].

    Guarantees:
        Relative error below 1e-12 for mu in [1e-8, 1e3] and delta in [1e-300, 1].
        Falls with epsilon and rises with mu; mu = 0 gives max(0, 1 - e^epsilon).

    Raises:
        ValueError: a NaN, or a negative mu.

    Source: Balle & Wang 2018, arXiv:1805.06530, Theorem 8.

    >>> gaussian_delta([0.0, 1.0, 2.0], 1.0).round(6)
    array([0.      , 0.126937, 0.509862])
    """
    return np.exp(log_gaussian_delta(mu, epsilon))


def gaussian_epsilon(mu: ArrayLike, delta: ArrayLike) -> Any:
    """The least epsilon >= 0 at which a mu-GDP release is (epsilon, delta)-DP.

    Args:
        mu: real array, >= 0; inf is allowed.
        delta: real array, in (0, 1), broadcast against mu.

    Returns:
        float64 array of the broadcast shape (a number for numbers), each in [0, inf]; 0 where delta
        is at least the profile at 0, erf(mu / sqrt(8)).

    Guarantees:
        Relative error below 1e-13 for mu in [1e-8, 1e3] and delta in [1e-300, 0.9] where epsilon
        is above mu / 100; below, absolute error below 1e-15 mu.

    Raises:
        ValueError: a NaN, a negative mu, or a delta outside (0, 1).

    Source: Balle & Wang 2018, arXiv:1805.06530, Theorem 8, solved by Newton's method: log delta is
        concave in epsilon, so from the right of the root the steps do not overshoot.

    >>> float(gaussian_epsilon(1.0, 1e-5).round(9))
    4.377178096
    """
    mu, delta = np.broadcast_arrays(_real(mu=mu), _real(delta=delta))
    if (mu < 0).any():
        raise ValueError(f"Expected mu >= 0, got {mu.min()}.")
    if not ((delta > 0) & (delta < 1)).all():
        raise ValueError(f"Expected 0 < delta < 1, got {delta}.")
    zero = scipy.special.erf(mu / math.sqrt(8)) <= delta
    solved = zero | np.isinf(mu)
    m, target = mu[~solved], np.log(delta[~solved])
    with np.errstate(all="ignore"):
        # delta < Phi(-a), so the root is below the epsilon at which Phi(-a) = delta.
        root = np.maximum(m * (m / 2 - scipy.special.ndtri(delta[~solved])), 0.0)
        for _ in range(100):
            log_delta = _log_delta(m, root)
            log_slope = root + scipy.special.log_ndtr(-(root / m + m / 2)) - log_delta
            step = (log_delta - target) * np.exp(-log_slope)
            # Beyond mu = 1e15 one unit in epsilon's last place is more than all of a's range.
            root = np.maximum(root + np.where(np.isfinite(step), step, 0.0), 0.0)
            if not (np.abs(step) > 1e-15 * root).any():
                break
    epsilon = np.where(zero, 0.0, np.inf)
    epsilon[~solved] = root
    return epsilon[()]


def mu_of(log: AnyLog) -> GDP:
    """The mu of a log: exact for full batches, the central limit theorem's for Poisson sampling.

    THE SAMPLED ONE IS AN APPROXIMATION THAT CAN UNDER-REPORT: mu^2 adds count * sampling_prob^2 *
    (exp(1 / noise_multiplier^2) - 1), which is right only in the limit of many rarely sampled steps.

    Args:
        log: what ran: Gaussian events, sampled "none" or "poisson".

    Returns:
        GDP(mu, exact): mu in [0, inf]; exact is False as soon as one event of finite noise was
        sampled with a probability in (0, 1).

    Guarantees:
        Each full-batch event adds count / noise_multiplier^2 to mu^2, or 4 times that under
        replace-one; sampling "poisson" with probability 1 is full batch.
        An empty log, probability 0 and infinite noise give exactly 0; zero noise gives inf.
        No overflow before mu itself overflows. The events' order does not matter.

    Raises:
        ValueError: an event of another kind, replace-one with Poisson sampling among them.

    Source: Dong, Roth, Su 2022, arXiv:1905.02383, Corollary 3.3; for Poisson Bu, Dong, Long, Su
        2020, arXiv:1911.11607, section 3.

    >>> from dpfunc.events import StepEvent
    >>> mu_of((StepEvent(noise_multiplier=8.0, sampling_prob=1.0, count=100),))
    GDP(mu=1.25, exact=True)
    """
    log = Log(log)
    noise, prob, count, kind = log.columns()
    for i, known in enumerate(log.kinds):
        _refuse_unknown(known, sampled=bool((prob[kind == i] < 1.0).any()))
    shift = np.array([2.0 if k.relation == "replace_one" else 1.0 for k in log.kinds])[kind]
    ran = (prob > 0.0) & (noise < math.inf)
    noise, prob, count, shift = noise[ran], prob[ran], count[ran], shift[ran]
    with np.errstate(divide="ignore", over="ignore"):  # infinity is then the truth
        one = np.where(prob == 1.0, shift / noise, _one_sampled(noise, prob))
        # In order and with equal ones together, so that no order of the events rounds differently.
        one, which = np.unique(one, return_inverse=True)
        parts = np.sqrt(np.bincount(which, weights=count, minlength=one.size)) * one
    return GDP(math.hypot(*parts.tolist()), bool((prob == 1.0).all()))


def gdp_epsilon(log: AnyLog, delta: float) -> float:
    """Epsilon at delta by Gaussian differential privacy.

    EXACT FOR FULL-BATCH LOGS; OTHERWISE AN APPROXIMATION THAT CAN UNDER-REPORT, measured at as much
    as 70% below the truth (noise multiplier 1, probability 0.001, 100 steps, delta 1e-8). Do not
    claim privacy by it: it is for comparison with published figures. `mu_of` says which case it is.

    Args:
        log: what ran, as for `mu_of`.
        delta: in (0, 1).

    Returns:
        A number in [0, inf]; no bound in either direction once a batch was sampled.

    Source: that of `mu_of` and `gaussian_epsilon`.

    >>> from dpfunc.events import StepEvent
    >>> log = (StepEvent(noise_multiplier=1.0, sampling_prob=0.001, count=100),)
    >>> round(gdp_epsilon(log, 1e-8), 4)  # the true value is 0.1935
    0.0588
    """
    return float(gaussian_epsilon(mu_of(log).mu, delta))


def gdp_delta(log: AnyLog, epsilon: float) -> float:
    """Delta at epsilon by Gaussian differential privacy; the inverse of `gdp_epsilon`.

    EXACT FOR FULL-BATCH LOGS; OTHERWISE AN APPROXIMATION THAT CAN UNDER-REPORT.

    Source: that of `mu_of` and `gaussian_delta`.

    >>> gdp_delta((), 1.0)
    0.0
    """
    return float(gaussian_delta(mu_of(log).mu, epsilon))


def _log_delta(mu: NDArray[np.float64], epsilon: NDArray[np.float64]) -> NDArray[np.float64]:
    """log delta for epsilon >= 0 and mu in (0, inf)."""
    a = _lower(mu, epsilon)
    b = a + mu
    mills_a, mills_b = _mills(a), _mills(b)
    x = a[..., None] + 0.5 * mu[..., None] * (1 + _NODES)
    integral = 0.5 * mu * (_minus_slope(x) @ _WEIGHTS)
    log_phi = -(a**2) / 2 - _LOG_ROOT_2PI
    near = 2 * mills_b > mills_a
    tail = log_phi + np.log(np.where(near, integral, mills_a - mills_b))
    # Where a is far below 0 its Mills ratio is huge and delta is close to 1.
    body = np.log1p(-(np.exp(scipy.special.log_ndtr(a)) + np.exp(log_phi) * mills_b))
    return np.where((a < -1) & ~near, body, tail)


def _lower(mu: NDArray[np.float64], epsilon: NDArray[np.float64]) -> NDArray[np.float64]:
    """epsilon / mu - mu / 2 to a few units in its last place, with mu^2 in two words (Dekker)."""
    high = mu * 134217729.0
    high = high - (high - mu)
    low = mu - high
    square = mu * mu
    rest = ((high * high - square) + 2 * high * low) + low * low
    exact = ((epsilon - square / 2) - rest / 2) / mu
    return np.where((mu > 1e-100) & (mu < 1e100), exact, epsilon / mu - mu / 2)


def _mills(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return math.sqrt(math.pi / 2) * scipy.special.erfcx(x / math.sqrt(2))


def _minus_slope(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 - x R(x), the negative slope of the Mills ratio."""
    inverse = 1 / np.maximum(x, _SERIES_FROM) ** 2
    series = np.ones_like(x)
    for k in range(20, 0, -1):
        series = 1 - (2 * k + 1) * inverse * series
    return np.where(x > _SERIES_FROM, inverse * series, 1 - x * _mills(x))


def _one_sampled(noise: NDArray[np.float64], prob: NDArray[np.float64]) -> NDArray[np.float64]:
    """prob * sqrt(exp(1 / noise^2) - 1)."""
    inverse = 1.0 / noise
    square = inverse * inverse
    little = prob * inverse * np.sqrt(scipy.special.exprel(square))
    much = prob * np.exp(square / 2) * np.sqrt(-np.expm1(-square))
    return np.where(square < 1, little, much)


def _refuse_unknown(kind: Kind, *, sampled: bool) -> None:
    sampled = sampled and kind.sampling == "poisson"
    relations = ("add_or_remove_one", "zero_out") + (() if sampled else ("replace_one",))
    known = {
        "mechanism": ("gaussian",),
        "sampling": ("poisson", "none"),
        "relation": relations,
    }
    for field, values in known.items():
        if getattr(kind, field) not in values:
            raise ValueError(
                f"Expected {field} to be one of {', '.join(map(repr, values))} for the 'gdp' accountant, got "
                f"{getattr(kind, field)!r}. It refuses what it has no formula for; it does not guess."
            )


def _real(**named: ArrayLike) -> NDArray[np.float64]:
    ((name, value),) = named.items()
    array = np.asarray(value, dtype=np.float64)
    if np.isnan(array).any():
        raise ValueError(f"Expected {name} to hold no NaN, got {value!r}.")
    return array

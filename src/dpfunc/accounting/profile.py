"""The whole privacy profile of a log, and what it says of attacks.

The certified bounds of pld.py are points (epsilon, delta) on or above the profile. By duality each is
a line below the trade-off curve of Dong, Roth & Su 2022, Proposition 2.12: whatever an attack does,
with alpha its false positive rate,

    false negative rate >= max(1 - delta - e^epsilon alpha, e^-epsilon (1 - delta - alpha)).

Every point gives a bound that holds, so which points are chosen costs tightness alone. They are taken
where delta's normal quantile goes in equal steps (for Gaussians so does epsilon, nearly), and then, for
each alpha, where a smooth curve through those says that its line touches.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from dpfunc import _checks
from dpfunc.accounting.gdp import gaussian_delta, log_gaussian_delta
from dpfunc.accounting.pld import delta_bounds, epsilon_bounds
from dpfunc.events import AnyLog, Log

Array = NDArray[np.float64]

_STEP = 0.25  # of the normal quantile of delta, in which Gaussian profiles are nearly straight
_NEAR_ONE = 1 - 1e-9
_ROUNDING = 8 * 2.0**-53
_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


class Profile(NamedTuple):
    """delta at some epsilons, from both sides."""

    epsilons: Array
    lower: Array
    upper: Array


class TradeOff(NamedTuple):
    """The least false negative rate of any attack at some false positive rates."""

    false_positive_rates: Array
    false_negative_rates: Array


class GaussianSummary(NamedTuple):
    """The mu-GDP that sums a log up, and how much more it concedes than the log gives away."""

    mu: float
    regret: float


def privacy_profile(log: AnyLog, *, epsilons: ArrayLike | None = None) -> Profile:
    """Bounds on delta at many epsilons: all that a log gives away.

    Args:
        log: what ran; `()` is nothing.
        epsilons: finite, >= 0, any shape; by default some thirty from 0 to where delta is 1e-12.

    Returns:
        Profile(epsilons, lower, upper): float64 arrays of one shape, the deltas in [0, 1].

    Guarantees:
        lower <= delta <= upper for the exact delta, as for `delta_bounds`.
        Both fall, or stay, as epsilon rises.

    Raises:
        ValueError, TypeError: an epsilon out of range, or as for `delta_bounds`.

    Source: that of `delta_bounds`; the least upper bound so far holds further on, as delta falls.

    >>> from dpfunc.events import StepEvent
    >>> log = (StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=1000),)
    >>> privacy_profile(log, epsilons=[0.0, 1.0, 2.0]).upper.round(5)
    array([0.16102, 0.00261, 0.     ])
    """
    log = Log(log)
    at = _points(log, 1e-12)[0] if epsilons is None else _reals(epsilons=epsilons)
    lower, upper = delta_bounds(log, epsilon=at.ravel())
    order = np.argsort(at.ravel(), kind="stable")
    lower[order] = np.maximum.accumulate(lower[order][::-1])[::-1]
    upper[order] = np.minimum.accumulate(upper[order])
    return Profile(at, lower.reshape(at.shape), upper.reshape(at.shape))


def trade_off(log: AnyLog, *, false_positive_rates: ArrayLike | None = None) -> TradeOff:
    """The least false negative rate that any membership attack can have: the f-DP curve of a log.

    The attack sees all that was released and all examples but one, and guesses whether that one was
    in. A log whose curve is f is f-DP: this holds whichever of in and out it calls positive.

    Args:
        log: what ran; `()` is nothing.
        false_positive_rates: in [0, 1], any shape, some milliseconds for each; by default some sixty.

    Returns:
        TradeOff(false_positive_rates, false_negative_rates): float64 arrays of one shape.

    Guarantees:
        No attack has a lower false negative rate.
        Falls, or stays, as the false positive rate rises, and is convex, but for rounding; never
        above 1 - false_positive_rate.
        For full-batch Gaussians within 1e-7 of the exact curve, Phi(Phi^-1(1 - rate) - mu).
        An empty log, probability 0 and infinite noise give 1 - false_positive_rate, but for
        rounding; zero noise on all the data gives 0.

    Raises:
        ValueError, TypeError: a rate out of range, or as for `delta_bounds`.

    Source: Dong, Roth, Su 2022, arXiv:1905.02383, Proposition 2.12.

    >>> from dpfunc.events import StepEvent
    >>> log = (StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=1000),)
    >>> trade_off(log, false_positive_rates=[0.01, 0.1, 0.5]).false_negative_rates.round(4)
    array([0.9709, 0.8058, 0.3414])
    """
    if false_positive_rates is None:
        false_positive_rates = _default_rates()
    rates = _rates(false_positive_rates=false_positive_rates)
    missed, _ = _errors(Log(log), rates.ravel())
    return TradeOff(rates, missed.reshape(rates.shape))


def attack_advantage(log: AnyLog) -> float:
    """The most by which any membership attack's true positive rate exceeds its false positive rate.

    Args:
        log: what ran; `()` is nothing.

    Returns:
        An upper bound in [0, 1]: the certified delta at epsilon 0.

    Guarantees:
        No attack has a larger advantage: it is the greatest 1 - rate - f(rate) of `trade_off`.
        erf(mu / sqrt(8)) for full-batch Gaussians.
        An empty log, probability 0 and infinite noise give exactly 0; zero noise on all the data
        gives 1.

    Raises:
        ValueError, TypeError: as for `delta_bounds`.

    Source: total variation distance; Dong, Roth, Su 2022, arXiv:1905.02383, Proposition 2.12.

    >>> from dpfunc.events import StepEvent
    >>> round(attack_advantage((StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=1000),)), 5)
    0.16102
    """
    return float(delta_bounds(Log(log), epsilon=0.0)[1])


def posterior_odds(log: AnyLog, *, prior: float, false_positive_rate: float) -> float:
    """The most that the odds of being in can be for an example that an attack has flagged.

    P(in | flagged) / P(out | flagged) = prior / (1 - prior) * true positive rate / false positive rate

    Args:
        log: what ran; `()` is nothing.
        prior: the probability, before the attack, that the example was in; in (0, 1).
        false_positive_rate: of the attack: how often it flags an example that was out; in (0, 1).

    Returns:
        An upper bound on those odds; odds of o are a probability of o / (1 + o).

    Guarantees:
        Holds for every attack whose false positive rate is that or larger.
        At least the prior odds, which an empty log gives; at most
        prior / (1 - prior) / false_positive_rate, which zero noise on all the data gives.

    Raises:
        ValueError, TypeError: a number out of range, or as for `delta_bounds`.

    Source: Bayes' theorem, with the true positive rate that `trade_off` allows.

    >>> from dpfunc.events import StepEvent
    >>> log = (StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=1000),)
    >>> round(posterior_odds(log, prior=0.5, false_positive_rate=0.01), 2)
    2.91
    """
    prior = _checks.open_unit("It is a probability.", prior=prior)
    rate = _checks.open_unit(
        "At rate 0 the odds have no bound.", false_positive_rate=false_positive_rate
    )
    _, caught = _errors(Log(log), np.array([rate]))
    return prior / (1 - prior) * max(1.0, float(caught[0]) / rate) * (1 + _ROUNDING)


def gdp_summary(log: AnyLog, *, deltas: ArrayLike | None = None) -> GaussianSummary:
    """The least mu whose Gaussian profile is nowhere below the log's at some deltas.

    Args:
        log: what ran; `()` is nothing.
        deltas: in (0, 1); by default some twenty from 1e-10 up to 1/2 or to where epsilon is 0.

    Returns:
        GaussianSummary(mu, regret): mu in [0, inf], and the largest, over the log's epsilons at those
        deltas and over epsilon 0, of

            (delta of the mu-GDP release - the log's) / (1 + e^epsilon),

        by which the log's trade-off curve has to move left and down to be below that of mu.
        Gomez et al. would have mu reported where it is at most 0.01.

    Guarantees:
        At each delta the epsilon of a mu-GDP release is at least that of the log.
        For full-batch Gaussians mu is exact to 1e-9 and the regret below 1e-9.
        An empty log, probability 0 and infinite noise give (0, 0); zero noise on all the data
        gives (inf, 0).

    NOT A BOUND BELOW THE LEAST DELTA: with delta, the mu of a sampled log grows towards that of the
    same steps on full batches.

    Raises:
        ValueError, TypeError: a delta out of range, or as for `epsilon_bounds`.

    Source: Gomez et al. 2025, arXiv:2503.10945, for mu and the regret, which is theirs by duality.

    >>> from dpfunc.events import StepEvent
    >>> mu, regret = gdp_summary((StepEvent(noise_multiplier=9.4, sampling_prob=0.328, count=2000),))
    >>> round(mu, 2), round(regret, 3)
    (1.57, 0.001)
    """
    log = Log(log)
    least, most = delta_bounds(log, epsilon=0.0)
    at = _between(1e-10, min(most, 0.5)) if deltas is None else np.ravel(_reals(deltas=deltas))
    low, high = epsilon_bounds(log, delta=at)
    at_zero = float(gaussian_mu(0.0, most)) if deltas is None and most <= 0.5 else 0.0
    mu = float(gaussian_mu(high, at)[high > 0].max(initial=at_zero))
    # Where low is 0 the profile may be below `at`: there it starts, at `least`.
    at, low = np.append(at[low > 0], least), np.append(low[low > 0], 0.0)
    with np.errstate(over="ignore"):
        excess = (gaussian_delta(mu, low) - at) / (1 + np.exp(low))
    return GaussianSummary(mu, float(excess.max(initial=0.0)))


def gaussian_mu(epsilon: ArrayLike, delta: ArrayLike) -> Any:
    """The least mu whose Gaussian profile reaches delta at epsilon: of a release that just meets both.

    Args:
        epsilon: real array, >= 0; inf is allowed.
        delta: real array, in [0, 1], broadcast against epsilon.

    Returns:
        float64 array of the broadcast shape (a number for numbers), each in [0, inf].

    Guarantees:
        Relative error below 1e-11 for delta in [1e-300, 0.999] and epsilon up to 1000.
        delta 0 gives 0; else epsilon inf and delta 1 give inf.

    Raises:
        ValueError, TypeError: a NaN, a negative epsilon, or a delta outside [0, 1].

    Source: Balle & Wang 2018, arXiv:1805.06530, Theorem 8, by bisection above its closed form at
        epsilon 0, sqrt(8) erf^-1(delta).

    >>> float(gaussian_mu(4.377178096, 1e-5).round(9))
    1.0
    """
    epsilon, delta = np.broadcast_arrays(_reals(epsilon=epsilon), _rates(delta=delta))
    beyond = (delta == 1) | np.isinf(epsilon)
    mu = np.where(beyond & (delta > 0), np.inf, 0.0)
    solved = beyond | (delta == 0)
    e, log_delta = epsilon[~solved], np.log(delta[~solved])

    def falls_short(mu: Array) -> NDArray[np.bool_]:
        return log_gaussian_delta(mu, e) < log_delta

    low = math.sqrt(8) * scipy.special.erfinv(delta[~solved]) * (1 - 1e-15)
    high = low * (1 + 4e-15)
    while (short := falls_short(high)).any():
        low, high = np.where(short, [high, np.maximum(2 * high, np.sqrt(e))], [low, high])
    for _ in range(60):
        middle = np.sqrt(low) * np.sqrt(high)
        low, high = np.where(falls_short(middle), [middle, high], [low, middle])
    mu[~solved] = high
    return mu[()]


def _errors(log: Log, rates: Array) -> tuple[Array, Array]:
    """Bounds on what any attack does at each false positive rate: false negatives, true positives."""
    inner = rates[(rates > 0) & (rates < 1)]
    least = 1e-3 * min(1e-6, inner.min(initial=1.0), (1 - inner).min(initial=1.0))
    epsilon, delta = _points(log, max(least, 1e-290))
    touched = np.unique(_touching(epsilon, delta, inner))
    epsilon = np.append(epsilon, touched)[:, None]
    delta = np.append(delta, delta_bounds(log, epsilon=touched)[1])[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        caught = delta + np.where(rates > 0, np.exp(epsilon) * rates, 0.0) * (1 + _ROUNDING)
        missed = np.exp(-epsilon) * (1 - rates - delta) * (1 - _ROUNDING)
    caught, missed = caught.min(0), missed.max(0)
    caught = np.minimum(caught, (1 - missed) * (1 + _ROUNDING))
    missed = np.maximum(missed, 1 - caught * (1 + _ROUNDING))
    return np.clip(missed, 0.0, 1 - rates), np.clip(caught, rates, 1.0)


def _points(log: Log, least: float) -> tuple[Array, Array]:
    """Points on or above the profile, from epsilon 0 to where delta is `least`; epsilon rises."""
    most = float(delta_bounds(log, epsilon=0.0)[1])
    delta = _between(least, most)
    epsilon = epsilon_bounds(log, delta=delta)[1]
    kept = (epsilon > 0) & np.isfinite(epsilon)
    epsilon, first = np.unique(np.append(epsilon[kept], 0.0), return_index=True)
    return epsilon, np.append(delta[kept], most)[first]


def _between(least: float, most: float) -> Array:
    """Deltas from least up to most, but not most itself, in equal steps of the normal quantile."""
    low, high = scipy.special.ndtri(least), scipy.special.ndtri(min(most, _NEAR_ONE))
    count = math.ceil((high - low) / _STEP) if most > least else 0
    return scipy.special.ndtr(np.linspace(low, high, count, endpoint=False))


def _touching(epsilon: Array, delta: Array, rates: Array) -> Array:
    """Where the line of a point of the profile touches the trade-off curve at each rate, nearly."""
    if len(epsilon) < 3:
        return np.zeros(0)
    from scipy.interpolate import CubicSpline

    curve = CubicSpline(epsilon, scipy.special.ndtri(np.minimum(delta, _NEAR_ONE)))
    parts = np.linspace(0, 1, 16, endpoint=False)
    fine = np.append((epsilon[:-1, None] + np.diff(epsilon)[:, None] * parts).ravel(), epsilon[-1])
    u = curve(fine)
    # Of the better attack that calls a loss above epsilon "in", or the other way round: its errors are
    # -delta'(epsilon) / e^epsilon and 1 - delta + delta'(epsilon).
    log_fall = -(u**2) / 2 - _LOG_ROOT_2PI + np.log(np.maximum(-curve(fine, 1), 1e-300))
    log_rate = np.minimum.accumulate(log_fall - fine)[::-1]
    log_caught = np.minimum.accumulate(
        np.log(np.minimum(scipy.special.ndtr(u) + np.exp(log_fall), 1.0))
    )[::-1]
    near_zero = np.interp(np.log(rates), log_rate, fine[::-1])
    near_one = np.interp(np.log1p(-rates), log_caught, fine[::-1])
    return np.where(np.log(rates) < log_rate[-1], near_zero, near_one)


def _default_rates() -> Array:
    return np.concatenate([[0.0], np.geomspace(1e-6, 0.1, 26)[:-1], np.linspace(0.1, 1.0, 37)])


def _reals(**named: ArrayLike) -> Array:
    """An array of numbers >= 0."""
    ((name, value),) = named.items()
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" and array.size:
        raise TypeError(f"Expected {name} to hold numbers, got {value!r}.")
    array = array.astype(np.float64) + 0.0
    if not (array >= 0).all():
        raise ValueError(f"Expected {name} >= 0, got {value!r}.")
    return array


def _rates(**named: ArrayLike) -> Array:
    """An array of numbers in [0, 1]."""
    ((name, value),) = named.items()
    array = _reals(**named)
    if (array > 1).any():
        raise ValueError(f"Expected {name} <= 1, got {value!r}.")
    return array

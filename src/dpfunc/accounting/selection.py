"""The privacy of the best of several runs: hyper-parameters tuned on private data.

Training k times and releasing the best run is not as private as one run, and not k times worse if k
is itself random and secret. With K the number of runs, m = E[K], and rdp(a) that of one run, the
released run has at each order a > 1 (Papernot & Steinke 2022)

    rdp(a) + log(m) / (a - 1) + (1 + shape) min_b [(1 - 1/b) rdp(b) + log(1/stop_prob) / b]

for the truncated negative binomial law (Theorem 2; b ranges over the orders from 1 on), and

    rdp(a) + log(m) / (a - 1) + m delta(log(a / (a - 1)))

for the Poisson law (Theorem 6), delta being that of one run: the lesser of what its orders give and of
Pinsker's bound on its total variation. Both laws have at least one expected run; the negative
binomial one is truncated to K >= 1, with the generating function ((1 - (1 - stop_prob) x)^-shape - 1)
/ (stop_prob^-shape - 1), and Poisson's K = 0 releases nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from dpfunc import _checks
from dpfunc.accounting.rdp import ORDERS, _best, _total, rdp_delta
from dpfunc.events import AnyLog, Log

_OUTWARD = 1 + 1e-12
_MOST = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """The law of a secret number of runs.

    Args:
        expected_runs: the mean number of runs, in [1, 1e6].
        shape: in [0, inf]: 0 is the logarithmic law, 1 the geometric, inf the Poisson, and between
            them lies the truncated negative binomial of that shape. A larger shape is more
            concentrated around the mean. Poisson can draw 0 runs, and then nothing is released.

    Guarantees:
        The mean of the law is expected_runs to 1e-9, relatively.

    Raises:
        ValueError, TypeError: a number out of range.

    Source: Papernot & Steinke 2022, arXiv:2110.03620, Definition 1.

    >>> Repeats(expected_runs=20).probability([1, 2, 3]).round(5)
    array([0.05   , 0.0475 , 0.04512])
    """

    expected_runs: float
    shape: float = 1.0

    def __post_init__(self) -> None:
        expected_runs = _checks.real(expected_runs=self.expected_runs)
        if not 1.0 <= expected_runs <= 1e6:
            raise ValueError(f"Expected 1 <= expected_runs <= 1e6, got {self.expected_runs!r}.")
        object.__setattr__(self, "expected_runs", expected_runs)
        object.__setattr__(self, "shape", _checks.non_negative(shape=self.shape))

    @property
    def stop_prob(self) -> float:
        """The parameter called gamma in the paper, in (0, 1]; 1 / expected_runs where shape is 1.

        Raises:
            ValueError: shape is inf; the Poisson law has no such parameter.
        """
        if math.isinf(self.shape):
            raise ValueError("Expected a finite shape, got inf: the Poisson law has no stop_prob.")
        return math.exp(-_log_inverse_stop_prob(self))

    def probability(self, runs: ArrayLike) -> NDArray[np.float64]:
        """The probability of each of these numbers of runs.

        Args:
            runs: whole numbers >= 0, of any shape.

        Returns:
            float64 of the same shape, each in [0, 1].

        Guarantees:
            Sums to 1 over all numbers, to 1e-9.

        >>> Repeats(expected_runs=2.0, shape=float("inf")).probability(0).round(6)
        np.float64(0.135335)
        """
        k = np.asarray(runs, dtype=np.float64)
        if not ((k >= 0) & (k == np.floor(k))).all():
            raise ValueError(f"Expected runs to be whole numbers >= 0, got {runs!r}.")
        if math.isinf(self.shape):
            log_mean = math.log(self.expected_runs)
            return np.exp(k * log_mean - self.expected_runs - scipy.special.gammaln(k + 1))[()]
        if self.expected_runs == 1.0:
            return np.where(k == 1, 1.0, 0.0)[()]
        rate = _log_inverse_stop_prob(self)
        log_go_on = math.log(-math.expm1(-rate))
        some = np.maximum(k, 1.0)
        if self.shape == 0.0:
            log_probability = some * log_go_on - np.log(some) - math.log(rate)
        else:
            scaled = self.shape * rate
            norm = scaled + math.log(-math.expm1(-scaled)) + scipy.special.betaln(some, self.shape)
            log_probability = some * log_go_on - np.log(some) - norm
        return np.where(k > 0, np.exp(log_probability), 0.0)[()]

    def num_runs(self, uniform: float) -> int:
        """The number of runs that a uniform number stands for: the law's quantile.

        Draw `uniform` from a secure generator, once, before the first run, and keep it secret, as
        well as the number of runs: the guarantee is for a number that nobody learns.

        Args:
            uniform: in (0, 1).

        Returns:
            The least number whose cumulated probability is at least `uniform`.

        Guarantees:
            A pure function, non-decreasing in `uniform`. Over a uniform number the law is that of
            `probability`, to 1e-9 in total variation.

        Raises:
            ValueError: uniform is outside (0, 1).

        >>> Repeats(expected_runs=20).num_runs(0.5)
        14
        """
        uniform = _checks.open_unit(uniform=uniform)
        below, start, size = 0.0, 0, 256
        while True:
            block = np.arange(start, start + size)
            probability = self.probability(block)
            cumulated = below + np.cumsum(probability)
            place = int(np.searchsorted(cumulated, uniform))
            if place < size:
                return start + place
            if block[-1] > self.expected_runs and probability[-1] * block[-1] < 1e-17:
                # By rounding the sum ends below 1; what is left of the law is less than it lacks.
                return start + int(np.searchsorted(cumulated, cumulated[-1]))
            below, start, size = float(cumulated[-1]), start + size, min(2 * size, _MOST)


def selection_epsilon(log: AnyLog, *, delta: float, repeats: Repeats) -> float:
    """Epsilon at delta of training a random number of times and releasing the best run.

    Each run draws its hyper-parameters at random, independently of the others; it trains, and scores
    itself. The best run's parameters, hyper-parameters and score are released; the others, and how
    many they were, are not. Whatever of a run looks at private data is in its log, the score
    included: a score on private data is a noisy release and an event of its own.

    Args:
        log: what one run ran. Where the candidates differ in noise, sampling or steps, the log of
            the one that is the least private at every order.
        delta: in (0, 1).
        repeats: the law of the number of runs.

    Returns:
        A number in [0, inf]: an upper bound.

    Guarantees:
        Never below the epsilon of one run by the "rdp" accountant; equal to it at expected_runs=1
        with a finite shape. Rises with expected_runs.
        A log that releases nothing gives exactly 0; zero noise gives inf.

    Raises:
        ValueError: delta out of range, or an event that `rdp` has no bound for.

    Source: Papernot & Steinke 2022, arXiv:2110.03620, Theorems 2 and 6; to (epsilon, delta) by
        Canonne, Kamath, Steinke 2020, arXiv:2004.00010, Proposition 12.

    >>> from dpfunc.events import StepEvent
    >>> log = (StepEvent(noise_multiplier=2.0, sampling_prob=0.01, count=1000),)
    >>> repeats = Repeats(expected_runs=20)
    >>> round(selection_epsilon(log, delta=1e-5, repeats=repeats), 2)
    1.62
    """
    delta = _checks.open_unit(delta=delta)
    log = Log(log)
    constant = _constant(log, repeats)
    return _best(log, None, lambda total, order: (
        total + _price(log, repeats, order, constant)
        + np.log1p(-1 / order) - (math.log(delta) + np.log(order)) / (order - 1)
    ))[0]  # fmt: skip


def selection_rdp(
    log: AnyLog, repeats: Repeats, orders: Sequence[float] = ORDERS
) -> NDArray[np.float64]:
    """Renyi divergence of the released run at each order.

    Args:
        log: what one run ran, as for `selection_epsilon`.
        repeats: the law of the number of runs.
        orders: real numbers above 1.

    Returns:
        (len(orders),) float64, in nats, each in [0, inf]: upper bounds.

    Guarantees:
        Never below the divergence of one run. Non-decreasing in the order.

    Raises:
        ValueError: an order that is not above 1, or an event that `rdp` has no bound for.

    Source: Papernot & Steinke 2022, arXiv:2110.03620, Theorems 2 and 6.

    >>> from dpfunc.events import StepEvent
    >>> log = (StepEvent(noise_multiplier=4.0, sampling_prob=1.0),)
    >>> selection_rdp(log, Repeats(expected_runs=10), [2.0, 32.0]).round(3)
    array([1.583, 2.085])
    """
    log = Log(log)
    order = np.union1d(orders, ORDERS)
    total = _total(log, order)
    if total.any():
        total = total + _price(log, repeats, order, _constant(log, repeats))
    # The divergence rises with its order, so what bounds it at a higher one bounds it here.
    least = np.minimum.accumulate(total[::-1])[::-1]
    return least[np.searchsorted(order, orders)]


def _price(
    log: Log, repeats: Repeats, order: NDArray[np.float64], constant: float
) -> NDArray[np.float64]:
    """What selection adds to the divergence of one run."""
    price = math.log(repeats.expected_runs) * _OUTWARD / (order - 1) + constant
    if math.isfinite(repeats.shape):
        return price
    # For one order the inner ones are searched; for many, taken from the list, at little loss.
    inner = None if order.size == 1 else ORDERS
    deltas = np.array([rdp_delta(log, math.log1p(1 / (a - 1)), inner) for a in order])
    divergence = float(_total(log, np.array(ORDERS[:1]))[0])  # at least the one of order 1
    return price + repeats.expected_runs * np.minimum(deltas, math.sqrt(divergence / 2))


def _constant(log: Log, repeats: Repeats) -> float:
    """The term of Theorem 2 that does not depend on the order; 0 for the Poisson law."""
    if math.isinf(repeats.shape):
        return 0.0
    rate = _log_inverse_stop_prob(repeats) * _OUTWARD
    inner, _ = _best(log, None, lambda total, order: (1 - 1 / order) * total + rate / order)
    return (1 + repeats.shape) * min(inner, rate)  # at order 1 the first is `rate`


def _log_inverse_stop_prob(repeats: Repeats) -> float:
    """log(1 / stop_prob), from the mean exprel(rate) / exprel(-shape rate), exprel(x) = (e^x - 1) / x."""
    runs, shape = repeats.expected_runs, repeats.shape
    if shape == 1.0 or runs == 1.0:
        return math.log(runs)
    from scipy.optimize import brentq

    def excess(rate: float) -> float:
        return (
            math.log(scipy.special.exprel(rate))
            - math.log(scipy.special.exprel(-shape * rate))
            - math.log(runs)
        )

    # The mean rises with the shape, and with shape 0 it is exprel(rate) > e^(rate / 2).
    return float(brentq(excess, 0.0, 2 * math.log(runs), xtol=1e-300, rtol=1e-14))  # pyright: ignore[reportArgumentType]

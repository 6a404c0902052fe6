"""Lower bounds on epsilon from many canaries of one run, however they depend on each other.

Every canary is in by a fair coin of its own. The auditor makes c guesses out of m, and v are right. If
one coin changes the run's output no more than a trade-off curve f allows, then

    pure and approximate    Pr[right >= v] <= Pr[B >= v] + 2 m delta max_i Pr[v > B >= v - i] / i,
                            B binomial(c, e^epsilon / (1 + e^epsilon))       (Steinke et al. 2023)
    f                       with p_i = Pr[right = i], for every t:
                            sum_{i >= t} i p_i / m <= 1 - f(sum_{i >= t} (c - i + 1) p_{i-1} / m)
                                                                             (Mahloujifar et al. 2024)

The second is what f says of the event "this guess is right, and at least t are" when one coin, drawn at
random, is turned over: then this guess is wrong, and at least t - 1 are right.

Runs under independent keys make one mechanism on all their coins: a coin still changes one run alone.
So the canaries of R runs count as those of one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, bdtrc, expit

from dpfunc import _checks
from dpfunc.audit.estimators import scores
from dpfunc.audit.families import Family, Points, gaussian_family, strongest_refuted

Array = NDArray[np.float64]


def one_run_p_value(
    correct: int, num_guesses: int, num_canaries: int, *, epsilon: float, delta: float
) -> float:
    """The most probability that an (epsilon, delta)-DP run gives to so many right guesses.

    Args:
        correct: right guesses, in [0, num_guesses].
        num_guesses: guesses made, fixed beforehand, in [0, num_canaries].
        num_canaries: each in or out by a fair coin, those without a guess included.
        epsilon: >= 0.
        delta: in [0, 1).

    Returns:
        A number in [0, 1].

    Guarantees:
        At least the probability of `correct` or more right guesses in any (epsilon, delta)-DP run.
        Equals the binomial tail at delta = 0, which randomized response meets.

    Raises:
        ValueError: a number out of range.

    Source: Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, Theorem 5.2.

    >>> round(one_run_p_value(9, 10, 10, epsilon=0.0, delta=0.0), 6)  # 11 / 1024
    0.010742
    """
    correct, num_guesses, num_canaries = _counts(correct, num_guesses, num_canaries)
    epsilon = _checks.finite_non_negative(epsilon=epsilon)
    delta = _checks.probability(delta=delta)
    right = expit(epsilon)
    if correct == 0:
        return 1.0
    tail = float(bdtrc(correct - 1, num_guesses, right))
    further = np.arange(1, correct + 1)
    below = np.append(bdtr(correct - 1.0 - further[:-1], num_guesses, right), 0.0)
    slope = float(((bdtr(correct - 1.0, num_guesses, right) - below) / further).max())
    return min(tail + 2 * num_canaries * delta * slope, 1.0)


def one_run_refutes(
    correct: int, num_guesses: int, num_canaries: int, *, points: Points, confidence: float
) -> bool:
    """Whether so many right guesses have probability below 1 - confidence under a trade-off curve.

    The most probable way, with the rest of the probability as low as the curve allows, is built from
    `correct` downwards: moving probability to fewer right guesses relaxes every constraint, so
    each constraint is met with equality in turn. The curve is refuted if that takes more than 1.

    Args:
        correct, num_guesses, num_canaries: as for `one_run_p_value`.
        points: (epsilon, delta) pairs that hold: each is a line below the curve, so more points make
            the bound tighter and none makes it wrong.
        confidence: in (0, 1).

    Returns:
        True if it is refuted.

    Guarantees:
        A run that meets the curve is refuted with probability at most 1 - confidence.
        Equals the linear program over p, up to rounding.

    Raises:
        ValueError: a number out of range.

    Source: Mahloujifar, Melis, Chaudhuri 2024, arXiv:2410.22235, in the form of the
        module's docstring.

    >>> one_run_refutes(95, 100, 100, points=gaussian_family().points(0.5), confidence=0.95)
    True
    """
    correct, num_guesses, num_canaries = _counts(correct, num_guesses, num_canaries)
    tau = 1.0 - _checks.open_unit(confidence=confidence)
    if num_guesses == 0:
        return False
    share = num_guesses / num_canaries
    with np.errstate(over="ignore"):  # an infinite slope says nothing, as it should
        slopes, deltas = np.exp(points.epsilons), points.deltas
    # right <= delta + e^epsilon wrong. The mirrored line, 1 - wrong <= ..., follows while right + wrong <= 1:
    # then 1 - right >= wrong, and of two such terms the larger one times e^epsilon makes the larger sum.
    right = tau * share * correct / num_guesses
    wrong = tau * share * (num_guesses - correct) / num_guesses
    for i in range(correct - 1, -1, -1):
        if right + wrong > share * (1 + 1e-9):
            return True
        needed = max(float(((right - deltas) / slopes).max()), wrong)
        right += i / (num_guesses - i) * (needed - wrong)
        wrong = needed
    return right + wrong > share * (1 + 1e-9)


def one_run(
    scores_in: ArrayLike,
    scores_out: ArrayLike,
    *,
    delta: float,
    confidence: float = 0.95,
    num_guesses: int | None = None,
) -> float:
    """Bound epsilon from below by the canaries of one run, with no assumption on the mechanism.

    Args:
        scores_in: scores of the canaries that were in; higher should mean in.
        scores_out: scores of those that were out. Each was in by a fair coin of its own.
        delta, confidence: in (0, 1).
        num_guesses: half of them say in, of the highest scores, and half out, of the lowest. None:
            the best of powers of two up to 4096, at a confidence that allows for the choice.

    Returns:
        A number in [0, inf).

    Guarantees:
        Above the true epsilon with probability at most 1 - confidence, however the canaries depend
        on each other.
        Ties are broken against the auditor.

    Raises:
        ValueError: fewer than two scores on a side, a NaN, or a number out of range.

    Source: Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, Algorithm 1 and Theorem 5.2.

    >>> trials = np.random.default_rng(0).standard_normal((2, 2000))
    >>> round(one_run(trials[0] + 3.0, trials[1], delta=1e-5), 2)
    4.66
    """
    inside, outside = scores(scores_in=scores_in), scores(scores_out=scores_out)
    delta = _checks.open_unit(delta=delta)
    alpha = 1.0 - _checks.open_unit(confidence=confidence)
    choices = _choices(num_guesses, len(inside) + len(outside))

    def refuted(right: int, made: int, num: int, alpha: float, epsilon: float) -> bool:
        return one_run_p_value(right, made, num, epsilon=epsilon, delta=delta) <= alpha

    return _best(inside, outside, alpha, choices, refuted, 64.0)


def one_run_curve(
    scores_in: ArrayLike,
    scores_out: ArrayLike,
    *,
    delta: float,
    confidence: float = 0.95,
    num_guesses: int | None = None,
    family: Family | None = None,
) -> float:
    """Bound epsilon from below by the canaries of one run, for a family of trade-off curves.

    Args:
        scores_in, scores_out, delta, confidence, num_guesses: as for `one_run`. Takes a second
            for some 4096 guesses.
        family: the assumption; None is `gaussian_family()`. With `approximate_family(delta)` there is none.

    Returns:
        Epsilon of the strongest curve in the family that is refuted; 0 where none is.

    Guarantees:
        If the mechanism meets a curve of the family, above that curve's epsilon with probability at
        most 1 - confidence, however the canaries depend on each other.

    Raises:
        ValueError: as `one_run`.

    Source: Mahloujifar, Melis, Chaudhuri 2024, arXiv:2410.22235.

    >>> trials = np.random.default_rng(0).standard_normal((2, 2000))
    >>> round(one_run_curve(trials[0] + 1.0, trials[1], delta=1e-5, num_guesses=128), 2)
    2.21
    """
    inside, outside = scores(scores_in=scores_in), scores(scores_out=scores_out)
    delta = _checks.open_unit(delta=delta)
    alpha = 1.0 - _checks.open_unit(confidence=confidence)
    choices = _choices(num_guesses, len(inside) + len(outside))
    curves = gaussian_family() if family is None else family
    known: dict[float, Points] = {}

    def refuted(right: int, made: int, num: int, alpha: float, strength: float) -> bool:
        if strength not in known:
            known[strength] = curves.points(strength)
        points = known[strength]
        return one_run_refutes(right, made, num, points=points, confidence=1 - alpha)

    strength = _best(inside, outside, alpha, choices, refuted, curves.strongest)
    return curves.epsilon(strength, delta) if strength > 0 else 0.0


Refuted = Callable[[int, int, int, float, float], bool]
"""`refuted(right, made, num_canaries, alpha, strength)`."""


def _best(
    inside: Array, outside: Array, alpha: float, choices: list[int], refuted: Refuted, most: float
) -> float:
    """The greatest strength refuted by some number of guesses, each at its share of alpha."""
    num, best = len(inside) + len(outside), 0.0
    for made in choices:
        right = right_guesses(inside, outside, made)

        def fails(strength: float, right: int = right, made: int = made) -> bool:
            return refuted(right, made, num, alpha / len(choices), strength)

        if fails(max(1.01 * best, 2.0**-10)):
            best = strongest_refuted(fails, most)
    return best


def _choices(num_guesses: int | None, num: int) -> list[int]:
    if num_guesses is not None:
        made = _checks.integer(at_least=1, num_guesses=num_guesses)
        if made > num:
            raise ValueError(f"Expected num_guesses <= {num}, the number of scores, got {made}.")
        return [made]
    return [2**i for i in range(3, 13) if 2**i <= num] or [num]


def right_guesses(scores_in: Array, scores_out: Array, num_guesses: int) -> int:
    """How many are right if the highest scores are said to be in and the lowest to be out.

    Of equal scores those are guessed that are wrong: no more are right than in any fixed order.
    """
    low = num_guesses // 2
    high = num_guesses - low
    return _right_at_top(scores_in, scores_out, high) + _right_at_top(-scores_out, -scores_in, low)


def _right_at_top(right: Array, wrong: Array, num: int) -> int:
    if num == 0:
        return 0
    last = np.partition(np.concatenate([right, wrong]), -num)[-num]
    above = int((right > last).sum())
    tied = num - above - int((wrong > last).sum())
    return above + max(0, tied - int((wrong == last).sum()))


def _counts(correct: int, num_guesses: int, num_canaries: int) -> tuple[int, int, int]:
    num_canaries = _checks.integer(at_least=1, num_canaries=num_canaries)
    num_guesses = _checks.integer(at_least=0, num_guesses=num_guesses)
    correct = _checks.integer(at_least=0, correct=correct)
    if not correct <= num_guesses <= num_canaries:
        raise ValueError(
            f"Expected correct <= num_guesses <= num_canaries, got {correct}, {num_guesses}, {num_canaries}."
        )
    return correct, num_guesses, num_canaries

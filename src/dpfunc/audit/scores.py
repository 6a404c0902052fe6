"""Scores: one number for each canary of each run, higher where it seems to have been in.

A score is `score(shadows, observed) -> (R, m)`: shadows are runs of their own whose coins it may look
at, to learn what in and out look like. It never sees the coins of the runs it scores. Any
function will do: a bad one makes the bound loose, none makes it wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dpfunc import _checks
from dpfunc.audit.replicas import Observations

Array = NDArray[np.float64]
Score = Callable[[Observations, Observations], Array]

_TINY = 1e-300


def gradient_score(shadows: Observations, observed: Observations) -> Array:
    """The dot product of what was released with the canary's direction, summed over the steps.

    The released change of the parameters is the noisy gradient times a learning rate. Centred by
    what the shadow runs show on average for each canary.
    """
    return _centred(shadows.projections.sum(1), shadows.coins, observed.projections.sum(1))


def loss_score(shadows: Observations, observed: Observations) -> Array:
    """The loss of the canary at the last parameters, lower for in, as a likelihood ratio of normals.

    Source: Carlini et al. 2022, arXiv:2112.03570 (LiRA), with one variance for all canaries.
    """
    centred = _centred(-shadows.losses, shadows.coins, -observed.losses)
    inside, outside = _means(-shadows.losses, shadows.coins)
    return centred * (inside - outside)


def likelihood_ratio(sampling_prob: float) -> Score:
    """The log likelihood ratio, step by step, of a canary that joins each batch with a probability.

    Out, the projection of a step is normal; in, it is shifted with probability sampling_prob. Mean,
    variance and shift come from the shadow runs, so that nothing is taken from the claim but
    sampling_prob. For gradient canaries on coordinates that the data do not move, and a step that
    keeps its claim, no score is better (Neyman and Pearson).

    Args:
        sampling_prob: in (0, 1].

    Returns:
        A score.

    Raises:
        ValueError: sampling_prob is 0 or out of range.
    """
    if _checks.probability(sampling_prob=sampling_prob) == 0.0:
        raise ValueError("Expected sampling_prob above 0: at 0 no canary is ever in a batch.")

    def score(shadows: Observations, observed: Observations) -> Array:
        coins = shadows.coins[:, None, :]
        num_out = np.maximum((~coins).sum(0), 1)
        outside = np.where(coins, 0.0, shadows.projections).sum(0) / num_out
        moved = shadows.projections - outside
        variance = np.mean(moved[np.broadcast_to(~coins, moved.shape)] ** 2) + _TINY
        average = np.mean(moved[np.broadcast_to(coins, moved.shape)])
        shift = max(average / sampling_prob, 1e-3 * variance**0.5)
        ratio = (shift * (observed.projections - outside) - shift**2 / 2) / variance
        if sampling_prob < 1.0:
            ratio = np.logaddexp(np.log1p(-sampling_prob), np.log(sampling_prob) + ratio)
        return ratio.sum(1)

    return score


def spread_score(shadows: Observations, observed: Observations) -> Array:
    """TARGETED at noise that repeats: how much a canary's projection varies over the steps.

    Noise that is the same at each step falls out of the differences between steps; what remains
    is whether the canary was in the batch.
    """
    return _centred(shadows.projections.std(1), shadows.coins, observed.projections.std(1))


def largest_score(shadows: Observations, observed: Observations) -> Array:
    """TARGETED at sampling that takes every example once: the largest projection of any step."""
    return _centred(shadows.projections.max(1), shadows.coins, observed.projections.max(1))


def _means(values: Array, coins: NDArray[np.bool_]) -> tuple[Array, Array]:
    """(m,) means over shadow runs with the canary in, and out; the mean of all where there is none."""
    every = values.mean(0)
    inside = np.where(coins, values, 0.0).sum(0) / np.maximum(coins.sum(0), 1)
    outside = np.where(coins, 0.0, values).sum(0) / np.maximum((~coins).sum(0), 1)
    return np.where(coins.any(0), inside, every), np.where(coins.all(0), every, outside)


def _centred(values: Array, coins: NDArray[np.bool_], observed: Array) -> Array:
    inside, outside = _means(values, coins)
    return observed - (inside + outside) / 2

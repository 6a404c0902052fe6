"""Poisson sampling at a cost of the batch, not of the data set."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dpfunc import _checks, random
from dpfunc.typing import Key

MAX_EXAMPLES = 2**40
_OUTSIDE = 1e-30  # more than the mass outside `_window`
_ROUNDING = 1e-8  # more than what rounding moves a ratio of sums over `_window` by


def poisson_indices(
    num_examples: int, key: Key, step: int | Tensor, *, sampling_prob: float
) -> Tensor:
    """Draw the batch of a step: each example in or out, independently, with one probability.

    Args:
        num_examples: size of the data set, in [0, 2**40]. PRIVATE when an example may be added or
            removed; it is used here and goes nowhere else.
        key: the run's key.
        step: an int or a 0-d integer tensor, >= 0.
        sampling_prob: probability of each example, in [0, 1].

    Returns:
        Sorted int64 tensor of the indices drawn, on CPU. Its length is PRIVATE.

    Guarantees:
        A function of its arguments alone: any step can be drawn without the ones before.
        Each index is in with sampling_prob, independently of the others. The law of the whole draw
        is off by at most (4 s + 16) 2**-50 in total variation, s the standard deviation of the
        batch size: that of the count (see `_binomial`); given the count the subset is uniform,
        exactly.
        Time and memory are O(batch), however large the data set.

    Raises:
        ValueError, TypeError: a number out of range, or a key of another shape or dtype.

    Source: given its size, a Poisson sample is a uniform subset of that size, and the size is
    binomial: Tille 2006, Sampling Algorithms, section 5.2.

    >>> poisson_indices(2_000_000_000, random.key(0), 3, sampling_prob=1e-9).dtype
    torch.int64
    """
    random.check_key(key)
    num_examples = _num_examples(num_examples)
    step = _checks.integer(at_least=0, step=step)
    sampling_prob = _checks.probability(sampling_prob=sampling_prob)
    count_key, subset_key, _ = _keys(key, step)
    count = _binomial(count_key, num_examples, sampling_prob)
    if 2 * count <= num_examples:
        return torch.from_numpy(np.sort(_subset(subset_key, num_examples, count)))
    kept = np.ones(num_examples, dtype=bool)
    kept[_subset(subset_key, num_examples, num_examples - count)] = False
    return torch.from_numpy(np.flatnonzero(kept))


def overflow_probability(num_examples: int, *, sampling_prob: float, max_batch_size: int) -> float:
    """Bound the probability that a Poisson draw exceeds max_batch_size and is cut.

    It is what the mechanism of a run with such a cap takes as its overflow_prob.

    Args:
        num_examples: a PUBLIC upper bound on the size of the data set and of its neighbours, in
            [0, 2**40]. Not the size itself, unless that is public: the result goes into the log.
        sampling_prob: probability of each example, in [0, 1].
        max_batch_size: the cap of `poisson_batches`, at least 1.

    Returns:
        Pr[Binomial(num_examples, sampling_prob) > max_batch_size] rounded up, in [1e-30, 1].

    Guarantees:
        Never below the true value; above it by at most 2e-8 of it plus 2e-30.
        Never 0, even where no draw can exceed the cap: in an event 0 says that no bound was given.
        Holds for every smaller data set too.

    Raises:
        ValueError, TypeError: a number out of range, or not a number.

    Source: Chua et al. 2024, arXiv:2411.04205, which accounts truncated Poisson batches by this
        tail.

    >>> f"{overflow_probability(60_000, sampling_prob=0.01, max_batch_size=750):.3e}"
    '1.344e-09'
    """
    num_examples = _num_examples(num_examples)
    sampling_prob = _checks.probability(sampling_prob=sampling_prob)
    max_batch_size = _checks.integer(at_least=1, max_batch_size=max_batch_size)
    if num_examples <= max_batch_size or sampling_prob == 0.0:
        return _OUTSIDE
    if sampling_prob == 1.0:
        return 1.0
    low, weights = _window(num_examples, sampling_prob)
    above = weights[max(0, max_batch_size + 1 - low) :].sum() / weights.sum()
    return min(1.0, float(above) * (1 + _ROUNDING) + _OUTSIDE)


def uniform_subset(key: Key, num: int, size: int) -> Tensor:
    """Sorted positions of a uniform subset of `size` out of `num`, size at most num."""
    return torch.from_numpy(np.sort(_subset(key, num, size)))


def loading_seed(key: Key, step: int) -> int:
    """What a data set that draws while a step's examples load is seeded with."""
    low, high = random.bits(_keys(key, step)[2], (2,)).tolist()
    return (high & 0x7FFFFFFF) << 32 | low


def _keys(key: Key, step: int) -> Tensor:
    """Of the sampler, at a step: for the count, for the subset, for loading."""
    return random.split(random.derive(key.cpu(), random.SAMPLING, step), 3)


def _num_examples(num_examples: int) -> int:
    num_examples = _checks.integer(at_least=0, num_examples=num_examples)
    if num_examples > MAX_EXAMPLES:
        raise ValueError(f"Expected num_examples <= 2**40, got {num_examples}.")
    return num_examples


def _binomial(key: Key, num: int, prob: float) -> int:
    """Invert the distribution function of the binomial law, summed from ratios around its mode.

    Rounding: a ratio is within 3 roundings, so the weight at distance d of the mode is within 3 d,
    and d is about the standard deviation s where the mass is: 3 s 2**-53 in total variation, and as
    much for the normalisation. u has a grid of 2**-53, which moves each of the 24 s + 80 weights
    by at most that. What lies outside the window is below 1e-30 (Bennett's inequality).
    """
    if prob in (0.0, 1.0):
        return int(num * prob)
    low, weights = _window(num, prob)
    below = np.cumsum(weights)
    u = float(random.uniform(key, (), dtype=torch.float64))
    return low + int(np.searchsorted(below, u * below[-1], side="right"))


def _window(num: int, prob: float) -> tuple[int, np.ndarray]:
    """The binomial law within 12 s + 40 of its mode, up to a factor: the first number, the weights.

    At distance d of the mode 5 d roundings, at most 5 (12 * 2**19 + 40) 2**-53 < 4e-9.
    """
    mode = min(num, math.floor((num + 1) * prob))
    reach = math.ceil(12 * math.sqrt(num * prob * (1 - prob)) + 40)
    low, high = max(0, mode - reach), min(num, mode + reach)
    odds = prob / (1 - prob)
    up = np.arange(mode, high, dtype=np.float64)  # from k to k + 1
    down = np.arange(mode, low, -1, dtype=np.float64)  # from k to k - 1
    rising = np.cumprod((num - up) / (up + 1) * odds)
    falling = np.cumprod(down / (num - down + 1) / odds)
    return low, np.concatenate([falling[::-1], [1.0], rising])


def _subset(key: Key, num: int, size: int) -> np.ndarray:
    """The first `size` different values in a stream of uniform integers below `num`."""
    if size == 0:
        return np.empty(0, dtype=np.int64)
    limit = 2**63 // num * num  # reject above: what is left divides evenly
    drawn = np.empty(0, dtype=np.int64)
    offset = 0
    while True:
        _, first = np.unique(drawn, return_index=True)
        if len(first) >= size:
            return drawn[np.sort(first)[:size]]
        more = 2 * (size - len(first)) + 16
        low, high = random.bits(key, (more, 2), offset=offset).unbind(1)
        wide = (((high & 0x7FFFFFFF) << 32) | low).numpy()
        drawn = np.concatenate([drawn, wide[wide < limit] % num])
        offset += 2 * more

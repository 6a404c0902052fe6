"""Laws of sampling: of what a sampler draws, by statistics, and of the batches that hold it, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from dpfunc import random, trees
from dpfunc.mechanism import DPSGD
from dpfunc.sampling import Batch, poisson_batches, poisson_indices
from dpfunc.testing.laws.exact import same_bits
from dpfunc.typing import Key

Draw: TypeAlias = Callable[[int], Any]
"""`draw(step) -> indices` of the examples in that step's batch, in any order."""

_LAGS = (1, 2, 3)


def inclusion_is_independent(
    draw: Draw | None = None,
    *,
    num_examples: int = 12,
    sampling_prob: float = 0.3,
    num_steps: int = 3000,
    error_rate: float = 1e-6,
) -> None:
    """Each example is in each batch with one probability, independently of the others and of other steps.

    Args:
        draw: the sampler under test; None is `poisson_indices` with a fixed key.
        num_examples: that it draws from, at least 2. Few, so that every pair has its test.
        sampling_prob: what each is drawn with, in (0, 1).
        num_steps: how many batches are drawn, from step 0 on.
        error_rate: probability that a right sampler is refused, in five equal parts: each example's
            count and all together (binomial tests), batch sizes, pairs, and pairs up to three steps
            apart (chi-square tests). By default a probability that is 10 % off for all, or 30 % for
            one example, passes with probability below 1e-5; batches of a fixed size, a shuffled
            pass over the data, and blocks of neighbours never do.

    Raises:
        AssertionError: an index out of range or twice in a batch, or a test fails.

    >>> coins = np.random.default_rng(0).random((3000, 12)) < 0.3
    >>> inclusion_is_independent(lambda step: coins[step].nonzero()[0])
    """
    if draw is None:
        draw = _poisson(num_examples, sampling_prob)
    member = np.zeros((num_steps, num_examples))
    for step in range(num_steps):
        indices = np.asarray(draw(step))
        if len(np.unique(indices)) < len(indices):
            raise AssertionError(f"an example is twice in the batch of step {step}: {indices!r}")
        if len(indices) and not 0 <= indices.min() <= indices.max() < num_examples:
            raise AssertionError(f"step {step} draws {indices!r} from {num_examples} examples")
        member[step, indices] = 1
    each = error_rate / 5
    counts = member.sum(0).astype(int)
    for example, count in enumerate(counts.tolist()):
        chance = _binomial_tail(count, num_steps, sampling_prob)
        _expect(
            chance, each / num_examples, f"example {example} is in {count} of {num_steps} batches"
        )
    total = int(counts.sum())
    chance = _binomial_tail(total, num_steps * num_examples, sampling_prob)
    _expect(chance, each, f"all examples together are in {total} places of {member.size}")
    _expect(_sizes(member, sampling_prob), each, "batch sizes are not binomial")
    spread = (member - sampling_prob) / np.sqrt(sampling_prob * (1 - sampling_prob))
    together = _products(spread, 0)[np.triu_indices(num_examples, 1)]
    chance = float(stats.chi2.sf((together**2).sum(), together.size))
    _expect(chance, each, "examples are in batches together more or less often than apart")
    for lag in _LAGS:
        after = _products(spread, lag)
        chance = float(stats.chi2.sf((after**2).sum(), after.size))
        _expect(
            chance, each / len(_LAGS), f"batches that are {lag} steps apart depend on each other"
        )


def batches_are_whole(
    mechanism: DPSGD,
    *,
    make: Callable[..., Iterable[Batch]] = poisson_batches,
    key: Key | None = None,
    num_examples: int = 40,
    num_steps: int = 40,
) -> None:
    """Every step has its batch, resumed or not: examples under the mask, each once, and zeros as padding.

    Args:
        mechanism: whose sampling_prob is drawn with. A small one makes empty draws, which have batches.
        make: the function under test, called as `poisson_batches(data, key, mechanism, num_steps=...,
            start=...)`.
        key: of the run; None is a fixed one.
        num_examples, num_steps: of the run.

    Raises:
        AssertionError: a step is missing, an example is there twice or none of the data, padding is
            not zeros, or a resumed run has other batches.

    >>> batches_are_whole(
    ...     DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.05, expected_batch_size=2))
    """
    key = random.key(0) if key is None else key
    data = {"x": torch.arange(num_examples).double() + 1, "y": torch.arange(num_examples) + 1}
    batches = list(make(data, key, mechanism, num_steps=num_steps))
    steps = [int(batch.step) for batch in batches]
    if steps != list(range(num_steps)):
        raise AssertionError(f"a run of {num_steps} steps has batches of steps {steps}")
    for batch in batches:
        real, padding = batch.data["y"][batch.mask], batch.data["y"][~batch.mask]
        if padding.any():
            raise AssertionError(f"step {int(batch.step)} has padding rows {padding.tolist()}")
        known = real.clamp(1, num_examples).unique().equal(real.sort().values)
        if not known or not batch.data["x"].equal(batch.data["y"].double()):
            raise AssertionError(f"step {int(batch.step)} has no rows of the data: {batch!r}")
    for start in (0, 1, num_steps // 2, num_steps):
        resumed = list(make(data, key, mechanism, num_steps=num_steps, start=start))
        if len(resumed) != num_steps - start or not same_bits(batches[start:], resumed):
            raise AssertionError(
                f"a run resumed at step {start} has other batches than the whole run"
            )


def drawn_by(
    mechanism: DPSGD,
    *,
    make: Callable[..., Iterable[Batch]] = poisson_batches,
    key: Key | None = None,
    num_examples: int = 12,
    num_steps: int = 3000,
) -> Draw:
    """What batches hold, as a sampler for `inclusion_is_independent`.

    Args:
        mechanism, make, key: as for `batches_are_whole`.
        num_examples, num_steps: as the law is asked with.

    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.5, expected_batch_size=2)
    >>> drawn = drawn_by(mechanism, num_examples=3, num_steps=5)(4)
    >>> drawn.dtype
    torch.int64
    """
    key = random.key(0) if key is None else key
    batches = make(torch.arange(num_examples), key, mechanism, num_steps=num_steps)
    held: list[Tensor] = [trees.leaves(batch.data)[0][batch.mask] for batch in batches]
    return held.__getitem__


def _poisson(num_examples: int, sampling_prob: float) -> Draw:
    key = random.key(0)
    return lambda step: poisson_indices(num_examples, key, step, sampling_prob=sampling_prob)


def _products(spread: np.ndarray, lag: int) -> np.ndarray:
    """(N, N), each nearly standard normal: of examples, standardised, `lag` steps apart."""
    num = len(spread) - lag
    return spread[:num].T @ spread[lag:] / np.sqrt(num)


def _sizes(member: np.ndarray, prob: float) -> float:
    """The probability of batch sizes as far from binomial, over sizes that are expected ten times."""
    num_steps, num = member.shape
    counts = np.bincount(member.sum(1).astype(int), minlength=num + 1)
    expected = num_steps * stats.binom.pmf(np.arange(num + 1), num, prob)
    common = expected >= 10
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], max(num_steps - expected[common].sum(), 1e-9))
    return float(
        stats.chi2.sf(((observed - wanted) ** 2 / np.maximum(wanted, 10)).sum(), len(wanted) - 1)
    )


def _binomial_tail(count: int, num: int, prob: float) -> float:
    return float(2 * min(stats.binom.cdf(count, num, prob), stats.binom.sf(count - 1, num, prob)))


def _expect(chance: float, least: float, otherwise: str) -> None:
    if not chance >= least:
        raise AssertionError(f"{otherwise}, which has probability {chance:.1e}")

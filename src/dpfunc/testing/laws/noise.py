"""Laws of noise, which takes numbers enough to tell a tenth: each says how often it errs.

The function under test is `release`, which is called as `privatize`. A law draws with one key, so that it
passes or fails again alike; its error rate is over keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from dpfunc import random, trees
from dpfunc.mechanism import DPSGD
from dpfunc.noise import privatize
from dpfunc.testing.laws.exact import distance, exact_norm
from dpfunc.typing import Key, Tree

Release: TypeAlias = Callable[[Any, Key, DPSGD], Any]
"""`release(clipped_sum, key, mechanism) -> noisy tree`."""

_MOST = 200_000
"""Among so many float32 numbers, some hundreds are equal by chance: far from one in a hundred."""


def noise_is_calibrated(
    mechanism: DPSGD,
    *,
    release: Release = privatize,
    key: Key | None = None,
    num: int = 20_000,
    dtype: torch.dtype = torch.float32,
    error_rate: float = 1e-6,
) -> None:
    """Released noise has the scale noise_multiplier * sensitivity / divisor, and its very law.

    Args:
        mechanism: Gaussian or Laplace, its noise the same at every step and in every leaf.
        release: the function under test.
        key: of the release; None is a fixed one.
        num: how many numbers are drawn.
        dtype: of the clipped sum.
        error_rate: probability that right noise is refused. With 20 000 numbers a scale that is 10 %
            off, either way, passes with probability below 1e-9, and noise of the right scale whose
            distribution function is 4 % off somewhere, with probability below 1e-6.

    Raises:
        AssertionError: another scale, another law, or numbers that repeat as those of a shorter format.

    >>> noise_is_calibrated(
    ...     DPSGD(clipping=0.5, noise_multiplier=3.0, sampling_prob=0.1, expected_batch_size=20))
    """
    key = random.key(0) if key is None else key
    noise = release({"w": torch.zeros(num, dtype=dtype)}, key, mechanism)["w"]
    scale = _multiplier(mechanism) * mechanism.sensitivity / mechanism.divisor
    numbers_follow(noise, scale, law=mechanism.mechanism, error_rate=error_rate)


def numbers_follow(
    noise: Tensor, scale: float, *, law: str = "gaussian", error_rate: float = 1e-6
) -> None:
    """Numbers are independent draws of a Gaussian or a Laplace law of this scale, as far as a test sees.

    Two tests, each with half of the error rate: of the scale, by the exact law of the sum of squares (of
    absolute values for Laplace); of the law's whole form, by Kolmogorov and Smirnov.

    Args:
        noise: any shape, floating point.
        scale: standard deviation, or b of the Laplace law, > 0.
        law: "gaussian" or "laplace".
        error_rate: probability that right numbers are refused. How often wrong ones pass depends on how
            many there are: `noise_is_calibrated` says it for 20 000.

    Raises:
        AssertionError: another scale, another law, or numbers that repeat as those of a shorter format.

    >>> numbers_follow(2 * random.normal(random.key(1), (10_000,)), 2.0)
    """
    if law not in ("gaussian", "laplace"):
        raise ValueError(f"Expected law to be 'gaussian' or 'laplace', got {law!r}.")
    values = noise.detach().double().flatten().numpy() / scale
    num = len(values)
    if not np.isfinite(values).all():
        raise AssertionError("the noise is not finite")
    different = len(np.unique(values[:_MOST]))
    if different < 0.99 * min(num, _MOST):
        raise AssertionError(f"of {min(num, _MOST)} numbers only {different} are different ones")
    if law == "gaussian":
        statistic, shape, wanted = float((values**2).sum()) / 2, num / 2, "norm"
        found = math.sqrt(2 * statistic / num)
    else:
        statistic, shape, wanted = float(np.abs(values).sum()), float(num), "laplace"
        found = statistic / num
    tail = 2 * min(special.gammainc(shape, statistic), special.gammaincc(shape, statistic))
    if not tail >= error_rate / 2:
        raise AssertionError(
            f"the scale of {num} numbers is {found:.4g} times {scale!r}, which has probability {tail:.1e}"
        )
    form = stats.kstest(values, wanted).pvalue
    if not form >= error_rate / 2:
        raise AssertionError(f"{num} numbers are not {law}: probability {form:.1e}")


def noise_is_independent(
    mechanism: DPSGD,
    *,
    release: Release = privatize,
    key: Key | None = None,
    num: int = 20_000,
    error_rate: float = 1e-6,
) -> None:
    """Noise of different leaves, keys, steps and ranks has nothing in common, nor do its elements.

    Leaves lie at paths of each depth; two keys are split from one, and two are folded in from one, as
    for steps and for ranks.

    Args:
        mechanism: any whose noise_multiplier is a number above 0.
        release: the function under test.
        key: of the run; None is a fixed one.
        num: numbers in each leaf.
        error_rate: as for `streams_are_independent`, which is asked.

    Raises:
        AssertionError: two of them share numbers, or are correlated.

    >>> noise_is_independent(
    ...     DPSGD(clipping=0.5, noise_multiplier=3.0, sampling_prob=0.1, expected_batch_size=20))
    """
    key = random.key(0) if key is None else key
    keys = {"key": key, "step 0": random.fold_in(key, 0), "step 1": random.fold_in(key, 1)}
    keys |= {f"child {i}": child for i, child in enumerate(random.split(key))}
    keys["rank 1 of step 0"] = random.fold_in(keys["step 0"], 1)
    zeros = torch.zeros(num)
    tree = {"a": {"w": zeros}, "b": [zeros, zeros], "w": zeros}
    streams = {}
    for name, each in keys.items():
        noisy = release(tree, each, mechanism)
        leaves = {"a.w": noisy["a"]["w"], "b.0": noisy["b"][0], "b.1": noisy["b"][1]}
        streams |= {f"{path} of {name}": leaf for path, leaf in leaves.items()}
        streams[f"w of {name}"] = noisy["w"]
    streams_are_independent(streams, error_rate=error_rate)


def streams_are_independent(streams: Mapping[str, Tensor], *, error_rate: float = 1e-6) -> None:
    """Streams of numbers share none, and neither two of them nor neighbours in one are correlated.

    Shared are numbers of the same size at any places, so that a stream shifted, reordered or with its
    signs turned is seen. Correlated means linearly, number by number, by Fisher's transform.

    Args:
        streams: by name, floating point. Of two the first numbers are compared, as many as the shorter
            has and at most 200 000; one with fewer than 8 is left out.
        error_rate: probability that independent normal streams are refused, over all pairs together. A
            correlation of 8 % between two of 24 streams of 20 000 numbers passes with probability
            below 1e-6.

    Raises:
        AssertionError: two of them share more than 2 numbers and a hundredth of the shorter, or are correlated.

    >>> a, b = random.normal(random.key(1), (2, 1000))
    >>> streams_are_independent({"a": a, "b": b})
    """
    values = {
        name: leaf.detach().double().flatten()[:_MOST].numpy()
        for name, leaf in streams.items()
        if leaf.numel() >= 8
    }
    sizes = {name: np.unique(np.abs(each)) for name, each in values.items()}
    pairs = list(itertools.combinations(values, 2))
    # 1 - error_rate / (2 tests) as a normal quantile; Fisher's transform has variance 1 / (n - 3).
    most = -float(special.ndtri(error_rate / 2 / max(1, len(pairs) + len(values))))
    for name, each in values.items():
        if len(sizes[name]) < 0.99 * len(each) - 2:
            raise AssertionError(f"{name} has {len(sizes[name])} different of {len(each)} numbers")
        _expect_uncorrelated(each[:-1], each[1:], most, f"neighbours in {name}")
    for a, b in pairs:
        shared = np.intersect1d(sizes[a], sizes[b], assume_unique=True)
        num = min(len(values[a]), len(values[b]))
        if len(shared) > 2 + 0.01 * num:
            raise AssertionError(f"{a} and {b} share {len(shared)} numbers, such as {shared[-1]!r}")
        _expect_uncorrelated(values[a][:num], values[b][:num], most, f"{a} and {b}")


def signal_is_kept(
    total: Tree,
    mechanism: DPSGD,
    *,
    release: Release = privatize,
    key: Key | None = None,
) -> None:
    """A release is (sum + noise) / divisor: noise that does not depend on the sum, one public number.

    Args:
        total: a clipped sum, leaves float32 or float64, not all zero.
        mechanism: whose divisor it is.
        release: the function under test.
        key: of the release; None is a fixed one.

    Raises:
        AssertionError: without its noise, that of zeros under the same key, the release is not
            total / divisor up to rounding; or its structure is another.

    >>> signal_is_kept({"w": torch.tensor([4.0])},
    ...     DPSGD(clipping=0.5, noise_multiplier=3.0, sampling_prob=0.1, expected_batch_size=20))
    """
    key = random.key(0) if key is None else key
    noise = release(trees.map(torch.zeros_like, total), key, mechanism)
    noisy = release(total, key, mechanism)
    signal = trees.map(lambda a, b: a.double() - b.double(), noisy, noise)
    wanted = trees.map(lambda leaf: leaf.double() / mechanism.divisor, total)
    off = distance(signal, wanted)
    if not off <= 4 * 2.0**-24 * (exact_norm(noisy) + exact_norm(noise)):
        raise AssertionError(f"under the noise lies {signal!r}, where {wanted!r} was expected")


def _multiplier(mechanism: DPSGD) -> float:
    multiplier: Any = mechanism.noise_multiplier
    moves = mechanism.factor is not None or mechanism.adaptive is not None
    by_leaf = getattr(mechanism.rule, "noise", "common") != "common"
    if moves or by_leaf or mechanism.noise is not None or not isinstance(multiplier, float):
        raise ValueError(
            "Expected a mechanism whose noise is the same at every step and in every leaf, got "
            f"{mechanism!r}. Ask numbers_follow about each leaf."
        )
    return multiplier


def _expect_uncorrelated(a: np.ndarray, b: np.ndarray, most: float, who: str) -> None:
    found = float(np.corrcoef(a, b)[0, 1])
    if not abs(math.atanh(max(-1 + 1e-15, min(1 - 1e-15, found)))) * math.sqrt(len(a) - 3) <= most:
        raise AssertionError(f"{who} are correlated: {found:.3g} over {len(a)} numbers")

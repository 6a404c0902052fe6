"""Noise on sums of bounded contributions, and the division by a public number after it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dpfunc import random, trees
from dpfunc._chacha20 import add_normals
from dpfunc.mechanism import DPSGD, noise_scales
from dpfunc.schedules import Schedule
from dpfunc.typing import Key, Tree


def privatize(
    clipped_sum: Tree,
    key: Key,
    mechanism: DPSGD,
    noise_multiplier: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tree:
    """Add noise of scale `noise_multiplier * sensitivity` to a sum, then divide by a public number.

    Args:
        clipped_sum: leaves (*s,), float32 or float64: a sum whose sensitivity is the mechanism's,
            as `clip_and_sum` returns it.
        key: of this release alone.
        mechanism: what to add and what to divide by: `expected_batch_size` for the mean, else 1.
        noise_multiplier: 0-d floating-point tensor, 0 or at least 1e-30 / sensitivity, in place of
            the mechanism's number. Its value cannot be checked inside a graph.
        factor: 0-d tensor that the release is multiplied by: what clipping divided gradients by.

    Returns:
        The released estimate of the mean gradient: the same structure, shapes and dtypes.

    Guarantees:
        This file is the one place of the noise's scale, which is rounded up to the leaf's format, and
        of the division, in this order. What `factor` does comes after both.
        Noise is a function of (key, leaf path, element offset): it does not depend on the other
        leaves, on the dtype of others or on the device of the key. Leaves share no word.
        The realised batch size and the size of the data set enter nowhere.

    Raises:
        TypeError: a leaf is neither float32 nor float64, noise_multiplier is not a tensor, or noise of
            your own returned something else than it was asked for.
        ValueError: noise_multiplier is not 0-d.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1; Dwork et al. 2006 for Laplace noise.

    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=0.0, sampling_prob=0.5, expected_batch_size=4)
    >>> privatize({"w": torch.tensor([2.0])}, random.key(0), mechanism)
    {'w': tensor([0.5000])}
    """
    multiplier: Any = mechanism.noise_multiplier
    if noise_multiplier is not None:
        # In float64: the product may round, or vanish, in the format the multiplier came in.
        multiplier = _checked(noise_multiplier).detach().to(torch.float64)
    draw = _draw(mechanism)

    def release(leaf: Tensor, leaf_key: Key, width: float) -> Tensor:
        if leaf.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"Expected clipped_sum in float32 or float64, got {leaf.dtype}. Raise it first."
            )
        mean = _noisy(leaf, leaf_key, multiplier * width, draw) / mechanism.divisor
        return mean if factor is None else mean * factor.to(leaf.dtype)

    return trees.map_with_tags(
        release,
        clipped_sum,
        lambda tags: random.derive(key, random.LEAF, tags),
        partial(noise_scales, mechanism.rule),
    )


def privatize_queries(sums: dict[str, Tensor], key: Key, mechanism: DPSGD) -> dict[str, Tensor]:
    """Each sum of values in [-1, 1] with the noise of its query, over `expected_batch_size`.

    Args:
        sums: 0-d, float64, by the name of the query.
        key: of this step's telemetry alone.
        mechanism: whose `queries` these are.

    Returns:
        0-d, float64, by the name of the query.

    Guarantees:
        The noise of a query is a function of (key, its name), of standard deviation its own
        `noise_multiplier`: its sensitivity is 1.

    >>> from dpfunc.mechanism import DPSGD
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.5, expected_batch_size=4)
    >>> privatize_queries({}, random.key(0), mechanism)
    {}
    """
    by_name = {query.name: query.noise_multiplier for query in mechanism.queries}

    def release(total: Tensor, query_key: Key, scale: float) -> Tensor:
        return _noisy(total, query_key, scale, random.normal) / mechanism.expected_batch_size

    return trees.map_with_tags(
        release,
        sums,
        lambda tags: random.derive(key, random.LEAF, tags),
        lambda names: [by_name[name] for name in names],
    )


def _noisy(leaf: Tensor, key: Key, scale: Any, draw: Callable[..., Tensor]) -> Tensor:
    exact = torch.as_tensor(scale, dtype=torch.float64, device=leaf.device)
    near = exact.to(leaf.dtype)
    above = torch.nextafter(near, torch.full_like(near, math.inf))
    scale = torch.where(near.double() < exact, above, near)  # never less noise
    key = key.to(leaf.device)
    derived = leaf.requires_grad or forward_ad._current_level >= 0
    if draw is not random.normal or derived:
        return leaf + scale * draw(key, leaf.shape, dtype=leaf.dtype)
    random.check_key(key)  # the same bits, and no memory for the noise, but no derivative
    noisy = add_normals(leaf.reshape(1, -1), key.unsqueeze(0), scale.reshape(1))
    return noisy.reshape(leaf.shape)


def _draw(mechanism: DPSGD) -> Callable[..., Tensor]:
    """Numbers of scale 1, by the name of the mechanism."""
    own = mechanism.noise
    if own is None:
        return random.laplace if mechanism.mechanism == "laplace" else random.normal

    def draw(key: Key, shape: torch.Size, *, dtype: torch.dtype) -> Tensor:
        noise = own(key, shape, dtype=dtype)
        if not isinstance(noise, Tensor) or noise.shape != shape or noise.dtype != dtype:
            raise TypeError(
                f"Expected noise(key, shape, dtype=dtype) to return a tensor of shape {tuple(shape)} "
                f"and {dtype}, got {getattr(noise, 'shape', type(noise).__name__)} and "
                f"{getattr(noise, 'dtype', 'no dtype')}."
            )
        return noise

    return draw


def _checked(noise_multiplier: Tensor) -> Tensor:
    if not isinstance(noise_multiplier, Tensor) or not noise_multiplier.is_floating_point():
        raise TypeError(
            f"Expected noise_multiplier to be a 0-d floating-point tensor, got {noise_multiplier!r}. "
            "A number goes into the mechanism, where the log reads it."
        )
    if noise_multiplier.ndim != 0:
        raise ValueError(
            f"Expected noise_multiplier to be a 0-d tensor, got shape {tuple(noise_multiplier.shape)}. "
            "To sweep over several, use vmap."
        )
    return noise_multiplier


def released_variance(mechanism: DPSGD) -> float:
    """The variance that `privatize` gives each coordinate of what it returns; it is public.

    Raises:
        ValueError: it is not one number: it changes with the step or the leaf, or is your own.

    >>> released_variance(
    ...     DPSGD(clipping=2.0, noise_multiplier=1.5, sampling_prob=0.1, expected_batch_size=6))
    0.25
    """
    multiplier = mechanism.noise_multiplier
    moves = mechanism.factor is not None or mechanism.adaptive is not None
    by_leaf = getattr(mechanism.rule, "noise", "common") != "common"
    if moves or by_leaf or isinstance(multiplier, Schedule) or mechanism.noise is not None:
        raise ValueError(
            "Expected a mechanism whose noise is the same at every step and in every leaf, got one with "
            "a schedule, adaptive clipping, noise per group, or noise of its own."
        )
    unit = 2.0 if mechanism.mechanism == "laplace" else 1.0  # of noise of scale 1
    return unit * (multiplier * mechanism.sensitivity / mechanism.divisor) ** 2

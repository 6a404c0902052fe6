"""Gaussian noise on a clipped sum, and the division by a public number after it."""

from __future__ import annotations

import torch
from torch import Tensor

from dpfunc import random, trees
from dpfunc.mechanism import DPSGD
from dpfunc.typing import Key, Tree


def privatize(
    clipped_sum: Tree, key: Key, mechanism: DPSGD, noise_multiplier: Tensor | None = None
) -> Tree:
    """Add noise of `noise_multiplier * sensitivity` to a sum, then divide by `expected_batch_size`.

    Args:
        clipped_sum: leaves (*s,), float32 or float64: a sum whose sensitivity is the mechanism's,
            as `clip_and_sum` returns it.
        key: of this release alone.
        mechanism: what to add and what to divide by.
        noise_multiplier: 0-d floating-point tensor, 0 or at least 1e-30 / sensitivity, in place of
            the mechanism's number. Its value cannot be checked inside a graph.

    Returns:
        The released estimate of the mean gradient: the same structure, shapes and dtypes.

    Guarantees:
        This is the one place of the standard deviation and of the division, in this order.
        Noise is a function of (key, leaf path, element offset): it does not depend on the other
        leaves, on the dtype of others or on the device of the key. Leaves share no word.
        The realised batch size and the size of the data set enter nowhere.

    Raises:
        TypeError: a leaf is neither float32 nor float64, or noise_multiplier is not a tensor.
        ValueError: noise_multiplier is not 0-d.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=0.0, sampling_prob=0.5, expected_batch_size=4)
    >>> privatize({"w": torch.tensor([2.0])}, random.key(0), mechanism)
    {'w': tensor([0.5000])}
    """
    multiplier = mechanism.noise_multiplier
    if noise_multiplier is not None:
        # In float64: the product may round, or vanish, in the format the multiplier came in.
        multiplier = _checked(noise_multiplier).detach().to(torch.float64)
    stddev = multiplier * mechanism.sensitivity

    def release(leaf: Tensor, leaf_key: Key) -> Tensor:
        if leaf.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"Expected clipped_sum in float32 or float64, got {leaf.dtype}. Raise it first."
            )
        noise = random.normal(leaf_key.to(leaf.device), leaf.shape, dtype=leaf.dtype)
        scale = torch.as_tensor(stddev, dtype=leaf.dtype, device=leaf.device)
        return (leaf + scale * noise) / mechanism.expected_batch_size

    return trees.map_with_tags(
        release, clipped_sum, lambda tags: random.derive(key, random.LEAF, tags)
    )


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

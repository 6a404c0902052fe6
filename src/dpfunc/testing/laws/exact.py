"""What laws measure with: norms with one rounding, equality of bits, and what a float32 sum may round."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpfunc import trees
from dpfunc.typing import ClippingRule, Tree

ROUNDOFF = 2.0**-24
"""Of float32, which everything is summed in at least."""


def exact_norm(tree: Tree, order: int = 2) -> float:
    """The L2 (or L1) norm over all leaves, with one rounding: summed by `math.fsum` in float64.

    Args:
        tree: of real tensors.
        order: 1 or 2.

    >>> exact_norm({"a": torch.tensor([3.0]), "b": torch.tensor(-4.0)})
    5.0
    """
    values = [v for leaf in trees.leaves(tree) for v in leaf.double().flatten().tolist()]
    largest = max(map(abs, values), default=0.0)
    if any(map(math.isnan, values)):
        return math.nan
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    if order == 1:
        return math.fsum(map(abs, values))
    return largest * math.sqrt(math.fsum((v / largest) ** 2 for v in values))


def distance(a: Tree, b: Tree, order: int = 2) -> float:
    """The norm of a - b."""
    return exact_norm(trees.map(lambda x, y: x.double() - y.double(), a, b), order)


def same_bits(a: Tree, b: Tree) -> bool:
    """Whether two trees hold the same numbers in the same formats, NaN equal to NaN."""
    pairs = list(zip(trees.leaves(a), trees.leaves(b), strict=True))
    return all(_same(x, y) for x, y in pairs)


def _same(x: object, y: object) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return x == y
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    equal = x == y
    return bool((equal | ((x != x) & (y != y))).all())


def promise(clipping: float | ClippingRule) -> tuple[float, int]:
    """The sensitivity, and the order of the norm it is measured in."""
    if isinstance(clipping, ClippingRule):
        return clipping.sensitivity, clipping.order
    return float(clipping), 2


def sum_rounding(sensitivity: float, num: int) -> float:
    """What two float32 sums of `num` contributions may differ by, however they are ordered."""
    return 2 * ROUNDOFF * num * num * sensitivity


def without(row: int, num: int) -> Tensor:
    """The mask of a batch that one example was removed from."""
    return torch.arange(num) != row


def column(mask: Tensor, leaf: Tensor) -> Tensor:
    """The mask in a shape that goes with the leaf, row by row."""
    return mask.reshape(-1, *[1] * (leaf.ndim - 1))

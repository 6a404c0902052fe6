"""Laws of the clipped sum as a sum: a batch is a bag of examples, some of which do not count."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpfunc import trees
from dpfunc.gradients import clip_and_sum
from dpfunc.testing.laws.clipping import Clip, contribution
from dpfunc.testing.laws.exact import (
    column,
    distance,
    exact_norm,
    promise,
    same_bits,
    sum_rounding,
)
from dpfunc.typing import ClippingRule, Tree


def masked_rows_vanish(
    grads: Tree, clipping: float | ClippingRule, mask: Tensor, *, clip: Clip = clip_and_sum
) -> None:
    """What stands in a masked row changes no bit of sum or norms: zeros, ones, NaN or infinity alike.

    Padding adds nothing: the sum is that of the other rows alone, up to rounding.

    Args:
        grads: per-sample gradients, every leaf (B, *s).
        clipping: an L2 clip norm or a rule.
        mask: (B,) bool, False for the rows that are written over.
        clip: the function under test.

    Raises:
        AssertionError: a masked row changes the sum, or has a norm.

    >>> masked_rows_vanish(torch.tensor([[3.0], [4.0]]), 1.0, torch.tensor([True, False]))
    """
    found = []
    for filler in (0.0, 1.0, math.nan, math.inf):
        filled = trees.map(
            lambda leaf, filler=filler: torch.where(column(mask, leaf), leaf, filler), grads
        )
        found.append(clip(filled, clipping, mask=mask))
    for other in found[1:]:
        if not same_bits(found[0].sum, other.sum):
            raise AssertionError(
                f"a masked row changed the sum: {found[0].sum!r} against {other.sum!r}"
            )
        if not same_bits(found[0].norms, other.norms) or other.norms[~mask].any():
            raise AssertionError(f"masked rows have norms: {other.norms!r} under {mask!r}")
    alone = clip(trees.map(lambda leaf: leaf[mask], grads), clipping, mask=None).sum
    _expect_equal_sums(found[0].sum, alone, clipping, len(mask), "with padding", "without")


def poison_vanishes(
    grads: Tree, clipping: float | ClippingRule, *, clip: Clip = clip_and_sum
) -> None:
    """An example with a NaN or an infinity contributes exactly 0.

    Args:
        grads: per-sample gradients, some of them not finite.
        clipping: an L2 clip norm or a rule.
        clip: the function under test.

    Raises:
        AssertionError: one that is not finite contributes something.

    >>> poison_vanishes(torch.tensor([[3.0, math.nan], [0.0, 2.0]]), 1.0)
    """
    for row in range(trees.batch_size(grads, "grads")):
        gradient = trees.rows(grads, row, row + 1)
        if math.isfinite(exact_norm(gradient)):
            continue
        added = contribution(grads, row, clipping, clip=clip)
        if exact_norm(added) != 0.0:
            raise AssertionError(f"example {row} is not finite and contributes {added!r}")


def order_does_not_matter(
    grads: Tree, clipping: float | ClippingRule, *, clip: Clip = clip_and_sum
) -> None:
    """Examples in another order give the same norms, in that order, and the same sum up to rounding.

    Args:
        grads: per-sample gradients, every leaf (B, *s); they are reversed and rotated.
        clipping: an L2 clip norm or a rule.
        clip: the function under test.

    Raises:
        AssertionError: the order changes a norm or the sum.

    >>> order_does_not_matter(torch.tensor([[3.0], [4.0], [0.0]]), 1.0)
    """
    num = trees.batch_size(grads, "grads")
    whole = clip(grads, clipping, mask=None)
    for order in (torch.arange(num).flip(0), torch.arange(num).roll(1)):
        other = clip(trees.map(lambda leaf, at=order: leaf[at], grads), clipping, mask=None)
        if not same_bits(whole.norms[order], other.norms):
            raise AssertionError(f"norms {whole.norms!r} are {other.norms!r} in order {order!r}")
        _expect_equal_sums(whole.sum, other.sum, clipping, num, "in order", f"in order {order!r}")


def sums_add_up(
    grads: Tree, clipping: float | ClippingRule, cut: int, *, clip: Clip = clip_and_sum
) -> None:
    """The sum over a batch is that over its two parts, up to rounding; its norms are theirs, in order.

    Args:
        grads: per-sample gradients, every leaf (B, *s).
        clipping: an L2 clip norm or a rule.
        cut: where the second part begins; 0, and B and above, leave one of them empty.
        clip: the function under test.

    Raises:
        AssertionError: the parts do not add up.

    >>> sums_add_up(torch.tensor([[3.0], [4.0], [0.1]]), 1.0, cut=2)
    """
    num = trees.batch_size(grads, "grads")
    whole = clip(grads, clipping, mask=None)
    parts = [clip(trees.rows(grads, *ends), clipping, mask=None) for ends in ((0, cut), (cut, num))]
    added = trees.map(torch.add, *(part.sum for part in parts))
    _expect_equal_sums(whole.sum, added, clipping, num, "of the whole", f"of parts cut at {cut}")
    if not same_bits(whole.norms, torch.cat([part.norms for part in parts])):
        raise AssertionError(f"norms {whole.norms!r} are others in parts cut at {cut}: {parts!r}")


def duplicates_count_each(
    grads: Tree, clipping: float | ClippingRule, *, clip: Clip = clip_and_sum
) -> None:
    """Every example twice gives twice the sum, up to rounding.

    Args:
        grads: per-sample gradients, every leaf (B, *s).
        clipping: an L2 clip norm or a rule.
        clip: the function under test.

    Raises:
        AssertionError: the sum is not doubled.

    >>> duplicates_count_each(torch.tensor([[3.0], [4.0]]), 1.0)
    """
    once = clip(grads, clipping, mask=None).sum
    twice = clip(trees.map(lambda x: x.repeat_interleave(2, 0), grads), clipping, mask=None).sum
    num = 2 * trees.batch_size(grads, "grads")
    doubled = trees.map(lambda leaf: 2 * leaf, once)
    _expect_equal_sums(doubled, twice, clipping, num, "doubled", "of all twice")


def _expect_equal_sums(
    a: Tree, b: Tree, clipping: float | ClippingRule, num: int, one: str, other: str
) -> None:
    sensitivity, order = promise(clipping)
    apart = distance(a, b, order)
    if not apart <= sum_rounding(sensitivity, num):
        raise AssertionError(
            f"the sum {one} and the sum {other} are {apart!r} apart, which is "
            f"{apart / sensitivity:.3g} of the sensitivity: {a!r} against {b!r}"
        )

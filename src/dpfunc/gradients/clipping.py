"""Clipping: each example's gradient scaled to a bounded norm, then the sum over examples.

Why the bound is exact and not up to rounding. Let u be the unit roundoff of the arithmetic (2**-24
for float32, to which shorter formats are raised; 2**-53 for float64) and v = 2**-53.

1. Norms are summed in float64, where the square of a float32 is exact and neither overflows nor
   underflows (a float64 leaf is divided by its largest entry first). n - 1 additions in any order
   lose at most a factor (1 - v)**(n - 1), and the root, the scaling and the rule's own arithmetic a
   few more. Norms are therefore raised by the factor 1 + 2 (n + 64) v: upper bounds. A leaf whose
   norm is below 1e-290, where float64 itself rounds coarsely, is given the scale 0.
2. A rule promises scale * norm <= sensitivity for those upper bounds; scales that break the promise
   are shrunk until they keep it, so a mistake in a rule costs utility and not privacy. A scale of
   exactly 1 leaves the gradient as it is: nothing is rounded. Any other is lowered by the factor
   1 - 8 u: one u is spent when the scale is rounded to the format, one when each product is, and
   what is left is far above the absolute error of products that are subnormal, since the
   sensitivity is at least 1e-30.
   A scale that is itself subnormal in the format would round coarsely, so it becomes 0; one above
   the format's range becomes the largest number of the format. Where scale * norm leaves the range of
   float64 nothing can be said of it, and the scale becomes 0 too.
3. Rows that are masked or whose norm is not finite are replaced, not multiplied: 0 times NaN is NaN.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpfunc import trees
from dpfunc.gradients.norms import DOUBLE_ROUNDOFF, raised
from dpfunc.gradients.rules import ELEMENTWISE, FlatClipping, Rescaled
from dpfunc.mechanism import check_rule, noise_scales
from dpfunc.typing import ClippingRule, Tree

_SMALLEST_NORM = 1e-290


class Clipped(NamedTuple):
    """A sum of clipped gradients, not yet private, and what each example's norm was before."""

    sum: Tree
    """Leaves of the shape of the parameters, float32 at least."""
    norms: Tensor
    """(B,), float64, before clipping; 0 where masked. PRIVATE."""


class ClippedWithAux(NamedTuple):
    """`Clipped`, and what the loss returned beside its value."""

    sum: Tree
    norms: Tensor
    aux: Any
    """Leaves with a leading batch axis, as the loss returned them. PRIVATE."""


def as_rule(clipping: float | ClippingRule) -> ClippingRule:
    """A number means flat L2 clipping."""
    if isinstance(clipping, ClippingRule):
        return check_rule(clipping)
    return FlatClipping(l2_clip_norm=clipping)


def clip_and_sum(
    grads: Tree, clipping: float | ClippingRule, *, mask: Tensor | None = None
) -> Clipped:
    """Scale each example's gradient to a bounded norm, then add them up.

    Args:
        grads: per-sample gradients: every leaf (B, *s), floating point; B may be 0.
        clipping: the largest L2 norm of one example, in gradient units, or a clipping rule.
        mask: (B,) bool, True for a real example and False for padding; None: all are real.

    Returns:
        Clipped(sum, norms). sum: leaves (*s,), float32 at least, of sensitivity
        `clipping.sensitivity`. norms: (B,) before clipping. PRIVATE.

    Guarantees:
        Each example contributes a vector of norm at most the sensitivity, after rounding, in every
        float dtype, for any input and whatever scales a rule of your own returns. (The proof stands
        at the top of this file.)
        An example that is masked, or whose gradient is not finite, contributes exactly 0.
        B = 0 gives zeros. grads are unchanged. Nothing raises or branches on values.
        Adding the contributions up in floating point moves the sum by at most B * u * B times the
        sensitivity, u the unit roundoff (2**-24 for float32) and B the padded batch size: less than
        0.4 % of the sensitivity at B = 256.

    Raises:
        ValueError: leaves disagree on B, mask has another shape, grads is empty, a bad clip norm.
        TypeError: a leaf of grads is not floating point, or mask is not bool.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> clip_and_sum({"w": torch.tensor([[3.0, 4.0], [0.0, 0.5]])}, 1.0).sum["w"]
    tensor([0.6000, 1.3000])
    """
    return sum_by(as_rule(clipping), grads, mask)


def sum_by(rule: ClippingRule, grads: Tree, mask: Tensor | None) -> Clipped:
    """`clip_and_sum` for a rule that was checked before."""
    grads, norms = batch_of(grads, rule, mask)
    scales, keep, total = decide(rule, norms, mask)
    summed = trees.map(lambda leaf, scale: scaled(leaf, scale, keep).sum(0), grads, scales)
    return Clipped(summed, total)


def batch_of(grads: Tree, rule: ClippingRule, mask: Tensor | None) -> tuple[Tree, Tree]:
    """Checked gradients in float32 at least, and for each leaf upper bounds on its norms."""
    trees.check_floating(grads, "grads", "Differentiate with respect to floating-point parameters.")
    check_mask(mask, trees.batch_size(grads, "grads"))
    grads = trees.map(raised, grads)
    size = sum(leaf[:1].numel() for leaf in trees.leaves(grads))
    return grads, trees.map(lambda leaf: _norm_bound(leaf, rule.order, size), grads)


def decide(rule: ClippingRule, norms: Tree, mask: Tensor | None) -> tuple[Tree, Tensor, Tensor]:
    """From upper bounds on the norms: scales, which examples count at all, and what to report.

    The scales of an example that does not count (masked, or not finite) are 0: see `_kept_to_promise`.
    """
    total = _total(rule, norms)
    keep = total.isfinite() if mask is None else total.isfinite() & mask
    norms = trees.map(lambda norm: torch.where(keep, norm, 0.0), norms)
    scales = _kept_to_promise(rule, norms, _scales(rule, norms, len(total)))
    return scales, keep, total if mask is None else torch.where(mask, total, 0.0)


def check_mask(mask: Tensor | None, num: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"Expected mask to be a bool tensor or None, got {type(mask).__name__}.")
    if mask.dtype != torch.bool:
        raise TypeError(f"Expected mask to be bool (True: a real example), got {mask.dtype}.")
    if mask.shape != (num,):
        raise ValueError(f"Expected mask of shape ({num},), got {tuple(mask.shape)}.")


def _norm_bound(leaf: Tensor, order: int, size: int) -> Tensor:
    """An upper bound on the norm of each row, in float64; step 1 of the proof above."""
    flat = leaf.flatten(1) if leaf.ndim > 1 else leaf.unsqueeze(1)
    unit = 1.0
    if leaf.dtype == torch.float64 and flat.shape[1] > 0:
        largest = flat.abs().amax(1)
        unit = torch.where(largest > 0, largest, 1.0)
        flat = flat / unit.unsqueeze(1)
    norm = torch.linalg.vector_norm(flat, ord=order, dim=1, dtype=torch.float64)
    return norm * unit * (1.0 + 2 * (size + 64) * DOUBLE_ROUNDOFF)


def _total(rule: ClippingRule, norms: Tree) -> Tensor:
    """The norm over all leaves, from the norm of each."""
    each = trees.leaves(norms)
    return torch.stack(each).sum(0) if rule.order == 1 else trees.root_sum_squares(each)


def _scales(rule: ClippingRule, norms: Tree, num: int) -> Tree:
    """The rule's scales for each row; the rule sees one row at a time."""
    known = rule.rule if isinstance(rule, Rescaled) else rule
    # By exact type: a subclass may look at the whole batch.
    if type(known) in ELEMENTWISE or num == 0:  # vmap refuses 0
        return rule.scales(norms) if num else norms

    def checked(row: Tree) -> Tree:
        scales = rule.scales(row)
        for path, scale in trees.named_leaves(scales, "scales"):
            if scale.ndim != 0:
                raise ValueError(
                    "Expected a clipping rule to return one 0-d scale for each leaf, got shape "
                    f"{tuple(scale.shape)} at {path}. It sees the norms of one example."
                )
        return trees.map(lambda norm, scale: scale.to(norm.dtype), row, scales)

    return torch.vmap(checked)(norms)


def _kept_to_promise(rule: ClippingRule, norms: Tree, scales: Tree) -> Tree:
    """Scales that are finite, not negative, and keep scale * norm within the sensitivity.

    A rule with noise scales of its own is kept to them as well: scale * norm / noise scale within 1.
    """
    scales = trees.map(
        lambda s, n: torch.where(s.isfinite() & (s > 0) & (n >= _SMALLEST_NORM), s, 0.0),
        scales,
        norms,
    )
    products = trees.map(torch.mul, scales, norms)
    total = _total(rule, products)
    shrink = _shrink(total, rule.sensitivity)
    if hasattr(rule, "noise_scales"):
        widths = partial(noise_scales, rule)
        shares = trees.map_with_paths(lambda x, width: x / width, products, widths)
        shrink = torch.minimum(shrink, _shrink(_total(rule, shares), 1.0))
    return trees.map(lambda s: s * shrink, scales)


def _shrink(total: Tensor, most: float) -> Tensor:
    """What takes a norm within its bound; 0 where the norm, or the factor itself, is out of range."""
    factor = torch.where(total > most, most / total, 1.0)
    return torch.where(total.isfinite() & (factor >= _SMALLEST_NORM), factor, 0.0)


def scaled(leaf: Tensor, scale: Tensor, keep: Tensor) -> Tensor:
    """The contributions of the rows; steps 2 and 3 of the proof above."""
    shape = (-1,) + (1,) * (leaf.ndim - 1)
    factor = lowered(scale, leaf.dtype).reshape(shape)
    return torch.where(keep.reshape(shape), leaf * factor, 0.0)


def lowered(scale: Tensor, dtype: torch.dtype, most: float | None = None) -> Tensor:
    """A scale in the format of the gradients, with room for what rounding adds; step 2 above.

    A smaller scale is always safe: `most` keeps it within another range.
    """
    finfo = torch.finfo(dtype)
    low = torch.where(scale == 1.0, scale, scale * (1.0 - 4 * finfo.eps))  # eps is 2 u
    low = torch.where(low < 2 * finfo.tiny, 0.0, low)
    return low.clamp(max=most or finfo.max).to(dtype)

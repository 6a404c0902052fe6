"""What clipping does to each example, laid open: for debugging, never for release."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpfunc import trees
from dpfunc.gradients.clipping import as_rule, batch_of, decide, scaled
from dpfunc.typing import ClippingRule, Tree


class Observation(NamedTuple):
    """Norms, scales and gradients of every example. PRIVATE, all of it but the sensitivity."""

    norms: Tree
    """(B,) for each leaf of the parameters, float64: upper bounds before clipping. PRIVATE."""
    total_norms: Tensor
    """(B,), float64: over all leaves, in the order of the rule. PRIVATE."""
    scales: Tree
    """(B,) for each leaf: what each gradient is multiplied by; 0 where it does not count. PRIVATE."""
    sensitivity: float
    """What the norm of each row of `after` is at most. Public."""
    before: Tree
    """(B, *s): the gradients as they came. PRIVATE."""
    after: Tree
    """(B, *s), float32 at least: what each example adds to the clipped sum. PRIVATE."""


def observe(
    grads: Tree, clipping: float | ClippingRule, *, mask: Tensor | None = None
) -> Observation:
    """Show what `clip_and_sum` does to each example: norms, scales, gradients before and after.

    Args:
        grads, clipping, mask: as for `clip_and_sum`; grads from `per_sample_grads`.

    Returns:
        An `Observation`. PRIVATE: nothing in it is noised. To release such numbers, ask for them as
        `telemetry` in the mechanism.

    Guarantees:
        The sum of `after` over the examples is `clip_and_sum(grads, clipping, mask=mask).sum`.
        grads are unchanged; nothing raises or branches on values.

    Raises:
        ValueError, TypeError: as `clip_and_sum`.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1, before its sum.

    >>> seen = observe({"w": torch.tensor([[3.0, 4.0], [0.0, 0.5]])}, 1.0)
    >>> seen.total_norms, seen.scales["w"], seen.after["w"]  # doctest: +ELLIPSIS
    (tensor([5.0000, 0.5000], ...), tensor([0.2000, 1.0000], ...), tensor([[0.6000, 0.8000],
            [0.0000, 0.5000]]))
    """
    rule = as_rule(clipping)
    wide, norms = batch_of(grads, rule, mask)
    scales, keep, total = decide(rule, norms, mask)
    after = trees.map(lambda leaf, scale: scaled(leaf, scale, keep), wide, scales)
    shown = trees.map(lambda scale: torch.where(keep, scale, 0.0), scales)
    return Observation(norms, total, shown, rule.sensitivity, grads, after)

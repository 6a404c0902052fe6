"""Laws of clipping each example. The function under test is `clip`, which is called as `clip_and_sum`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dpfunc import trees
from dpfunc.gradients import clip_and_sum
from dpfunc.testing.laws.exact import (
    column,
    distance,
    exact_norm,
    promise,
    same_bits,
    sum_rounding,
    without,
)
from dpfunc.typing import ClippingRule, Tree

Clip: TypeAlias = Callable[..., Any]
"""`clip(grads, clipping, mask=mask) -> Clipped(sum, norms)`."""


def contribution(
    grads: Tree, row: int, clipping: float | ClippingRule, *, clip: Clip = clip_and_sum
) -> Tree:
    """What one example adds to the clipped sum.

    Args:
        grads: per-sample gradients, every leaf (B, *s).
        row: which example, in [0, B).
        clipping: an L2 clip norm or a rule.
        clip: the function under test.

    >>> contribution(torch.tensor([[3.0, 4.0]]), 0, 10.0)
    tensor([3., 4.])
    """
    return clip(trees.rows(grads, row, row + 1), clipping, mask=None).sum


def scales_keep_the_promise(grads: Tree, rule: ClippingRule) -> None:
    """What the rule returns for each example keeps scale * norm within its sensitivity.

    `clip_and_sum` would shrink scales that do not: then the rule is not what its author thinks. A
    rule with `noise_scales` keeps scale * norm / noise scale within 1 too.

    Args:
        grads: per-sample gradients, every leaf (B, *s). Examples that are not finite, or whose norm is
            below 1e-290, are left out: their scale is 0 whatever the rule says.
        rule: the rule under test.

    Raises:
        AssertionError: scales that are negative or not finite, or that break the promise.

    >>> from dpfunc import FlatClipping
    >>> scales_keep_the_promise({"w": torch.ones(2, 3)}, FlatClipping(l2_clip_norm=1.0))
    """
    own = getattr(rule, "noise_scales", None)
    for row in range(trees.batch_size(grads, "grads")):
        gradient = trees.rows(grads, row, row + 1)
        norms = trees.map(
            lambda leaf: torch.tensor(exact_norm(leaf, rule.order), dtype=torch.float64), gradient
        )
        if not 1e-290 <= exact_norm(norms, rule.order) < math.inf:
            continue
        scales = rule.scales(norms)
        if not all(bool(s.isfinite()) and s >= 0 for s in trees.leaves(scales)):
            raise AssertionError(
                f"the scales {scales!r} for norms {norms!r} are not all finite and >= 0"
            )
        products = trees.map(torch.mul, scales, norms)
        norm = exact_norm(products, rule.order)
        if not norm <= rule.sensitivity * (1 + 1e-12):
            raise AssertionError(
                f"the scales {scales!r} take norms {norms!r} to {norm!r}, above {rule.sensitivity!r}"
            )
        if own is None:
            continue
        share = exact_norm(trees.map_with_paths(torch.div, products, own), rule.order)
        if not share <= 1 + 1e-12:
            raise AssertionError(
                f"the scales {scales!r} take norms {norms!r} to {share!r} times the noise scales"
            )


def contribution_is_bounded(
    grads: Tree,
    clipping: float | ClippingRule,
    mask: Tensor | None = None,
    *,
    clip: Clip = clip_and_sum,
) -> float:
    """Each example's contribution has norm at most the sensitivity, recomputed in float64, exactly.

    Args:
        grads: per-sample gradients, every leaf (B, *s).
        clipping: an L2 clip norm or a rule.
        mask: (B,) bool, False for padding, for the sum over all.
        clip: the function under test.

    Returns:
        The largest ratio of norm to sensitivity that was seen.

    Raises:
        AssertionError: a contribution above the sensitivity, or a sum that is not finite.

    >>> contribution_is_bounded(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), 10.0)
    0.5
    """
    sensitivity, order = promise(clipping)
    worst = 0.0
    for row in range(trees.batch_size(grads, "grads")):
        added = contribution(grads, row, clipping, clip=clip)
        norm = exact_norm(added, order)
        if not norm <= sensitivity:
            raise AssertionError(
                f"example {row} contributes a vector of norm {norm!r}, above the sensitivity "
                f"{sensitivity!r} (ratio - 1 = {norm / sensitivity - 1:.3g}); its gradient was "
                f"{trees.rows(grads, row, row + 1)!r}"
            )
        worst = max(worst, norm / sensitivity)
    total = clip(grads, clipping, mask=mask).sum
    if not math.isfinite(exact_norm(total)):
        raise AssertionError(f"the clipped sum is not finite: {total!r}")
    return worst


def norms_are_upper_bounds(
    grads: Tree, clipping: float | ClippingRule, *, rtol: float = 1e-6, clip: Clip = clip_and_sum
) -> None:
    """The norm reported for each example is at least the true one, and above it by rounding alone.

    Args:
        grads: per-sample gradients; examples that are not finite are left out.
        clipping: an L2 clip norm or a rule, whose order the norms are in.
        rtol: how far above, relative to the norm.
        clip: the function under test.

    Raises:
        AssertionError: a norm that is below the true one, or above it by more.

    >>> norms_are_upper_bounds({"w": torch.tensor([[3.0, 4.0]])}, 1.0)
    """
    norms = clip(grads, clipping, mask=None).norms.tolist()
    _, order = promise(clipping)
    for row, norm in enumerate(norms):
        true = exact_norm(trees.rows(grads, row, row + 1), order)
        # The true norm's own roundings; below 1e-290 the scale is 0 whatever the norm is.
        if math.isfinite(true) and not true * (1 - 1e-15) - 1e-290 <= norm <= true * (1 + rtol):
            raise AssertionError(f"example {row} of norm {true!r} is said to have norm {norm!r}")


def neighbours_are_close(
    grads: Tree, clipping: float | ClippingRule, *, clip: Clip = clip_and_sum
) -> None:
    """Removing any one example moves the sum by the sensitivity, plus what summation rounds.

    Args:
        grads: per-sample gradients, every leaf (B, *s). Each is masked, and then taken out.
        clipping: an L2 clip norm or a rule.
        clip: the function under test.

    Raises:
        AssertionError: the sum moves by more.

    >>> neighbours_are_close(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), 1.0)
    """
    sensitivity, order = promise(clipping)
    num = trees.batch_size(grads, "grads")
    most = sensitivity * (1 + 1e-12) + sum_rounding(sensitivity, num)
    whole = clip(grads, clipping, mask=None).sum
    for row in range(num):
        kept = without(row, num)
        others = trees.map(lambda leaf, kept=kept: leaf[kept], grads)
        masked = clip(grads, clipping, mask=kept).sum
        for how, less in (
            ("masking", masked),
            ("taking out", clip(others, clipping, mask=None).sum),
        ):
            moved = distance(whole, less, order)
            if not moved <= most:
                raise AssertionError(
                    f"{how} example {row} moves the sum by {moved!r}, above {most!r}"
                )


def replaced_neighbours_are_close(
    grads: Tree, clipping: float | ClippingRule, *, clip: Clip = clip_and_sum
) -> None:
    """Replacing any one example moves the sum by twice the sensitivity, plus what summation rounds.

    Args:
        grads: per-sample gradients. Each example is replaced by its opposite, by its neighbour and
            by one that is not finite.
        clipping: an L2 clip norm or a rule.
        clip: the function under test.

    Raises:
        AssertionError: the sum moves by more.

    >>> replaced_neighbours_are_close(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), 1.0)
    """
    sensitivity, order = promise(clipping)
    num = trees.batch_size(grads, "grads")
    most = 2 * sensitivity * (1 + 1e-12) + sum_rounding(sensitivity, num)
    whole = clip(grads, clipping, mask=None).sum
    for row in range(num):
        at = without(row, num)
        for other in (
            lambda leaf: -leaf,
            lambda leaf: leaf.roll(1, 0),
            lambda leaf: leaf * math.inf,
        ):
            replaced = trees.map(
                lambda x, f=other, at=at: torch.where(column(at, x), x, f(x)), grads
            )
            moved = distance(whole, clip(replaced, clipping, mask=None).sum, order)
            if not moved <= most:
                raise AssertionError(
                    f"replacing example {row} by {trees.rows(replaced, row, row + 1)!r} moves the sum "
                    f"by {moved!r}, above {most!r}"
                )


def clipping_is_idempotent(
    grads: Tree, clipping: float | ClippingRule, *, clip: Clip = clip_and_sum
) -> None:
    """A contribution, clipped again, is itself, bit for bit: of rules that only ever shorten.

    Args:
        grads: per-sample gradients, every leaf (B, *s).
        clipping: an L2 clip norm, or a rule with a scale of exactly 1 within its bound, such as
            `FlatClipping`, `L1Clipping` or `PerGroupClipping`; not one that normalises.
        clip: the function under test.

    Raises:
        AssertionError: clipping twice is not clipping once.

    >>> clipping_is_idempotent(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), 1.0)
    """
    for row in range(trees.batch_size(grads, "grads")):
        once = contribution(grads, row, clipping, clip=clip)
        again = trees.map(lambda leaf: leaf.unsqueeze(0), once)
        twice = clip(again, clipping, mask=None).sum
        if not same_bits(once, twice):
            raise AssertionError(f"clipping {once!r} again gives {twice!r}")

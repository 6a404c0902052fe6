"""Laws of clipping, as functions that raise AssertionError and say what broke them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpfunc import trees
from dpfunc.gradients import clip_and_sum, clipped_grad
from dpfunc.typing import ClippingRule, Loss, Tree


def exact_norm(tree: Tree, order: int = 2) -> float:
    """The L2 (or L1) norm over all leaves, with one rounding: summed by `math.fsum` in float64."""
    values = [v for leaf in trees.leaves(tree) for v in leaf.double().flatten().tolist()]
    largest = max(map(abs, values), default=0.0)
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    if order == 1:
        return math.fsum(map(abs, values))
    return largest * math.sqrt(math.fsum((v / largest) ** 2 for v in values))


def _promise(clipping: float | ClippingRule) -> tuple[float, int]:
    """The sensitivity, and the order of the norm it is measured in."""
    if isinstance(clipping, ClippingRule):
        return clipping.sensitivity, clipping.order
    return float(clipping), 2


def contribution(grads: Tree, row: int, clipping: float | ClippingRule) -> Tree:
    """What one example adds to the clipped sum."""
    return clip_and_sum(trees.rows(grads, row, row + 1), clipping).sum


def scales_keep_the_promise(grads: Tree, rule: ClippingRule) -> None:
    """What the rule returns for each example keeps scale * norm within its sensitivity.

    `clip_and_sum` would shrink scales that do not: then the rule is not what its author thinks.
    """
    for row in range(trees.batch_size(grads, "grads")):
        gradient = trees.rows(grads, row, row + 1)
        norms = trees.map(
            lambda leaf: torch.tensor(exact_norm(leaf, rule.order), dtype=torch.float64), gradient
        )
        if not all(norm.isfinite() for norm in trees.leaves(norms)):
            continue
        scales = rule.scales(norms)
        if not all(bool(s.isfinite()) and s >= 0 for s in trees.leaves(scales)):
            raise AssertionError(
                f"the scales {scales!r} for norms {norms!r} are not all finite and >= 0"
            )
        norm = exact_norm(trees.map(torch.mul, scales, norms), rule.order)
        if not norm <= rule.sensitivity * (1 + 1e-12):
            raise AssertionError(
                f"the scales {scales!r} take norms {norms!r} to {norm!r}, above {rule.sensitivity!r}"
            )


def contribution_is_bounded(
    grads: Tree, clipping: float | ClippingRule, mask: Tensor | None = None
) -> float:
    """Each example's contribution has norm at most the sensitivity, recomputed in float64, exactly.

    Returns the largest ratio of norm to sensitivity that was seen.
    """
    sensitivity, order = _promise(clipping)
    worst = 0.0
    for row in range(trees.batch_size(grads, "grads")):
        added = contribution(grads, row, clipping)
        norm = exact_norm(added, order)
        if not norm <= sensitivity:
            raise AssertionError(
                f"example {row} contributes a vector of norm {norm!r}, above the sensitivity "
                f"{sensitivity!r} (ratio - 1 = {norm / sensitivity - 1:.3g}); its gradient was "
                f"{trees.rows(grads, row, row + 1)!r}"
            )
        worst = max(worst, norm / sensitivity)
    total = clip_and_sum(grads, clipping, mask=mask).sum
    if not all(bool(leaf.isfinite().all()) for leaf in trees.leaves(total)):
        raise AssertionError(f"the clipped sum is not finite: {total!r}")
    return worst


def neighbours_are_close(grads: Tree, clipping: float | ClippingRule) -> None:
    """Removing any one example moves the sum by the sensitivity, plus what summation rounds."""
    sensitivity, order = _promise(clipping)
    num = trees.batch_size(grads, "grads")
    roundoff = 2.0**-24  # the sum is in float32 at least
    most = sensitivity * (1 + roundoff * num * num) * (1 + 1e-12)
    whole = clip_and_sum(grads, clipping).sum
    for row in range(num):
        mask = torch.arange(num) != row
        without = clip_and_sum(grads, clipping, mask=mask).sum
        moved = exact_norm(trees.map(lambda a, b: a.double() - b.double(), whole, without), order)
        if not moved <= most:
            raise AssertionError(
                f"removing example {row} moves the sum by {moved!r}, above {most!r}"
            )


def masked_rows_vanish(grads: Tree, clipping: float | ClippingRule, mask: Tensor) -> None:
    """What stands in a masked row changes no bit of the sum: zeros, NaN or infinity alike."""
    sums = []
    for filler in (0.0, math.nan, math.inf):
        filled = trees.map(
            lambda leaf, filler=filler: torch.where(_column(mask, leaf), leaf, filler), grads
        )
        sums.append(trees.leaves(clip_and_sum(filled, clipping, mask=mask).sum))
    for other in sums[1:]:
        if not all(a.equal(b) for a, b in zip(sums[0], other, strict=True)):
            raise AssertionError(f"a masked row changed the sum: {sums[0]!r} against {other!r}")


def poison_vanishes(grads: Tree, clipping: float | ClippingRule) -> None:
    """An example with a NaN or an infinity contributes exactly 0."""
    for row in range(trees.batch_size(grads, "grads")):
        gradient = trees.rows(grads, row, row + 1)
        if all(bool(leaf.isfinite().all()) for leaf in trees.leaves(gradient)):
            continue
        added = contribution(grads, row, clipping)
        if exact_norm(added) != 0.0:
            raise AssertionError(f"example {row} is not finite and contributes {added!r}")


def clipping_is_idempotent(grads: Tree, clipping: float | ClippingRule) -> None:
    """A contribution, clipped again, is itself, bit for bit."""
    for row in range(trees.batch_size(grads, "grads")):
        once = contribution(grads, row, clipping)
        twice = clip_and_sum(trees.map(lambda leaf: leaf.unsqueeze(0), once), clipping).sum
        if not all(
            a.equal(b) for a, b in zip(trees.leaves(once), trees.leaves(twice), strict=True)
        ):
            raise AssertionError(f"clipping {once!r} again gives {twice!r}")


def methods_agree(
    loss: Loss,
    params: Tree,
    data: Tree,
    clipping: float | ClippingRule,
    *,
    methods: Sequence[str] = ("vmap", "bookkeeping", "two_pass"),
    rtol: float = 2e-4,
) -> None:
    """Every method gives the clipped sum and the norms of a float64 loop over single examples.

    The sums differ from it by at most rtol of their norm; no norm is below the loop's by more.
    """
    wide, wide_data = trees.map(_wide, params), trees.map(_wide, data)
    num = trees.batch_size(data, "data")
    rows = [
        torch.func.grad(loss)(wide, trees.map(lambda leaf, i=i: leaf[i], wide_data))
        for i in range(num)
    ]
    expected = clip_and_sum(trees.map(lambda *each: torch.stack(each), *rows), clipping)
    size = exact_norm(expected.sum)
    for method in methods:
        got = clipped_grad(loss, clipping, method=method)(params, data)
        off = exact_norm(trees.map(lambda a, b: a.double() - b, got.sum, expected.sum))
        if not off <= rtol * size:
            raise AssertionError(
                f"method {method!r} gives a sum that differs by {off / size:.2e} of its norm from a "
                f"float64 loop: {got.sum!r} against {expected.sum!r}"
            )
        if not bool((got.norms >= expected.norms * (1 - rtol)).all()):
            raise AssertionError(
                f"method {method!r} says norms {got.norms!r}, below the true {expected.norms!r}"
            )


def losses_contribution_is_bounded(
    loss: Loss,
    params: Tree,
    data: Tree,
    clipping: float | ClippingRule,
    *,
    method: str = "auto",
) -> float:
    """No example of the data adds a vector of norm above the sensitivity, as computed, exactly.

    Returns the largest ratio of norm to sensitivity that was seen.
    """
    sensitivity, order = _promise(clipping)
    clipped, worst = clipped_grad(loss, clipping, method=method), 0.0
    for row in range(trees.batch_size(data, "data")):
        example = trees.rows(data, row, row + 1)
        norm = exact_norm(clipped(params, example).sum, order)
        if not norm <= sensitivity:
            raise AssertionError(
                f"method {method!r}: example {example!r} contributes a vector of norm {norm!r}, above "
                f"the sensitivity {sensitivity!r}"
            )
        worst = max(worst, norm / sensitivity)
    return worst


def _wide(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf


def _column(mask: Tensor, leaf: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (leaf.ndim - 1))

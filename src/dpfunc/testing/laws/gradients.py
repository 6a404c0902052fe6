"""Laws of the clipped sum of a loss. Each takes a way to make it: a method, or a function of your own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dpfunc import trees
from dpfunc.gradients import clip_and_sum, clipped_grad, per_sample_grads
from dpfunc.testing.laws.exact import distance, exact_norm, promise
from dpfunc.typing import ClippingRule, Loss, Tree

ClippedGrad: TypeAlias = Callable[..., Any]
"""Called as `clipped_grad`, it gives `f(params, data, mask=mask) -> Clipped(sum, norms)`."""


def methods_agree(
    loss: Loss,
    params: Tree,
    data: Tree,
    clipping: float | ClippingRule,
    *,
    methods: Sequence[str] = ("vmap", "bookkeeping", "two_pass"),
    rtol: float = 2e-4,
    make: ClippedGrad = clipped_grad,
) -> None:
    """Every method gives the clipped sum and the norms of a float64 loop over single examples.

    Args:
        loss: `loss(params, example) -> scalar`.
        params: leaves floating point.
        data: every leaf (B, ...).
        clipping: an L2 clip norm or a rule.
        methods: which to hold against the loop.
        rtol: what sums may differ by, relative to the sum's norm, and norms be too low by.
        make: the function under test, `clipped_grad` or one that is called alike.

    Raises:
        AssertionError: a sum is another one, or a norm is below the loop's by more.

    >>> methods_agree(lambda w, x: (w * x).sum() ** 2, torch.ones(2), torch.eye(2), 1.0)
    """
    expected = _looped(loss, params, data, clipping)
    size = exact_norm(expected.sum)
    for method in methods:
        got = make(loss, clipping, method=method)(params, data)
        off = distance(got.sum, expected.sum)
        if not off <= rtol * size:
            share = off / size if size else math.inf
            raise AssertionError(
                f"method {method!r} gives a sum that differs by {share:.2e} of its norm from a "
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
    make: ClippedGrad = clipped_grad,
) -> float:
    """No example of the data adds a vector of norm above the sensitivity, as computed, exactly.

    Args:
        loss, params, data, clipping, make: as for `methods_agree`.
        method: how the sum is made.

    Returns:
        The largest ratio of norm to sensitivity that was seen.

    Raises:
        AssertionError: an example contributes more.

    >>> losses_contribution_is_bounded(lambda w, x: w @ x, torch.ones(2), torch.eye(2), 2.0)
    0.5
    """
    sensitivity, order = promise(clipping)
    clipped, worst = make(loss, clipping, method=method), 0.0
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


def chunks_and_padding_agree(
    loss: Loss,
    params: Tree,
    data: Tree,
    clipping: float | ClippingRule,
    *,
    method: str = "auto",
    chunk_sizes: Sequence[int] = (1, 2, 7),
    rtol: float = 1e-5,
    make: ClippedGrad = clipped_grad,
) -> None:
    """Chunks, and padding of any content between the examples, change the sum by rounding alone.

    Args:
        loss, params, data, clipping, method, make: as for `losses_contribution_is_bounded`.
        chunk_sizes: how many examples at once.
        rtol: what sums may differ by, relative to the sum over examples of their contributions' norms.

    Raises:
        AssertionError: a chunk size or padding changes the sum.

    >>> chunks_and_padding_agree(lambda w, x: w @ x, torch.ones(2), torch.eye(2), 1.0)
    """
    num = trees.batch_size(data, "data")
    clipped = make(loss, clipping, method=method)
    whole = clipped(params, data).sum
    rows = [trees.rows(data, row, row + 1) for row in range(num)]
    most = rtol * sum(exact_norm(clipped(params, row).sum) for row in rows)
    for size in chunk_sizes:
        parts = make(loss, clipping, method=method, chunk_size=size)(params, data).sum
        _expect_near(whole, parts, most, f"in chunks of {size}")
    mask = torch.ones(num + 3, dtype=torch.bool)
    mask[[0, (num + 2) // 2, num + 2]] = False
    for filler in (0.0, 1.0, math.nan):
        padded = trees.map(lambda leaf, filler=filler: _padded(leaf, mask, filler), data)
        found = clipped(params, padded, mask=mask)
        _expect_near(whole, found.sum, most, f"with padding rows of {filler}")
        if found.norms[~mask].any():
            raise AssertionError(f"padding rows of {filler} have norms {found.norms[~mask]!r}")


def examples_are_apart(
    loss: Loss,
    params: Tree,
    data: Tree,
    *,
    rtol: float = 1e-4,
    make: Callable[..., Any] = per_sample_grads,
) -> None:
    """Each example's gradient is that of the example alone: nothing leaks along the batch axis.

    Args:
        loss, params, data: as for `methods_agree`.
        rtol: what a gradient may differ by, relative to the norm of it and of the others.
        make: the function under test: `make(loss)(params, data)` has leaves (B, *s).

    Raises:
        AssertionError: a gradient depends on the other examples.

    >>> examples_are_apart(lambda w, x: (w * x).sum() ** 2, torch.ones(2), torch.eye(2))
    """
    together = make(loss)(params, data)
    most = rtol * exact_norm(together)
    for row in range(trees.batch_size(data, "data")):
        alone = torch.func.grad(loss)(params, trees.map(lambda leaf, i=row: leaf[i], data))
        off = distance(trees.map(lambda leaf, i=row: leaf[i], together), alone)
        if not off <= most:
            raise AssertionError(
                f"the gradient of example {row} differs by {off!r} in the batch from {alone!r}, alone"
            )


def _looped(loss: Loss, params: Tree, data: Tree, clipping: float | ClippingRule) -> Any:
    """Clipped, from a float64 loop over single examples."""
    wide, wide_data = trees.map(_wide, params), trees.map(_wide, data)
    rows = [
        torch.func.grad(loss)(wide, trees.map(lambda leaf, i=i: leaf[i], wide_data))
        for i in range(trees.batch_size(data, "data"))
    ]
    if not rows:
        return clip_and_sum(trees.map(lambda leaf: leaf.new_zeros(0, *leaf.shape), wide), clipping)
    return clip_and_sum(trees.map(lambda *each: torch.stack(each), *rows), clipping)


def _expect_near(whole: Tree, other: Tree, most: float, how: str) -> None:
    off = distance(whole, other)
    if not off <= most:
        raise AssertionError(f"the sum {how} differs by {off!r}: {other!r} against {whole!r}")


def _padded(leaf: Tensor, mask: Tensor, filler: float) -> Tensor:
    if not leaf.is_floating_point():
        filler = 0.0  # an index of padding must be one that the loss can take
    out = leaf.new_full((len(mask), *leaf.shape[1:]), filler)
    out[mask] = leaf
    return out


def _wide(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf

"""`clipped_grad`: from a per-example loss to the sum of its clipped gradients, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

from dpfunc import _checks, random, trees
from dpfunc.gradients import bookkeeping, two_pass
from dpfunc.gradients.clipping import (
    Clipped,
    ClippedWithAux,
    as_rule,
    check_mask,
    sum_by,
)
from dpfunc.gradients.per_sample import batched_grads, check_arguments, refuse_keywords
from dpfunc.gradients.plan import Plan
from dpfunc.typing import ClippingRule, Key, Loss, Tree

METHODS = ("auto", "vmap", "bookkeeping", "two_pass")


def clipped_grad(
    loss: Loss,
    clipping: float | ClippingRule,
    *,
    method: str = "auto",
    chunk_size: int | None = None,
    has_aux: bool = False,
    has_key: bool = False,
    randomness: str = "error",
    batch_axes: Tree = 0,
) -> Callable[..., Any]:
    """Turn the loss of one example into the sum over a batch of its clipped gradients.

    Args:
        loss, has_aux, has_key, randomness, batch_axes: as for `per_sample_grads`.
        clipping: the largest L2 norm of one example, in gradient units, or a clipping rule.
        method: how, never what. "bookkeeping" makes the sum in one pass from the inputs and output
            gradients of linear layers, convolutions and embeddings (`explain` says where), at about
            the cost of a plain gradient. "two_pass" is the same in less memory and twice the time:
            norms first, then the weighted sum (one pass under torch.compile and vmap). "vmap"
            differentiates every example apart: slow, and the specification. "auto" is
            "bookkeeping", or "vmap" for a loss without such layers.
        chunk_size: examples differentiated at once, >= 1: memory only, never meaning.

    Returns:
        `f(params, data, *, mask=None, key=None) -> Clipped(sum, norms)`, or with has_aux
        `ClippedWithAux(sum, norms, aux)`. norms and aux are per example. PRIVATE.

    Guarantees:
        Those of `clip_and_sum`: each example contributes at most the sensitivity, after rounding.
        Chunks, and padding rows with mask False, change the sum by rounding alone.
        At most chunk_size examples' gradients are in memory at once. B = 0 gives zeros.
        Every method agrees with the others to 2e-4 of the sum's norm, in float32, and reports norms
        that are upper bounds. Shapes alone decide what is computed, never an example's values.
        Adding up rounds more than in `clip_and_sum`, except with "vmap": by at most B T u times the sum
        over examples of scale x (sum over the T tokens of a layer of |output gradient| |input|).
        An example whose activations or output gradients reach 9e18 in float32 (norms added up over
        the tokens of one layer) contributes 0, except with "vmap", which clips it.

    Raises:
        ValueError, TypeError: as `per_sample_grads` and `clip_and_sum`.
        RuntimeError: the loss branches on values, writes to what it closes over, draws from the global
            generator, or calls other operations than in its abstract run.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1; Bu et al. 2023, arXiv:2210.00038.

    >>> loss = lambda w, x: (w * x).sum() ** 2
    >>> clipped_grad(loss, 1.0)(torch.ones(2), torch.tensor([[3.0, 4.0], [0.0, 0.1]])).sum
    tensor([0.6000, 0.8200])
    """
    rule = as_rule(clipping)
    sums_of = clipped_sums(
        loss,
        method=method,
        chunk_size=chunk_size,
        has_aux=has_aux,
        has_key=has_key,
        randomness=randomness,
        batch_axes=batch_axes,
    )

    def f(
        params: Tree,
        data: Tree,
        *,
        mask: Tensor | None = None,
        key: Key | None = None,
        **unexpected: Any,
    ) -> Clipped | ClippedWithAux:
        refuse_keywords(unexpected)
        found = sums_of(params, data, rule, mask, key)
        return found if has_aux else Clipped(found.sum, found.norms)

    return f


def clipped_sums(
    loss: Loss,
    *,
    method: str = "auto",
    chunk_size: int | None = None,
    has_aux: bool = False,
    has_key: bool = False,
    randomness: str = "error",
    batch_axes: Tree = 0,
) -> Callable[..., ClippedWithAux]:
    """As `clipped_grad`, for a rule that comes with the call: `f(params, data, rule, mask, key)`.

    With `first`, the batch is the part of a larger one that begins at this row.
    """
    _checks.choice(METHODS, method=method)
    if chunk_size is not None:
        _checks.integer(at_least=1, chunk_size=chunk_size)
    by_vmap = _by_vmap(loss, has_aux, has_key, randomness)
    by_rules = _by_rules(loss, has_aux, randomness, method, by_vmap)
    clipped_sum = by_vmap if method == "vmap" else by_rules

    def f(
        params: Tree,
        data: Tree,
        rule: ClippingRule,
        mask: Tensor | None,
        key: Key | None,
        first: int = 0,
    ) -> ClippedWithAux:
        data = trees.batch_first(data, batch_axes, "data")
        num = check_arguments(params, data, key, has_key)
        check_mask(mask, num)
        keys = None if key is None else random.split(key, first + num)[first:]
        size = chunk_size or max(num, 1)
        total, norms, auxes = None, [], []
        for begin in range(0, max(num, 1), size):
            chunk = trees.rows((data, keys, mask), begin, begin + size)
            sums, chunk_norms, aux = clipped_sum(rule, params, *chunk)
            total = sums if total is None else trees.map(torch.add, total, sums)
            norms.append(chunk_norms)
            auxes.append(aux)
        aux = trees.map(lambda *parts: torch.cat(parts), *auxes) if has_aux else ()
        return ClippedWithAux(total, torch.cat(norms), aux)

    return f


def _can_take_two(plan: Plan, params: Tree) -> bool:
    traced = torch.compiler.is_compiling() or maybe_current_level() is not None
    _, leaves = trees.numbered(params)
    return not traced and all(leaves[i].ndim < 2 for i in bookkeeping.without_rules(plan))


_ClippedSum = Callable[
    [ClippingRule, Tree, Tree, Tensor | None, Tensor | None], tuple[Tree, Tensor, Any]
]
"""`f(rule, params, data, keys, mask) -> (sum, norms, aux)` for one chunk."""


def _by_vmap(loss: Loss, has_aux: bool, has_key: bool, randomness: str) -> _ClippedSum:
    grads_of = batched_grads(loss, has_aux, has_key, randomness, None)

    def f(
        rule: ClippingRule, params: Tree, data: Tree, keys: Tensor | None, mask: Tensor | None
    ) -> Any:
        grads, aux = grads_of(params, data, keys)
        return (*sum_by(rule, grads, mask), aux)

    return f


def _by_rules(
    loss: Loss, has_aux: bool, randomness: str, method: str, by_vmap: _ClippedSum
) -> _ClippedSum:
    """By book-keeping, in one pass or in two."""
    plan_of = bookkeeping.planner(loss, has_aux)

    def f(
        rule: ClippingRule, params: Tree, data: Tree, keys: Tensor | None, mask: Tensor | None
    ) -> Any:
        if trees.batch_size(data, "data") == 0:
            # vmap refuses an empty axis: one blank example, masked.
            blank, blank_keys = trees.map(
                lambda leaf: leaf.new_zeros(1, *leaf.shape[1:]), (data, keys)
            )
            nobody = torch.zeros(1, dtype=torch.bool, device=trees.leaves(params)[0].device)
            sums, norms, aux = f(rule, params, blank, blank_keys, nobody)
            return sums, norms[:0], trees.rows(aux, 0, 0)
        arguments = (data,) if keys is None else (data, keys)
        plan = plan_of(params, arguments)
        unsure = plan.hidden and torch.compiler.is_compiling()
        if method == "auto" and (unsure or not plan.sightings):
            return by_vmap(rule, params, data, keys, mask)
        twice = method == "two_pass" and randomness == "error" and _can_take_two(plan, params)
        passes = two_pass if twice else bookkeeping
        run = partial(passes.clipped_sum, loss, has_aux, rule, randomness)
        if torch.compiler.is_compiling():  # the plan is of this very trace
            return run(plan, params, arguments, mask)
        try:
            return run(plan, params, arguments, mask)
        except bookkeeping.PlanMismatch:  # an old plan: a module went from train to eval, say
            plan = plan_of(params, arguments, afresh=True)
        try:
            return run(plan, params, arguments, mask)
        except bookkeeping.PlanMismatch:
            if method != "auto":
                raise
        return by_vmap(rule, params, data, keys, mask)

    return f

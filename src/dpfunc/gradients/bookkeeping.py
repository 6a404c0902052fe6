"""The clipped sum without per-sample gradients: one forward, one backward, one weighted product.

1. While the loss runs, every op that has a rule and takes a planned parameter gets a zero *tap* added
   to its output, and its inputs are recorded. The parameter itself is a constant.
2. `vmap(grad(loss))` with respect to the taps is the gradient at every such output for every
   example. Parameters without rules are differentiated for each example in the same pass.
3. Inputs and output gradients are the factors of each parameter's gradient. They give the norms
   first; then, from the clipping rule's scales, the clipped sum.

The two forms of step 3 - factors or per-sample gradients - give the same sum; the cheaper is chosen
from shapes (`costs`). What is done to the factors, and why the norms are upper bounds, stands in
`layers/`.

Source: Bu et al. 2023, arXiv:2210.00038 (book-keeping); Li et al. 2022, arXiv:2110.05679 (Gram form).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import grad, vmap

from dpfunc import trees
from dpfunc.gradients import norms
from dpfunc.gradients.clipping import decide, lowered
from dpfunc.gradients.layers import INSTANTIATED, Rule, Use, cheapest, combine
from dpfunc.gradients.per_sample import checked
from dpfunc.gradients.plan import Calls, Plan, Region, Shape, Sighting, make_plan
from dpfunc.typing import ClippingRule, Loss, Tree


class PlanMismatch(RuntimeError):
    """The loss did not call what it called in its abstract run."""


def planner(loss: Loss, has_aux: bool) -> Callable[[Tree, Tree], Plan]:
    """`plan(params, arguments)` for batched arguments, made once for each signature of shapes."""

    @lru_cache(maxsize=64)
    def cached(spec: Any, shapes: tuple[Shape, ...], autocast: Any) -> Plan:
        del autocast
        skeleton = optree.tree_unflatten(spec, list(range(len(shapes))))
        return make_plan(loss, has_aux, skeleton, shapes)

    def plan(params: Tree, arguments: Tree, *, afresh: bool = False) -> Plan:
        example = trees.map(lambda leaf: leaf[0], arguments)
        skeleton, leaves = trees.numbered((params, *example))
        shapes = tuple((tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in leaves)
        if torch.compiler.is_compiling():
            return _constant_plan(loss, has_aux, skeleton, shapes)
        if afresh:
            cached.cache_clear()
        kind = shapes[0][2].type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return cached(optree.tree_structure(skeleton), shapes, autocast)

    return plan


@torch.compiler.assume_constant_result
def _constant_plan(loss: Loss, has_aux: bool, skeleton: Tree, shapes: tuple[Shape, ...]) -> Plan:
    return make_plan(loss, has_aux, skeleton, shapes)


def clipped_sum(
    loss: Loss,
    has_aux: bool,
    rule: ClippingRule,
    randomness: str,
    plan: Plan,
    params: Tree,
    arguments: Tree,
    mask: Tensor | None,
) -> tuple[Tree, Tensor, Any]:
    """(sum, norms, aux) for a loss, its plan and batched arguments with B >= 1."""
    skeleton, leaves = trees.numbered(trees.map(Tensor.detach, params))
    with torch.no_grad():
        gradients, aux = _gradients(
            checked(loss, has_aux), plan, leaves, skeleton, arguments, randomness
        )
        with torch.autocast(leaves[0].device.type, enabled=False):
            blocks = [_chosen(parts, rule.order) for parts in gradients]
            num = trees.batch_size(arguments, "data")
            bounds = trees.map(lambda i: _norm(blocks[i], rule, num, leaves[i]), skeleton)
            scales, keep, total = decide(rule, bounds, mask)
            sums = trees.map(
                lambda i, scale: _sum(blocks[i], torch.where(keep, scale, 0.0), leaves[i]),
                skeleton,
                scales,
            )
    return sums, total, aux


Blocks = list[tuple[Region | None, Any]]
"""The gradient of one parameter by regions: factors of it, or (B, *size) for each example."""


def _gradients(
    loss: Callable[..., tuple[Tensor, Any]],
    plan: Plan,
    leaves: list[Tensor],
    skeleton: Tree,
    arguments: Tree,
    randomness: str,
) -> tuple[list[Blocks], Any]:
    """One pass forward and one back: the gradient of every parameter in blocks, and the aux."""
    by_call: dict[int, list[Sighting]] = {}
    for sighting in plan.sightings:
        by_call.setdefault(sighting.call, []).append(sighting)
    place = {call: i for i, call in enumerate(by_call)}
    others = [i for i, reason in enumerate(plan.reasons) if reason]
    rules: list[Rule] = []

    def per_example(taps: list[Tensor], rest: list[Tensor], arguments: Tree) -> Any:
        full = list(leaves)
        for i, leaf in zip(others, rest, strict=True):
            full[i] = leaf
        names: list[str] = []
        recorded: list[tuple[Tensor, ...]] = []

        def visit(func: Any, rule: Rule, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            call = len(names)
            names.append(func.__name__)
            if call not in by_call:
                return output
            for sighting in by_call[call]:
                use = rule.uses(*args, **kwargs)[sighting.use]
                _check_same(sighting, use, output, full[sighting.leaf])
                recorded.append(use.inputs)
                rules.append(rule)
            return output + taps[place[call]]

        with Calls(visit):
            value, aux = loss(trees.map(full.__getitem__, skeleton), *arguments)
        if tuple(names) != plan.calls:
            raise PlanMismatch(_MISMATCH)
        return value, (aux, recorded)

    num = trees.batch_size(arguments, "data")
    taps = [
        torch.zeros((), dtype=first.dtype, device=leaves[0].device).expand(num, *first.shape)
        for first, *_ in by_call.values()
    ]
    differentiated = vmap(
        grad(per_example, argnums=(0, 1), has_aux=True), (0, None, 0), randomness=randomness
    )
    (output_grads, rest), (aux, recorded) = differentiated(
        taps, [leaves[i] for i in others], arguments
    )
    gradients: list[Blocks] = [[] for _ in leaves]
    for i, leaf in zip(others, rest, strict=True):
        gradients[i] = [(None, norms.raised(leaf))]
    factors: dict[tuple[int, Region | None], list[Any]] = {}
    for sighting, rule, inputs in zip(plan.sightings, rules, recorded, strict=True):
        use = Use(
            leaves[sighting.leaf],
            tuple(norms.raised(x) if x.is_floating_point() else x for x in inputs),
            sighting.constants,
        )
        made = rule.factors(use, norms.raised(output_grads[place[sighting.call]]))
        made = made.transposed() if sighting.transposed else made
        factors.setdefault((sighting.leaf, sighting.region), []).append(made)
    for (i, region), parts in factors.items():
        size = tuple(leaves[i].shape) if region is None else region.size
        gradients[i].append((region, combine(parts, size)))
    return gradients, aux


def _check_same(sighting: Sighting, use: Use, output: Tensor, leaf: Tensor) -> None:
    same = (
        tuple(output.shape) == sighting.shape
        and output.dtype == sighting.dtype
        and use.constants == sighting.constants
        and (not sighting.direct or use.weight is leaf)
    )
    if not same:
        raise PlanMismatch(_MISMATCH)


def _chosen(blocks: Blocks, order: int) -> Blocks:
    """Every block in its cheaper form; an L1 norm needs the gradient itself."""
    return [
        (region, part)
        if isinstance(part, Tensor) or (order == 2 and cheapest(part.costs()) not in INSTANTIATED)
        else (region, part.per_sample())
        for region, part in blocks
    ]


def _norm(blocks: Blocks, rule: ClippingRule, num: int, leaf: Tensor) -> Tensor:
    """(B,), float64, an upper bound on the norm over the blocks of one parameter."""
    if not blocks:
        return torch.zeros(num, dtype=torch.float64, device=leaf.device)
    bounds = [
        norms.upper_of_rows(part, rule.order)
        if isinstance(part, Tensor)
        else part.norm_bound(rule.sensitivity)
        for _, part in blocks
    ]
    return torch.stack(bounds).sum(0) if rule.order == 1 else trees.root_sum_squares(bounds)


def _sum(blocks: Blocks, scale: Tensor, leaf: Tensor) -> Tensor:
    """The clipped sum of one parameter."""
    total = norms.raised(torch.zeros_like(leaf, memory_format=torch.contiguous_format))
    scale = lowered(scale, total.dtype)
    for region, part in blocks:
        if isinstance(part, Tensor):
            finite = part.flatten(1) if part.ndim > 1 else part.unsqueeze(1)
            block = (scale @ finite.nan_to_num(0.0, 0.0, 0.0)).reshape(part.shape[1:])
        else:
            block = part.weighted_sum(scale)
        if region is None:
            return block
        total = torch.as_strided_scatter(total, block, *region)
    return total


_MISMATCH = (
    "Expected the loss to call the same operations on tensors of the same shapes at every call, got "
    "others than in its abstract run. Does it depend on Python state that changes?"
)

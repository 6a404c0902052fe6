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


def planner(loss: Loss, has_aux: bool) -> Callable[..., Plan]:
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
    num = trees.batch_size(arguments, "data")
    skeleton, leaves = trees.numbered(trees.map(Tensor.detach, params))
    with torch.no_grad():
        found, aux = factored_gradients(
            checked(loss, has_aux), plan, leaves, skeleton, arguments, randomness
        )
        with torch.autocast(leaves[0].device.type, enabled=False):
            blocks = [_chosen(parts, rule.order) for parts in found]
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


def factored_gradients(
    loss: Callable[..., tuple[Tensor, Any]],
    plan: Plan,
    leaves: list[Tensor],
    skeleton: Tree,
    arguments: Tree,
    randomness: str,
) -> tuple[list[Blocks], Any]:
    """One pass forward and one back: the gradient of every parameter in blocks, and the aux."""
    tapped = _by_call(plan)
    others = [i for i, reason in enumerate(plan.reasons) if reason]
    rules: list[Rule] = []

    def per_example(taps: list[Tensor], rest: list[Tensor], arguments: Tree) -> Any:
        full = list(leaves)
        for i, leaf in zip(others, rest, strict=True):
            full[i] = leaf
        names: list[str] = []
        recorded: list[tuple[Tensor, ...]] = []

        def visit(func: Any, rule: Rule, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            tap, sightings = tapped.get(len(names), (0, []))
            names.append(func.__name__)
            for sighting in sightings:
                use = rule.uses(*args, **kwargs)[sighting.use]
                _check_same(sighting, use, output, full[sighting.leaf])
                recorded.append(use.inputs)
                rules.append(rule)
            return output + taps[tap] if sightings else output

        with Calls(visit):
            value, aux = loss(trees.map(full.__getitem__, skeleton), *arguments)
        if tuple(names) != plan.calls:
            raise PlanMismatch(_MISMATCH)
        return value, (aux, recorded)

    num, device = trees.batch_size(arguments, "data"), leaves[0].device
    taps = [
        torch.zeros((), dtype=first.dtype, device=device).expand(num, *first.shape)
        for _, (first, *_) in tapped.values()
    ]
    differentiated = vmap(
        grad(per_example, argnums=(0, 1), has_aux=True), (0, None, 0), randomness=randomness
    )
    (output_grads, rest), (aux, recorded) = differentiated(
        taps, [leaves[i] for i in others], arguments
    )
    blocks: list[Blocks] = [[] for _ in leaves]
    for i, grads in zip(others, rest, strict=True):
        blocks[i] = [(None, norms.raised(grads))]
    factors: dict[tuple[int, Region | None], list[Any]] = {}
    for sighting, rule, inputs in zip(plan.sightings, rules, recorded, strict=True):
        tap, _ = tapped[sighting.call]
        made = _factors(sighting, rule, inputs, output_grads[tap], leaves[sighting.leaf])
        factors.setdefault((sighting.leaf, sighting.region), []).append(made)
    for (i, region), parts in factors.items():
        size = tuple(leaves[i].shape) if region is None else region.size
        blocks[i].append((region, combine(parts, size)))
    return blocks, aux


def _by_call(plan: Plan) -> dict[int, tuple[int, list[Sighting]]]:
    """For each call with a tap: which tap, and the sightings there."""
    tapped: dict[int, tuple[int, list[Sighting]]] = {}
    for sighting in plan.sightings:
        tapped.setdefault(sighting.call, (len(tapped), []))[1].append(sighting)
    return tapped


def _check_same(sighting: Sighting, use: Use, output: Tensor, leaf: Tensor) -> None:
    same = (
        tuple(output.shape) == sighting.shape
        and output.dtype == sighting.dtype
        and use.constants == sighting.constants
        and (not sighting.direct or use.weight is leaf)
    )
    if not same:
        raise PlanMismatch(_MISMATCH)


def _factors(
    sighting: Sighting, rule: Rule, inputs: tuple[Tensor, ...], output_grads: Tensor, leaf: Tensor
) -> Any:
    raised = tuple(norms.raised(x) if x.is_floating_point() else x for x in inputs)
    seen = leaf if sighting.region is None else torch.as_strided(leaf, *sighting.region)
    factors = rule.factors(Use(seen, raised, sighting.constants), norms.raised(output_grads))
    return factors.transposed() if sighting.transposed else factors


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
            finite = part.nan_to_num(0.0, 0.0, 0.0)
            if part.ndim > 2:
                block = (scale @ finite.flatten(1)).reshape(part.shape[1:])
            else:  # vectors: the compiler fuses it with what made them
                block = (finite.T * scale).T.sum(0) if part.ndim == 2 else (finite * scale).sum(0)
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

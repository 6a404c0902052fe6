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
from dpfunc.gradients.layers import INSTANTIATED, Instantiated, Rule, Use, cheapest, combine
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
            blocks = [chosen(parts, rule.order) for parts in found]
            bounds = trees.map(lambda i: norm_of(blocks[i], rule, num, leaves[i]), skeleton)
            scales, keep, total = decide(rule, bounds, mask)
            sums = trees.map(
                lambda i, scale: sum_of(blocks[i], torch.where(keep, scale, 0.0), leaves[i]),
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
    tapped = by_call(plan)
    others = without_rules(plan)
    rules: list[Rule] = []

    def per_example(taps: list[Tensor], rest: list[Tensor], arguments: Tree) -> Any:
        recorded: list[tuple[Tensor, ...]] = []

        def tap(i: int, output: Tensor, met: list[tuple[Sighting, Rule, Use]]) -> Tensor:
            recorded.extend(use.inputs for _, _, use in met)
            rules.extend(rule for _, rule, _ in met)
            return output + taps[i]

        value, aux = tapped_loss(loss, plan, leaves, skeleton, rest, arguments, tap)
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
        made = factors_of(sighting, rule, inputs, output_grads[tap], leaves[sighting.leaf])
        factors.setdefault((sighting.leaf, sighting.region), []).append(made)
    for (i, region), parts in factors.items():
        blocks[i].append((region, combine(parts, size_of(leaves[i], region))))
    return blocks, aux


def tapped_loss(
    loss: Callable[..., tuple[Tensor, Any]],
    plan: Plan,
    leaves: list[Tensor],
    skeleton: Tree,
    rest: list[Tensor],
    arguments: Tree,
    tap: Callable[[int, Tensor, list[tuple[Sighting, Rule, Use]]], Tensor],
) -> tuple[Tensor, Any]:
    """The loss of one example, with the output of every planned op sent through `tap`.

    rest are the parameters without rules, the only ones that may be differentiated.
    """
    full, tapped = list(leaves), by_call(plan)
    for i, leaf in zip(without_rules(plan), rest, strict=True):
        full[i] = leaf
    names: list[str] = []

    def visit(func: Any, rule: Rule, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        i, sightings = tapped.get(len(names), (0, []))
        names.append(func.__name__)
        met = [(sighting, rule, rule.uses(*args, **kwargs)[sighting.use]) for sighting in sightings]
        for sighting, _, use in met:
            _check_same(sighting, use, output, full[sighting.leaf])
        return tap(i, output, met) if met else output

    with Calls(visit):
        value, aux = loss(trees.map(full.__getitem__, skeleton), *arguments)
    if tuple(names) != plan.calls:
        raise PlanMismatch(_MISMATCH)
    return value, aux


def without_rules(plan: Plan) -> list[int]:
    return [i for i, reason in enumerate(plan.reasons) if reason]


def by_call(plan: Plan) -> dict[int, tuple[int, list[Sighting]]]:
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


def factors_of(
    sighting: Sighting, rule: Rule, inputs: tuple[Tensor, ...], output_grads: Tensor, leaf: Tensor
) -> Any:
    raised = tuple(norms.raised(x) if x.is_floating_point() else x for x in inputs)
    seen = leaf if sighting.region is None else torch.as_strided(leaf, *sighting.region)
    factors = rule.factors(Use(seen, raised, sighting.constants), norms.raised(output_grads))
    return factors.transposed() if sighting.transposed else factors


def size_of(leaf: Tensor, region: Region | None) -> tuple[int, ...]:
    return tuple(leaf.shape) if region is None else region.size


def chosen(blocks: Blocks, order: int) -> Blocks:
    """Every block in its cheaper form; an L1 norm needs the gradient itself."""

    def one(part: Any) -> Any:
        if isinstance(part, Tensor):
            return Instantiated(part, order, fresh=False)
        if order == 2 and cheapest(part.costs()) not in INSTANTIATED:
            return part
        return Instantiated(part.per_sample(), order, fresh=True)

    return [(region, one(part)) for region, part in blocks]


def norm_of(blocks: Blocks, rule: ClippingRule, num: int, leaf: Tensor) -> Tensor:
    """(B,), float64, an upper bound on the norm over the chosen blocks of one parameter."""
    if not blocks:
        return torch.zeros(num, dtype=torch.float64, device=leaf.device)
    bounds = [part.norm_bound(rule.sensitivity) for _, part in blocks]
    return torch.stack(bounds).sum(0) if rule.order == 1 else trees.root_sum_squares(bounds)


def sum_of(blocks: Blocks, scale: Tensor, leaf: Tensor) -> Tensor:
    """The clipped sum of one parameter from its chosen blocks."""
    dtype = torch.float64 if leaf.dtype == torch.float64 else torch.float32
    scale = lowered(scale, dtype)
    total = torch.zeros((), dtype=dtype, device=leaf.device).expand(leaf.shape)
    for region, part in blocks:
        block = part.weighted_sum(scale)
        if region is None:  # all of it
            return block
        size, stride, offset = region
        total = torch.as_strided_scatter(total.contiguous(), block, size, stride, offset)
    return total.contiguous()


_MISMATCH = (
    "Expected the loss to call the same operations on tensors of the same shapes at every call, got "
    "others than in its abstract run. Does it depend on Python state that changes?"
)

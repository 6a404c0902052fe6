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
from operator import index
from typing import Any

import optree
import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
    maybe_current_level,
)
from torch.func import grad, vmap

from dpfunc import trees
from dpfunc.gradients import norms
from dpfunc.gradients.clipping import decide, lowered
from dpfunc.gradients.layers import PER_SAMPLE_FORMS, Instantiated, Rule, Use, cheapest, combine
from dpfunc.gradients.per_sample import checked
from dpfunc.gradients.plan import Calls, Parameters, Plan, Region, Sighting
from dpfunc.gradients.trace import Shape, make_plan
from dpfunc.typing import ClippingRule, Loss, Tree


class PlanMismatch(RuntimeError):
    """The loss did not call what it called in its abstract run."""


class _Plans(dict[Any, Plan]):
    """Plans by their signature. They follow from the loss, and say nothing more of what it is."""

    is_cache = True


def planner(loss: Loss, has_aux: bool) -> Callable[..., Plan]:
    """`plan(params, arguments)` for batched arguments, made once for each signature of shapes."""

    plans = _Plans()

    def plan(params: Tree, arguments: Tree, *, afresh: bool = False) -> Plan:
        example = trees.map(lambda leaf: leaf[0], arguments)
        skeleton, leaves = trees.numbered((params, *example))
        # index: a dimension that the compiler made symbolic is a number here.
        shapes = tuple((tuple([index(n) for n in x.shape]), x.dtype, x.device) for x in leaves)
        if torch.compiler.is_compiling():
            return _constant_plan(loss, has_aux, skeleton, shapes)
        kind = leaves[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        signature = optree.tree_structure(skeleton), shapes, autocast
        if afresh or signature not in plans:
            if len(plans) >= _MOST_PLANS:
                plans.clear()
            _, values = trees.numbered(params)
            known = None if any(map(is_functorch_wrapped_tensor, values)) else values
            plans[signature] = make_plan(loss, has_aux, skeleton, shapes, known)
        return plans[signature]

    return plan


_MOST_PLANS = 64


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
    skeleton, leaves = trees.numbered(trees.map(lambda leaf: leaf.detach().contiguous(), params))
    with torch.no_grad():
        found, aux = factored_gradients(
            checked(loss, has_aux), plan, leaves, skeleton, arguments, randomness
        )
        with torch.autocast(leaves[0].device.type, enabled=False):
            for i, parts in enumerate(found):  # one by one: factors that are used up are freed
                found[i] = chosen(parts, rule.order)
            bounds = trees.map(lambda i: norm_of(found[i], rule, num, leaves[i]), skeleton)
            scales, _, total = decide(rule, bounds, mask)
            sums = trees.map(lambda i, scale: sum_of(found[i], scale, leaves[i]), skeleton, scales)
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
    # New memory costs more than the addition, but a compiler fuses it, and in a map of the caller's
    # it is not known which map an output depends on.
    in_place = not torch.compiler.is_compiling() and maybe_current_level() is None

    def per_example(taps: list[Tensor], rest: list[Tensor], arguments: Tree) -> Any:
        recorded: list[tuple[Tensor, ...]] = []

        def tap(i: int, output: Tensor, met: list[tuple[Sighting, Rule, Use]]) -> Tensor:
            recorded.extend(use.inputs for _, _, use in met)
            rules.extend(rule for _, rule, _ in met)
            fresh = in_place and all(rule.fresh for _, rule, _ in met) and _is_batched(output)
            return output.add_(taps[i]) if fresh else output + taps[i]

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


def _is_batched(output: Tensor) -> bool:
    """Whether an output inside vmap(grad) depends on the example: only then can it be written to."""
    inner = get_unwrapped(output) if is_gradtrackingtensor(output) else output
    return is_batchedtensor(inner)


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
        if not sightings:
            return output
        uses = rule.uses(*args, **kwargs)
        met = []
        for sighting in sightings:
            if len(uses) <= sighting.use or not _same(sighting, uses[sighting.use], output):
                raise PlanMismatch(_MISMATCH)
            met.append((sighting, rule, uses[sighting.use]))
        return tap(i, output, met)

    # A compiler traces the very loss that was planned; a map over parameters hides their memory.
    known = not torch.compiler.is_compiling() and not any(map(is_functorch_wrapped_tensor, leaves))
    calls = Calls(visit, Parameters(leaves) if known else None)
    with calls:
        value, aux = loss(trees.map(full.__getitem__, skeleton), *arguments)
    if tuple(names) != plan.calls or (known and not _same_touches(plan, calls)):
        raise PlanMismatch(_MISMATCH)
    return value, aux


def _same_touches(plan: Plan, calls: Calls) -> bool:
    """Whether the parameters that rules serve went to the same functions through the same views."""
    told_apart = {leaf for leaf, _ in calls.parameters.places.values()} if calls.parameters else {}
    served = {i for i, reason in enumerate(plan.reasons) if not reason and i in told_apart}
    planned = [touch for touch in plan.touches if touch.leaf in served]
    return planned == [touch for touch in calls.touches if touch.leaf in served]


def without_rules(plan: Plan) -> list[int]:
    return [i for i, reason in enumerate(plan.reasons) if reason]


def by_call(plan: Plan) -> dict[int, tuple[int, list[Sighting]]]:
    """For each call with a tap: which tap, and the sightings there."""
    tapped: dict[int, tuple[int, list[Sighting]]] = {}
    for sighting in plan.sightings:
        tapped.setdefault(sighting.call, (len(tapped), []))[1].append(sighting)
    return tapped


def _same(sighting: Sighting, use: Use, output: Tensor) -> bool:
    return (
        tuple(output.shape) == sighting.shape
        and output.dtype == sighting.dtype
        and use.constants == sighting.constants
    )


def factors_of(
    sighting: Sighting, rule: Rule, inputs: tuple[Tensor, ...], output_grads: Tensor, leaf: Tensor
) -> Any:
    raised = tuple(norms.raised(x) if x.is_floating_point() else x for x in inputs)
    like = leaf.new_empty(()).expand(size_of(leaf, sighting.region))  # only its shape is read
    factors = rule.factors(Use(like, raised, sighting.constants), norms.raised(output_grads))
    return factors.transposed() if sighting.transposed else factors


def size_of(leaf: Tensor, region: Region | None) -> tuple[int, ...]:
    return tuple(leaf.shape) if region is None else region.size


def chosen(blocks: Blocks, order: int) -> Blocks:
    """Every block in its cheaper form; an L1 norm needs the gradient itself."""

    def one(part: Any) -> Any:
        if isinstance(part, Tensor):
            return Instantiated(part, order, fresh=False)
        if order == 2 and cheapest(part.costs()) not in PER_SAMPLE_FORMS:
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
    scale = lowered(scale, dtype, most=torch.finfo(dtype).max ** 0.5)  # times a factor: no overflow
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

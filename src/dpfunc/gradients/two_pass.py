"""The clipped sum in two passes: norms first, then one weighted backward pass.

Book-keeping holds the gradients at the outputs of all ops at once. Here each is used when the backward
pass makes it, and let go: once for its part of the norms, and in a second pass over the same batch for
its part of the clipped sum. Twice the work for the memory of a plain step.

The two passes should have the same bits. Should they differ (a loss with a random state of its own,
sums on a GPU in changing order), the bound must hold all the same: the norms of the first pass are
raised by one part in 8192, and whatever in the second has a larger norm than that contributes 0.

The backward pass has side effects, which a compiler cannot follow: under torch.compile, and inside
vmap, `clipped_grad` keeps to one pass, as where a matrix has no rule: its per-sample gradients are
then the memory.

Source: Li et al. 2022, arXiv:2110.05679 (ghost clipping).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, vmap

from dpfunc import trees
from dpfunc.gradients import norms
from dpfunc.gradients.bookkeeping import (
    Blocks,
    chosen,
    factors_of,
    norm_of,
    size_of,
    sum_of,
    tapped_loss,
    without_rules,
)
from dpfunc.gradients.clipping import decide
from dpfunc.gradients.layers import Rule, Use, combine
from dpfunc.gradients.per_sample import checked
from dpfunc.gradients.plan import Plan, Region, Sighting
from dpfunc.typing import ClippingRule, Loss, Tree


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

    def each_block(receive: Callable[[int, Blocks], None]) -> Any:
        return _backward(
            checked(loss, has_aux),
            plan,
            leaves,
            skeleton,
            arguments,
            num,
            randomness,
            rule,
            receive,
        )

    with torch.no_grad():
        bounds = [norm_of([], rule, num, leaf) for leaf in leaves]

        promised: dict[tuple[int, Region | None], Tensor] = {}

        def add_norm(i: int, blocks: Blocks) -> None:
            norm = norm_of(blocks, rule, num, leaves[i]) * (1.0 + _SLACK)
            promised[i, blocks[0][0]] = norm
            both = [bounds[i], norm]
            bounds[i] = sum(both[1:], both[0]) if rule.order == 1 else trees.root_sum_squares(both)

        aux = each_block(add_norm)
        tree = trees.map(bounds.__getitem__, skeleton)
        scales, _, total = decide(rule, tree, mask)
        _, flat = trees.numbered(scales)
        sums = [sum_of([], flat[i], leaf) for i, leaf in enumerate(leaves)]

        def add_sum(i: int, blocks: Blocks) -> None:
            most = promised.get((i, blocks[0][0]))
            if most is not None:
                kept = norm_of(blocks, rule, num, leaves[i]) <= most
                sums[i] += sum_of(blocks, torch.where(kept, flat[i], 0.0), leaves[i])

        each_block(add_sum)
    return trees.map(sums.__getitem__, skeleton), total, aux


_SLACK = 2.0**-13


class _Tap(torch.autograd.Function):
    """The identity, which hands the gradient of its output to `receive(inputs, grad)`.

    start, of one number for each example, requires grad and is batched: so is the output.
    """

    @staticmethod
    def forward(output: Tensor, start: Tensor, receive: Any, *inputs: Tensor) -> Tensor:
        return output.clone()  # the loss may write to it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.receive = inputs[2]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.receive(ctx.saved_tensors, grads[0])
        return grads[0], None, None, *(None for _ in ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        output, start, receive, *inputs = (
            x
            if not isinstance(x, Tensor)
            else x.expand(info.batch_size, *x.shape)
            if dim is None
            else x.movedim(dim, 0)
            for x, dim in zip(args, in_dims, strict=True)
        )
        return _Tap.apply(output, start, receive, *inputs), 0


def _backward(
    loss: Callable[..., tuple[Tensor, Any]],
    plan: Plan,
    leaves: list[Tensor],
    skeleton: Tree,
    arguments: Tree,
    num: int,
    randomness: str,
    rule: ClippingRule,
    receive: Callable[[int, Blocks], None],
) -> Any:
    """One pass forward and one back; `receive(leaf, block)` sees each block once all of it is made."""
    awaited = Counter((s.leaf, s.region) for s in plan.sightings)
    parts: dict[tuple[int, Region | None], list[Any]] = {place: [] for place in awaited}

    def finish(place: tuple[int, Region | None]) -> None:
        made, (leaf, region) = parts.pop(place), place
        if made:  # an op that the loss does not depend on gives nothing
            whole = combine(made, size_of(leaves[leaf], region))
            receive(leaf, chosen([(region, whole)], rule.order))

    def arrive(sighting: Sighting, layer: Rule, inputs: Any, output_grads: Tensor) -> None:
        place = sighting.leaf, sighting.region
        leaf = leaves[sighting.leaf]
        with torch.no_grad(), torch.autocast(leaf.device.type, enabled=False):
            made = factors_of(sighting, layer, inputs, output_grads, leaf)
            parts[place].append(made)
            awaited[place] -= 1
            if not awaited[place]:
                finish(place)

    others = without_rules(plan)
    start = torch.zeros(num, device=leaves[0].device, requires_grad=True)

    def per_example(start: Tensor, rest: list[Tensor], arguments: Tree) -> Any:
        def tap(i: int, output: Tensor, met: list[tuple[Sighting, Rule, Use]]) -> Tensor:
            for sighting, layer, use in met:

                def receive_one(
                    inputs: Any, grads: Tensor, sighting: Sighting = sighting, layer: Rule = layer
                ) -> None:
                    arrive(sighting, layer, inputs, grads)

                output = _Tap.apply(output, start, receive_one, *use.inputs)
            return output

        return tapped_loss(loss, plan, leaves, skeleton, rest, arguments, tap)

    with torch.enable_grad():
        rest = [leaves[i].expand(num, *leaves[i].shape).requires_grad_() for i in others]
        values, aux = vmap(per_example, randomness=randomness)(start, rest, arguments)
        grads = torch.autograd.grad(
            (values + start).sum(), [start, *rest], allow_unused=True, materialize_grads=True
        )
    for place in list(parts):
        finish(place)
    for i, grad in zip(others, grads[1:], strict=True):
        receive(i, chosen([(None, norms.raised(grad))], rule.order))
    return trees.map(lambda leaf: leaf.detach(), aux)

"""Clipping rules for a tree of gradients: each of this library's, and one of a user's own."""

from __future__ import annotations

from typing import NamedTuple

import optree
import torch
from hypothesis import strategies as st
from torch import Tensor

from dpfunc import trees
from dpfunc.gradients import (
    AutomaticClipping,
    CustomClipping,
    FlatClipping,
    L1Clipping,
    PerGroupClipping,
    PerSampleAdaptiveClipping,
)
from dpfunc.testing.strategies.batches import masks
from dpfunc.testing.strategies.gradients import clip_norms, per_sample_grads
from dpfunc.typing import ClippingRule, Tree


class RuleCase(NamedTuple):
    """Per-sample gradients, a rule that fits them, and a mask or None."""

    grads: Tree
    rule: ClippingRule
    mask: Tensor | None


def clipping_rules(
    tree: Tree, bounds: st.SearchStrategy[float] | None = None
) -> st.SearchStrategy[ClippingRule]:
    """Rules for parameters or gradients of this structure, their bounds in [1e-4, 1e4].

    Groups are single leaves, a prefix of the tree, or one pattern for all; where two paths of the tree
    read alike when dotted, there is one group.
    """
    bounds = clip_norms(-4, 4) if bounds is None else bounds
    return st.one_of(
        st.builds(FlatClipping, l2_clip_norm=bounds),
        st.builds(L1Clipping, l1_clip_norm=bounds),
        st.builds(AutomaticClipping, l2_clip_norm=bounds, stabilizer=st.just(0.0) | bounds),
        st.builds(PerSampleAdaptiveClipping, l2_clip_norm=bounds, r=bounds),
        st.builds(
            PerGroupClipping,
            l2_clip_norms=_groups(tree, bounds),
            noise=st.sampled_from(["common", "per_group"]),
        ),
        bounds.map(_soft),
    )


@st.composite
def rule_cases(draw: st.DrawFn, poison: bool = True) -> RuleCase:
    """Gradients, any rule that fits their structure, and sometimes a mask."""
    grads = draw(per_sample_grads(poison=poison))
    mask = draw(st.none() | masks(trees.batch_size(grads, "grads")))
    return RuleCase(grads, draw(clipping_rules(grads)), mask)


@st.composite
def _groups(draw: st.DrawFn, tree: Tree, bounds: st.SearchStrategy[float]) -> Tree:
    paths, leaves, structure = optree.tree_flatten_with_path(tree)
    dotted = [trees.dotted(path) for path in paths]
    if not paths[0] or draw(st.booleans()) or _ambiguous(dotted):
        return draw(bounds.map(lambda bound: bound) | bounds.map(lambda bound: {"*": bound}))
    tops = sorted({str(path[0]) for path in paths})
    if all("." not in top for top in tops) and draw(st.booleans()):
        return {top: draw(bounds) for top in tops}
    return optree.tree_unflatten(structure, [draw(bounds) for _ in leaves])


def _ambiguous(dotted: list[str]) -> bool:
    """Whether one path is another, or begins one: a group by that name would hold both."""
    return any(
        a == b or b.startswith(a + ".")
        for i, a in enumerate(dotted)
        for b in dotted[:i] + dotted[i + 1 :]
    )


def _soft(bound: float) -> CustomClipping:
    def scales(norms: Tree) -> Tree:
        total = trees.root_sum_squares(trees.leaves(norms))
        return trees.map(lambda norm: bound / torch.hypot(total, torch.ones_like(norm)), norms)

    return CustomClipping(scales=scales, sensitivity=bound)

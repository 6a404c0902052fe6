"""Batches: what a step gets, padding and poison among it."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from dpfunc import trees
from dpfunc.sampling import Batch
from dpfunc.typing import Tree


def masks(num: int) -> st.SearchStrategy[Tensor]:
    """(num,) bool, True for a real example; all and none of them too."""
    entries = st.lists(st.booleans(), min_size=num, max_size=num)
    fixed = st.sampled_from([[True] * num, [False] * num])
    return (entries | fixed).map(lambda given: torch.tensor(given, dtype=torch.bool))


def batches(data: Tree, steps: st.SearchStrategy[int] | None = None) -> st.SearchStrategy[Batch]:
    """`Batch`es of these data, every leaf (B, ...), under any mask.

    Rows behind the mask hold what stood there, zeros, or NaN and infinities: none of it may matter.
    """
    num = trees.batch_size(data, "data")
    steps = st.integers(0, 2**62) if steps is None else steps
    fillers = st.sampled_from([None, 0.0, float("nan"), float("inf")])

    def batch(mask: Tensor, step: int, filler: float | None) -> Batch:
        rows = trees.map(lambda leaf: _filled(leaf, mask, filler), data)
        return Batch(rows, mask, torch.tensor(step))

    return st.builds(batch, masks(num), steps, fillers)


def _filled(leaf: Tensor, mask: Tensor, filler: float | None) -> Tensor:
    if filler is None or not leaf.is_floating_point():
        return leaf
    return torch.where(mask.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, filler)

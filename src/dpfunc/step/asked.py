"""What is asked of a batch beside its gradient: each example's answer by itself, and their sum."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from dpfunc import trees
from dpfunc.mechanism import DPSGD
from dpfunc.typing import Observed, Query, Tree

States: TypeAlias = dict[str, Tensor]
"""The public state of every query, by its name."""


def initial_states(mechanism: DPSGD, like: Tree) -> States:
    """Every query's state before the first step, on the device of the parameters."""
    device = trees.leaves(like)[0].device
    return {
        query.name: torch.tensor(query.init(), dtype=torch.float64, device=device)
        for query in mechanism.queries
    }


def answers(
    query: Query, norms: Tensor, losses: Tensor, clip_norm: Tensor, state: Tensor
) -> Tensor:
    """(B,): what each example answers, by itself."""
    if len(norms) == 0:  # vmap refuses an empty axis
        return norms

    def one(norm: Tensor, loss: Tensor) -> Tensor:
        value = query.value(Observed(norm, loss, clip_norm), state)
        if not isinstance(value, Tensor) or value.ndim != 0:
            raise TypeError(
                f"Expected value(observed, state) of the query {query.name!r} to be a 0-d tensor, got "
                f"{getattr(value, 'shape', type(value).__name__)}. It sees one example."
            )
        return value.to(norm.dtype)

    return torch.vmap(one)(norms, losses)


def summed(values: Tensor, mask: Tensor | None) -> Tensor:
    """The sum of what every real example answers, within [-1, 1] and 0 where it is no number."""
    values = values.nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0)
    return (values if mask is None else torch.where(mask, values, 0.0)).sum()

"""How the gradient of a parameter is made from what an op saw: one small file for each family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfunc.gradients.layers.composite import expanded
from dpfunc.gradients.layers.convolution import CONVOLUTION, TRANSPOSED_CONVOLUTION
from dpfunc.gradients.layers.embedding import EMBEDDING
from dpfunc.gradients.layers.linear import ADDMM, LINEAR, MATMUL
from dpfunc.gradients.layers.outer import Outer, OuterSum, join
from dpfunc.gradients.layers.rule import Rule, Use, cheapest

__all__ = ["INSTANTIATED", "RULES", "Rule", "Use", "cheapest", "combine", "expanded"]

RULES: dict[Callable[..., Any], Rule] = {
    F.linear: LINEAR,
    F.embedding: EMBEDDING,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), CONVOLUTION),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), TRANSPOSED_CONVOLUTION
    ),
    torch.matmul: MATMUL,
    torch.mm: MATMUL,
    torch.addmm: ADDMM,
    Tensor.matmul: MATMUL,
    Tensor.mm: MATMUL,
    Tensor.addmm: ADDMM,
}


INSTANTIATED = ("per-sample", "matmul", "grouped")
"""The forms that make the gradient of every example."""


class Several(NamedTuple):
    """The sum of gradients that have no common factors, for each example."""

    parts: list[Any]

    def costs(self) -> dict[str, tuple[float, float]]:
        each = [
            cost for part in self.parts for f, cost in part.costs().items() if f in INSTANTIATED
        ]
        return {"per-sample": (sum(f for f, _ in each), sum(b for _, b in each))}

    def per_sample(self) -> Tensor:
        first, *rest = [part.per_sample() for part in self.parts]
        return sum(rest, first)


def combine(parts: Sequence[Any], size: tuple[int, ...]) -> Any:
    """The gradient of one parameter from what each use of it gave."""
    outer = [part for part in parts if isinstance(part, Outer)]
    rest = [part for part in parts if not isinstance(part, Outer)]
    sums = ([OuterSum(join(outer), size)] if outer else []) + rest
    return sums[0] if len(sums) == 1 else Several(sums)

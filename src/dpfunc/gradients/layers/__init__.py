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
from dpfunc.gradients.layers.instantiated import Instantiated
from dpfunc.gradients.layers.linear import ADDMM, LINEAR, MATMUL, MM
from dpfunc.gradients.layers.outer import Outer, OuterSum, join
from dpfunc.gradients.layers.registered import make_rule
from dpfunc.gradients.layers.rule import Rule, Use, cheapest

__all__ = [
    "PER_SAMPLE_FORMS",
    "RULES",
    "Instantiated",
    "Rule",
    "Use",
    "cheapest",
    "combine",
    "expanded",
    "register_rule",
]

RULES: dict[Callable[..., Any], Rule] = {
    F.linear: LINEAR,
    F.embedding: EMBEDDING,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), CONVOLUTION),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), TRANSPOSED_CONVOLUTION
    ),
    torch.matmul: MATMUL,
    torch.mm: MM,
    torch.addmm: ADDMM,
    Tensor.matmul: MATMUL,
    Tensor.mm: MM,
    Tensor.addmm: ADDMM,
}


def register_rule(
    op: Callable[..., Tensor],
    *,
    parameter: int | str,
    squared_norm: Callable[..., Tensor],
    weighted_sum: Callable[..., Tensor],
) -> None:
    """Give an op of your own a rule, so that book-keeping makes no per-sample gradient for it.

    Args:
        op: a function that torch's function modes see: an op of `torch.library`, or a function in
            Python that asks `torch.overrides.has_torch_function`. Its output is one tensor.
        parameter: the position or keyword of the argument that is the parameter.
        squared_norm: `squared_norm(inputs, output_grads, *constants) -> (B,)`, at least the squared
            L2 norm of each example's gradient. inputs: the op's other tensors, in order, with a
            leading batch axis (B, ...), float32 at least; output_grads (B, *output shape);
            constants: its other arguments, which must be hashable, in the order of its signature;
            where it has none that can be read, a call with keywords takes the path without rules.
        weighted_sum: `weighted_sum(inputs, output_grads, scale, *constants)`, the sum over examples
            of scale (B,) times gradient, of the parameter's shape.

    Guarantees:
        Examples of scale 0 reach weighted_sum with an output gradient of 0.
        A parameter that another op meets too uses the rule only if that op has one.
        The norm that clips is what squared_norm says: `dpfunc.testing.laws.methods_agree` holds it against
        differentiation for each example.

    Raises:
        TypeError: op, squared_norm or weighted_sum cannot be called.
        ValueError: op has a rule of this library.

    Source: Bu et al. 2023, arXiv:2210.00038.

    >>> def squared_norm(inputs, output_grads):
    ...     return (inputs[0].square() * output_grads.square()).sum(1)
    >>> def weighted_sum(inputs, output_grads, scale):
    ...     return (scale[:, None] * inputs[0] * output_grads).sum(0)
    >>> register_rule(torch.ldexp, parameter=1, squared_norm=squared_norm, weighted_sum=weighted_sum)
    >>> del RULES[torch.ldexp]
    """
    for name, function in (
        ("op", op),
        ("squared_norm", squared_norm),
        ("weighted_sum", weighted_sum),
    ):
        if not callable(function):
            raise TypeError(f"Expected {name} to be a function, got {type(function).__name__}.")
    if op in _OWN:
        raise ValueError(f"Expected an op without a rule, got {op!r}, which has one.")
    RULES[op] = make_rule(op, parameter, squared_norm, weighted_sum)


_OWN = frozenset(RULES)

PER_SAMPLE_FORMS = ("per-sample", "matmul", "grouped")
"""The forms that make the gradient of every example."""


class Several(NamedTuple):
    """The sum of gradients that have no common factors, for each example."""

    parts: list[Any]

    def costs(self) -> dict[str, tuple[float, float]]:
        each = [
            cost for part in self.parts for f, cost in part.costs().items() if f in PER_SAMPLE_FORMS
        ]
        return {"per-sample": (sum(f for f, _ in each), sum(b for _, b in each))}

    def per_sample(self) -> Tensor:
        grads: list[Tensor] = [part.per_sample() for part in self.parts]
        return sum(grads[1:], grads[0])


def combine(parts: Sequence[Any], size: tuple[int, ...]) -> Any:
    """The gradient of one parameter from what each use of it gave."""
    outer = [part for part in parts if isinstance(part, Outer)]
    rest = [part for part in parts if not isinstance(part, Outer)]
    sums = ([OuterSum(join(outer), size)] if outer else []) + rest
    return sums[0] if len(sums) == 1 else Several(sums)

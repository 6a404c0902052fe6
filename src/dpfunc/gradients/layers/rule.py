"""What a rule for an op is: which arguments may be its parameter, and how their gradients are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Use(NamedTuple):
    """A parameter in the hands of an op, and what its gradient depends on besides the output's."""

    weight: Tensor
    inputs: tuple[Tensor, ...]
    constants: tuple[Any, ...] = ()
    """Hashable, the same for every example."""


class Rule(NamedTuple):
    """`uses` has the arguments of the op and names each that may be a parameter.

    `factors(use, output_grad)` sees the inputs and the output gradient with a leading batch axis.
    """

    uses: Callable[..., list[Use]]
    factors: Callable[[Use, Tensor], Any]
    transposable: bool = False
    """Whether the parameter may also be the transpose of a view."""
    fresh: bool = False
    """Whether the output is new memory, no view, that the op does not keep to differentiate itself."""


BYTES_TO_FLOPS = 4
"""Floating-point operations in the time of moving one byte; fitted to layers timed on a CPU core."""


def cheapest(costs: dict[str, tuple[float, float]]) -> str:
    """The form of least (FLOPs, bytes)."""
    return min(costs, key=lambda form: costs[form][0] + BYTES_TO_FLOPS * costs[form][1])

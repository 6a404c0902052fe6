"""Rules of users' own, for their own ops."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, vmap

from dpfunc.gradients.layers.rule import Rule, Use


class Registered(NamedTuple):
    """What a registered rule makes of one use."""

    use: Use
    output_grads: Tensor
    squared_norm: Callable[..., Tensor]
    weighted: Callable[..., Tensor]

    def costs(self) -> dict[str, tuple[float, float]]:
        return {"registered": (0.0, 0.0)}

    def per_sample(self) -> Tensor:
        """(B, *size): the weighted sums for one example at a time."""
        eye = torch.eye(len(self.output_grads), dtype=self.output_grads.dtype)
        return vmap(self.weighted_sum)(eye.to(self.output_grads.device))

    def norm_bound(self, sensitivity: float) -> Tensor:
        del sensitivity
        square = self.squared_norm(self.use.inputs, self.output_grads, *self.use.constants)
        # What the scale and one product round, which no rule need think of.
        rounding = 4 * torch.finfo(self.output_grads.dtype).eps
        return square.double().clamp(min=0.0).sqrt() * (1.0 + rounding)

    def weighted_sum(self, scale: Tensor) -> Tensor:
        real = (scale > 0).reshape(-1, *(1,) * (self.output_grads.ndim - 1))
        grads = torch.where(real, self.output_grads, 0.0)
        inputs = tuple(
            x.nan_to_num(0.0, 0.0, 0.0) if x.is_floating_point() else x for x in self.use.inputs
        )
        return self.weighted(inputs, grads, scale, *self.use.constants)


def make_rule(
    op: Callable[..., Any],
    parameter: int | str,
    squared_norm: Callable[..., Tensor],
    weighted_sum: Callable[..., Tensor],
) -> Rule:
    try:
        signature = inspect.signature(op).parameters
    except (TypeError, ValueError):
        signature = {}
    order = tuple(signature)
    defaults = {n: p.default for n, p in signature.items() if p.default is not p.empty}
    place = order[parameter] if isinstance(parameter, int) and parameter < len(order) else parameter

    def uses(*args: Any, **kwargs: Any) -> list[Use]:
        if not order and kwargs:
            return []
        names = order[: len(args)] if order else tuple(range(len(args)))
        given = {**defaults, **dict(zip(names, args, strict=True)), **kwargs}
        weight = given.pop(place, None)
        if not isinstance(weight, Tensor):
            return []
        values = [given[name] for name in order or names if name in given]
        tensors = tuple(x for x in values if isinstance(x, Tensor))
        constants = tuple(x for x in values if not isinstance(x, Tensor))
        return [Use(weight, tensors, constants)]

    def factors(use: Use, output_grad: Tensor) -> Registered:
        return Registered(use, output_grad, squared_norm, weighted_sum)

    return Rule(uses, factors)

"""Rules of users' own, for their own ops."""

from __future__ import annotations

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
    parameter: int | str, squared_norm: Callable[..., Tensor], weighted_sum: Callable[..., Tensor]
) -> Rule:
    def uses(*args: Any, **kwargs: Any) -> list[Use]:
        named = {**dict(enumerate(args)), **kwargs}
        weight = named.pop(parameter, None)
        if not isinstance(weight, Tensor):
            return []
        tensors = tuple(x for x in named.values() if isinstance(x, Tensor))
        constants = tuple(x for x in named.values() if not isinstance(x, Tensor))
        return [Use(weight, tensors, constants)]

    def factors(use: Use, output_grad: Tensor) -> Registered:
        return Registered(use, output_grad, squared_norm, weighted_sum)

    return Rule(uses, factors)

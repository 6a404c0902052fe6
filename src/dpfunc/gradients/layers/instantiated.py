"""Gradients that were made for each example, by an op's rule or by differentiation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpfunc.gradients import norms
from dpfunc.gradients.layers.weighting import weighted


class Instantiated(NamedTuple):
    grads: Tensor
    """(B, *size), float32 at least."""
    order: int
    """Of the norm: 1 or 2."""
    fresh: bool
    """Whether the memory is nobody else's."""

    def norm_bound(self, sensitivity: float) -> Tensor:
        """(B,), float64, at least the norm of each row."""
        del sensitivity
        return norms.upper_of_rows(self.grads, self.order)

    def weighted_sum(self, scale: Tensor) -> Tensor:
        """The sum over examples of scale x gradient. A scale of 0 stops NaN and infinity too."""
        if self.grads.ndim <= 2:  # The compiler fuses this with what made the gradients.
            return weighted(self.grads, scale.reshape(-1, *(1,) * (self.grads.ndim - 1))).sum(0)
        in_place = self.fresh and not torch.compiler.is_compiling()
        clean = torch.Tensor.nan_to_num_ if in_place else torch.nan_to_num
        grads = clean(self.grads, 0.0, 0.0, 0.0)
        return (scale @ grads.flatten(1)).reshape(grads.shape[1:])

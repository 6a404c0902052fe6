"""Gradients that were made for each example, by an op's rule or by differentiation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpfunc.gradients import norms


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
        in_place = self.fresh and not torch.compiler.is_compiling()
        clean = torch.Tensor.nan_to_num_ if in_place else torch.nan_to_num
        grads = clean(self.grads, 0.0, 0.0, 0.0)
        if grads.ndim > 2:
            return (scale @ grads.flatten(1)).reshape(grads.shape[1:])
        # Vectors: the compiler fuses this with what made the gradients.
        return (grads.T * scale).T.sum(0) if grads.ndim == 2 else (grads * scale).sum(0)

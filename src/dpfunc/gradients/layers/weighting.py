"""Multiplying by a scale of which 0 stops NaN and infinity too."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted(x: Tensor, scale: Tensor) -> Tensor:
    """x * scale, and something finite where the scale is 0.

    Whoever has another scale has a finite norm, and so finite factors: both forms leave those alone.
    Compiled, `where` needs less memory; eager, with a broadcast condition, six times the time.
    """
    if torch.compiler.is_compiling():
        return torch.where(scale == 0, 0.0, x * scale)
    return (x * scale).nan_to_num_(0.0, 0.0, 0.0)

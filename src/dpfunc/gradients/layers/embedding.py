"""Embeddings: row i of the table has the gradient of the outputs that looked i up."""

from __future__ import annotations

import torch
from torch import Tensor

from dpfunc.gradients.layers.outer import Outer
from dpfunc.gradients.layers.rule import Rule, Use


def _uses(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[Use]:
    if max_norm is not None or scale_grad_by_freq or sparse:
        return []
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return [Use(weight, (input,), (padding_idx,))]


def _factors(use: Use, output_grad: Tensor) -> Outer:
    index = use.inputs[0].flatten(1) if use.inputs[0].ndim > 1 else use.inputs[0].unsqueeze(1)
    cols = output_grad.reshape(*index.shape, output_grad.shape[-1])
    (padding_idx,) = use.constants
    if padding_idx is not None:
        cols = torch.where((index == padding_idx).unsqueeze(-1), 0.0, cols)
    return Outer(index.long(), cols)


EMBEDDING = Rule(_uses, _factors)

"""Linear layers and matrix products with a parameter: y_t = W x_t has gradient sum_t g_t x_t^T."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from dpfunc.gradients.layers.outer import Outer
from dpfunc.gradients.layers.rule import Rule, Use


def _linear_uses(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Use]:
    return [Use(weight, (input,))] if weight.ndim == 2 else []


def _linear_factors(use: Use, output_grad: Tensor) -> Outer:
    return Outer(_tokens(output_grad), _tokens(use.inputs[0]))


def _matmul_uses(input: Any, other: Any, *, out: None = None) -> list[Use]:
    uses = []
    if other.ndim == 2 and input.ndim >= 1:
        uses.append(Use(other, (input,), ("right",)))
    if input.ndim == 2 and other.ndim >= 1:
        uses.append(Use(input, (other,), ("left",)))
    return uses


def _mm_uses(input: Any, mat2: Any, *, out: None = None) -> list[Use]:
    return _matmul_uses(input, mat2)


def _matmul_factors(use: Use, output_grad: Tensor) -> Outer:
    (other,) = use.inputs
    if use.constants == ("right",):
        return Outer(_tokens(other), _tokens(output_grad))
    if other.ndim == 2:  # (B, n): a matrix times one vector
        return Outer(output_grad.unsqueeze(1), other.unsqueeze(1))
    return Outer(_tokens(output_grad.mT), _tokens(other.mT))


def _addmm_uses(
    input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1, out: None = None
) -> list[Use]:
    return _matmul_uses(mat1, mat2) if alpha == 1 else []


def _tokens(x: Tensor) -> Tensor:
    """(B, T, n) from (B, *sequence, n)."""
    return x.reshape(x.shape[0], prod(list(x.shape[1:-1])), x.shape[-1])


LINEAR = Rule(_linear_uses, _linear_factors, transposable=True)
MATMUL = Rule(_matmul_uses, _matmul_factors, transposable=True)
MM = Rule(_mm_uses, _matmul_factors, transposable=True)
ADDMM = Rule(_addmm_uses, _matmul_factors, transposable=True)

"""Upper bounds on norms, fast: float32 in short blocks, float64 over the blocks.

A block of 128 squares summed in float32, in any order, is off by at most a factor 1 + 130 u; the root
halves that. What lies below the square root of the smallest normal number may be lost, which adds at most
`underflow`. What lies above the root of the largest gives infinity: whoever clips by such a bound
lets the example contribute nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

DOUBLE_ROUNDOFF = 2.0**-53
_BLOCK = 128
_PRODUCT_ROUNDOFF = {"tf32": 2.0**-11, "bf16": 2.0**-8}


def raised(leaf: Tensor) -> Tensor:
    """Float32 at least."""
    return leaf if leaf.dtype == torch.float64 else leaf.to(torch.float32)


def upper(x: Tensor) -> Tensor:
    """L2 norms over the last axis, float64, each at least the true one and within 2e-5 of it."""
    size = x.shape[-1]
    whole = size - size % _BLOCK
    parts = []
    if whole:
        blocks = x[..., :whole].unflatten(-1, (whole // _BLOCK, _BLOCK))
        parts.append(torch.linalg.vector_norm(blocks, dim=-1).double().square().sum(-1))
    if whole < size or not size:
        parts.append(torch.linalg.vector_norm(x[..., whole:], dim=-1).double().square())
    roundoff = torch.finfo(x.dtype).eps / 2 * (_BLOCK + 2) + 2 * (size + 64) * DOUBLE_ROUNDOFF
    return sum(parts[1:], parts[0]).sqrt() * (1.0 + roundoff) + underflow(x.dtype, size)


def upper_of_rows(grads: Tensor, order: int) -> Tensor:
    """(B,), float64, upper bounds on the L2 or L1 norms of (B, *s), with room for a product's rounding."""
    flat = grads.flatten(1) if grads.ndim > 1 else grads.unsqueeze(1)
    rounding = 2 * product_roundoff(grads.device.type, grads.dtype)
    if order == 2:
        return upper(flat) * (1.0 + rounding)
    norm = torch.linalg.vector_norm(flat, ord=1, dim=1, dtype=torch.float64)
    return norm * (1.0 + rounding + 2 * (flat.shape[1] + 64) * DOUBLE_ROUNDOFF)


def underflow(dtype: torch.dtype, size: int) -> float:
    """At most what is lost of the norm of `size` numbers whose squares are not normal numbers."""
    return 2.0 * size * torch.finfo(dtype).tiny ** 0.5


@torch.compiler.assume_constant_result
def product_roundoff(device_type: str, dtype: torch.dtype, operation: str = "matmul") -> float:
    """How far the settings let a product ("matmul" or "conv") round its float32 factors."""
    if dtype != torch.float32:
        return 0.0
    backend = torch.backends.cudnn if device_type == "cuda" else torch.backends.mkldnn
    if operation == "matmul" and device_type == "cuda":
        backend = torch.backends.cuda
    return _PRODUCT_ROUNDOFF.get(getattr(backend, operation).fp32_precision, 0.0)

"""Gradients that are sums of outer products, handled by their factors.

The weight of a linear layer that meets T tokens has, for one example, the gradient
G = sum_t r_t c_t^T: output gradients times inputs. An embedding is the same with one-hot r_t. Tied
weights and a cell over time only lengthen the sum. From the factors come

- the gradient itself, `per_sample`: m x n numbers for each example;
- its norm without it, `norm_bound`: |r| |c| for one token, else the Gram form
  |G|^2 = sum_st <r_s, r_t> <c_s, c_t>, T^2 numbers for each example;
- the clipped sum, `weighted_sum`: one matrix product over all tokens of all examples.

Why `norm_bound` is a bound. Let u be the roundoff of the factors' format, v = 2**-53 and
M = sum_t |r_t| |c_t|, from norms that are upper bounds themselves (`norms.upper`). The Gram form cancels
where tokens cancel, so it is computed in float64: an inner product of length m is off by at most
m v |r_s| |r_t|, the square by at most (m + n + T^2 + 16) v M^2, which is added. (In float32 this
margin would be a few per cent of the norm.) The sum multiplies one factor by the scale, which rounds
it by u; adding T products up costs another T u; a reduced-precision product (TF32, bfloat16) rounds
both factors by w: together at most ((T + 1) u + 2 w) M, which is added with room to spare. So one
example's part of the sum is within the bound as computed, not only as defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from dpfunc.gradients import norms
from dpfunc.gradients.layers.weighting import weighted


class Outer(NamedTuple):
    """For each example the sum over tokens of rows_t x cols_t, an (m, n) matrix.

    rows: (B, T, m), or (B, T) integers below m that stand for one-hot rows. cols: (B, T, n).
    """

    rows: Tensor
    cols: Tensor

    def transposed(self) -> Outer:
        return Outer(self.cols, self.rows)

    @property
    def dense(self) -> bool:
        return self.rows.is_floating_point()


def join(parts: Sequence[Outer]) -> list[Outer]:
    """The same sum in at most two parts, one dense and one of one-hot rows."""
    kinds = [[p for p in parts if p.dense == dense] for dense in (True, False)]
    return [
        kind[0] if len(kind) == 1 else Outer(*(torch.cat(f, 1) for f in zip(*kind, strict=True)))
        for kind in kinds
        if kind
    ]


class OuterSum(NamedTuple):
    """The gradient of one (m, n) weight for each example: a sum over the outer products of parts."""

    parts: list[Outer]
    size: tuple[int, ...]

    def costs(self) -> dict[str, tuple[float, float]]:
        """(FLOPs, bytes) of norm and clipped sum in each form.

        A float64 product counts twice. Per-sample gradients are written once and read three times.
        """
        m, n = self.size
        batch, tokens = self.parts[0].cols.shape[0], sum(p.cols.shape[1] for p in self.parts)
        one_hot = not any(part.dense for part in self.parts)
        length = n if one_hot else m + n
        matmul = 0.0 if one_hot else 2.0 * batch * tokens * m * n
        gram = 4.0 * batch * tokens**2 * length if tokens > 1 else 0.0
        factors = 4.0 * batch * tokens * length
        return {
            "factors": (matmul + gram, factors * (6 if tokens > 1 else 2)),
            "per-sample": (matmul, factors + 16.0 * batch * m * n),
        }

    def per_sample(self) -> Tensor:
        """(B, m, n)."""
        grads = [_per_sample(part, self.size) for part in self.parts]
        return sum(grads[1:], grads[0])

    def norm_bound(self, sensitivity: float) -> Tensor:
        """(B,), float64, at least the norm; infinite where the scaled product might underflow."""
        rows = torch.cat([_row_norms(part) for part in self.parts], 1)
        cols = torch.cat([norms.upper(part.cols) for part in self.parts], 1)
        square = None
        if rows.shape[1] > 1:
            pairs = [_gram_products(a, b).sum((1, 2)) for a, b in product(self.parts, self.parts)]
            square = sum(pairs[1:], pairs[0])
        return bound(rows, cols, square, sum(self.size), self.parts[0].cols, sensitivity)

    def weighted_sum(self, scale: Tensor) -> Tensor:
        """(m, n): the sum over examples of scale x gradient. A scale of 0 stops NaN and inf too."""
        sums = [_weighted(part, self.size, scale.reshape(-1, 1, 1)) for part in self.parts]
        return sum(sums[1:], sums[0])


def bound(
    rows: Tensor,
    cols: Tensor,
    square: Tensor | None,
    numbers: int,
    like: Tensor,
    sensitivity: float,
    operation: str = "matmul",
) -> Tensor:
    """The norm of sum_t r_t c_t^T from above; the argument stands at the top of this file.

    rows, cols: (B, T), float64, norms of r_t and c_t. square: (B,), its square in Gram form, where T
    is more than one. numbers: m + n. like: a factor. operation: what sums the products up.
    """
    together, both, tokens = (rows * cols).sum(1), rows.sum(1) + cols.sum(1), rows.shape[1]
    above = together
    if square is not None:
        margin = (numbers + tokens**2 + 16) * norms.DOUBLE_ROUNDOFF
        lost = norms.underflow(torch.float64, numbers) * both
        above = (square.clamp(min=0.0) + margin * together.square()).sqrt() + lost
    finfo = torch.finfo(like.dtype)
    lost = norms.product_roundoff(like.device.type, like.dtype, operation)
    rounding = (tokens + 3) * finfo.eps / 2 + 2 * lost
    # Neither does the scaled product lose what matters to underflow, nor can it overflow: factors
    # are below the root of the largest number, and so are scales (see `lowered`).
    safe = finfo.tiny * numbers * both <= finfo.eps / 2 * sensitivity
    safe &= both < finfo.max**0.5 / 2
    return torch.where(safe, above + rounding * together, torch.inf)


def _per_sample(part: Outer, size: Sequence[int]) -> Tensor:
    if part.dense:
        return torch.bmm(part.rows.mT, part.cols)
    zeros = part.cols.new_zeros(part.cols.shape[0], *size)
    return zeros.scatter_add(1, part.rows.unsqueeze(-1).expand_as(part.cols), part.cols)


def _row_norms(part: Outer) -> Tensor:
    if part.dense:
        return norms.upper(part.rows)
    return torch.ones_like(part.rows, dtype=torch.float64)


def _gram_products(a: Outer, b: Outer) -> Tensor:
    """(B, T_a, T_b): <r_s, r_t> <c_s, c_t>."""
    cols = torch.bmm(a.cols.double(), b.cols.double().mT)
    if a.dense and b.dense:
        return cols * torch.bmm(a.rows.double(), b.rows.double().mT)
    if not a.dense and not b.dense:
        return torch.where(a.rows.unsqueeze(2) == b.rows.unsqueeze(1), cols, 0.0)
    if b.dense:
        return _gram_products(b, a).mT
    index = b.rows.unsqueeze(1).expand(-1, a.rows.shape[1], -1)
    return cols * a.rows.gather(2, index)


def _weighted(part: Outer, size: Sequence[int], scale: Tensor) -> Tensor:
    if not part.dense:
        scaled = weighted(part.cols, scale).flatten(0, 1)
        return part.cols.new_zeros(tuple(size)).index_add(0, part.rows.flatten(), scaled)
    scaled, other = sorted(part, key=Tensor.numel)
    scaled = weighted(scaled, scale).flatten(0, 1)
    other = other.nan_to_num(0.0, 0.0, 0.0).flatten(0, 1)
    return scaled.T @ other if part.rows.numel() <= part.cols.numel() else other.T @ scaled

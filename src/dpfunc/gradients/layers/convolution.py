"""Convolutions in one to three spatial dimensions, transposed ones too.

For an example, output channel o, input channel c of the same group and kernel offset k,

    gradient[o, c, k] = sum_t output_grads[o, t] * inputs[c, stride * t + dilation * k],

where t runs over the output positions and the inputs are padded with zeros. With the patches
U[t, (c, k)] = inputs[c, stride * t + dilation * k] it is the product output_grads @ U: a sum of outer
products, one for each position. A transposed convolution is the adjoint of a convolution: its weight
gradient is that of the convolution with inputs and output gradients exchanged.

The forms, of which shapes choose the cheapest:

- "matmul": the product with the patches, example by example;
- "grouped": one weight gradient with the examples side by side as groups of channels, which copies no
  patches but writes each weight slowly;
- "patches", "pixels": the norm in Gram form, in float64, and then the ordinary weight gradient.
  Patches at t and t' agree offset by offset, so U U^T is also the Gram matrix X^T X of the pixels
  summed along diagonals: (U U^T)[t, t'] = sum_k (X^T X)[s t + d k, s t' + d k].
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfunc.gradients.layers.outer import bound
from dpfunc.gradients.layers.rule import Rule, Use, cheapest
from dpfunc.gradients.layers.weighting import weighted


class Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()


class Convolution(NamedTuple):
    """The gradient of a convolution's weight for each example.

    inputs: (B, N, C, *size), output_grads: (B, N, O, *positions); N images make one example.
    """

    inputs: Tensor
    output_grads: Tensor
    size: tuple[int, ...]
    geometry: Geometry

    def costs(self) -> dict[str, tuple[float, float]]:
        """(FLOPs, bytes) of norm and clipped sum in each form. A float64 product counts twice."""
        inputs, grads, g = _as_convolution(self.inputs, self.output_grads, self.geometry)
        (outputs, channels, *kernel), positions = self.size, prod(grads.shape[3:])
        batch, images = inputs.shape[:2]
        patch = channels * prod(kernel)
        unfolding = 2 * g.groups * positions * patch if prod(kernel) > 1 else 0
        product = 2.0 * positions * prod(self.size)
        direct = 3 * prod(self.size) + (unfolding if self._direct() == "matmul" else 0)
        each = {self._direct(): (product, 4.0 * direct)}
        if images == 1:
            pixels = prod([n + 2 * p for n, p in zip(inputs.shape[3:], g.padding, strict=True)])
            output_gram = 4.0 * positions**2 * outputs
            each["patches"] = (
                product + output_gram + 4.0 * positions**2 * patch * g.groups,
                8.0 * (2 * unfolding + g.groups * positions**2),
            )
            each["pixels"] = (
                product + output_gram + 4.0 * pixels**2 * channels * g.groups,
                8.0 * g.groups * (pixels**2 + positions**2 * sum(kernel)),
            )
        return {form: (batch * images * f, batch * images * b) for form, (f, b) in each.items()}

    def per_sample(self) -> Tensor:
        """(B, *size)."""
        inputs, grads, g = _as_convolution(self.inputs, self.output_grads, self.geometry)
        (batch, images), (outputs, channels, *kernel) = inputs.shape[:2], self.size
        num = batch * images
        if self._direct() == "matmul":
            patches = unfold(inputs.flatten(0, 1), kernel, g)
            rows = grads.reshape(num, g.groups, outputs // g.groups, -1)
            each = rows @ patches
        else:
            each = weight_gradient(
                inputs.reshape(1, -1, *inputs.shape[3:]),
                grads.reshape(1, -1, *grads.shape[3:]),
                (num * outputs, channels, *kernel),
                g._replace(groups=num * g.groups),
            )
        each = each.reshape(batch, images, *self.size)
        return each.sum(1) if images > 1 else each.squeeze(1)

    def norm_bound(self, sensitivity: float) -> Tensor:
        """(B,), float64, at least the norm; see `outer.bound`."""
        inputs, grads, g = _as_convolution(self.inputs, self.output_grads, self.geometry)
        costs, (outputs, channels, *kernel) = self.costs(), self.size
        batch, positions = len(inputs), tuple(grads.shape[3:])
        inputs, grads = inputs.double().squeeze(1), grads.double().squeeze(1)
        if cheapest({form: costs[form] for form in ("pixels", "patches")}) == "pixels":
            pixels = _pad(inputs, g.padding).unflatten(1, (g.groups, channels)).flatten(0, 1)
            span = pixels.shape[2:]
            gram = (pixels.flatten(2).mT @ pixels.flatten(2)).view(-1, *span, *span)
            for dim, steps in enumerate(
                zip(positions, kernel, g.stride, g.dilation, strict=True), 1
            ):
                gram = _sum_diagonals(gram, dim, dim + len(kernel), *steps)
            gram = gram.reshape(batch * g.groups, prod(positions), prod(positions))
        else:
            patches = unfold(inputs, kernel, g).flatten(0, 1)
            gram = patches @ patches.mT
        rows = grads.reshape(batch * g.groups, outputs // g.groups, prod(positions))
        output_gram = rows.mT @ rows
        square = (gram * output_gram).sum((1, 2)).reshape(batch, g.groups).sum(1)
        row_norms, col_norms = (
            m.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt().reshape(batch, -1)
            for m in (output_gram, gram)
        )
        numbers = outputs + (channels + 1) * prod(kernel)
        return bound(row_norms, col_norms, square, numbers, self.inputs, sensitivity, "conv")

    def weighted_sum(self, scale: Tensor) -> Tensor:
        """The sum over examples of scale x gradient. A scale of 0 stops NaN and infinity too."""
        scale = scale.reshape(-1, *(1,) * (self.output_grads.ndim - 1))
        return weight_gradient(
            self.inputs.nan_to_num(0.0, 0.0, 0.0).flatten(0, 1),
            weighted(self.output_grads, scale).flatten(0, 1),
            self.size,
            self.geometry,
        )

    def _direct(self) -> str:
        """The faster way to make per-sample gradients.

        The grouped convolution pays off when patches are copies, positions outnumber outputs, and
        channels fill vectors or are split anyway.
        """
        outputs, channels, *kernel = self.size
        transposed, groups = self.geometry.transposed, self.geometry.groups
        positions = prod((self.inputs if transposed else self.output_grads).shape[3:])
        copies = prod(kernel) > 1 and positions > outputs // groups
        return "grouped" if copies and (channels % 8 == 0 or groups > 1) else "matmul"


def weight_gradient(inputs: Tensor, grads: Tensor, size: Sequence[int], g: Geometry) -> Tensor:
    """The ordinary weight gradient, summed over (N, C, *size) and (N, O, *positions)."""
    return torch.ops.aten.convolution_backward(
        grads,
        inputs,
        inputs.new_empty(1).expand(*size),  # only its shape is read
        None,
        g.stride,
        g.padding,
        g.dilation,
        g.transposed,
        g.output_padding or [0] * len(g.stride),
        g.groups,
        (False, True, False),
    )[1]


def unfold(inputs: Tensor, kernel: Sequence[int], g: Geometry) -> Tensor:
    """The patches U of (B, C, *size), as (B, groups, positions, C / groups * prod(kernel)).

    A view when the kernel has one element or fits in one position, otherwise one copy, in which
    positions are contiguous.
    """
    patches, dims = _pad(inputs, g.padding), len(kernel)
    for i, (k, s, d) in enumerate(zip(kernel, g.stride, g.dilation, strict=True)):
        patches = patches.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    batch, channels, *positions = patches.shape[: 2 + dims]
    patches = patches.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    features = channels // g.groups * prod(kernel)
    return patches.reshape(batch, g.groups, features, prod(positions)).mT


def _pad(inputs: Tensor, padding: Sequence[int]) -> Tensor:
    """Zeros on both sides of every spatial dimension."""
    return F.pad(inputs, [p for n in reversed(padding) for p in (n, n)]) if any(padding) else inputs


def _as_convolution(inputs: Tensor, grads: Tensor, g: Geometry) -> tuple[Tensor, Tensor, Geometry]:
    """Inputs, output gradients and geometry of a convolution with the same weight gradient.

    `output_padding` lengthens the end of a transposed convolution's output, which becomes the
    input here: that end takes as much less padding, and is cut where no kernel element reaches.
    """
    if not g.transposed:
        return inputs, grads, g
    if any(g.output_padding):
        ends = zip(reversed(g.padding), reversed(g.output_padding), strict=True)
        grads = F.pad(grads, [n for p, o in ends for n in (p, p - o)])
        g = g._replace(padding=(0,) * len(g.padding))
    return grads, inputs, g._replace(transposed=False, output_padding=())


def _sum_diagonals(
    gram: Tensor, row: int, column: int, size: int, kernel: int, stride: int, dilation: int
) -> Tensor:
    """sum_k gram[stride * t + dilation * k, stride * t' + dilation * k], t and t' < size."""
    windows: list[Tensor] = []
    for start in range(0, dilation * kernel, dilation):
        index = [slice(None)] * gram.ndim
        index[row] = index[column] = slice(start, start + stride * (size - 1) + 1, stride)
        windows.append(gram[tuple(index)])
    return sum(windows[1:], windows[0])


def _uses(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> list[Use]:
    dims = weight.ndim - 2
    stride, dilation = _ints(stride, dims), _ints(dilation, dims)
    if padding == "valid":
        padding = 0
    if padding == "same":  # the end gets one zero more than the start where the number is odd
        zeros = [d * (k - 1) for k, d in zip(weight.shape[2:], dilation, strict=True)]
        if any(n % 2 for n in zeros):
            input = F.pad(input, [p for n in reversed(zeros) for p in (0, n % 2)])
        padding = tuple(n // 2 for n in zeros)
    geometry = Geometry(stride, _ints(padding, dims), dilation, groups)
    return [Use(weight, (input,), tuple(geometry))]


def _transposed_uses(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> list[Use]:
    ints = [_ints(n, weight.ndim - 2) for n in (stride, padding, dilation, output_padding)]
    return [Use(weight, (input,), (*ints[:3], groups, True, ints[3]))]


def _factors(use: Use, output_grad: Tensor) -> Convolution:
    dims, inputs = use.weight.ndim - 2, use.inputs[0]
    if inputs.ndim == dims + 2:  # (B, C, *size): no axis of images
        inputs, output_grad = inputs.unsqueeze(1), output_grad.unsqueeze(1)
    return Convolution(inputs, output_grad, tuple(use.weight.shape), Geometry(*use.constants))


def _ints(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


CONVOLUTION = Rule(_uses, _factors, fresh=True)
TRANSPOSED_CONVOLUTION = Rule(_transposed_uses, _factors, fresh=True)

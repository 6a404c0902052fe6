"""Small pure losses, of every way that a parameter meets an example, with parameters and data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dpfunc.typing import Loss, Tree


class LossCase(NamedTuple):
    """A loss of one example, parameters, and data with a leading batch axis."""

    loss: Loss
    params: Tree
    data: Tree


def losses(
    num_examples: st.SearchStrategy[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> st.SearchStrategy[LossCase]:
    """Losses with their parameters and data: B from 1 to 6; 0 and more where num_examples says so.

    A linear layer and bare parameters, a network of two, tied weights, a sequence whose tokens cancel, a
    convolution, an embedding, a parameter that the loss ignores. Rows differ in magnitude from 1e-3 to 1e3.
    None saturates, so that float32 has its gradients to some four digits.
    """
    num_examples = st.integers(1, 6) if num_examples is None else num_examples
    draws = st.integers(0, 2**32).map(lambda seed: _draws(seed, dtype))
    return st.builds(
        lambda make, num, draw: make(num, draw), st.sampled_from(_ALL), num_examples, draws
    )


_Draw = Callable[..., Tensor]


def _draws(seed: int, dtype: torch.dtype) -> _Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _rows(num: int, draw: _Draw, *shape: int) -> Tensor:
    """Examples of different magnitude."""
    sizes = 10.0 ** (3 * torch.tanh(draw(num)))
    return draw(num, *shape) * sizes.reshape(-1, *[1] * len(shape))


def _affine(num: int, draw: _Draw) -> LossCase:
    def loss(params: Tree, example: Tensor) -> Tensor:
        return params["scale"] * (F.linear(example, params["w"], params["b"])).sum()

    params = {"w": draw(3, 4), "b": draw(3), "scale": draw()}
    return LossCase(loss, params, _rows(num, draw, 4))


def _network(num: int, draw: _Draw) -> LossCase:
    def loss(params: Tree, example: tuple[Tensor, Tensor]) -> Tensor:
        x, y = example
        first, second = params
        hidden = F.softsign(F.linear(x, first["w"], first["b"]))
        return F.cross_entropy(hidden @ second["w"], y)

    params = [{"w": draw(5, 4), "b": draw(5)}, {"w": draw(5, 3)}]
    return LossCase(loss, params, (_rows(num, draw, 4), torch.arange(num) % 3))


def _tied(num: int, draw: _Draw) -> LossCase:
    def loss(params: Tree, example: Tensor) -> Tensor:
        return F.linear(F.softsign(F.linear(example, params)), params.mT).square().sum()

    return LossCase(loss, draw(3, 4), draw(num, 4))


def _cancelling(num: int, draw: _Draw) -> LossCase:
    """Half of the tokens nearly undo the other half."""

    def loss(params: Tree, example: tuple[Tensor, Tensor]) -> Tensor:
        x, sign = example
        return (F.linear(x, params["w"]) * sign).sum()

    x, sign = _rows(num, draw, 3, 6), draw(num, 3, 4)
    data = torch.cat([x, x * (1 + 1e-3)], 1), torch.cat([sign, -sign], 1)
    return LossCase(loss, {"w": draw(4, 6)}, data)


def _convolution(num: int, draw: _Draw) -> LossCase:
    def loss(params: Tree, example: Tensor) -> Tensor:
        out = F.conv1d(example, params["kernel"], params["bias"], padding=1)
        return F.softsign(out).square().mean()

    return LossCase(loss, {"kernel": draw(3, 2, 3), "bias": draw(3)}, _rows(num, draw, 2, 6))


def _embedding(num: int, draw: _Draw) -> LossCase:
    def loss(params: Tree, example: Tensor) -> Tensor:
        return F.softsign(F.embedding(example, params["table"]) @ params["w"]).sum()

    tokens = (torch.arange(5 * num) ** 2 % 7).reshape(num, 5)
    return LossCase(loss, {"table": draw(7, 4), "w": draw(4, 2)}, tokens)


def _ignoring(num: int, draw: _Draw) -> LossCase:
    def loss(params: Tree, example: Tensor) -> Tensor:
        return (params["used"] * example).sum() + 0 * params["idle"].sum()

    return LossCase(loss, {"used": draw(4), "idle": draw(2, 2)}, _rows(num, draw, 4))


_ALL = (_affine, _network, _tied, _cancelling, _convolution, _embedding, _ignoring)

"""Inputs that break clipping: nested trees, every float format, every magnitude, poison, padding."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from dpfunc import trees
from dpfunc.testing.strategies.batches import masks
from dpfunc.typing import Tree

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ClippingCase(NamedTuple):
    """Per-sample gradients, a clip norm, and a mask or None."""

    grads: Tree
    l2_clip_norm: float
    mask: Tensor | None


class Layer(NamedTuple):
    """A node of the trees: what a NamedTuple of parameters is."""

    weight: Any
    bias: Any


def clip_norms(low: float = -8, high: float = 8) -> st.SearchStrategy[float]:
    """Clip norms, evenly over the exponents."""
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of one example's leaf: scalars, empty leaves, and a few larger."""
    return st.one_of(
        st.just(()), st.just((0,)), st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
    )


def shape_trees() -> st.SearchStrategy[Tree]:
    """Nested dicts, lists, tuples and NamedTuples with a shape for each leaf."""
    leaf = shapes().map(_Shape)
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.dictionaries(st.text("abc.", min_size=1, max_size=3), inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3),
            st.tuples(inner, inner),
            st.builds(Layer, inner, inner),
        ),
        max_leaves=4,
    )


@st.composite
def per_sample_grads(
    draw: st.DrawFn,
    num_examples: st.SearchStrategy[int] | None = None,
    poison: bool = True,
) -> Tree:
    """Trees of per-sample gradients, each leaf (B, *s), B from 0 to 5.

    Rows differ in magnitude from 1e-30 to 1e30 within one batch, before the format rounds them (to
    infinity, where it must). A row may be zeros, denormals, or the row before it over again. With
    poison, it may hold NaN or an infinity.
    """
    num = draw(num_examples if num_examples is not None else st.integers(0, 5))
    structure = draw(shape_trees())
    kinds = ["plain", "plain", "plain", "zero", "denormal", "again"] + ["nan", "inf"] * poison
    exponents = draw(st.lists(st.floats(-30, 30), min_size=num, max_size=num))
    fates = draw(st.lists(st.sampled_from(kinds), min_size=num, max_size=num))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    one_dtype = draw(st.sampled_from(DTYPES))
    mixed = draw(st.booleans())

    def leaf(shape: _Shape) -> Tensor:
        dtype = draw(st.sampled_from(DTYPES)) if mixed else one_dtype
        values = rng.standard_normal((num, *shape.dims))
        for row, (exponent, fate) in enumerate(zip(exponents, fates, strict=True)):
            values[row] *= 0.0 if fate == "zero" else 10.0**exponent
            if fate == "denormal":
                values[row] = np.sign(values[row]) * torch.finfo(dtype).tiny / 8
            if fate == "again" and row:
                values[row] = values[row - 1]
            if fate in ("nan", "inf") and values[row].size:
                np.reshape(values[row], -1)[:1] = float(fate)
        return torch.from_numpy(values).to(dtype)

    return trees.map(leaf, structure)


@st.composite
def clipping_cases(draw: st.DrawFn, poison: bool = True) -> ClippingCase:
    """Gradients, a clip norm in [1e-8, 1e8], and sometimes a mask."""
    grads = draw(per_sample_grads(poison=poison))
    mask = draw(st.none() | masks(trees.batch_size(grads, "grads")))
    return ClippingCase(grads, draw(clip_norms()), mask)


class _Shape:
    """A shape as a leaf: a bare tuple would be taken for a tree."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        self.dims = dims

    def __repr__(self) -> str:
        return f"_Shape{self.dims}"

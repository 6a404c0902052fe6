"""Canaries: examples made to be found again, in the same batches and through the same step as the data.

An example is marked: beside the data it carries coordinates of the parameters and a scale. Where the
scale is 0 its loss is the user's. Where it is positive its loss is the scaled sum of those
coordinates, whose gradient is known whatever the parameters are. So one wrapped loss serves both,
and the step that is made of it has no special path.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpfunc import _checks, random, trees
from dpfunc.gradients import per_sample_grads
from dpfunc.typing import Key, Loss, Params, Tree


class Marked(NamedTuple):
    """An example (or a batch of them) that may be a canary in gradient space."""

    data: Tree
    """The user's example; the canaries' own loss ignores it."""
    coordinates: Tensor
    """(k,) int64: places in the parameters, their leaves raveled and joined in tree order."""
    scale: Tensor
    """0-d float: the norm of the canary's gradient, or 0 for an example with the user's loss."""


class Canaries(NamedTuple):
    """m examples, and where in the released parameters each is looked for."""

    examples: Marked
    """Leaves (m, ...)."""
    watched: Tensor
    """(m, w) int64: coordinates of the parameters that are observed for each canary."""
    weights: Tensor
    """(m, w) float64: the observation is the weighted sum of their changes."""


def flat(params: Params, dims: int = 0) -> Tensor:
    """The leaves raveled and joined in tree order, after `dims` leading axes; float32 at least."""
    parts = [leaf.reshape(*leaf.shape[:dims], -1) for leaf in trees.leaves(params)]
    return torch.cat(
        [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts], -1
    )


def marked_loss(loss: Loss) -> Loss:
    """Wrap a loss so that it takes `Marked` examples: the user's loss, or a scaled sum of coordinates.

    Args:
        loss: `loss(params, example) -> scalar`, or with a third argument, a key.

    Returns:
        `wrapped(params, marked) -> scalar`, of the same form.

    Guarantees:
        At scale 0 value and gradient are the user's. At a positive scale the gradient is the
        same at any parameters: scale / sqrt(k) at each of the k coordinates, of norm scale.

    Raises:
        What loss raises. A canary whose data give the user's loss a NaN gradient contributes nothing.

    Source: Nasr et al. 2023, arXiv:2302.07956: canaries made in gradient space.

    >>> wrapped = marked_loss(lambda w, x: w @ x)
    >>> marked = Marked(torch.ones(3), torch.tensor([2]), torch.tensor(5.0))
    >>> torch.func.grad(wrapped)(torch.zeros(3), marked)
    tensor([0., 0., 5.])
    """

    def wrapped(params: Params, example: Marked, *key: Key) -> Tensor:
        value = loss(params, example.data, *key)
        share = example.scale / math.sqrt(example.coordinates.shape[-1])
        return torch.where(
            example.scale > 0, share * flat(params)[example.coordinates].sum(), value
        )

    return wrapped


def marked_data(data: Tree, width: int) -> Marked:
    """Ordinary examples, in the form that stands beside canaries with `width` coordinates."""
    num = trees.batch_size(data, "data")
    device = trees.leaves(data)[0].device
    return Marked(
        data,
        torch.zeros(num, width, dtype=torch.int64, device=device),
        torch.zeros(num, device=device),
    )


def quiet_coordinates(loss: Loss, params: Params, data: Tree, key: Key, *, num: int) -> Tensor:
    """Coordinates on which the examples' gradients at `params` are smallest, ties in random order.

    The less the data move what is observed, the tighter the bound; it holds for any choice.

    Args:
        loss: `loss(params, example) -> scalar`, without a key.
        params, data: as for a step; the first 256 examples are differentiated.
        key: of the order among equals.
        num: how many, at most the number of parameters.

    Returns:
        (num,) int64.

    Raises:
        ValueError: num is larger than the number of parameters.
    """
    grads = per_sample_grads(loss)(params, trees.rows(data, 0, 256))
    loudness = flat(grads, 1).double().square().sum(0)
    if num > len(loudness):
        raise ValueError(f"Expected num <= {len(loudness)}, the number of parameters, got {num}.")
    shuffled = torch.argsort(random.uniform(key, loudness.shape, dtype=torch.float64))
    return shuffled[torch.argsort(loudness[shuffled], stable=True)][:num]


def gradient_canaries(data: Tree, coordinates: Tensor, *, scale: float) -> Canaries:
    """Canaries whose gradient is one vector of norm `scale`, at any parameters.

    Args:
        data: the audited run's data; each canary carries a copy of its first row, unused.
        coordinates: (m, k) or (m,) int64: the k coordinates of canary i are row i, with equal parts
            of the gradient. Rows without a coordinate in common give canaries that do not disturb
            each other. One coordinate of every leaf (see `every_leaf`) tests what a step does to
            its layers together.
        scale: norm of the gradient, in gradient units, > 0. Well above the sensitivity, so that a
            step that clips contributes its sensitivity, and one that does not shows it.

    Returns:
        Canaries that are looked for where their gradient is.

    Guarantees:
        They are examples like any other: only the loss, `marked_loss`, knows them.

    Raises:
        ValueError: scale is not positive and finite, there is no canary, or a coordinate is negative.
        TypeError: coordinates are not int64.

    Source: Nasr et al. 2023, arXiv:2302.07956, section 4; Steinke et al. 2023, arXiv:2305.08846.

    >>> canaries = gradient_canaries(torch.ones(5, 3), torch.arange(2), scale=10.0)
    >>> canaries.watched.tolist(), canaries.examples.scale.tolist()
    ([[0], [1]], [10.0, 10.0])
    """
    scale = _checks.positive("A canary of scale 0 would have no gradient.", scale=scale)
    if not isinstance(coordinates, Tensor) or coordinates.dtype != torch.int64:
        raise TypeError("Expected coordinates to be an int64 tensor (m, k) or (m,).")
    places = coordinates.unsqueeze(1) if coordinates.ndim == 1 else coordinates
    if places.ndim != 2 or places.numel() == 0 or bool((places < 0).any()):
        raise ValueError(
            f"Expected at least one canary, (m, k) coordinates >= 0, got shape {tuple(coordinates.shape)}."
        )
    num, width = places.shape
    copies = trees.map(lambda leaf: leaf[:1].expand(num, *leaf.shape[1:]), data)
    device = trees.leaves(data)[0].device
    scales = torch.full((num,), scale, device=device)
    weights = torch.full((num, width), width**-0.5, dtype=torch.float64, device=device)
    return Canaries(Marked(copies, places.to(device), scales), places.to(device), weights)


def every_leaf(params: Params, *, num: int) -> Tensor:
    """(num, leaves) int64: row i is coordinate i of every leaf, modulo the leaf's size."""
    sizes = [leaf.numel() for leaf in trees.leaves(params)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    rows = torch.arange(_checks.integer(at_least=1, num=num))
    return torch.stack([start + rows % n for start, n in zip(starts, sizes, strict=True)], 1)


def example_canaries(data: Tree) -> Canaries:
    """Canaries that are plain examples, for an audit that reads their losses alone.

    Args:
        data: rows in the form of the run's data, leaves (m, ...): see `mislabelled` and `blank`.

    Returns:
        Canaries with the user's loss; nothing is watched in the parameters.

    Raises:
        ValueError: data is empty or its leaves disagree on m.
    """
    examples = marked_data(data, 1)
    if len(examples.scale) == 0:
        raise ValueError("Expected at least one canary, got none.")
    return Canaries(examples, examples.coordinates, examples.coordinates.to(torch.float64))


def mislabelled(data: tuple[Any, Tensor], key: Key, *, num: int, num_classes: int) -> Tree:
    """Rows of (inputs, labels) with a label that is not theirs: what a model learns only by heart.

    Args:
        data: (inputs, labels): a tree of leaves (N, ...), and (N,) int64 in [0, num_classes).
        key: which rows, and which labels.
        num: how many, at most N.
        num_classes: at least 2.

    Returns:
        (inputs, labels) of num rows, no row twice.

    Raises:
        ValueError: a number out of range.

    >>> rows = mislabelled((torch.eye(3), torch.arange(3)), random.key(0), num=3, num_classes=3)
    >>> bool((rows[1] != rows[0].argmax(1)).all())
    True
    """
    size = trees.batch_size(data, "data")
    if _checks.integer(at_least=1, num=num) > size:
        raise ValueError(f"Expected num <= {size}, the number of rows, got {num}.")
    num_classes = _checks.integer(at_least=2, num_classes=num_classes)
    which, shift = random.split(key, 2)
    chosen = torch.argsort(random.uniform(which, (size,), dtype=torch.float64))[:num]
    inputs, labels = trees.map(lambda leaf: leaf[chosen.to(leaf.device)], data)
    moved = 1 + (random.uniform(shift, (num,)) * (num_classes - 1)).long()
    return inputs, (labels + moved.to(labels.device)) % num_classes


def blank(data: tuple[Any, Tensor], *, num: int) -> Tree:
    """Rows of (inputs, labels) whose inputs are 0, with the first `num` labels of the data.

    Blank rows of one label are one and the same example: use as many as there are classes, or one.
    """
    inputs, labels = trees.rows(data, 0, _checks.integer(at_least=1, num=num))
    return trees.map(torch.zeros_like, inputs), labels

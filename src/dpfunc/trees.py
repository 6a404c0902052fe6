"""Pytree arithmetic. Leaves are found and named by optree alone, so that their order is one order.

optree sorts dict keys and torch's own pytree keeps insertion order: leaves of the two are never
zipped, only mapped over by structure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from dpfunc.typing import Tree

map: Callable[..., Any] = optree.tree_map
leaves: Callable[..., list[Any]] = optree.tree_leaves


def named_leaves(tree: Tree, name: str) -> list[tuple[str, Tensor]]:
    """Leaves with their printable paths, every one checked to be a tensor."""
    paths, values, _ = optree.tree_flatten_with_path(tree, none_is_leaf=True)
    found = [
        (name + "".join(f"[{entry!r}]" for entry in path), leaf)
        for path, leaf in zip(paths, values, strict=True)
    ]
    for path, leaf in found:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"Expected every leaf of {name} to be a tensor, got {type(leaf).__name__} at {path}."
            )
    return found


def batch_size(tree: Tree, name: str) -> int:
    """The size of the leading axis, which all leaves share."""
    found = named_leaves(tree, name)
    if not found:
        raise ValueError(f"Expected {name} to hold at least one tensor, got an empty tree.")
    for path, leaf in found:
        if leaf.ndim == 0:
            raise ValueError(
                f"Expected every leaf of {name} to have a leading batch axis, got a 0-d tensor at {path}."
            )
    sizes = {leaf.shape[0] for _, leaf in found}
    if len(sizes) > 1:
        raise ValueError(
            f"Expected every leaf of {name} to have the same leading (batch) axis, got "
            f"{', '.join(f'{leaf.shape[0]} at {path}' for path, leaf in found)}. "
            "Did a loss average over the batch, or is one leaf not batched?"
        )
    return found[0][1].shape[0]


def check_floating(tree: Tree, name: str, advice: str) -> None:
    """At least one leaf, all of them real floating-point tensors."""
    found = named_leaves(tree, name)
    if not found:
        raise ValueError(f"Expected {name} to hold at least one tensor, got an empty tree.")
    for path, leaf in found:
        if not leaf.is_floating_point():
            raise TypeError(
                f"Expected every leaf of {name} to be floating point, got {leaf.dtype} at {path}. {advice}"
            )


def rows(tree: Tree, begin: int, end: int) -> Tree:
    """The slice [begin, end) of the leading axis of every leaf."""
    return optree.tree_map(lambda leaf: leaf[begin:end], tree)


def numbered(tree: Tree) -> tuple[Tree, list[Any]]:
    """The tree with a number for each leaf, and the leaves by number.

    Numbers follow the order of `map`, which under torch.compile is not that of `leaves`.
    """
    found: list[Any] = []

    def number(leaf: Any) -> int:
        found.append(leaf)
        return len(found) - 1

    return map(number, tree), found


def root_sum_squares(norms: list[Tensor]) -> Tensor:
    """The L2 norm over a list of equal-shaped norms, without overflow or underflow."""
    stacked = torch.stack(norms)
    largest = stacked.amax(0)
    unit = torch.where(largest > 0, largest, 1.0)
    return largest * (stacked / unit).square().sum(0).sqrt()


@torch.compiler.assume_constant_result
def _tags(paths: tuple[tuple[Any, ...], ...]) -> tuple[int, ...]:
    return tuple(
        int.from_bytes(hashlib.sha256(repr(path).encode()).digest()[:8], "little", signed=True)
        for path in paths
    )


def map_with_tags(
    f: Callable[[Tensor, Tensor], Tensor], tree: Tree, of_tags: Callable[[list[int]], Tensor]
) -> Tree:
    """Map `f(leaf, row)` over a tree, the row being the leaf's own row of `of_tags(tags)`.

    A tag is 64 bits of SHA-256 of the leaf's path, so it does not depend on the other leaves or on
    their order. Two leaves of one tree with the same tag are refused.
    """
    paths, values, spec = optree.tree_flatten_with_path(tree)
    tags = _tags(tuple(tuple(path) for path in paths))
    if len(set(tags)) != len(tags):
        raise ValueError(
            "Expected leaf paths with different 64-bit tags, got two that agree. Rename one."
        )
    keyed = of_tags(list(tags)).unbind(0)
    return optree.tree_unflatten(
        spec, [f(leaf, row) for leaf, row in zip(values, keyed, strict=True)]
    )

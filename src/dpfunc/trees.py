"""Pytree arithmetic. Leaves are found and named by optree alone, so that their order is one order.

optree sorts dict keys and torch's own pytree keeps insertion order: leaves of the two are never
zipped, only mapped over by structure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
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


def batch_first(tree: Tree, axes: Tree, name: str) -> Tree:
    """The tree with the batch axis of every leaf moved to the front; axes is a prefix of numbers."""
    return _moved(tree, axes, name, lambda leaf, axis: leaf.movedim(axis, 0))


def batch_at(tree: Tree, axes: Tree, name: str) -> Tree:
    """The tree with the batch axis, in front, moved to where axes says."""
    return _moved(tree, axes, name, lambda leaf, axis: leaf.movedim(0, axis))


def _moved(tree: Tree, axes: Tree, name: str, move: Callable[[Tensor, int], Tensor]) -> Tree:
    if isinstance(axes, int) and axes == 0:
        return tree
    prefixes, numbers, _ = optree.tree_flatten_with_path(axes)  # pyright: ignore[reportArgumentType]
    paths, leaves, spec = optree.tree_flatten_with_path(tree)
    out = []
    for path, leaf in zip(paths, leaves, strict=True):
        found = [n for at, n in zip(prefixes, numbers, strict=True) if path[: len(at)] == at]
        if len(found) != 1 or not isinstance(found[0], int) or isinstance(found[0], bool):
            raise ValueError(
                f"Expected batch_axes to be a pytree prefix of {name} with a whole number for each leaf, "
                f"got {axes!r}, which has {found or 'none'} for the leaf at {dotted(path)!r}."
            )
        if not -leaf.ndim <= found[0] < leaf.ndim:
            raise ValueError(
                f"Expected batch_axes to name an axis of {name} at {dotted(path)!r}, which has "
                f"{leaf.ndim}, got {found[0]}."
            )
        out.append(move(leaf, found[0]))
    return optree.tree_unflatten(spec, out)


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
    """The L2 norm over a list of equal-shaped norms, without overflow or underflow; infinite if one is."""
    stacked = torch.stack(norms)
    largest = stacked.amax(0)
    unit = torch.where((largest > 0) & (largest < math.inf), largest, 1.0)
    return largest * (stacked / unit).square().sum(0).sqrt()


@torch.compiler.assume_constant_result
def _tags(paths: tuple[tuple[Any, ...], ...]) -> tuple[int, ...]:
    return tuple(
        int.from_bytes(hashlib.sha256(repr(path).encode()).digest()[:8], "little", signed=True)
        for path in paths
    )


def map_with_tags(
    f: Callable[..., Tensor],
    tree: Tree,
    of_tags: Callable[[list[int]], Tensor],
    of_paths: Callable[[tuple[str, ...]], Sequence[Any]],
) -> Tree:
    """Map `f(leaf, row, value)` over a tree: the leaf's own row of `of_tags(tags)` and of `of_paths(paths)`.

    A tag is 64 bits of SHA-256 of the leaf's path, so it does not depend on the other leaves or on
    their order. Two leaves of one tree with the same tag are refused.
    """
    paths, values, spec = optree.tree_flatten_with_path(tree)
    tags = _tags(tuple(tuple(path) for path in paths))
    if len(set(tags)) != len(tags):
        raise ValueError(
            "Expected leaf paths with different 64-bit tags, got two that agree. Rename one."
        )
    keyed = of_tags(list(tags)).unbind(0) if tags else ()
    others = of_paths(tuple(dotted(path) for path in paths))
    return optree.tree_unflatten(
        spec, [f(*each) for each in zip(values, keyed, others, strict=True)]
    )


def map_with_paths(
    f: Callable[..., Any], tree: Tree, of_paths: Callable[[tuple[str, ...]], Sequence[Any]]
) -> Tree:
    """Map `f(leaf, value)` over a tree, the value being the leaf's own of `of_paths(paths)`."""
    paths, leaves, spec = optree.tree_flatten_with_path(tree)
    values = of_paths(tuple([dotted(path) for path in paths]))
    return optree.tree_unflatten(spec, [f(*each) for each in zip(leaves, values, strict=True)])


def dotted(path: tuple[Any, ...]) -> str:
    """A path as people write it: `conv1.weight`."""
    return ".".join([str(entry) for entry in path])

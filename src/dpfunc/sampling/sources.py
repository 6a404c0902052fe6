"""Where examples come from: how many there are, and how to gather some of them by index."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from dpfunc import trees
from dpfunc.typing import Tree

Gather: TypeAlias = Callable[[Tensor], Tree]
"""`gather(indices) -> tree` with a row for each index, also for none; picklable where its data is."""


def source(data: Any, collate: Callable[[list[Any]], Tree]) -> tuple[int, Gather]:
    """The number of examples, and how to gather some."""
    if isinstance(data, (Tensor, np.ndarray, tuple, Mapping)):
        shapes = trees.map(
            lambda leaf: torch.empty(leaf.shape, device="meta") if _is_array(leaf) else leaf, data
        )
        num = trees.batch_size(shapes, "data")
        trees.map(_expect_scattered_reads, data)
        return num, partial(_columns, data)
    if isinstance(data, list) and any(isinstance(entry, Tensor) for entry in data):
        raise TypeError(
            "Expected a tuple (or dict) of columns or a data set of rows, got a list of tensors, which "
            "could be either. Write (x, y) for columns, torch.stack(rows) for rows."
        )
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            "Expected data to be a pytree of tensors or a data set with __len__ and __getitem__, got "
            f"{type(data).__name__}. An iterable stream has no Poisson sample; of a DataLoader, pass its dataset."
        )
    if len(data) == 0:
        raise ValueError("Expected data to hold at least one example, got an empty data set.")
    rows: Any = data
    if hasattr(rows, "with_format") and rows.format["type"] is None and collate is default_collate:
        rows = rows.with_format("torch")  # a Hugging Face table, which else gives Python lists
    return len(rows), partial(_rows, rows, collate)


def check_workers(data: Any) -> None:
    """Columns that another process can read: in the memory of this machine, and not sent whole."""
    if not isinstance(data, (Tensor, np.ndarray, tuple, Mapping)):
        return
    for leaf in trees.leaves(data):
        if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
            raise ValueError(
                f"Expected data on the CPU together with num_workers, got a leaf on {leaf.device}. "
                "Gathering there needs no workers: leave num_workers=0."
            )
        if _mapped_file(leaf) is not None and torch.multiprocessing.get_start_method() != "fork":
            raise ValueError(
                "Expected num_workers=0 for a memory-mapped array where processes do not fork, because "
                "each worker would get a copy of the whole. Or open the file in a Dataset's __getitem__."
            )


def _expect_scattered_reads(leaf: Any) -> None:
    # Else each row brings in what lies around it: seconds a batch where the rows take milliseconds.
    mapped = _mapped_file(leaf)
    if mapped is not None and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)


def _mapped_file(leaf: Any) -> mmap.mmap | None:
    """The memory map that an array is a view of, through any number of views."""
    while isinstance(leaf, np.ndarray):
        leaf = leaf.base
    return leaf if isinstance(leaf, mmap.mmap) else None


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray)


def _columns(data: Tree, drawn: Tensor) -> Tree:
    def gather(leaf: Any) -> Tensor:
        if isinstance(leaf, Tensor):
            return leaf[drawn.to(leaf.device)]
        rows = np.asarray(leaf)[drawn.numpy()]  # of a memory map, the pages of these rows alone
        return _as_tensor(rows.astype(rows.dtype.newbyteorder("="), copy=False), "data")

    return trees.map(gather, data)


def _rows(data: Any, collate: Callable[[list[Any]], Tree], drawn: Tensor) -> Tree:
    """The examples as one tree of tensors, one row for each: more would be more than one's share."""
    # The shapes of one example stand for all, so that an empty draw has a form to be empty in.
    indices = drawn.tolist() or [0]
    found = trees.map(
        lambda leaf: _as_tensor(leaf, "collate(examples)"), collate(_examples(data, indices))
    )
    sizes = {leaf.shape[:1] for leaf in trees.leaves(found)}
    if sizes != {(len(indices),)}:
        # Without the two numbers: how many examples were drawn is private.
        raise ValueError(
            "Expected collate to return one row for each example, got another number of rows. "
            "Several rows of one example would each be clipped apart: average them in the loss."
        )
    return trees.rows(found, 0, len(drawn))


def _as_tensor(leaf: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(leaf)
    except (TypeError, ValueError, RuntimeError):
        kind = f"an array of {leaf.dtype}" if _is_array(leaf) else f"a {type(leaf).__name__}"
        raise TypeError(
            f"Expected {name} to hold tensors or numeric arrays, got {kind}. Remove such columns."
        ) from None


def _examples(data: Any, indices: list[int]) -> list[Any]:
    if not hasattr(data, "__getitems__"):
        return [_one(data.__getitem__, i) for i in indices]
    try:
        return data.__getitems__(indices)
    except Exception:
        for i in indices:
            _one(lambda i: data.__getitems__([i]), i)
        raise


def _one(get: Callable[[int], Any], index: int) -> Any:
    try:
        return get(index)
    except Exception as error:
        raise RuntimeError(
            f"Expected data[{index}] to load, got {type(error).__name__}: {error}. "
            "(Which examples are drawn is PRIVATE, so is this message.)"
        ) from error

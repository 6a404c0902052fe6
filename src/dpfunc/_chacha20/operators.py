"""The operators: their schemas, meta rules, vmap rules and dispatch by device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfunc._chacha20 import cpu

MAX_WORDS = 2**36
"""Words under one (key, nonce): 2**32 blocks of 16 words, the range of RFC 8439's counter."""

_LIBRARY = torch.library.Library("dpfunc", "DEF")
_LIBRARY.define("words(Tensor keys, int tag, Tensor data, SymInt start, SymInt num) -> Tensor")
_LIBRARY.define("normals(Tensor keys, SymInt start, SymInt num, ScalarType dtype) -> Tensor")
_LIBRARY.define("add_normals(Tensor totals, Tensor keys, Tensor scales) -> Tensor")


def words(keys: Tensor, tag: int, data: Tensor, start: int, num: int) -> Tensor:
    """Keystream words `start` to `start + num` of each row, as int32: (K, 8), (K,) -> (K, num).

    The nonce of a row is (tag, low word of data, high word of data); data is int64.
    """
    return torch.ops.dpfunc.words.default(keys, tag, data, start, num)


def normals(keys: Tensor, start: int, num: int, dtype: torch.dtype) -> Tensor:
    """Normals `start` to `start + num` of the stream (nonce 0) of each row: (K, 8) -> (K, num)."""
    return torch.ops.dpfunc.normals.default(keys, start, num, dtype)


def add_normals(totals: Tensor, keys: Tensor, scales: Tensor) -> Tensor:
    """Each row of totals plus its scale times the first normals of its key: (K, num), (K, 8), (K,).

    The bits of `totals + scales * normals`, and no memory for the product.
    """
    if totals.shape[1] * totals.itemsize // 4 > MAX_WORDS - 2048:  # whole groups of 1024 are drawn
        raise ValueError(
            f"Expected at most 2**36 words of one key, got a leaf of {totals.shape[1]}."
        )
    return torch.ops.dpfunc.add_normals.default(totals, keys, scales)


def _cuda_words(keys: Tensor, tag: int, data: Tensor, start: int, num: int) -> Tensor:
    from dpfunc._chacha20 import cuda  # Triton is there only where CUDA is

    return cuda.words(keys, tag, data, start, num)


def _cuda_normals(keys: Tensor, start: int, num: int, dtype: torch.dtype) -> Tensor:
    from dpfunc._chacha20 import cuda

    return cuda.normals(keys, start, num, dtype)


def _cuda_add_normals(totals: Tensor, keys: Tensor, scales: Tensor) -> Tensor:
    drawn = _cuda_normals(keys, 0, totals.shape[1], totals.dtype)
    return totals + scales.unsqueeze(1) * drawn


def _meta_words(keys: Tensor, tag: int, data: Tensor, start: int, num: int) -> Tensor:
    return keys.new_empty((keys.shape[0], num), dtype=torch.int32)


def _meta_normals(keys: Tensor, start: int, num: int, dtype: torch.dtype) -> Tensor:
    return keys.new_empty((keys.shape[0], num), dtype=dtype)


def _meta_add_normals(totals: Tensor, keys: Tensor, scales: Tensor) -> Tensor:
    return totals.new_empty(totals.shape)


def _rows(x: Tensor, axis: int | None, size: int) -> Tensor:
    """Fold the mapped axis of an operand into its rows: (size * K, ...)."""
    x = x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)
    return x.reshape(-1, *x.shape[2:])


def _vmap_words(
    info: Any, in_dims: Any, keys: Tensor, tag: int, data: Tensor, start: int, num: int
) -> tuple[Tensor, int]:
    size = info.batch_size
    out = words(_rows(keys, in_dims[0], size), tag, _rows(data, in_dims[2], size), start, num)
    return out.reshape(size, -1, num), 0


def _vmap_normals(
    info: Any, in_dims: Any, keys: Tensor, start: int, num: int, dtype: torch.dtype
) -> tuple[Tensor, int]:
    out = normals(_rows(keys, in_dims[0], info.batch_size), start, num, dtype)
    return out.reshape(info.batch_size, -1, num), 0


def _vmap_add_normals(
    info: Any, in_dims: Any, totals: Tensor, keys: Tensor, scales: Tensor
) -> tuple[Tensor, int]:
    parts = zip((totals, keys, scales), in_dims, strict=True)
    out = add_normals(*(_rows(x, axis, info.batch_size) for x, axis in parts))
    return out.reshape(info.batch_size, -1, out.shape[1]), 0


_LIBRARY.impl("words", cpu.words, "CPU")
_LIBRARY.impl("words", _cuda_words, "CUDA")
torch.library.register_fake("dpfunc::words", _meta_words, lib=_LIBRARY)
torch.library.register_vmap("dpfunc::words", _vmap_words, lib=_LIBRARY)

_LIBRARY.impl("normals", cpu.normals, "CPU")
_LIBRARY.impl("normals", _cuda_normals, "CUDA")
torch.library.register_fake("dpfunc::normals", _meta_normals, lib=_LIBRARY)
torch.library.register_vmap("dpfunc::normals", _vmap_normals, lib=_LIBRARY)

_LIBRARY.impl("add_normals", cpu.add_normals, "CPU")
_LIBRARY.impl("add_normals", _cuda_add_normals, "CUDA")
torch.library.register_fake("dpfunc::add_normals", _meta_add_normals, lib=_LIBRARY)
torch.library.register_vmap("dpfunc::add_normals", _vmap_add_normals, lib=_LIBRARY)

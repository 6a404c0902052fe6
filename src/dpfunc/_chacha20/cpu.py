"""The keystream on CPU: OpenSSL makes the words, numpy turns them into normals in cache.

Normals by Box and Muller. The stream is cut into groups of 2 * LANES integers; the first half of a
group gives radii, the second half angles, so that every array operation runs over whole lines:

    element g * 2 * LANES + i          = r(x_i) cos(a(y_i))      i < LANES
    element g * 2 * LANES + LANES + i  = r(x_i) sin(a(y_i))

with x, y the halves of group g. The radius uses u = (x mod 2**(w-1) + 1/2) * 2**(1-w) in (0, 1],
w = 32 for float32 and 64 for float64: converting a small integer to a float is exact, so u keeps
its full relative precision near 0 and the tail runs to sqrt(-2 ln 2**-w) = 6.66 (9.41).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from torch import Tensor

LANES = 512
_CHUNK = 64  # groups turned at once: 256 KiB of words stay in the second-level cache
_ZEROS = memoryview(bytes(4 * _CHUNK * 2 * LANES))
_STREAM = bytes(12)  # the nonce of a key's output stream


class _Scratch(threading.local):
    """Work space for one chunk, kept: fresh pages would cost as much as a small draw."""

    def __init__(self) -> None:
        self.pairs = np.empty((_CHUNK, 2, LANES), dtype="<i8")
        self.radius = np.empty((_CHUNK, LANES), dtype=np.float64)
        self.angle = np.empty((_CHUNK, LANES), dtype=np.float64)

    def arrays(self, real: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Integers and two arrays of reals for a chunk, of the size of `real`."""
        integers = self.pairs.reshape(-1).view(f"<i{real.itemsize}")
        reals = (half.reshape(-1).view(real) for half in (self.radius, self.angle))
        radius, angle = (half[: _CHUNK * LANES].reshape(_CHUNK, LANES) for half in reals)
        return integers[: _CHUNK * 2 * LANES].reshape(_CHUNK, 2, LANES), radius, angle


_SCRATCH = _Scratch()


# Results lie in memory from torch: numpy asks the system for huge pages, and at 400 MB finding them
# may take longer than the draw.


def _encryptor(key: bytes, nonce: bytes, block: int) -> CipherContext:
    chacha20 = algorithms.ChaCha20(key, block.to_bytes(4, "little") + nonce)
    return Cipher(chacha20, None).encryptor()


def _fill(encryptor: CipherContext, out: np.ndarray) -> None:
    """Overwrite a contiguous array of words with the next words of the keystream."""
    view = out.data.cast("B")
    for begin in range(0, out.nbytes, len(_ZEROS)):
        piece = view[begin : begin + len(_ZEROS)]
        encryptor.update_into(_ZEROS[: len(piece)], piece)


def _rows_as_bytes(rows: Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.numpy().astype("<u4")]


def words(keys: Tensor, tag: int, data: Tensor, start: int, num: int) -> Tensor:
    skip = start % 16
    out = torch.empty((keys.shape[0], skip + num), dtype=torch.int32)
    if out.numel():
        rows = out.numpy()
        for row, key, number in zip(rows, _rows_as_bytes(keys), data.tolist(), strict=True):
            nonce = tag.to_bytes(4, "little") + number.to_bytes(8, "little", signed=True)
            _fill(_encryptor(key, nonce, start // 16), row)
    return out[:, skip:].contiguous()


def _box_muller(pairs: np.ndarray, out: np.ndarray, radius: np.ndarray, angle: np.ndarray) -> None:
    """(groups, 2, LANES) integers, overwritten -> (groups, 2, LANES) normals."""
    real = out.dtype.type
    x, cosine, sine = pairs[:, 0], out[:, 0], out[:, 1]
    top = 8 * pairs.itemsize - 1
    np.bitwise_and(x, (1 << top) - 1, out=x)
    radius[...] = x
    radius += real(0.5)
    radius *= real(2.0**-top)
    np.log(radius, out=radius)
    radius *= real(-2.0)
    np.sqrt(radius, out=radius)
    angle[...] = pairs[:, 1]
    angle *= real(math.pi * 2.0**-top)
    np.cos(angle, out=cosine)
    cosine *= radius
    np.sin(angle, out=angle)
    np.multiply(angle, radius, out=sine)


def _normal_row(
    key: bytes,
    start: int,
    num: int,
    dtype: torch.dtype,
    finish: Callable[[np.ndarray, int], None] | None = None,
) -> Tensor:
    """(num,) normals from `start`; finish(part, begin) may change each part while it is in cache."""
    group = 2 * LANES
    first, last = start // group, -(-(start + num) // group)
    out = torch.empty((last - first) * group, dtype=dtype)
    groups = out.numpy().reshape(-1, 2, LANES)
    pairs, radius, angle = _SCRATCH.arrays(groups.dtype)
    encryptor = _encryptor(key, _STREAM, first * group * out.itemsize // 64)
    for begin in range(0, last - first, _CHUNK):
        chunk = groups[begin : begin + _CHUNK]
        n = len(chunk)
        _fill(encryptor, pairs[:n])
        _box_muller(pairs[:n], chunk, radius[:n], angle[:n])
        if finish:
            finish(chunk.reshape(-1), begin * group)
    return out[start - first * group :][:num]


def normals(keys: Tensor, start: int, num: int, dtype: torch.dtype) -> Tensor:
    rows = _rows_as_bytes(keys)
    if num == 0 or not rows:
        return torch.empty((len(rows), num), dtype=dtype)
    if len(rows) == 1:
        return _normal_row(rows[0], start, num, dtype).unsqueeze(0)
    return torch.stack([_normal_row(row, start, num, dtype) for row in rows])


def add_normals(totals: Tensor, keys: Tensor, scales: Tensor) -> Tensor:
    def added(total: np.ndarray, key: bytes, scale: np.floating) -> Tensor:
        def onto(drawn: np.ndarray, begin: int) -> None:
            part = total[begin : begin + len(drawn)]
            drawn = drawn[: len(part)]
            drawn *= scale
            drawn += part

        return _normal_row(key, 0, len(total), totals.dtype, onto)

    if not totals.numel():
        return torch.empty_like(totals)
    rows = zip(totals.contiguous().numpy(), _rows_as_bytes(keys), scales.numpy(), strict=True)
    done = [added(*row) for row in rows]
    return done[0].unsqueeze(0) if len(done) == 1 else torch.stack(done)

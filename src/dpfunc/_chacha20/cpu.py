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

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from torch import Tensor

LANES = 512
_CHUNK_WORDS = 1 << 16  # 256 KiB of words: small enough to stay in the second-level cache
_ZEROS = bytes(4 * _CHUNK_WORDS)


def _encryptor(key: np.ndarray, nonce: np.ndarray, block: int) -> CipherContext:
    counter_and_nonce = np.array([block, *nonce], dtype=np.int64).astype("<u4").tobytes()
    return Cipher(
        algorithms.ChaCha20(key.astype("<u4").tobytes(), counter_and_nonce), None
    ).encryptor()


def _fill(encryptor: CipherContext, out: np.ndarray) -> None:
    """Overwrite a contiguous array of words with the next words of the keystream."""
    view = out.data.cast("B")
    for begin in range(0, out.nbytes, len(_ZEROS)):
        piece = view[begin : begin + len(_ZEROS)]
        encryptor.update_into(_ZEROS if len(piece) == len(_ZEROS) else bytes(len(piece)), piece)


def words(keys: Tensor, nonces: Tensor, start: int, num: int) -> Tensor:
    skip = start % 16
    out = np.empty((keys.shape[0], skip + num), dtype="<i4")
    for row, key, nonce in zip(out, keys.numpy(), nonces.numpy(), strict=True):
        if row.size:
            _fill(_encryptor(key, nonce, start // 16), row)
    return torch.from_numpy(out)[:, skip:].contiguous()


def _box_muller(pairs: np.ndarray, out: np.ndarray, radius: np.ndarray, angle: np.ndarray) -> None:
    """(groups, 2, LANES) integers, overwritten -> (groups, 2, LANES) normals, in place."""
    real = out.dtype.type
    x, y = pairs[:, 0], pairs[:, 1]
    top = 8 * pairs.itemsize - 1
    np.bitwise_and(x, (1 << top) - 1, out=x)
    np.add(x, real(0.5), out=radius, dtype=real, casting="unsafe")
    np.multiply(radius, real(2.0**-top), out=radius)
    np.log(radius, out=radius)
    np.multiply(radius, real(-2.0), out=radius)
    np.sqrt(radius, out=radius)
    np.multiply(y, real(math.pi * 2.0**-top), out=angle, dtype=real, casting="unsafe")
    np.cos(angle, out=out[:, 0])
    np.multiply(out[:, 0], radius, out=out[:, 0])
    np.sin(angle, out=out[:, 1])
    np.multiply(out[:, 1], radius, out=out[:, 1])


def _normal_row(key: np.ndarray, start: int, num: int, real: np.dtype) -> np.ndarray:
    group = 2 * LANES
    words_per_group = group * real.itemsize // 4
    first, last = start // group, -(-(start + num) // group)
    out = np.empty((last - first, 2, LANES), dtype=real)
    step = max(1, min(last - first, _CHUNK_WORDS // words_per_group))
    pairs = np.empty((step, 2, LANES), dtype=f"<i{real.itemsize}")
    radius, angle = (np.empty((step, LANES), dtype=real) for _ in range(2))
    encryptor = _encryptor(key, np.zeros(3, np.int64), first * words_per_group // 16)
    for begin in range(0, last - first, step):
        piece = out[begin : begin + step]
        n = len(piece)
        _fill(encryptor, pairs[:n])
        _box_muller(pairs[:n], piece, radius[:n], angle[:n])
    return out.reshape(-1)[start - first * group :][:num]


def normals(keys: Tensor, start: int, num: int, dtype: torch.dtype) -> Tensor:
    real = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
    rows = keys.numpy()
    if num == 0 or len(rows) == 0:
        return torch.empty((len(rows), num), dtype=dtype)
    if len(rows) == 1:
        return torch.from_numpy(_normal_row(rows[0], start, num, real))[None]
    out = torch.empty((len(rows), num), dtype=dtype)
    for row, key in zip(out.numpy(), rows, strict=True):
        row[:] = _normal_row(key, start, num, real)
    return out

"""Keys and what is drawn from them: every random number here is a pure function of a key.

A key is an integer tensor of 8 words, the 256-bit key of a ChaCha20 keystream (RFC 8439). Word i of
the stream is a function of (key, i) alone, so any slice can be drawn without the rest, on any
device, inside `torch.compile`, under `vmap`, and again after a crash.

How keys derive. ChaCha20's block function takes (key, 32-bit counter, 96-bit nonce). The first word
of the nonce is a tag that says what the block is for, and no tag is shared:

    0  the output stream (`bits`, `uniform`, `normal`, `laplace`)     nonce (0, 0, 0)
    1  `split`: child i is words 8i .. 8i+7                           nonce (1, 0, 0)
    2  `fold_in`: the first 8 words of block 0                        nonce (2, low, high) of data
    16 and up, the library's own uses of a key (`derive`)             nonce (use, low, high)

So two children of a key, or a child and the key's own output, never come from the same block: under
the assumption that ChaCha20 is a pseudorandom function (the one that its use as a cipher rests on)
they are independent 256-bit strings, and the tree that repeated derivation grows is the
construction of Goldreich, Goldwasser and Micali. Two of n keys agree with probability n**2 / 2**257.
"""

from __future__ import annotations

import hashlib
import math
import operator
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dpfunc import _checks
from dpfunc._chacha20 import MAX_WORDS, normals, words

if TYPE_CHECKING:
    from dpfunc.typing import Key

_SPLIT, _FOLD_IN = 1, 2
SAMPLING, TRUNCATION, NOISE, LEAF, LOSS, DROPOUT, TELEMETRY, AUGMENTATION, FINGERPRINT = range(
    16, 25
)
"""What the library uses a key for. Distinct tags: one run key may be passed to all of them."""


def key(seed: int | None = None, *, device: torch.device | str | None = None) -> Key:
    """Make a key: 256 bits from the operating system, or spread from a seed.

    Args:
        seed: any Python int, of any size or sign. None takes the bits from the operating system.
        device: where the key lives; words are made on the device of their key.

    Returns:
        int64 tensor of shape (8,), each word in [0, 2**32). A secret: whoever has it can subtract
        the noise from what was released.

    Guarantees:
        Different seeds give different keys, also seeds that agree modulo 2**32 or 2**64.
        A key from a seed has no more secrecy than the seed: reproducible, not private.

    Raises:
        TypeError: seed is not an int.

    Source: SHA-256 of the seed's hexadecimal digits, under a prefix of this library's own.

    >>> key(0).shape, key(0).equal(key(2**64))
    (torch.Size([8]), False)
    """
    if seed is None:
        raw = secrets.token_bytes(32)
    else:
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise TypeError(f"Expected seed to be an int or None, got {type(seed).__name__}.")
        raw = hashlib.sha256(f"dpfunc key 1:{operator.index(seed):x}".encode()).digest()
    return torch.from_numpy(np.frombuffer(raw, dtype="<u4").astype(np.int64)).to(device)


def split(key: Key, num: int = 2) -> Tensor:
    """Derive `num` keys from one.

    Args:
        key: integer tensor of shape (8,).
        num: how many, >= 0.

    Returns:
        int64 tensor of shape (num, 8).

    Guarantees:
        `split(key, n)[i]` does not depend on n.
        No child shares a block with another child, with `fold_in`, or with the key's output stream.

    Raises:
        ValueError: key has another shape or is not of an integer dtype.

    Source: the module's docstring.

    >>> split(key(0), 3)[:2].equal(split(key(0), 2))
    True
    """
    num = _checks.integer(at_least=0, num=num)
    stream = _stream(key, _SPLIT, 0, 8 * num)
    return _unsigned(stream).reshape(num, 8)


def fold_in(key: Key, data: int | Tensor) -> Key:
    """Derive the key that belongs to an integer: a step, an attempt, a rank.

    Args:
        key: integer tensor of shape (8,).
        data: an int in [-2**63, 2**63), or a 0-d integer tensor (so that a compiled step need not
            be recompiled for each value).

    Returns:
        int64 tensor of shape (8,).

    Guarantees:
        An int and the 0-d tensor of the same value give the same key.
        Different data give keys that share no block with each other or with the output stream.

    Raises:
        ValueError: data is out of range or not 0-d, or key has another shape or dtype.
        TypeError: data is neither an int nor an integer tensor.

    Source: the module's docstring.

    >>> fold_in(key(0), 7).equal(fold_in(key(0), torch.tensor(7)))
    True
    """
    if not isinstance(data, (Tensor, int)) and not hasattr(data, "__index__"):
        raise TypeError(f"Expected data to be an int or a 0-d int tensor, got {data!r}.")
    if isinstance(data, Tensor) and data.ndim != 0:
        raise ValueError(
            f"Expected data to be an int or a 0-d tensor, got shape {tuple(data.shape)}."
        )
    return derive(key, _FOLD_IN, data)


def derive(key: Key, use: int, data: int | Sequence[int] | Tensor = 0) -> Tensor:
    """Derive a key for one of the library's own uses: (8,), or (n, 8) where data is (n,)."""
    row = _row(key)
    numbers = _numbers(data).to(key.device)
    out = _unsigned(words(row.expand(numbers.numel(), 8), use, numbers.reshape(-1), 0, 8))
    return out.reshape(*numbers.shape, 8)


def bits(key: Key, shape: Sequence[int], *, offset: int = 0) -> Tensor:
    """Words of the ChaCha20 keystream of RFC 8439 under `key`, nonce 0, block counter from 0.

    Args:
        key: integer tensor of shape (8,).
        shape: of the result, filled in row-major order.
        offset: the word to begin at.

    Returns:
        int64 tensor of `shape`, each word in [0, 2**32), on the key's device.

    Guarantees:
        Equal to the RFC 8439 keystream bit for bit, its bytes read as little-endian words.
        The same in eager mode, under `torch.compile`, under `vmap` and on every device.
        `bits(key, (n,), offset=k)` is `bits(key, (k + n,))[k:]`.

    Raises:
        ValueError: more than 2**36 words are asked for, or key has another shape or dtype.

    Source: RFC 8439, section 2.4.

    >>> bits(torch.zeros(8, dtype=torch.int64), (2,))
    tensor([2917185654, 2419978656])
    """
    num = _size(shape, offset, 1)
    return _unsigned(_stream(key, 0, offset, num)).reshape(tuple(shape))


def uniform(
    key: Key, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, offset: int = 0
) -> Tensor:
    """Uniform numbers on [0, 1), every one a multiple of 2**-24 (float32) or 2**-53 (float64).

    Args:
        key: integer tensor of shape (8,).
        shape: of the result.
        dtype: torch.float32 or torch.float64.
        offset: the element of the stream to begin at.

    Returns:
        Tensor of `shape` and `dtype` on the key's device.

    Guarantees:
        All multiples are equally likely. A slice drawn by its offset equals the slice of the whole.

    Raises:
        ValueError: another dtype, too long a stream, or a key of another shape or dtype.

    Source: the top 24 (53) bits of one word (of two words, the first the lower).

    >>> bool((uniform(key(0), (1000,)) < 1).all())
    True
    """
    wide = _wide(dtype)
    num = _size(shape, offset, 1 + wide)
    stream = _stream(key, 0, offset * (1 + wide), num * (1 + wide))
    if wide:
        low, high = _unsigned(stream).reshape(-1, 2).unbind(1)
        value = ((high << 21) + (low >> 11)).to(dtype) * 2.0**-53
    else:
        value = ((stream.reshape(-1) >> 8) & 0xFFFFFF).to(dtype) * 2.0**-24
    return value.reshape(tuple(shape))


def normal(
    key: Key, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, offset: int = 0
) -> Tensor:
    """Standard normal numbers.

    Args:
        key: integer tensor of shape (8,).
        shape: of the result.
        dtype: torch.float32 or torch.float64.
        offset: the element of the stream to begin at.

    Returns:
        Tensor of `shape` and `dtype` on the key's device.

    Guarantees:
        The radius has 31 (63) random bits and the angle 32 (64): the tail runs to 6.66 (9.41) standard deviations.
        A slice drawn by its offset equals the slice of the whole.
        Eager and compiled give the same bits on CPU. Devices share the words; the elementary
        functions may differ in the last bits.

    Raises:
        ValueError: another dtype, too long a stream, or a key of another shape or dtype.

    Source: Box and Muller 1958. The set of reachable floats is finite, as for every floating-point
    sampler: Mironov 2012 says what an adversary who sees exact outputs could make of that.

    >>> normal(key(0), (3,), offset=2).equal(normal(key(0), (5,))[2:])
    True
    """
    num = _size(shape, offset, 1 + _wide(dtype), 1024)
    return normals(_row(key), offset, num, dtype).reshape(tuple(shape))


def laplace(
    key: Key, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, offset: int = 0
) -> Tensor:
    """Laplace numbers of scale 1 (standard deviation sqrt 2).

    Args:
        key: integer tensor of shape (8,).
        shape: of the result.
        dtype: torch.float32 or torch.float64.
        offset: the element of the stream to begin at.

    Returns:
        Tensor of `shape` and `dtype` on the key's device.

    Guarantees:
        One bit gives the sign and 31 (63) bits the size: the tail runs to 22.2 (44.4).
        A slice drawn by its offset equals the slice of the whole.

    Raises:
        ValueError: another dtype, too long a stream, or a key of another shape or dtype.

    Source: inversion of the exponential distribution, with a random sign.

    >>> laplace(key(0), (2, 3), dtype=torch.float64).shape
    torch.Size([2, 3])
    """
    wide = _wide(dtype)
    num = _size(shape, offset, 1 + wide)
    stream = _stream(key, 0, offset * (1 + wide), num * (1 + wide))
    if wide:
        low, high = _unsigned(stream).reshape(-1, 2).unbind(1)
        signed = (high << 32) | low
    else:
        signed = stream.reshape(-1).to(torch.int64)
    top = 63 if wide else 31
    # Only float64 keeps a sum with 1/2 apart from it for all 31-bit sizes, so float32 rounds once.
    size = ((signed & ((1 << top) - 1)).to(torch.float64) + 0.5) * 2.0**-top
    value = torch.where(signed < 0, size.log(), -size.log()).to(dtype)
    return value.reshape(tuple(shape))


def _row(key: Key) -> Tensor:
    check_key(key)
    return key.unsqueeze(0)


def check_key(key: Key) -> None:
    """A tensor of 8 words, in a format that holds 32 bits of each."""
    words_of = (torch.int64, torch.int32, torch.uint32)
    if not isinstance(key, Tensor) or key.shape != (8,) or key.dtype not in words_of:
        got = f"{key.dtype} of shape {tuple(key.shape)}" if isinstance(key, Tensor) else type(key)
        raise ValueError(
            f"Expected key to be an integer tensor of shape (8,), got {got}. "
            "Make one with dpfunc.random.key(); to map over keys, use vmap."
        )


def _unsigned(stream: Tensor) -> Tensor:
    return stream.to(torch.int64) & 0xFFFFFFFF


def _stream(key: Key, tag: int, start: int, num: int) -> Tensor:
    row = _row(key)
    return words(row, tag, row.new_zeros(1, dtype=torch.int64), start, num)


def _numbers(data: int | Sequence[int] | Tensor) -> Tensor:
    """Integers as an int64 tensor of their own shape."""
    if isinstance(data, Tensor):
        if data.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise TypeError(
                f"Expected data to be an int or a 0-d int tensor, got dtype {data.dtype}."
            )
        return data.to(torch.int64)
    for number in data if isinstance(data, Sequence) else [data]:
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            raise TypeError(f"Expected data to be an int or a 0-d int tensor, got {number!r}.")
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"Expected -2**63 <= data < 2**63, got {number}.")
    return torch.tensor(data, dtype=torch.int64)


def _wide(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"Expected dtype to be torch.float32 or torch.float64, got {dtype}. "
            "Draw in float32 and cast: noise in a shorter format is not the noise accounted for."
        )
    return dtype == torch.float64


def _size(shape: Sequence[int], offset: int, words_per_element: int, group: int = 1) -> int:
    if isinstance(shape, int) or any(n < 0 for n in shape):
        raise ValueError(f"Expected shape to be a sequence of sizes >= 0, got {shape!r}.")
    if isinstance(offset, float) or offset < 0:
        raise ValueError(f"Expected offset to be a whole number >= 0, got {offset!r}.")
    num = math.prod(shape)
    if -(-(offset + num) // group) * group * words_per_element > MAX_WORDS:
        raise ValueError(
            f"Expected at most 2**36 words of one key, got shape {tuple(shape)} at offset {offset}. "
            "Derive a key for each part with fold_in."
        )
    return num

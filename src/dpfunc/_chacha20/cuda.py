"""The keystream on CUDA: each program makes its own blocks in registers and stores the results.

Nothing is copied from the host and nothing is kept between calls. The normals follow the layout
that `cpu.py` describes, so the words used for an element are the same on both devices; log, cos
and sin may differ in the last bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpfunc._chacha20.cpu import LANES

_BLOCKS = 128  # ChaCha blocks a program makes, one a lane


@triton.jit
def _rotate(x, bits: tl.constexpr):
    return (x << bits) | (x >> (32 - bits))


@triton.jit
def _quarter(a, b, c, d):
    a += b
    d = _rotate(d ^ a, 16)
    c += d
    b = _rotate(b ^ c, 12)
    a += b
    d = _rotate(d ^ a, 8)
    c += d
    b = _rotate(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _word(pointer, i: tl.constexpr, zero):
    return zero + tl.load(pointer + i).to(tl.uint32)


@triton.jit
def _block(key, tag, data, counter):
    """RFC 8439, section 2.3: sixteen words for each lane of `counter` (uint32)."""
    zero = counter * 0
    k0, k1, k2, k3 = (
        _word(key, 0, zero),
        _word(key, 1, zero),
        _word(key, 2, zero),
        _word(key, 3, zero),
    )
    k4, k5, k6, k7 = (
        _word(key, 4, zero),
        _word(key, 5, zero),
        _word(key, 6, zero),
        _word(key, 7, zero),
    )
    n0, n1, n2 = (
        zero + tag.to(tl.uint32),
        zero + data.to(tl.uint32),
        zero + (data >> 32).to(tl.uint32),
    )
    c0, c1, c2, c3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    x0, x1, x2, x3, x4, x5, x6, x7 = c0, c1, c2, c3, k0, k1, k2, k3
    x8, x9, x10, x11, x12, x13, x14, x15 = k4, k5, k6, k7, counter, n0, n1, n2
    for _ in range(10):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    return (
        x0 + c0, x1 + c1, x2 + c2, x3 + c3, x4 + k0, x5 + k1, x6 + k2, x7 + k3,
        x8 + k4, x9 + k5, x10 + k6, x11 + k7, x12 + counter, x13 + n0, x14 + n1, x15 + n2,
    )  # fmt: skip


@triton.jit
def _words_kernel(keys, tag, data, out, start, num, BLOCKS: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    block = start // 16 + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    number = tl.load(data + row).to(tl.int64)
    values = _block(keys + row * 8, tl.zeros([], tl.int64) + tag, number, block.to(tl.uint32))
    for i in tl.static_range(16):
        at = block * 16 + i - start
        word = values[i].to(tl.int32, bitcast=True)
        tl.store(out + row * num + at, word, mask=(at >= 0) & (at < num))


@triton.jit
def _store_pair(out, at, start, num, r, a):
    cosine, sine = at - start, at - start + 512
    tl.store(out + cosine, r * tl.cos(a), mask=(cosine >= 0) & (cosine < num))
    tl.store(out + sine, r * tl.sin(a), mask=(sine >= 0) & (sine < num))


@triton.jit
def _normals32_kernel(keys, out, start, num, BLOCKS: tl.constexpr):
    """A lane makes block j of a group's radii and block j of its angles (32 blocks each)."""
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    group, j = start // 1024 + lane // 32, lane % 32
    none = tl.zeros([], tl.int64)
    xs = _block(keys + row * 8, none, none, (group * 64 + j).to(tl.uint32))
    ys = _block(keys + row * 8, none, none, (group * 64 + 32 + j).to(tl.uint32))
    for i in tl.static_range(16):
        x = (xs[i] & 0x7FFFFFFF).to(tl.int32, bitcast=True).to(tl.float32)
        y = ys[i].to(tl.int32, bitcast=True).to(tl.float32)
        r = tl.sqrt(-2.0 * tl.log((x + 0.5) * 4.656612873077393e-10))  # 2**-31
        at = group * 1024 + j * 16 + i
        _store_pair(out + row * num, at, start, num, r, y * 1.4629180792671596e-09)  # pi 2**-31


@triton.jit
def _normals64_kernel(keys, out, start, num, BLOCKS: tl.constexpr):
    """As above with pairs of words: 64 blocks of radii and 64 of angles to a group."""
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    group, j = start // 1024 + lane // 64, lane % 64
    none = tl.zeros([], tl.int64)
    xs = _block(keys + row * 8, none, none, (group * 128 + j).to(tl.uint32))
    ys = _block(keys + row * 8, none, none, (group * 128 + 64 + j).to(tl.uint32))
    for i in tl.static_range(8):
        x = ((xs[2 * i + 1] & 0x7FFFFFFF).to(tl.int64) << 32) | xs[2 * i].to(tl.int64)
        y = (ys[2 * i + 1].to(tl.int32, bitcast=True).to(tl.int64) << 32) | ys[2 * i].to(tl.int64)
        u = (x.to(tl.float64) + 0.5) * 1.0842021724855044e-19  # 2**-63
        r = tl.sqrt(-2.0 * tl.log(u))
        at = group * 1024 + j * 8 + i
        a = y.to(tl.float64) * 3.4061215800865545e-19  # pi 2**-63
        _store_pair(out + row * num, at, start, num, r, a)


def words(keys: Tensor, tag: int, data: Tensor, start: int, num: int) -> Tensor:
    out = keys.new_empty((keys.shape[0], num), dtype=torch.int32)
    if out.numel():
        blocks = (start + num - 1) // 16 - start // 16 + 1
        grid = (triton.cdiv(blocks, _BLOCKS), keys.shape[0])
        _words_kernel[grid](
            keys.contiguous(), tag, data.contiguous(), out, start, num, BLOCKS=_BLOCKS
        )
    return out


def normals(keys: Tensor, start: int, num: int, dtype: torch.dtype) -> Tensor:
    out = keys.new_empty((keys.shape[0], num), dtype=dtype)
    if out.numel():
        group = 2 * LANES
        groups = (start + num - 1) // group - start // group + 1
        wide = dtype == torch.float64
        lanes = groups * (64 if wide else 32)
        kernel = _normals64_kernel if wide else _normals32_kernel
        grid = (triton.cdiv(lanes, _BLOCKS), keys.shape[0])
        kernel[grid](keys.contiguous(), out, start, num, BLOCKS=_BLOCKS)
    return out

"""The characteristic function of the tilted privacy loss, and how fast it falls.

**The decay** (`decay`). Integrate along a curve x + i y(x) with 0 <= k y < pi noise instead of along the
real line. The argument of P's density there is at least 0, that of Q's at most 0, so the modulus of e^(i t L)
is e^(-t (arg P - arg Q)), which falls with t. Hence the one number

    B(t) = integral of |N e^((1 + theta) a - theta b)| e^(-t (arg P - arg Q)) |1 + i y'| dx / M(theta)

bounds |E_p[e^(i u L)]| for *all* u >= t. Near y = t L'(x) / 2 it is close to what it bounds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpfunc.accounting.moments import Tilt, ends
from dpfunc.accounting.pairs import Array
from dpfunc.accounting.quadrature import UNIT, Nodes, Stack, posterior

_NEGLIGIBLE = 1e-19
_TOGETHER = 4096  # products of pairs and nodes, of which the turns are in the cache


class Characteristic(NamedTuple):
    """Sum over pairs of count log E_p[e^(i t (L - mean))]: arrays are (tilts, size)."""

    value: NDArray[np.complex128]
    error: Array
    """Bound on the absolute error of value."""
    ceiling: Array
    """Upper bound on the real part: it serves where the modulus is lost in rounding."""


def log_characteristic(
    stack: Stack, at: Nodes, tilted: Tilt, spacing: float, size: int
) -> Characteristic:
    """The characteristic function of the centred loss at t = spacing * (0, ..., size - 1)."""
    t = spacing * np.arange(size)
    # The tilts share the turns of the loss around one centre, from which each is turned to its own.
    centre = tilted.mean[0]
    p, loss = tilted.p, at.known[..., 0] - centre[:, None]
    dropped = ends(at, p)
    kept = p.max((0, 1)) > _NEGLIGIBLE
    if not kept.all():
        dropped += p[..., ~kept].sum(-1)
        p, loss = p[..., kept], loss[:, kept]
    change = _change(p, loss, spacing, size)
    if len(p) > 1:
        half = np.multiply.outer((centre - tilted.mean[1:]) / 2, t)
        turn = 2 * np.sin(half) * (1j * np.cos(half) - np.sin(half))
        change[1:] += turn * (1 + change[1:])
    re, im = change.real, change.imag
    whole = 1 + re
    squared = 2 * re + re * re + im * im  # the modulus, squared, less 1
    modulus = 0.5 * np.log1p(np.maximum(squared, -0.5))
    far = squared <= -0.5
    if far.any():
        modulus[far] = np.log(np.maximum(np.hypot(whole[far], im[far]), 1e-300))
    spread = np.multiply.outer((p.swapaxes(0, 1) @ np.abs(loss)[..., None])[..., 0].T, t)
    error = UNIT * (
        np.multiply.outer(tilted.wobble, 1 + t)
        + 16 * (1 + math.ceil(math.log2(size + 1))) * spread
        + 2 * loss.shape[1] * np.minimum(spread, 2.0)
    )
    error += (2 * tilted.rounding + 2 * dropped + at.error)[..., None]
    length = np.exp(modulus)
    least = np.maximum(length - error, 1e-300)
    most = np.minimum(length + error, 1.0)
    if stack.shape is not None:
        # Of a grid some counts are negative: what they take away is as little as it can be.
        most = np.where(stack.counts[:, None] > 0, most, least)
    logs = modulus + 1j * np.arctan2(im, whole)
    rounding = error / least + UNIT * (8 + len(stack.counts)) * np.abs(logs)
    off = np.abs(stack.counts) @ rounding
    if stack.shape is not None:
        off += stack.interpolation_error(logs + 1j * np.multiply.outer(tilted.mean, t))
    return Characteristic(stack.counts @ logs, off, stack.counts @ np.log(most))


def _change(p: Array, loss: Array, spacing: float, size: int) -> NDArray[np.complex128]:
    """Means under each p of e^(i t L) - 1: (tilts, pairs, size)."""
    tilts, pairs, nodes = p.shape
    # e^(i t L) for t = coarse + fine is a product, and its mean over nodes a matrix product: sqrt(size)
    # exponentials instead of size. e^(i u) - 1 in place of e^(i u) keeps the digits of small angles.
    fine_size = size if size * pairs <= 64 else math.ceil(math.sqrt(size))
    coarse_size = math.ceil(size / fine_size)
    together = max(1, _TOGETHER // max(1, nodes))
    change = np.empty((tilts, pairs, coarse_size, fine_size), np.complex128)
    for start in range(0, pairs, together):
        rows = slice(start, start + together)
        fine = _turns(spacing * loss[rows], fine_size)
        mean_fine = fine @ p[:, rows, :, None]
        change[:, rows] = mean_fine.swapaxes(2, 3)
        if coarse_size > 1:
            coarse = _turns(spacing * fine_size * loss[rows], coarse_size) * p[:, rows, None]
            change[:, rows] += coarse @ fine.swapaxes(1, 2)
            change[:, rows] += coarse.sum(-1, keepdims=True)
    return change.reshape(tilts, pairs, -1)[..., :size]


def _turns(angle: Array, size: int) -> NDArray[np.complex128]:
    """e^(i j angle) - 1 for j = 0, ..., size - 1, on the second axis: each block from the one before.

    A product errs by 4 u of itself, and what its factors err by is at most added up: in all by
    8 (1 + log2 size) u |j angle|.
    """
    turns = np.empty((len(angle), size, angle.shape[1]), dtype=np.complex128)
    turns[:, 0] = 0.0
    half = np.sin(angle / 2)
    step = (2 * half * (1j * np.cos(angle / 2) - half))[:, None]
    done = 1
    while done < size:
        more = turns[:, done : 2 * done]
        np.multiply(turns[:, : more.shape[1]], 1 + step, out=more)
        more += step
        step *= 2 + step
        done *= 2
    return turns


def decay(stack: Stack, at: Nodes, p: Array, theta: Array, t: float) -> Array:
    """Upper bound on sum of count log |E_p[e^(i u L)]| for all u >= t, under the law p of each tilt.

    With fewer counts than pairs, a count is that of the slowest of so many neighbours.

    The integral over the curve is a trapezoid sum whose error, unlike that of `nodes`, is an estimate:
    the difference to the sum over every other node, taken twice.
    """
    noise = stack.noise
    given_p = posterior(stack.above, at.x, noise, at.above)
    given_q = posterior(stack.below, -at.x, noise, at.below)
    slope_p, bend_p = _slopes(given_p, noise)
    slope_q, bend_q = _slopes(given_q, noise)
    slope = t * np.clip(noise / 2, 0.25, 1.0) * np.maximum(slope_p + slope_q, 1e-300)
    highest = 0.75 * math.pi * noise / max(len(given_p), len(given_q))
    y = slope * highest / (slope + highest)
    turned = (y / slope) ** 2 * t * np.clip(noise / 2, 0.25, 1.0) * (bend_p - bend_q)
    size_p, angle_p = _rotated(given_p, y / noise)
    size_q, angle_q = _rotated(given_q, -y / noise)
    exponent = y * y / 2 + (1 + theta) * size_p - theta * size_q - t * (angle_p - angle_q)
    change = _grown(p, exponent + 0.5 * np.log1p(turned * turned))
    whole, half = change.sum(-1), 2 * change[..., ::2].sum(-1)
    # Where next to nothing is left of 1, it is less than what rounding leaves of the sum.
    each = np.log1p(np.minimum(whole + 2 * np.abs(whole - half) + 32 * UNIT, 0.0))
    return each.reshape(len(each), len(stack.counts), -1).max(2) @ stack.counts


def _grown(p: Array, exponent: Array) -> Array:
    """p (e^exponent - 1), or more where p is lost to underflow and the exponent could bring it back."""
    if exponent.max() < 300:
        return p * np.expm1(exponent)
    far = np.log(np.maximum(p, 1e-300)) + exponent
    return np.where(
        exponent < 1, p * np.expm1(np.minimum(exponent, 1)), np.exp(np.minimum(far, 600)) - p
    )


def _slopes(given: list[Array], noise: Array) -> tuple[Array, Array]:
    """First and second derivative of a log density, from the probabilities of its components."""
    if not given:
        return np.zeros(()), np.zeros(())
    first = sum(j * share for j, share in enumerate(given, 1))
    second = sum(j * j * share for j, share in enumerate(given, 1))
    return first / noise, (second - first * first) / (noise * noise)


def _rotated(given: list[Array], angle: Array) -> tuple[Array, Array]:
    """log modulus and argument of E[e^(i j angle)] over the components j."""
    if not given:
        return np.zeros(()), np.zeros(())
    re = sum(-2 * share * np.sin(j * angle / 2) ** 2 for j, share in enumerate(given, 1))
    im = sum(share * np.sin(j * angle) for j, share in enumerate(given, 1))
    return 0.5 * np.log1p(np.maximum(2 * re + re * re + im * im, -1 + 1e-30)), np.arctan2(
        im, 1 + re
    )
